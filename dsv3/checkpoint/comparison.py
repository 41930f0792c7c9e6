"""Where does our model depart from transformers'? Layer by layer, on one text.

Two programs that read the same weights must give the same numbers up to rounding. When the logits
differ, the question is which part did it first: whatever follows a wrong layer is wrong as well.
So both models read the same random tokens in float32, and every part's output is compared in the
order of computation:

    embed; per layer attention, router choices and weights, feed-forward, block; norm; head; MTP

The difference of a part is max |ours - theirs| / max |theirs|. Float32 rounding leaves about
1e-6, and a router choice that differs counts whole. The first row above the tolerance is where
to look.

The two must not share a mistake, so they share little: ours is loaded by ``load_model``; theirs
gets its tensors straight from the files, by their released names, with FP8 blocks multiplied out.
transformers' own FP8 loader is not used: in 5.23 it refuses a ragged last block (576 rows) or
takes it for another block size. Its class is that of the checkpoint's family, so GLM-4.7-Flash
meets transformers' Glm4MoeLite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dsv3.checkpoint.contents import open_checkpoint
from dsv3.checkpoint.loading import load_model
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.families import FAMILIES
from dsv3.fp8 import QuantizedTensor, decode_scale
from dsv3.model import Transformer

# The bound that the logits of a correct model keep; see tests/test_oracle.py.
TOLERANCE = 2e-5

Outputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One part's largest relative difference; note: what else there is to say."""

    part: str
    difference: float
    note: str = ""


@dataclass(frozen=True)
class Report:
    """All rows in the order of computation, and how much they may differ."""

    rows: tuple[Row, ...]
    tolerance: float

    @property
    def first(self) -> Row | None:
        """The first part that departs; None when all agree. NaN departs."""
        return next((row for row in self.rows if not row.difference <= self.tolerance), None)

    def __str__(self) -> str:
        width = max(len(row.part) for row in self.rows)
        lines = [f"{'part':{width}}  difference"]
        for row in self.rows:
            mark = "  <- departs first" if row is self.first else ""
            note = f"  ({row.note})" if row.note else ""
            lines.append(f"{row.part:{width}}  {row.difference:10.1e}{note}{mark}")
        return "\n".join(lines)


def diff(
    folder: str | Path, length: int = 64, seed: int = 0, tolerance: float = TOLERANCE
) -> Report:
    """Compare a checkpoint's two models on one text.

    length: tokens of the text, drawn with ``seed``. Raises DSV3Error when transformers is not
    installed or cannot run this config.
    """
    theirs = TheirModel.from_folder(folder)
    ours = load_model(folder, precision="fp32")
    length = min(length, ours.config.max_position_embeddings)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(ours.config.vocab_size, (1, length), generator=random)
    return compare(ours, theirs, tokens, tolerance)


def compare(
    ours: Transformer, theirs: TheirModel, tokens: torch.Tensor, tolerance: float = TOLERANCE
) -> Report:
    """Run both on tokens (b, s) and compare part by part."""
    config = ours.config
    mine = our_outputs(ours, tokens)
    others = theirs.outputs(tokens)
    rows = []
    for part in parts(config):
        if part.endswith(".gate"):
            rows += compare_router(part, mine[part], others[part])
        else:
            rows.append(Row(part, relative(mine[part], others[part])))
    return Report(tuple(rows), tolerance)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


def compare_router(part: str, mine: torch.Tensor, other: torch.Tensor) -> list[Row]:
    """Two rows from weights (tokens, N_r) that are 0 for the experts that were not chosen."""
    differing, chosen = int(((mine > 0) & (other == 0)).sum()), int((other > 0).sum())
    return [
        Row(f"{part} choices", differing / chosen, f"{differing} of {chosen} differ"),
        Row(f"{part} weights", relative(mine, other)),
    ]


def parts(config: ModelConfig) -> Iterator[str]:
    """Names of the compared parts, in the order of computation: our modules' names."""

    def layer(number: int, name: str) -> Iterator[str]:
        yield f"{name}.attn"
        if config.is_moe(number):
            yield f"{name}.ffn.gate"
        yield f"{name}.ffn"

    yield "embed"
    for number in range(config.num_hidden_layers):
        yield from layer(number, f"layers.{number}")
        yield f"layers.{number}"
    yield "norm"
    yield "head"
    for k in range(config.num_nextn_predict_layers):
        yield f"mtp.{k}.eh_proj"
        yield from layer(config.num_hidden_layers + k, f"mtp.{k}")
        yield f"mtp.{k}.norm"
        yield f"mtp.{k}.head"


