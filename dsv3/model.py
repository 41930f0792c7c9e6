"""The whole model: embedding, layers, final norm, head, and the MTP modules behind them.

One class serves training, prefill, decoding, one process and many. What differs comes in as
objects: ``Precision`` says how to multiply, ``TensorGroup`` who holds what, ``LatentCache`` what
is remembered. The model lives where its weights are: tokens are brought there, and precision and
group follow when it is moved (``dsv3.placement``). Names of weights are those of the released
inference code (``embed``, ``layers.0.attn.wq_a``, ``layers.3.ffn.experts.7.w2``, ``norm``,
``head``), so a converted checkpoint loads without renaming.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from dsv3 import placement
from dsv3.block import Block
from dsv3.cache import LatentCache, Step, check_is_cache, numbers
from dsv3.compiling import KEYS, CompiledLayers, can_capture, check_can_compile
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.fp8.latent import check_kind
from dsv3.layers import Embedding, Head, RMSNorm, RowParallelLinear
from dsv3.moe import Experts, Router
from dsv3.mtp import MTPModule
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

Logits = Float32[Tensor, "b s v"] | Float32[Tensor, "b v"]  # the second with last_only


class Transformer(nn.Module):
    """DeepSeek-V3 of any size.

    precision: "fp32", "bf16" or "fp8", or a Precision (``Precision.training``). group: the ranks
    that share the model (default: this process alone). device: where the weights live (default:
    the group's device). Weights are allocated and not filled: use ``init_weights`` or
    ``dsv3.checkpoint.load_model``. They ask for gradients, unless they are stored in FP8 or cut
    over ranks, which cannot be trained (``TensorGroup.trains``).

    eos_ids: tokens that end a text, of the config or of a ``generation_config.json``.

    ``to(device)`` and its kin move the whole model. Its dtypes are those of its precision, and
    changing them is refused. Raises DSV3Error for a device that is not there or not the group's.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: str | Precision = "fp32",
        group: TensorGroup | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.config, self.eos_ids = config, config.eos_ids
        self.group, device = placement.agree(group, device)
        self.precision = (
            precision if isinstance(precision, Precision) else Precision.of(precision, config)
        )
        if self.precision.trains and not self.group.trains:
            raise DSV3Error(
                "a model cut over several ranks cannot be trained",
                where="group",
                found=f"{self.group.everyone.size} ranks",
                expected="1, or experts shared out with own_tokens=True",
                fix="Give each rank a whole model and share the batch: "
                "dsv3.training.step.train_step(..., group=group)",
            )
        shared = (self.precision, self.group)
        self.embed = Embedding(config.vocab_size, config.hidden_size, *shared, device=device)
        self.layers = nn.ModuleList(
            Block(config, layer, *shared, device=device)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, device, exact=self.precision.exact
        )
        self.head = Head(config.hidden_size, config.vocab_size, *shared, device=device)
        self.mtp = nn.ModuleList(
            MTPModule(config, depth, *shared, device=device)
            for depth in range(config.num_nextn_predict_layers)
        )
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
            self.register_state_dict_post_hook(_leave_out_head)
            self.register_load_state_dict_pre_hook(_give_head)
        if self.precision.quantized or not self.group.trains:
            self.requires_grad_(False)
        self._compiled: CompiledLayers | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.embed.weight.device

    def _apply(self, fn, recurse: bool = True) -> Transformer:
        """What ``to``, ``cuda``, ``half`` and the like do to every tensor; see ``placement``."""
        target = placement.check_move(self, fn)
        super()._apply(placement.keeping_dtypes(fn, target), recurse)
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed.weight  # still one, where it had to be made anew
        placement.follow(self, target)
        if self._compiled:  # captured passes read weights where these were
            self.compile(self._compiled.backend)
        return self

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """Weights under a checkpoint's names, in any form that one has, copied into the model's own
        precision. Raises DSV3Error for ``assign``, which would leave them in the file's, and for a
        model on the meta device, which has no room to copy into.
        """
        if assign or self.device.type == "meta":
            raise DSV3Error(
                "weights are copied into a model that has room for them",
                where="load_state_dict",
                found="assign=True" if assign else "a model on the meta device",
                fix="Make the model on its device, or move it there by to_empty(device=...), "
                "and leave out assign",
            )
        return super().load_state_dict(state_dict, strict)

    def forward(
        self,
        tokens: Int[Tensor, "b s"],
        cache: LatentCache | None = None,
        lengths: list[int] | None = None,
        last_only: bool = False,
        return_hidden: bool = False,
    ) -> Logits | tuple[Logits, Float[Tensor, "b s d"]]:
        """Scores of the next token after each token.

        tokens: (b, s) int64, on any device. With a cache they continue each row's text (chunked
        prefill, decoding, another turn); without one they are the whole text. lengths: true new
        tokens of each row, 0 to s, when rows are padded on the right; what stands behind a row's
        length is ignored (a row of 0 leaves its cache alone, and its answer means nothing). Returns
        logits (b, s, vocab_size) float32, or (b, vocab_size) of each row's last true token with
        last_only; with return_hidden also the states after the final norm (b, s, d). Raises
        DSV3Error for a wrong shape, a token id out of range, a full cache.
        """
        step, counts = self._step(tokens, cache, lengths)
        tokens = tokens.to(self.device, non_blocking=True)
        with _no_autocast(self.device):
            hidden = self._read(tokens, step, cache)
            if cache is not None:
                cache.advance(counts)
            logits = self._logits(hidden, counts, last_only)
            return (logits, hidden) if return_hidden else logits

    def _read(
        self, tokens: Int[Tensor, "b s"], step: Step, cache: LatentCache | None
    ) -> Float[Tensor, "b s d"]:
        """The pass itself, behind all checks: nothing in it asks a tensor for a number, and so
        nothing in it waits for a GPU."""
        if cache is not None:
            cache.remember(tokens, step)
            compiled = self._compiled_for(cache, tokens.shape[1])
            if compiled and compiled.captured:
                return compiled.captured(self._states, tokens, step, cache)
        return self._states(tokens, step, cache)

    def _states(
        self, tokens: Int[Tensor, "b s"], step: Step, cache: LatentCache | None
    ) -> Float[Tensor, "b s d"]:
        """From the embedding through all layers to the final norm."""
        x = self.embed(tokens)
        for slot, layer in enumerate(self.layers):
            x = self._run(layer, x, step=step, cache=cache, slot=slot)
        return self.norm(x)

    def _run(
        self,
        layer: nn.Module,
        *states: Float[Tensor, "b s d"],
        step: Step,
        cache: LatentCache | None,
        slot: int = 0,
    ) -> Float[Tensor, "b s d"]:
        """A layer, as compiled code where there is some. slot: its place in the cache."""
        kept = None if cache is None else cache.one(slot)
        compiled = self._compiled_for(cache, states[0].shape[1])
        if compiled and kept is not None:
            return compiled(layer, *states, step=step, kept=kept)
        return layer(*states, step, kept)

    def compile(self, backend: str = "inductor") -> Transformer:  # type: ignore[override]
        """Decode by compiled code from now on (``dsv3.compiling``): the first steps take seconds,
        the others less time than before. backend: of torch.compile. Raises DSV3Error for a model
        on several ranks."""
        check_can_compile(self.group.everyone.size)
        self._compiled = CompiledLayers(backend, can_capture(self, self.device))
        return self

    def fitting_rows(self, texts: int) -> int:
        """How many rows a batch of so many texts had better have, when others leave it: as many,
        or some more where passes are captured (``dsv3.compiling``)."""
        return self._compiled.fitting_rows(texts) if self._compiled else texts

    def _compiled_for(self, cache: LatentCache | None, width: int) -> CompiledLayers | None:
        """What runs the layers in a pass over so many tokens a row; None: they run themselves."""
        return self._compiled if self._compiled and self._compiled.serves(cache, width) else None

    def mtp_logits(
        self,
        hidden: Float[Tensor, "b s d"],
        tokens: Int[Tensor, "b s"],
        cache: LatentCache | None = None,
        depth: int = 0,
        lengths: list[int] | None = None,
        last_only: bool = False,
    ) -> tuple[Logits, Float[Tensor, "b s d"]]:
        """What MTP module ``depth`` predicts (eq. 21-23).

        hidden: states after the final norm at positions i (of the module before, for depth > 0).
        tokens: t_{i+1+depth}, the token after each position. Returns logits for t_{i+2+depth} and
        the module's own states. cache: a draft cache of its own.
        """
        if depth >= len(self.mtp):
            raise DSV3Error(
                "no such MTP module",
                where="depth",
                found=depth,
                expected=f"below num_nextn_predict_layers ({len(self.mtp)})",
            )
        step, counts = self._step(tokens, cache, lengths, layers=1)
        tokens = tokens.to(self.device, non_blocking=True)
        with _no_autocast(self.device):
            module, embedded = self.mtp[depth], self.embed(tokens)
            hidden = self._run(module, hidden, embedded, step=step, cache=cache)
            if cache is not None:
                cache.remember(tokens, step)
                cache.advance(counts)
            return self._logits(hidden, counts, last_only), hidden  # eq. 23

    def _logits(self, hidden: Float[Tensor, "b s d"], counts: list[int], last_only: bool) -> Logits:
        if last_only and min(counts) == hidden.shape[1]:
            hidden = hidden[:, -1]
        elif last_only:
            last = numbers(counts, hidden.device) - 1
            hidden = hidden[torch.arange(len(counts), device=hidden.device), last]
        return self.head(hidden)

    def _step(
        self,
        tokens: Int[Tensor, "b s"],
        cache: LatentCache | None,
        lengths: list[int] | None,
        layers: int | None = None,
    ) -> tuple[Step, list[int]]:
        """Where the new tokens stand, and how many each row has. layers: of a fitting cache."""
        if self.device.type == "meta":
            raise DSV3Error(
                "the model has no weights to compute with",
                where="device",
                found="meta",
                fix="Load it with load_model(folder, device=...)",
            )
        if (
            not isinstance(tokens, Tensor)
            or tokens.dim() != 2
            or (tokens.dtype != torch.int64 or 0 in tokens.shape)
        ):
            raise DSV3Error(
                "wrong token tensor",
                where="tokens",
                found=f"{tuple(tokens.shape)} {tokens.dtype}"
                if isinstance(tokens, Tensor)
                else type(tokens).__name__,
                expected="(batch, length) int64, neither of them 0",
            )
        batch, width = tokens.shape
        low, high = tokens.aminmax()
        if low < 0 or high >= self.config.vocab_size:
            raise DSV3Error(
                "token id out of range",
                where="tokens",
                found=int(low) if low < 0 else int(high),
                expected=f"0 to {self.config.vocab_size - 1}",
            )
        if isinstance(lengths, int):
            raise DSV3Error(
                "wrong row lengths",
                where="lengths",
                found=lengths,
                expected="a list, a number for each row",
            )
        counts = [width] * batch if lengths is None else [int(n) for n in lengths]
        if len(counts) != batch or not all(0 <= n <= width for n in counts):
            raise DSV3Error(
                "wrong row lengths",
                where="lengths",
                found=counts,
                expected=f"{batch} numbers from 0 to {width}",
            )
        starts = [0] * batch
        if cache is not None:
            check_is_cache(cache)
            if len(cache.lengths) != batch:
                raise DSV3Error(
                    "the cache is for another batch",
                    where="cache",
                    found=f"{len(cache.lengths)} rows",
                    expected=batch,
                )
            cache.check_fit(
                layers or self.config.num_hidden_layers,
                self.config.latent_dim,
                self.precision.dtype,
                self.device,
            )
            cache.check_room(counts)
            starts = cache.lengths
        longest = max(start + count for start, count in zip(starts, counts))
        if longest > self.config.max_position_embeddings:
            raise DSV3Error(
                "text longer than the context",
                where="tokens",
                found=f"{longest} tokens",
                expected=f"at most {self.config.max_position_embeddings}",
                fix="Shorten the text or start a new one",
            )
        turns, total = None, None
        if cache is not None:
            turns = cache.turns
            if self._compiled_for(cache, width):
                total = min(-(-longest // KEYS) * KEYS, cache.max_seq_len)
        return Step.make(self.config, starts, counts, width, self.device, turns, total), counts

    def new_cache(self, batch_size: int, max_seq_len: int, dtype: str | None = None) -> LatentCache:
        """An empty cache for ``batch_size`` texts of at most ``max_seq_len`` tokens.

        dtype: "plain" keeps latents in the model's own dtype; "fp8" packs them, 656 bytes a token
        and layer at the released sizes (``dsv3.fp8.latent``); None is what the precision says.
        """
        return self._cache(self.config.num_hidden_layers, batch_size, max_seq_len, dtype)

    def new_draft_cache(
        self, batch_size: int, max_seq_len: int, dtype: str | None = None
    ) -> LatentCache:
        """The same for one MTP module."""
        return self._cache(1, batch_size, max_seq_len, dtype)

    def _cache(
        self, layers: int, batch_size: int, max_seq_len: int, dtype: str | None
    ) -> LatentCache:
        own, kind = self.precision.dtype, self.precision.cache if dtype is None else dtype
        check_kind("dtype", kind)
        return LatentCache(
            self.config, layers, batch_size, max_seq_len, own, self.device, kind == "fp8"
        )

    def init_weights(
        self, seed: int = 0, embedding_std: float | None = None, by_width: bool = False
    ) -> Transformer:
        """Random weights as before training: normal matrices, unit norms, zero biases.

        Standard deviation ``initializer_range``, of the embedding ``embedding_std`` where given.
        by_width: of a matrix that reads d values 1/sqrt(d) instead, so that what goes in at size 1
        comes out at size 1 in a model of any width (the released 0.006 is half of that at 7,168,
        and a fifth of it at 256: scores of attention then are near 0, and their gradients too);
        what is added to the stream is smaller by the root of the number of additions. A rank that
        holds some of the experts gives them the numbers that they have in a whole model. For
        unquantised models.
        """
        random = torch.Generator(device=self.device).manual_seed(seed)
        usual = self.config.initializer_range
        with torch.no_grad():
            for module in self.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if isinstance(module, RMSNorm):
                        parameter.fill_(1.0)
                        continue
                    std = usual
                    if isinstance(module, Embedding):
                        std = embedding_std or usual
                    elif by_width:
                        adds = isinstance(module, RowParallelLinear) or name == "w2"
                        depth = 2 * self.config.num_hidden_layers if adds else 1
                        std = (parameter.shape[-1] * depth) ** -0.5
                    if isinstance(module, Experts):
                        whole = parameter.new_empty(
                            (self.config.n_routed_experts, *parameter.shape[1:])
                        )
                        whole.normal_(0.0, std, generator=random)
                        parameter.copy_(whole[list(module.held)])
                    else:
                        parameter.normal_(0.0, std, generator=random)
                if isinstance(module, Router) and module.bias is not None:
                    module.bias.zero_()
        return self


# A tied head is the embedding: a state_dict, like a checkpoint, has it once. ----------------------


def _leave_out_head(model: Transformer, state: dict[str, Tensor], prefix: str, *_) -> None:
    del state[prefix + "head.weight"]


def _give_head(model: Transformer, state: dict[str, Tensor], prefix: str, *_) -> None:
    """Raises DSV3Error for a head in the file that is another one."""
    head, embedding = prefix + "head.weight", state.get(prefix + "embed.weight")
    if embedding is None:
        return  # which is what the answer will say
    if head in state and not torch.equal(state[head].to(embedding), embedding):
        raise DSV3Error(
            "two tensors that the config calls one differ",
            where=f"{head} and {prefix}embed.weight",
            found="tie_word_embeddings true",
            fix="Set tie_word_embeddings to false if the head is one of its own",
        )
    state[head] = embedding


def _no_autocast(device: torch.device) -> torch.autocast:
    """A model multiplies as its precision says, also inside a caller's ``torch.autocast``."""
    return torch.autocast(device.type, enabled=False)
