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

In use, the core computes from the stored values in both forms and rounds nothing on the way
(``Precision.core``), so which one runs changes no rounding, only the order of sums. Kernels on a
GPU are the exception: they take float32 numbers in two bfloat16 parts, 16 bits or more of each, so
that there both forms are within about 2^-17 of the numbers they sum, and not within float32's
2^-24.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.bfloat16 import attention
from dsv3.cache import OneLayer, Step, dot_keys, mix_values
from dsv3.config import ModelConfig
from dsv3.costs import break_even_queries
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.latent import PackedLatents
from dsv3.kernels.operations import mla_decode, mla_loops, mla_prefill
from dsv3.layers import ColumnParallelLinear, Linear, RMSNorm, RowParallelLinear, take_stored
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Normed, Precision
from dsv3.rope import rotate, softmax_scale

# The two latent norms keep this epsilon whatever rms_norm_eps says, in the released code too.
_LATENT_EPS = 1e-6
# On a CPU, loops serve up to so many queries of a text; beyond, the library's products are faster.
_QUERIES_IN_LOOPS = 4


class LatentUpProjection(nn.Module):
    """W^UK and W^UV of this rank's heads, (heads, d_h + d_v, d_c): ``wkv_b`` in checkpoints.

    Held in float32, dequantised once at loading: the core reads it, and its latent comes
    unquantised in every form, since absorption could not quantise it. Expanded reads it as a
    product with the latent, absorbed as two products around the core.
    """

    def __init__(self, config: ModelConfig, heads: int, precision: Precision, device=None):
        super().__init__()
        self.config, self.precision, self.heads = config, precision, heads
        rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
        shape = (rows, config.kv_lora_rank)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
        self.register_load_state_dict_pre_hook(partial(take_stored, precision.plain))

    def forward(
        self, seen: Float[Tensor, "b t latent"]
    ) -> tuple[Float[Tensor, "b heads t d_qk"], Float[Tensor, "b heads t d_v"]]:
        """Keys and values of every head from the latents (eq. 2, 4, 5)."""
        c = self.config
        latent, k_rope = seen.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.precision.from_latent(latent, self.weight)  # eq. 2, 5
        kv = kv.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k_rope = k_rope[:, None].expand(-1, self.heads, -1, -1)
        return torch.cat([k_nope, k_rope], -1), v  # eq. 4

    def per_head(self) -> tuple[Float[Tensor, "heads d_h d_c"], Float[Tensor, "heads d_v d_c"]]:
        """W^UK and W^UV, as views where they are held in the core's dtype."""
        both = self.weight.to(self.precision.core(self.weight.device))
        both = both.view(self.heads, -1, self.weight.shape[-1])
        return both[:, : self.config.qk_nope_head_dim], both[:, self.config.qk_nope_head_dim :]


