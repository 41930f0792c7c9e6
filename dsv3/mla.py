"""Multi-head latent attention (TR 2.1.1): ordinary attention that remembers little.

Attention needs the keys and values of a token and all before it. Stored for every head, they
fill the memory: 4,997,120 bytes a token at the size of DeepSeek-V3. MLA stores one short vector
instead, the latent c^KV, from which the keys and values of all heads are made by fixed matrices,
and one rotated key shared by all heads: 512 + 64 values a token and layer, 70,272 bytes a token.

    c_t^KV = W^DKV h_t                       (1)  wkv_a, then kv_norm
    k^C_t  = W^UK c_t^KV                     (2)  wkv_b, per head rows [W^UK; W^UV]
    k^R_t  = RoPE(W^KR h_t)                  (3)  wkv_a's last rows
    v^C_t  = W^UV c_t^KV                     (5)
    q_t    = [W^UQ c_t^Q; RoPE(W^QR c_t^Q)]  (6-9) wq_a, q_norm, wq_b
    o_t,i  = sum_j softmax_j(q_t,i . [k^C_j,i; k^R_j] / sqrt(d_h + d_h^R)) v^C_j,i      (10)
    u_t    = W^O [o_t,1; ...]                (11) wo

The same sum can be taken in two orders. *Expanded*: make every head's keys and values, then
attend. *Absorbed*: since q^T (W^UK c) = (W^UK^T q)^T c, carry the query into the latent space,
attend to the latents themselves, and carry the result out by W^UV. Expanding t latents is shared
by all s queries; absorbed scores are wider but read nothing but the cache. So many queries are
cheaper expanded (prefill), few are cheaper absorbed (decode). RoPE stands outside this: a
rotation between W^UQ and W^UK would differ for every pair of positions and could not be absorbed,
which is why the position has its own small key.

The core computes from the stored values in both forms and rounds nothing on the way
(``Precision.core``), so which one runs changes no rounding, only the order of sums.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex64, Float, Int, Shaped
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.costs import break_even_queries
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.training import fp8_linear
from dsv3.layers import (ColumnParallelLinear, Linear, RMSNorm, RowParallelLinear, as_plain, put,
                         quantize_once)
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.rope import inverse_frequencies, rotate, rotation_scale, rotations, softmax_scale

# The two latent norms keep this epsilon whatever rms_norm_eps says, in the released code too.
_LATENT_EPS = 1e-6
# Keys that decoding widens at a time: few enough for their copy to stay in a core's cache.
_KEYS_AT_ONCE = 512


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward pass stand; made once, read by every layer.

    offset: position of the first new token (of the first row, when rows are ragged).
    total: keys that can be seen, t. rotation: of each pair of values, by position. mask: True
    where a query may look, or None when the causal rule says it all. take: for ragged rows,
    (row, column, position) of all n true tokens, else None.
    """

    offset: int
    total: int
    rotation: Complex64[Tensor, "b s pairs"]
    mask: Bool[Tensor, "b 1 s t"] | None
    take: tuple[Int[Tensor, "n"], Int[Tensor, "n"], Int[Tensor, "n"]] | None

    @classmethod
    def make(cls, config: ModelConfig, starts: list[int], counts: list[int], width: int,
             device: torch.device) -> Step:
        """starts: tokens already seen per row; counts: true new tokens per row; width: s."""
        total = max(start + count for start, count in zip(starts, counts))
        first = torch.tensor(starts, device=device)
        columns = torch.arange(width, device=device)
        positions = first[:, None] + columns                                    # (b, s)
        rotation = rotations(positions, inverse_frequencies(config).to(device),
                             rotation_scale(config))
        even = len(set(starts)) == 1 and all(count == width for count in counts)
        take = None
        if not even:
            row, column = (columns < torch.tensor(counts, device=device)[:, None]).nonzero(
                as_tuple=True)
            take = (row, column, first[row] + column)
        mask = None
        if not even or (starts[0] > 0 and width > 1):
            keys = torch.arange(total, device=device)
            mask = (keys <= positions[..., None])[:, None]                      # (b, 1, s, t)
        return cls(starts[0], total, rotation, mask, take)

    def write(self, store: Shaped[Tensor, "b room *rest"], new: Shaped[Tensor, "b s *rest"]) -> None:
        """Put what belongs to the new tokens into a store of all positions, at their places."""
        if self.take is None:
            store[:, self.offset:self.offset + new.shape[1]] = new
        else:
            row, column, position = self.take
            store[row, position] = new[row, column]