def our_outputs(model: Transformer, tokens: torch.Tensor) -> Outputs:
    """Every part's output in our model."""
    logits: Outputs = {}

    def run() -> None:
        logits["head"], hidden = model(tokens, return_hidden=True)
        ahead = tokens
        for k in range(len(model.mtp)):
            # Module k reads the positions whose token k + 1 further on is known.
            hidden, ahead = hidden[:, :-1], ahead[:, 1:]
            logits[f"mtp.{k}.head"], hidden = model.mtp_logits(hidden, ahead, depth=k)

    modules = {
        part: model.get_submodule(part) for part in parts(model.config) if not part.endswith("head")
    }
    return {**record(modules, model.config.n_routed_experts, slice(2), run), **logits}


@torch.inference_mode()
def record(
    modules: dict[str, nn.Module], experts: int, choice: slice, run: Callable[[], None]
) -> Outputs:
    """What each module gives when ``run`` calls it for the first time (the embedding is used again
    by the MTP modules). choice: where a router's output has the weights and numbers of the chosen
    experts. Weights are spread out as (tokens, experts), 0 for the experts that were not chosen,
    since the order of the chosen ones means nothing."""
    outputs: Outputs = {}

    def keep(part: str):
        def hook(_module, _inputs, output) -> None:
            if part in outputs:
                return
            if part.endswith(".gate"):
                weights, chosen = (tensor.flatten(0, -2) for tensor in output[choice])
                output = weights.new_zeros(len(weights), experts).scatter(-1, chosen, weights)
            outputs[part] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(part)) for part, module in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


# transformers' side -------------------------------------------------------------------------------


class TheirModel:
    """transformers' model of this family and its MTP modules, in float32."""

    def __init__(self, config: ModelConfig, state: Outputs):
        """state: plain tensors under released names. Raises DSV3Error for what cannot be run."""
        try:
            import transformers
            from transformers.modeling_layers import MtpModel

            model_class = getattr(transformers, FAMILIES[config.model_type].architecture)
        except (ImportError, AttributeError):
            raise DSV3Error(
                "cannot be compared without transformers, version 5.23 or later",
                where="dsv3 diff",
                fix="pip install 'transformers>=5.23'",
            ) from None
        if config.scoring_func != "sigmoid":
            raise DSV3Error(
                "transformers does not know this router",
                where="scoring_func",
                found=config.scoring_func,
                expected="sigmoid",
            )
        if not config.gate_bias and config.n_group > 1:
            raise DSV3Error(
                "transformers ranks groups by their two best experts, the released "
                "code a router without a bias by its best",
                where="gate_bias",
                found="false",
                expected="true, or n_group 1",
            )
        self.config, depth = config, config.num_nextn_predict_layers
        if depth and not config.is_moe(config.num_hidden_layers):
            raise DSV3Error(
                "transformers' MTP modules always have experts",
                where="first_k_dense_replace",
                found=config.first_k_dense_replace,
                expected=f"at most num_hidden_layers ({config.num_hidden_layers})",
            )
        fields = {
            **config.to_dict(),
            "torch_dtype": "float32",
            "num_mtp_layers": depth,
            "mtp_mlp_layer_types": ["sparse"] * depth,
        }
        for name in ("quantization_config", "num_nextn_predict_layers"):
            fields.pop(name, None)
        self.main = model_class(
            model_class.config_class(
                **fields, attn_implementation="eager", experts_implementation="eager"
            )
        ).eval()
        self.mtp = MtpModel(self.main, depth).eval() if depth else None
        main, mtp = their_names(config, state)
        load(self.main, main)
        self.main.tie_weights()
        if self.mtp:
            load(self.mtp, mtp)

    @classmethod
    def from_folder(cls, folder: str | Path) -> TheirModel:
        """Read a checkpoint in the released layout, without our loader."""
        config, reader, specs = open_checkpoint(folder)
        with reader:
            state = {}
            for spec in specs:
                if spec.scale_of or spec.copy_of:
                    continue
                value = reader.read(spec.hf_name)
                if spec.scale:
                    scale = decode_scale(reader.read(spec.scale.hf_name))
                    value = QuantizedTensor(value, scale).dequantize()
                state[spec.hf_name] = value.float()
        return cls(config, state)

    def outputs(self, tokens: torch.Tensor) -> Outputs:
        """Every part's output, under our names."""
        logits: Outputs = {}

        def run() -> None:
            hidden, ahead = self.main.model(tokens).last_hidden_state, tokens
            logits["head"] = self.main.lm_head(hidden)
            for k in range(self.config.num_nextn_predict_layers):
                hidden, ahead = hidden[:, :-1], ahead[:, 1:]
                hidden = self.mtp_states(hidden, ahead, self.new_mtp_cache(), k)
                logits[f"mtp.{k}.head"] = self.main.lm_head(hidden)

        modules = {
            part: self.module(part) for part in parts(self.config) if not part.endswith("head")
        }
        return {**record(modules, self.config.n_routed_experts, slice(-2, None), run), **logits}

    def new_mtp_cache(self):
        """An empty cache for the MTP modules."""
        from transformers.cache_utils import MtpCache

        return MtpCache(config=self.mtp.config)

    def mtp_states(self, hidden: torch.Tensor, tokens: torch.Tensor, cache, depth: int = 0):
        """Module ``depth`` after its norm; arguments as in our ``mtp_logits``. It counts positions
        by the tokens, one more than ours do; RoPE sees only how far apart they are."""
        first = depth + 1 + cache.get_seq_length(depth)
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        return self.mtp.forward_layer(depth, hidden, positions, cache, input_ids=tokens)

    def module(self, part: str) -> nn.Module:
        """Their module for one of our names."""
        root, *path = part.split(".")
        if root in ("embed", "norm"):
            return {"embed": self.main.model.embed_tokens, "norm": self.main.model.norm}[root]
        number, *path = path
        theirs = {"attn": "self_attn", "ffn": "mlp", "norm": "post_norm"}
        path = [theirs.get(name, name) for name in path]
        if root == "layers":
            return self.main.model.layers[int(number)].get_submodule(".".join(path))
        layer = self.mtp.layers[int(number)]
        inner = path[0] in ("self_attn", "mlp")
        return (layer.mtp_block if inner else layer).get_submodule(".".join(path))