class MLA(nn.Module):
    """Multi-head latent attention over one layer's slice of the cache."""

    def __init__(self, config: ModelConfig, precision: Precision, group: TensorGroup, device=None):
        super().__init__()
        self.config, self.precision = config, precision
        self.heads = group.split(config.num_attention_heads, "num_attention_heads")
        d, head_rows = config.hidden_size, config.num_attention_heads * config.qk_head_dim
        cut = dict(what="num_attention_heads", device=device)
        if config.q_lora_rank is None:
            self.wq = ColumnParallelLinear(d, head_rows, precision, group, **cut)  # W^UQ, W^QR
        else:
            self.wq_a = Linear(d, config.q_lora_rank, precision, device=device)  # W^DQ
            self.q_norm = RMSNorm(config.q_lora_rank, _LATENT_EPS, device, exact=precision.exact)
            self.wq_b = ColumnParallelLinear(
                config.q_lora_rank, head_rows, precision, group, **cut
            )  # W^UQ, W^QR
        self.wkv_a = Linear(d, config.latent_dim, precision, device=device)  # W^DKV, W^KR
        self.kv_norm = RMSNorm(config.kv_lora_rank, _LATENT_EPS, device, exact=precision.exact)
        self.wkv_b = LatentUpProjection(config, self.heads, precision, device)  # W^UK, W^UV
        # wo's input is kept in more bits: attention's own backward pass reads it too (TR 3.3.3).
        self.wo = RowParallelLinear(
            config.num_attention_heads * config.v_head_dim,
            d,
            precision.saving("e5m6"),
            group,
            **cut,
        )  # W^O
        self.scale = softmax_scale(config)

    def forward(
        self, h: Float[Tensor, "b s d"] | Normed, step: Step, kept: OneLayer | None = None
    ) -> Float[Tensor, "b s d"]:
        """h of the new tokens -> u; their latents join those that are kept."""
        operand = self.precision.operand(h)  # queries and latents read the same values
        q_nope, q_rope = self.queries(operand, step)
        new = self.latents(operand, step)
        seen = new if kept is None else kept.append(new, step)
        o = self.core(q_nope, q_rope, new)(q_nope, q_rope, seen, step)
        return self.wo(o.flatten(2).to(self.precision.dtype))  # eq. 11

    def queries(
        self, h: Float[Tensor, "b s d"] | QuantizedTensor, step: Step
    ) -> tuple[Float[Tensor, "b s heads d_h"], Float[Tensor, "b s heads d_r"]]:
        """q^C and rotated q^R of each head (eq. 6-9)."""
        if self.config.q_lora_rank is None:
            q = self.wq(h)
        else:
            q = self.wq_b(self.precision.normed(self.q_norm, self.wq_a(h)))  # eq. 6, 7
        q = q.unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        return q_nope, rotate(q_rope, step.rotation[:, :, None])  # eq. 8

    def latents(
        self, h: Float[Tensor, "b s d"] | QuantizedTensor, step: Step
    ) -> Float[Tensor, "b s latent"]:
        """[c^KV; k^R], d_c + d_h^R values: normalised latent, rotated shared key (eq. 1, 3)."""
        c, k_rope = self.wkv_a(h).split(
            [self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1
        )  # eq. 1
        return torch.cat([self.kv_norm(c), rotate(k_rope, step.rotation)], -1)  # eq. 3

    def core(self, q: Float[Tensor, "b s heads d_h"], *others: Tensor) -> Callable[..., Tensor]:
        """The form of the core for these queries, here. others: what else it is to read; loops and
        kernels have no backward pass."""
        expanded = self.prefers_expanded(q.shape[1])
        if self.precision.in_kernels(q, self.wkv_b.weight, *others):
            return self.expanded_in_kernel if expanded else self.absorbed_in_kernel
        if q.shape[1] <= _QUERIES_IN_LOOPS and self.precision.in_loops(
            q, self.wkv_b.weight, *others
        ):
            return self.absorbed_in_loops
        return self.expanded if expanded else self.absorbed

    def prefers_expanded(self, queries: int) -> bool:
        """Whether so many queries take fewer multiplications in the expanded form.

        Per head and key, expanding costs d_c (d_h + d_v) once, then d_h + d_h^R + d_v a query;
        absorbed costs 2 d_c + d_h^R a query. They meet at 171 queries for the released sizes.
        """
        return queries > break_even_queries(self.config)

    def expanded(
        self,
        q_nope: Float[Tensor, "b s heads d_h"],
        q_rope: Float[Tensor, "b s heads d_r"],
        seen: Float[Tensor, "b t latent"] | PackedLatents,
        step: Step,
    ) -> Float[Tensor, "b s heads d_v"]:
        """Keys and values of every head, then attention (eq. 10).

        Values are padded with zeros to the width of the keys: fast attention kernels want that,
        and it changes nothing.
        """
        k, v = self.wkv_b(seen.to(self.precision.core(seen.device)))  # (b, heads, t, d_qk)
        q = torch.cat([q_nope, q_rope], -1).to(k.dtype).transpose(1, 2)  # eq. 9
        causal = step.mask is None and q.shape[2] > 1
        v = F.pad(v, (0, max(k.shape[-1] - v.shape[-1], 0)))
        o = attention(q, k, v, step.mask, causal, self.scale)  # eq. 10
        return o[..., : self.config.v_head_dim].transpose(1, 2)

    def absorbed(
        self,
        q_nope: Float[Tensor, "b s heads d_h"],
        q_rope: Float[Tensor, "b s heads d_r"],
        seen: Float[Tensor, "b t latent"] | PackedLatents,
        step: Step,
    ) -> Float[Tensor, "b s heads d_v"]:
        """Attention to the latents themselves: one key, of which a part is the value too."""
        w_uk, w_uv = self.wkv_b.per_head()
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope.to(w_uk.dtype), w_uk)  # W^UK^T q^C
        q = torch.cat([q_latent, q_rope.to(w_uk.dtype)], -1) * self.scale
        seen = self.unpacked(seen)
        scores = dot_keys(q.flatten(1, 2), seen).unflatten(1, q.shape[1:3])  # (b, s, heads, t)
        mask = step.mask
        if mask is None and q.shape[1] > 1:
            mask = scores.new_ones(q.shape[1], step.total, dtype=torch.bool).tril()[None, None]
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), float("-inf"))
        weights = scores.softmax(-1).flatten(1, 2)  # eq. 10
        o_latent = mix_values(weights, seen[..., : self.config.kv_lora_rank])
        return torch.einsum("bshc,hdc->bshd", o_latent.unflatten(1, q.shape[1:3]), w_uv)

    def unpacked(
        self, seen: Float[Tensor, "b t latent"] | PackedLatents
    ) -> Float[Tensor, "b t latent"]:
        """The latents themselves, whatever the cache made of them."""
        return seen.to(self.precision.dtype) if isinstance(seen, PackedLatents) else seen

    def absorbed_in_loops(
        self,
        q_nope: Float[Tensor, "b s heads d_h"],
        q_rope: Float[Tensor, "b s heads d_r"],
        seen: Float[Tensor, "b t latent"] | PackedLatents,
        step: Step,
    ) -> Float[Tensor, "b s heads d_v"]:
        """``absorbed`` on a CPU, for few queries."""
        seen = self.unpacked(seen)
        weight = self.wkv_b.weight.view(self.heads, -1, self.config.kv_lora_rank)
        sums = self.precision.core(seen.device)
        return mla_loops(q_nope, q_rope, seen, step.reach, weight, self.scale, sums)

    # The same two on a GPU, each around a kernel. --------------------------------------------

    def expanded_in_kernel(
        self,
        q_nope: Float[Tensor, "b s heads d_h"],
        q_rope: Float[Tensor, "b s heads d_r"],
        seen: Float[Tensor, "b t latent"] | PackedLatents,
        step: Step,
    ) -> Float[Tensor, "b s heads d_v"]:
        """``expanded``, with keys and values where the product with wkv_b leaves them."""
        c, core = self.config, self.precision.core(seen.device)
        latent, k_rope = seen.to(core).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.precision.from_latent(latent, self.wkv_b.weight)  # eq. 2, 5
        kv = kv.unflatten(-1, (self.heads, -1))
        return mla_prefill(q_nope.to(core), q_rope.to(core), kv, k_rope, step.reach, self.scale)

    def absorbed_in_kernel(
        self,
        q_nope: Float[Tensor, "b s heads d_h"],
        q_rope: Float[Tensor, "b s heads d_r"],
        seen: Float[Tensor, "b t latent"] | PackedLatents,
        step: Step,
    ) -> Float[Tensor, "b s heads d_v"]:
        """``absorbed``, from the cache as it lies there, packed or not."""
        w_uk, w_uv = self.wkv_b.per_head()
        q_latent = torch.einsum("bshd,hdc->bshc", q_nope.to(w_uk.dtype), w_uk)  # W^UK^T q^C
        q = torch.cat([q_latent, q_rope.to(w_uk.dtype)], -1)
        rows = seen.rows if isinstance(seen, PackedLatents) else seen
        o_latent = mla_decode(q, rows, step.reach, self.scale, self.config.kv_lora_rank)
        return torch.einsum("bshc,hdc->bshd", o_latent, w_uv)