class LatentCache:
    """What decoding remembers: [c^KV; k^R] of every token, layer by layer.

    data: (layers, batch, max_seq_len, d_c + d_h^R). Every row has its own length; positions
    beyond it hold leftovers that no query looks at. The latent is stored after its norm, the key
    after its rotation. ids: (batch, max_seq_len), the token that each position was computed for,
    -1 where that is not known; so a text can be told from one that only begins like it.

    What is kept is numbers and no history: a gradient reaches the tokens of the pass that it comes
    from, none of an earlier one.
    """

    def __init__(self, config: ModelConfig, layers: int, batch_size: int, max_seq_len: int,
                 dtype: torch.dtype, device: torch.device | str):
        for name, size in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 0:
                raise DSV3Error("not a usable value", where=name, found=repr(size),
                                expected="an integer of at least 0")
        with torch.inference_mode(False):  # wherever it is made, it can be written anywhere
            self.data = torch.zeros(layers, batch_size, max_seq_len, config.latent_dim,
                                    dtype=dtype, device=device)
            self.ids = torch.full((batch_size, max_seq_len), -1, device=device)
        self.lengths = [0] * batch_size

    @property
    def max_seq_len(self) -> int:
        """Tokens a row can hold."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all latents."""
        return self.data.nbytes

    def append(self, layer: int, new: Float[Tensor, "b s latent"],
               step: Step) -> Float[Tensor, "b t latent"]:
        """Write what is new after each row's tokens; return that of all keys."""
        store = self.data[layer]
        step.write(store, new.detach())
        seen = store[:, :step.total]
        if torch.is_grad_enabled() and new.requires_grad:
            seen = seen.clone()  # later passes write into the store, which would spoil the graph
            step.write(seen, new)
        return seen

    def remember(self, tokens: Int[Tensor, "b s"], step: Step) -> None:
        """Note which tokens a pass was about."""
        step.write(self.ids, tokens)

    def tokens(self, row: int) -> list[int]:
        """The ids of the tokens that a row holds."""
        return self.ids[row, :self.lengths[row]].tolist()

    def copies(self, n: int, max_seq_len: int) -> LatentCache:
        """Another cache in which each row stands ``n`` times in a row, with room for more."""
        other = copy.copy(self)
        longest = max(self.lengths)
        with torch.inference_mode(False):
            layers, batch, _, width = self.data.shape
            other.data = self.data.new_zeros(layers, n * batch, max_seq_len, width)
            other.ids = self.ids.new_full((n * batch, max_seq_len), -1)
        other.data[:, :, :longest] = self.data[:, :, :longest].repeat_interleave(n, dim=1)
        other.ids[:, :longest] = self.ids[:, :longest].repeat_interleave(n, dim=0)
        other.lengths = [length for length in self.lengths for _ in range(n)]
        return other

    def advance(self, counts: list[int]) -> None:
        """Count the tokens of a finished forward pass."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]

    def truncate(self, lengths: list[int]) -> None:
        """Forget each row's tokens from ``lengths`` on (rejected drafts, an edited prompt)."""
        if not isinstance(lengths, Sequence) or len(lengths) != len(self.lengths):
            raise DSV3Error("wrong row lengths", where="truncate", found=lengths,
                            expected=f"a list of {len(self.lengths)}, one a row")
        for row, (new, old) in enumerate(zip(lengths, self.lengths)):
            if not 0 <= new <= old:
                raise DSV3Error("cannot grow a cache by truncating", where=f"row {row}",
                                found=new, expected=f"0 to {old}")
        self.lengths = list(lengths)

    def check_fit(self, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise DSV3Error unless this is a cache of such a model."""
        found = (self.data.shape[0], self.data.shape[3], self.data.dtype, self.data.device)
        if found != (layers, width, dtype, device):
            raise DSV3Error("the cache is another model's", where="cache", found=_words(*found),
                            expected=_words(layers, width, dtype, device),
                            fix="Make it with new_cache, or new_draft_cache for an MTP module, "
                                "where the model is now")

    def check_room(self, counts: list[int]) -> None:
        """Raise DSV3Error when a row's new tokens do not fit."""
        for row, (length, count) in enumerate(zip(self.lengths, counts)):
            if length + count > self.max_seq_len:
                raise DSV3Error("the cache is full", where=f"row {row}",
                                found=f"{length} + {count} tokens",
                                expected=f"at most {self.max_seq_len}",
                                fix="Make the cache longer (max_seq_len)")


def check_is_cache(cache: object, name: str = "cache") -> None:
    """Raise DSV3Error for what is no cache at all."""
    if not all(hasattr(cache, part) for part in ("lengths", "tokens", "truncate")):
        raise DSV3Error("not a cache", where=name, found=type(cache).__name__,
                        expected="LatentCache",
                        fix="Make it with new_cache, or new_draft_cache for an MTP module")


def _words(layers: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"{layers} layers of {width} values, {dtype}, on {device}"


class LatentUpProjection(nn.Module):
    """W^UK and W^UV of this rank's heads, (heads, d_h + d_v, d_c): ``wkv_b`` in checkpoints.

    Held in the dtype of the attention core, dequantised once at loading (in training: as a
    float32 master). Both forms of the core read it: expanded as a product with the latent,
    absorbed as two products around the core.
    """

    def __init__(self, config: ModelConfig, heads: int, precision: Precision, device=None):
        super().__init__()
        self.config, self.precision, self.heads = config, precision, heads
        rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.weight = nn.Parameter(torch.empty(rows, config.kv_lora_rank, dtype=self.held,
                                               device=device))

    @property
    def held(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.precision.weights if self.precision.has_masters else self.precision.core

    def forward(self, seen: Float[Tensor, "b t latent"]) -> tuple[
            Float[Tensor, "b heads t d_qk"], Float[Tensor, "b heads t d_v_padded"]]:
        """Keys and values of every head from the latents (eq. 2, 4, 5).

        Values are padded with zeros to the width of the keys: fast attention kernels want that,
        and it changes nothing.
        """
        c = self.config
        latent, k_rope = seen.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        if self.precision.fp8:
            kv = fp8_linear(latent, self.weight, self.precision.fp8)
        else:
            kv = F.linear(latent, self.weight.to(latent.dtype))             # eq. 2, 5
        kv = kv.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = k_rope[:, None].expand(-1, self.heads, -1, -1)
        k = torch.cat([k_nope, k_rope], -1)                                 # eq. 4
        return k, F.pad(v, (0, max(k.shape[-1] - c.v_head_dim, 0)))

    def per_head(self) -> tuple[Float[Tensor, "heads d_h d_c"], Float[Tensor, "heads d_v d_c"]]:
        """W^UK and W^UV, as views where they are held in the core's dtype."""
        both = self.weight.to(self.precision.core).view(self.heads, -1, self.weight.shape[-1])
        return both[:, :self.config.qk_nope_head_dim], both[:, self.config.qk_nope_head_dim:]

    def load(self, name: str, value: Float[Tensor, "..."], scale: Tensor | None = None) -> None:
        put(self.weight, as_plain(name, value, scale), name)


class MLA(nn.Module):
    """Multi-head latent attention over one layer's slice of the cache."""

    def __init__(self, config: ModelConfig, precision: Precision, group: TensorGroup, device=None):
        super().__init__()
        self.config, self.precision = config, precision
        self.heads = group.split(config.num_attention_heads, "num_attention_heads")
        d, head_rows = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        cut = dict(what="num_attention_heads", device=device)
        if config.q_lora_rank is None:
            self.wq = ColumnParallelLinear(d, head_rows, precision, group, **cut)   # W^UQ, W^QR
        else:
            self.wq_a = Linear(d, config.q_lora_rank, precision, device=device)     # W^DQ
            self.q_norm = RMSNorm(config.q_lora_rank, _LATENT_EPS, device)
            self.wq_b = ColumnParallelLinear(config.q_lora_rank, head_rows, precision, group,
                                             **cut)                                 # W^UQ, W^QR
        self.wkv_a = Linear(d, config.latent_dim, precision, device=device)         # W^DKV, W^KR
        self.kv_norm = RMSNorm(config.kv_lora_rank, _LATENT_EPS, device)
        self.wkv_b = LatentUpProjection(config, self.heads, precision, device)      # W^UK, W^UV
        self.wo = RowParallelLinear(config.num_attention_heads * config.v_head_dim, d, precision,
                                    group, saved="e5m6", **cut)                     # W^O
        self.scale = softmax_scale(config)

    def forward(self, h: Float[Tensor, "b s d"], step: Step, cache: LatentCache | None = None,
                layer: int = 0) -> Float[Tensor, "b s d"]:
        """h of the new tokens -> u; their latents go to the cache."""
        h = quantize_once(h, self.precision)
        q_nope, q_rope = self.queries(h, step)
        new = self.latents(h, step)
        seen = new if cache is None else cache.append(layer, new, step)
        core = self.expanded if self.prefers_expanded(q_nope.shape[1]) else self.absorbed
        o = core(q_nope, q_rope, seen, step)
        return self.wo(o.flatten(2).to(self.precision.dtype))               # eq. 11

    def queries(self, h: Float[Tensor, "b s d"] | QuantizedTensor, step: Step) -> tuple[
            Float[Tensor, "b s heads d_h"], Float[Tensor, "b s heads d_r"]]:
        """q^C and rotated q^R of each head (eq. 6-9)."""
        if self.config.q_lora_rank is None:
            q = self.wq(h)
        else:
            q = self.wq_b(self.q_norm(self.wq_a(h)))                        # eq. 6, 7
        q = q.unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        return q_nope, rotate(q_rope, step.rotation[:, :, None])            # eq. 8

    def latents(self, h: Float[Tensor, "b s d"] | QuantizedTensor,
                step: Step) -> Float[Tensor, "b s latent"]:
        """[c^KV; k^R], d_c + d_h^R values: normalised latent, rotated shared key (eq. 1, 3)."""
        c, k_rope = self.wkv_a(h).split([self.config.kv_lora_rank, self.config.qk_rope_head_dim],
                                        -1)                                 # eq. 1
        return torch.cat([self.kv_norm(c), rotate(k_rope, step.rotation)], -1)  # eq. 3

    def prefers_expanded(self, queries: int) -> bool:
        """Whether so many queries take fewer multiplications in the expanded form.

        Per head and key, expanding costs d_c (d_h + d_v) once, then d_h + d_h^R + d_v a query;
        absorbed costs 2 d_c + d_h^R a query. They meet at 171 queries for the released sizes.
        """
        return queries > break_even_queries(self.config)

    def expanded(self, q_nope: Float[Tensor, "b s heads d_h"],
                 q_rope: Float[Tensor, "b s heads d_r"], seen: Float[Tensor, "b t latent"],
                 step: Step) -> Float[Tensor, "b s heads d_v"]:
        """Keys and values of every head, then attention (eq. 10)."""
        k, v = self.wkv_b(seen.to(self.precision.core))                     # (b, heads, t, d_qk)
        q = torch.cat([q_nope, q_rope], -1).to(k.dtype).transpose(1, 2)     # eq. 9
        causal = step.mask is None and q.shape[2] > 1
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=step.mask, scale=self.scale,
                                           is_causal=causal)                # eq. 10
        return o[..., :self.config.v_head_dim].transpose(1, 2)

    def absorbed(self, q_nope: Float[Tensor, "b s heads d_h"],
                 q_rope: Float[Tensor, "b s heads d_r"], seen: Float[Tensor, "b t latent"],
                 step: Step) -> Float[Tensor, "b s heads d_v"]:
        """Attention to the latents themselves."""
        w_uk, w_uv = self.wkv_b.per_head()
        b, s = q_nope.shape[:2]
        parts = seen.split(_KEYS_AT_ONCE, dim=1)
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope.to(w_uk.dtype), w_uk)  # W^UK^T q^C
        q = torch.cat([q_latent, q_rope.to(w_uk.dtype)], -1).flatten(1, 2)  # (b, s heads, d_c+d_r)
        q = q * self.scale
        scores = torch.cat([q @ part.to(q.dtype).transpose(1, 2) for part in parts], -1)
        scores = scores.view(b, s, self.heads, -1)
        mask = step.mask
        if mask is None and s > 1:
            mask = scores.new_ones(s, step.total, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), float("-inf"))
        weights = scores.softmax(-1).flatten(1, 2)              # eq. 10; (b, s heads, t)
        o_latent = sum(weight @ part[..., :self.config.kv_lora_rank].to(q.dtype)
                       for weight, part in zip(weights.split(_KEYS_AT_ONCE, dim=-1), parts))
        return torch.einsum("bshc,hdc->bshd", o_latent.view(b, s, self.heads, -1), w_uv)