def their_names(config: ModelConfig, state: Outputs) -> tuple[Outputs, Outputs]:
    """Released names -> those that transformers has in memory, for the model and for its MTP
    modules: experts stacked, gate above up; a block of its own inside each MTP module."""
    main: Outputs = {}
    mtp: Outputs = {}
    for name, value in stack_experts(config, state).items():
        _, _, number, rest = name.split(".", 3) if ".layers." in name else ("", "", "-1", "")
        depth = int(number) - config.num_hidden_layers
        if depth < 0:
            main[name] = value
            continue
        if rest == "shared_head.norm.weight":
            rest = "post_norm.weight"
        elif not rest.startswith(("enorm", "hnorm", "eh_proj")):
            rest = f"mtp_block.{rest}"
        mtp[f"layers.{depth}.{rest}"] = value
    return main, mtp


def stack_experts(config: ModelConfig, state: Outputs) -> Outputs:
    """All experts of a layer in two tensors: gate_up_proj (E, 2I, d) and down_proj (E, d, I)."""
    stacked: Outputs = {}
    for name, value in state.items():
        layer, found, rest = name.partition(".experts.0.")
        if ".experts." not in name:
            stacked[name] = value
        elif found and rest != "up_proj.weight":

            def all_of(matrix: str, layer: str = layer) -> torch.Tensor:
                return torch.stack(
                    [
                        state[f"{layer}.experts.{expert}.{matrix}.weight"]
                        for expert in range(config.n_routed_experts)
                    ]
                )

            if rest == "down_proj.weight":
                stacked[f"{layer}.experts.down_proj"] = all_of("down_proj")
            else:
                stacked[f"{layer}.experts.gate_up_proj"] = torch.cat(
                    [all_of("gate_proj"), all_of("up_proj")], dim=1
                )
    return stacked


def load(module: nn.Module, state: Outputs) -> None:
    """Fill a module; everything must have its place, and every place its value, but for the
    router bias of a model that has none, and what an MTP module shares with the model."""
    missing, unexpected = module.load_state_dict(state, strict=False, assign=True)
    shared = ("e_score_correction_bias", "embed_tokens.weight", "head.weight")
    missing = [name for name in missing if not name.endswith(shared)]
    if missing or unexpected:
        raise DSV3Error(
            "transformers has other weights than the checkpoint",
            where=(missing or unexpected)[0],
            fix="Use transformers 5.23",
        )
