"""Every tensor of a checkpoint: its three names, its shape, its bits, and how it is cut.

A model is a list of tensors, and three worlds name them differently: the released files
(``model.layers.3.self_attn.kv_b_proj.weight``), the released inference code and this package
(``layers.3.attn.wkv_b.weight``), and the paper (W^UK and W^UV, eq. 2 and 5). ``TABLE`` holds all
three side by side, once. From a config, ``layout`` unrolls it into the complete checkpoint; for
the 671B model that is 91,991 tensors in 688,574,839,360 bytes, and the totals per dtype equal the
published ones to the digit. So the table also says which tensors are not FP8: any other choice
would break those sums.

An FP8 weight (rows, cols) has beside it a grid of scales (ceil(rows/128), ceil(cols/128)), named
``...weight_scale_inv`` in released files and ``...scale`` in converted ones, with
weight = E4M3 value * scale. Blocks at the lower and right edge may be smaller than 128x128: wkv_a
has 576 rows, so 5 rows of scales, the last for 64 rows.

Cutting over N ranks (tensor parallelism): a tensor is whole on every rank (norms, latent
down-projections, router), cut along dimension 0 (outputs) or 1 (inputs), or, if it belongs to
a routed expert, whole on the rank that owns the expert. A cut must fall between two FP8 blocks,
or a block's one scale would be needed on both sides of it with other neighbours on each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from math import ceil, prod

from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK

F8 = "F8_E4M3"
ITEM_BYTES = {F8: 1, "BF16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table, for one kind of tensor.

    hf, name: the released and the short name; {L} stands for a layer, {E} for an expert, {K} for
    an MTP module (whose released layer number is num_hidden_layers + K). symbol: the paper's.
    shape: from a config. dtype: as released; "F8_E4M3" becomes "BF16" in a checkpoint that is
    not quantised. shard_dim: see above. copy_of: hf name of the main model's tensor this repeats.
    """

    hf: str
    name: str
    symbol: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    dtype: str
    shard_dim: int | None = None
    copy_of: str | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of one checkpoint; fields as in ``Row``, with everything filled in.

    expert: which routed expert it belongs to. part: "main" or "mtp". scale_of: for a grid of
    scales, the hf name of its weight.
    """

    hf_name: str
    name: str
    symbol: str
    shape: tuple[int, ...]
    dtype: str
    shard_dim: int | None = None
    expert: int | None = None
    part: str = "main"
    copy_of: str | None = None
    scale_of: str | None = None

    @property
    def numel(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def layer(self) -> int | None:
        """Number of its layer, MTP modules counted on; None outside of the layers."""
        _, first, number, *_ = (*self.hf_name.split("."), "", "")
        return int(number) if first == "layers" else None

    @property
    def scale(self) -> TensorSpec | None:
        """The grid of scales of an FP8 weight; None for any other tensor."""
        if self.dtype != F8:
            return None
        return replace(
            self,
            hf_name=self.hf_name + "_scale_inv",
            name=self.name.removesuffix("weight") + "scale",
            symbol=f"scales of {self.symbol}",
            dtype="F32",
            scale_of=self.hf_name,
            shape=tuple(ceil(size / BLOCK) for size in self.shape),
        )

    def slice_for(
        self, rank: int, size: int, n_experts: int, held: Collection[int] | None = None
    ) -> tuple[range, ...] | None:
        """What rank ``rank`` of ``size`` holds: one range per dimension, or None for nothing.

        held: its routed experts, where they are shared out otherwise than all else.
        """
        if self.expert is not None and held is None and self.expert // (n_experts // size) != rank:
            return None
        if self.expert is not None and held is not None and self.expert not in held:
            return None
        ranges = [range(n) for n in self.shape]
        if self.shard_dim is not None:
            part = self.shape[self.shard_dim] // size
            ranges[self.shard_dim] = range(rank * part, (rank + 1) * part)
        return tuple(ranges)


def _vector(c: ModelConfig) -> tuple[int, ...]:
    return (c.hidden_size,)


def _query_latent(c: ModelConfig) -> int:
    assert c.q_lora_rank is not None  # asked of models that have one
    return c.q_lora_rank


def _vocabulary(c: ModelConfig) -> tuple[int, ...]:
    return (c.vocab_size, c.hidden_size)


# fmt: off
def _feed_forward(
    hf: str, name: str, symbol: str, width: Callable[[ModelConfig], int], cut: bool
) -> tuple[Row, ...]:
    """The three matrices of a SwiGLU of inner width ``width(config)``."""

    def inward(c):
        return width(c), c.hidden_size

    def outward(c):
        return c.hidden_size, width(c)

    rows, columns = (0, 1) if cut else (None, None)
    return (
        Row(f"{hf}.gate_proj.weight", f"{name}.w1.weight", f"{symbol}, gate", inward, F8, rows),
        Row(f"{hf}.up_proj.weight",   f"{name}.w3.weight", f"{symbol}, up", inward, F8, rows),
        Row(f"{hf}.down_proj.weight", f"{name}.w2.weight", f"{symbol}, down", outward, F8, columns),
    )


_QUERY_PLAIN = (
    Row("self_attn.q_proj.weight", "attn.wq.weight", "W^Q",
        lambda c: (c.num_attention_heads * c.qk_head_dim, c.hidden_size), F8, 0),
)
_QUERY_LATENT = (
    Row("self_attn.q_a_proj.weight", "attn.wq_a.weight", "W^DQ",
        lambda c: (_query_latent(c), c.hidden_size), F8),
    Row("self_attn.q_a_layernorm.weight", "attn.q_norm.weight", "RMSNorm of c^Q",
        lambda c: (_query_latent(c),), "BF16"),
    Row("self_attn.q_b_proj.weight", "attn.wq_b.weight", "[W^UQ; W^QR]",
        lambda c: (c.num_attention_heads * c.qk_head_dim, _query_latent(c)), F8, 0),
)
_ATTENTION = (
    Row("self_attn.kv_a_proj_with_mqa.weight", "attn.wkv_a.weight", "[W^DKV; W^KR]",
        lambda c: (c.latent_dim, c.hidden_size), F8),
    Row("self_attn.kv_a_layernorm.weight", "attn.kv_norm.weight", "RMSNorm of c^KV",
        lambda c: (c.kv_lora_rank,), "BF16"),
    Row("self_attn.kv_b_proj.weight", "attn.wkv_b.weight", "[W^UK; W^UV]",
        lambda c: (c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        F8, 0),
    Row("self_attn.o_proj.weight", "attn.wo.weight", "W^O",
        lambda c: (c.hidden_size, c.num_attention_heads * c.v_head_dim), F8, 1),
)
_NORMS = (
    Row("input_layernorm.weight", "attn_norm.weight", "RMSNorm before attention",
        _vector, "BF16"),
    Row("post_attention_layernorm.weight", "ffn_norm.weight", "RMSNorm before the feed-forward",
        _vector, "BF16"),
)
_DENSE = _feed_forward("mlp", "ffn", "FFN", lambda c: c.intermediate_size, cut=True)
_GATE = (
    Row("mlp.gate.weight", "ffn.gate.weight", "e_i",
        lambda c: (c.n_routed_experts, c.hidden_size), "BF16"),
)
_GATE_BIAS = (
    Row("mlp.gate.e_score_correction_bias", "ffn.gate.bias", "b_i",
        lambda c: (c.n_routed_experts,), "F32"),
)
_EXPERT = _feed_forward("mlp.experts.{E}", "ffn.experts.{E}", "FFN^(r)_i",
                        lambda c: c.moe_intermediate_size, cut=False)
_SHARED = _feed_forward("mlp.shared_experts", "ffn.shared_experts", "FFN^(s)",
                        lambda c: c.n_shared_experts * c.moe_intermediate_size, cut=True)

_EMBED = (Row("model.embed_tokens.weight", "embed.weight", "Emb", _vocabulary, "BF16", 0),)
_NORM = (Row("model.norm.weight", "norm.weight", "final RMSNorm", _vector, "BF16"),)
_HEAD = (Row("lm_head.weight", "head.weight", "OutHead", _vocabulary, "BF16", 0),)

_MTP_ENTRY = (
    Row("enorm.weight", "enorm.weight", "RMSNorm of Emb(t_{i+k})", _vector, "BF16"),
    Row("hnorm.weight", "hnorm.weight", "RMSNorm of h^{k-1}_i", _vector, "BF16"),
    Row("eh_proj.weight", "eh_proj.weight", "M_k",
        lambda c: (c.hidden_size, 2 * c.hidden_size), "BF16"),
)
_MTP_EXIT = (
    Row("shared_head.norm.weight", "norm.weight", "RMSNorm before OutHead", _vector, "BF16"),
)
_MTP_COPIES = (
    Row("embed_tokens.weight", "embed.weight", "Emb", _vocabulary, "BF16", 0,
        copy_of="model.embed_tokens.weight"),
    Row("shared_head.head.weight", "head.weight", "OutHead", _vocabulary, "BF16", 0,
        copy_of="lm_head.weight"),
)
# fmt: on


def _under(hf: str, name: str, rows: tuple[Row, ...]) -> tuple[Row, ...]:
    return tuple(replace(row, hf=hf + row.hf, name=name + row.name) for row in rows)


# The whole table, as chapter 0 prints it: a model is these lines, repeated.
TABLE: tuple[Row, ...] = (
    *_EMBED,
    *_under(
        "model.layers.{L}.",
        "layers.{L}.",
        (
            *_QUERY_PLAIN,
            *_QUERY_LATENT,
            *_ATTENTION,
            *_NORMS,
            *_DENSE,
            *_GATE,
            *_GATE_BIAS,
            *_EXPERT,
            *_SHARED,
        ),
    ),
    *_NORM,
    *_HEAD,
    *_under("model.layers.{L}.", "mtp.{K}.", (*_MTP_ENTRY, *_MTP_EXIT, *_MTP_COPIES)),
)


def layout(
    config: ModelConfig, *, scales: bool = True, mtp: bool = True, mtp_copies: bool = True
) -> list[TensorSpec]:
    """All tensors of a released-layout checkpoint of this config, layer by layer.

    scales: list the scale grids too, each behind its weight (there are none when the config has
    no quantization_config). mtp: with the MTP modules. mtp_copies: with the copies of embedding
    and head that the released MTP layer carries, and that a loader does without.
    """
    return list(_walk(config, scales, mtp, mtp_copies))


def _walk(c: ModelConfig, scales: bool, mtp: bool, copies: bool) -> Iterator[TensorSpec]:
    def unroll(rows, hf="", name="", part="main", expert=None):
        for row in rows:
            dtype = row.dtype
            if dtype == F8 and c.quantization_config is None:
                dtype = "BF16"
            spec = TensorSpec(
                hf + row.hf.format(E=expert),
                name + row.name.format(E=expert),
                row.symbol,
                row.shape(c),
                dtype,
                row.shard_dim,
                expert,
                part,
                row.copy_of,
            )
            yield spec
            if scales and (scale := spec.scale):
                yield scale

    def layer(number, name, part):
        hf = f"model.layers.{number}."
        query = _QUERY_PLAIN if c.q_lora_rank is None else _QUERY_LATENT
        yield from unroll((*query, *_ATTENTION, *_NORMS), hf, name, part)
        if not c.is_moe(number):
            yield from unroll(_DENSE, hf, name, part)
            return
        yield from unroll((*_GATE, *(_GATE_BIAS if c.gate_bias else ())), hf, name, part)
        for expert in range(c.n_routed_experts):
            yield from unroll(_EXPERT, hf, name, part, expert)
        yield from unroll(_SHARED, hf, name, part)

    yield from unroll(_EMBED)
    for number in range(c.num_hidden_layers):
        yield from layer(number, f"layers.{number}.", "main")
    yield from unroll(_NORM)
    if not c.tie_word_embeddings:
        yield from unroll(_HEAD)
    for k in range(c.num_nextn_predict_layers if mtp else 0):
        number, name = c.num_hidden_layers + k, f"mtp.{k}."
        ends = (*_MTP_ENTRY, *_MTP_EXIT, *(_MTP_COPIES if copies else ()))
        yield from unroll(ends, f"model.layers.{number}.", name, "mtp")
        yield from layer(number, name, "mtp")


def check_sharding(config: ModelConfig, size: int, *, blocks: bool | None = None) -> None:
    """Raise DSV3Error unless a model of this config can be cut over ``size`` ranks.

    blocks: whether weights are cut as FP8 blocks; the default is what the checkpoint holds.
    """
    if blocks is None:
        blocks = config.quantization_config is not None
    problem = _sharding_problem(config, size, blocks)
    if problem:
        problem.fix = f"Choose one of {valid_sizes(config, blocks=blocks)} ranks"
        raise problem


def valid_sizes(config: ModelConfig, *, blocks: bool | None = None, up_to: int = 64) -> list[int]:
    """Numbers of ranks, 1 to ``up_to``, that a model of this config can be cut over."""
    if blocks is None:
        blocks = config.quantization_config is not None
    return [n for n in range(1, up_to + 1) if _sharding_problem(config, n, blocks) is None]


def _sharding_problem(c: ModelConfig, size: int, blocks: bool) -> DSV3Error | None:
    if size < 1:
        return DSV3Error("bad number of ranks", found=size, expected="1 or more")
    for field in ("num_attention_heads", "n_routed_experts", "vocab_size"):
        if getattr(c, field) % size:
            return DSV3Error(
                f"cannot be split over {size} ranks",
                where=field,
                found=getattr(c, field),
                expected=f"a multiple of {size}",
            )
    # One layer of each kind stands for all, and its routed experts stay whole.
    few = c.but(
        num_hidden_layers=min(c.num_hidden_layers, c.first_k_dense_replace + 1),
        n_routed_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        quantization_config=QuantizationConfig() if blocks else None,
    )
    for spec in layout(few, scales=False, mtp=False):
        if spec.shard_dim is None:
            continue
        whole, unit = spec.shape[spec.shard_dim], ("rows", "columns")[spec.shard_dim]
        if whole % size:
            return DSV3Error(
                f"cannot be split over {size} ranks",
                where=spec.hf_name,
                found=f"{whole} {unit}",
                expected=f"a multiple of {size}",
            )
        if spec.dtype == F8 and size > 1 and whole // size % BLOCK:
            return DSV3Error(
                f"the cut over {size} ranks falls inside an FP8 block",
                where=spec.hf_name,
                found=f"{whole} / {size} = {whole // size} {unit} per rank",
                expected=f"a multiple of {BLOCK}",
            )
    return None
