"""DeepSeekMoE (TR 2.1.2): many small experts, of which each token uses a few.

    h'_t = u_t + sum_i FFN^(s)_i(u_t) + sum_i g_i,t FFN^(r)_i(u_t)                     (12)
    g_i,t = g'_i,t / sum_j g'_j,t                                                      (13)
    s_i,t = Sigmoid(u_t . e_i)                                                         (15)
    g'_i,t = s_i,t if s_i,t + b_i is among the K_r largest, else 0                     (16)

The bias b_i steers *which* experts are chosen, so that all stay busy; the *weight* of a chosen
expert comes from s_i,t alone. Weights taken from the biased scores are the most common bug.

Experts stand in groups, one per node in training. A token may reach ``topk_group`` of them,
ranked by the sum of their two best biased scores; the other groups' experts are out, by -inf and
not by 0, since a strongly negative bias makes 0 the winner.

Three things stand in the released code and not in the equations: groups are ranked by *biased*
scores; a router without a bias ranks them by their single best expert; and the weights are
multiplied by ``routed_scaling_factor`` (2.5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float8e4m3fn, Float32, Int
from torch import Tensor, nn

from dsv3 import fp8
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.training import fp8_linear
from dsv3.layers import SwiGLU, as_plain, as_quantized, put, quantize_once, quantized_storage
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

# A grouped product wants rows that start at multiples of so many bytes.
_ROW_BYTES = 16
# Rows an expert's share is rounded up to, see ``spread``.
_ROWS = 64


class Router(nn.Module):
    """The gate: which experts a token goes to, and with which weights; never in few bits."""

    def __init__(self, config: ModelConfig, precision: Precision, device=None):
        super().__init__()
        self.config, self.precision = config, precision
        wide = dict(dtype=torch.float32, device=device)
        self.weight = nn.Parameter(  # e_i, (N_r, d)
            torch.empty(config.n_routed_experts, config.hidden_size, **wide)
        )
        if config.gate_bias:  # b_i; no gradient moves it
            self.bias = nn.Parameter(
                torch.empty(config.n_routed_experts, **wide), requires_grad=False
            )
        else:
            self.bias = None

    def forward(self, u: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
        """Of n tokens, the weights (unrounded) and the numbers of their k = K_r experts."""
        scores = self.scores(u)
        chosen = self.choose(scores)
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # eq. 13
        return weights * self.config.routed_scaling_factor, chosen

    def scores(self, u: Float[Tensor, "n d"]) -> Float[Tensor, "n experts"]:
        """Affinities s_i,t of each token to all N_r experts (eq. 15)."""
        sums = self.precision.sums
        logits = F.linear(u.to(sums), self.weight.to(sums))
        return (
            logits.sigmoid()
            if self.config.scoring_func == "sigmoid"  # eq. 15
            else logits.softmax(-1)
        )

    def choose(self, scores: Float[Tensor, "n experts"]) -> Int[Tensor, "n k"]:
        """The K_r best experts of the M best groups, by biased score (eq. 16)."""
        c = self.config
        biased = scores if self.bias is None else scores + self.bias  # eq. 14, 16
        if c.n_group > 1:
            closed = ~self.open_groups(biased)[1].repeat_interleave(
                biased.shape[-1] // c.n_group, dim=-1
            )
            biased = biased.masked_fill(closed, float("-inf"))
        return biased.topk(c.num_experts_per_tok, dim=-1).indices

    def open_groups(
        self, biased: Float[Tensor, "n experts"]
    ) -> tuple[Float[Tensor, "n groups"], Bool[Tensor, "n groups"]]:
        """What each group counts as, its two best biased scores together (without a bias: its
        best score), and whether it is one of the M best (TR 2.1.2)."""
        grouped = biased.unflatten(-1, (self.config.n_group, -1))  # (n, G, N_r/G)
        if self.bias is None:
            strength = grouped.amax(-1)
        else:
            strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = strength.topk(self.config.topk_group, dim=-1).indices
        return strength, torch.zeros_like(strength, dtype=torch.bool).scatter(-1, best, True)

    def load(self, name: str, value: Float[Tensor, "..."], scale: Tensor | None = None) -> None:
        if name.endswith("bias") and self.bias is None:
            raise DSV3Error(
                "the checkpoint has a router bias, the config has none",
                where=name,
                fix='Set "gate_bias": true in config.json',
            )
        target = self.bias if name.endswith("bias") else self.weight
        if not value.isfinite().all():
            raise DSV3Error("router values must be finite", where=name, found="NaN or infinity")
        put(target, value, name)


class Experts(nn.Module):
    """This rank's routed experts, stacked: w13 (E, 2, inner, d) and w2 (E, d, inner).

    Each expert is a SwiGLU; w1 and w3 lie side by side so that one product serves both.
    """

    def __init__(self, config: ModelConfig, precision: Precision, group: TensorGroup, device=None):
        super().__init__()
        self.precision = precision
        self.total = config.n_routed_experts
        self.count = group.split(self.total, "n_routed_experts")
        self.first = group.rank * self.count
        d, inner = config.hidden_size, config.moe_intermediate_size
        shapes = (self.count, 2, inner, d), (self.count, d, inner)
        if precision.quantized:
            self.w13, self.w13_scale = quantized_storage(shapes[0], device)
            self.w2, self.w2_scale = quantized_storage(shapes[1], device)
        else:
            self.w13, self.w2 = (
                nn.Parameter(torch.empty(s, dtype=precision.weights, device=device)) for s in shapes
            )

    def forward(
        self, u: Float[Tensor, "n d"], weights: Float[Tensor, "n k"], chosen: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n d"]:
        """The weighted sum of my experts' outputs for each token, unrounded.

        A partial sum over the ranks. Tokens are sorted by expert, so that an expert meets all of
        its tokens in one product and nobody waits for a token that chose somebody else.
        """
        local = chosen.flatten()
        if self.count < self.total:  # the choices of other ranks' experts go last
            local = local - self.first
            local = local.where((local >= 0) & (local < self.count), self.count)
        local, order = local.sort(stable=True)
        ends = torch.searchsorted(local, torch.arange(self.count, device=u.device), right=True)
        token = order // chosen.shape[1]
        run = self.grouped if self.can_group(chosen) else self.one_by_one
        y = run(u, token, ends)
        if self.count < self.total:  # and what stands in their rows is junk
            y = y.masked_fill((local == self.count)[:, None], 0.0)
        y = y * weights.flatten()[order, None]
        return torch.zeros_like(u, dtype=y.dtype).index_add(0, token, y)

    def can_group(self, chosen: Int[Tensor, "n k"]) -> bool:
        """Whether one grouped product serves all experts: plain weights, aligned rows, and, on a
        CPU, where it visits every expert, enough choices to go round."""
        if self.precision.quantized or self.precision.fp8:
            return False
        if chosen.numel() < self.count and not chosen.is_cuda:
            return False
        width = self.precision.dtype.itemsize
        return all(size * width % _ROW_BYTES == 0 for size in self.w2.shape[1:])

    def grouped(
        self, u: Float[Tensor, "n d"], token: Int[Tensor, "choices"], ends: Int[Tensor, "experts"]
    ) -> Float[Tensor, "choices d"]:
        """Outputs by two grouped products; rows past the last end are junk.

        token: of each choice, sorted by expert. ends: where each of my experts' choices end.
        """
        ends = ends.to(torch.int32)
        x, slot = u.index_select(0, token), None
        if not x.is_cuda and x.dtype == torch.bfloat16 and len(x) >= self.count * _ROWS:
            slot, ends = spread(ends, len(x))
            x = x.new_zeros(len(x) + self.count * _ROWS, x.shape[1]).index_copy(0, slot, x)
        w13, w2 = self.w13.to(u.dtype).flatten(1, 2), self.w2.to(u.dtype)
        both = F.grouped_mm(x, w13.transpose(1, 2), offs=ends)
        gate, up = both.chunk(2, dim=-1)
        y = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        return (y if slot is None else y.index_select(0, slot)).float()

    def one_by_one(
        self, u: Float[Tensor, "n d"], token: Int[Tensor, "choices"], ends: Int[Tensor, "experts"]
    ) -> Float[Tensor, "choices d"]:
        """The same outputs, expert after expert: the plain form, and the one for FP8 weights."""
        if self.precision.quantized:
            x, run = quantize_once(u, self.precision)[token], self.expert
        else:  # taken apart once: the gradient of w13[e] alone would be a stack full of zeros
            x, w13, w2 = u.index_select(0, token), self.w13.unbind(), self.w2.unbind()

            def run(expert, rows):
                return self.swiglu(rows, w13[expert].flatten(0, 1), w2[expert])

        parts, start = [], 0
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                parts.append(run(expert, x[start:end]))
            start = end
        others = len(token) - start
        parts.append(
            torch.zeros(others, self.w2.shape[1], dtype=torch.float32, device=token.device)
        )
        return torch.cat(parts)

    def expert(self, index: int, x: Float[Tensor, "n d"] | QuantizedTensor) -> Float[Tensor, "n d"]:
        """One expert's SwiGLU of its n tokens: unrounded when x is quantised."""
        if not self.precision.quantized:
            return self.swiglu(x, self.w13[index].flatten(0, 1), self.w2[index])
        gate, up = (
            self.product(x, self.w13, self.w13_scale, (index, half)).to(self.precision.dtype)
            for half in (0, 1)
        )
        inner = quantize_once(F.silu(gate) * up, self.precision)
        return self.product(inner, self.w2, self.w2_scale, (index,))

    def swiglu(
        self,
        x: Float[Tensor, "n d"],
        w13: Float[Tensor, "twice_inner d"],
        w2: Float[Tensor, "d inner"],
    ) -> Float[Tensor, "n d"]:
        """SwiGLU by weights that are not stored in FP8; in FP8 training, quantised for this."""

        def product(x, weight):
            if self.precision.fp8:
                return fp8_linear(x, weight, self.precision.fp8)
            return F.linear(x, weight.to(x.dtype))

        gate, up = product(x, w13).chunk(2, dim=-1)
        return product(F.silu(gate) * up, w2).float()

    def product(
        self,
        x: QuantizedTensor,
        data: Float8e4m3fn[Tensor, "... out in"],
        scale: Float32[Tensor, "... out_blocks in_blocks"],
        index: tuple[int, ...],
    ) -> Float[Tensor, "n out"]:
        """x times one matrix of a stack."""
        weight = QuantizedTensor(
            data[index], scale[index], (fp8.BLOCK, fp8.BLOCK), self.precision.scale_format
        )
        return fp8.matmul(x, weight, self.precision.sums)

    def slot(
        self, expert: int, matrix: str
    ) -> tuple[Float[Tensor, "out in"], Float32[Tensor, "out_blocks in_blocks"] | None]:
        """Where w1, w2 or w3 of expert number ``expert`` (0 .. N_r - 1) lives: data and scale."""
        index = expert - self.first
        name, place = {
            "w1": ("w13", (index, 0)),
            "w3": ("w13", (index, 1)),
            "w2": ("w2", (index,)),
        }[matrix]
        scale = getattr(self, name + "_scale")[place] if self.precision.quantized else None
        return getattr(self, name)[place], scale

    def load(self, name: str, value: Float[Tensor, "..."], scale: Tensor | None = None) -> None:
        """name ends in "experts.E.w1.weight" or the like."""
        expert, matrix, _ = name.split(".")[-3:]
        data, grid = self.slot(int(expert), matrix)
        if grid is None:
            put(data, as_plain(name, value, scale), name)
        else:
            stored = as_quantized(name, value, scale, self.precision)
            put(data.view(torch.uint8), stored.data.view(torch.uint8), name)
            put(grid, stored.scale, name + "_scale_inv")


def spread(
    ends: Int[Tensor, "experts"], rows: int
) -> tuple[Int[Tensor, "{rows}"], Int[Tensor, "experts"]]:
    """Places for rows sorted by expert such that each expert's share is a multiple of 64 rows.

    A bfloat16 product on a CPU is compiled for its shape, which takes longer than the product.
    Rounded up, the few shapes there are come again and again. Rows that belong to nobody (behind
    the last end) go behind the last share. Returns the place of each row, and the new ends.
    """
    starts = F.pad(ends, (1, 0))
    shares = (starts.diff() + _ROWS - 1) // _ROWS * _ROWS
    new_ends = shares.cumsum(0, dtype=ends.dtype)
    moved = F.pad(new_ends, (1, 0)) - starts
    row = torch.arange(rows, device=ends.device)
    return row + moved[torch.searchsorted(ends, row, right=True)], new_ends


class MoE(nn.Module):
    """Shared experts for every token, routed experts by choice (eq. 12, without the residual)."""

    def __init__(self, config: ModelConfig, precision: Precision, group: TensorGroup, device=None):
        super().__init__()
        self.precision, self.group = precision, group
        self.gate = Router(config, precision, device)
        self.experts = Experts(config, precision, group, device)
        self.shared_experts = SwiGLU(
            config.hidden_size,
            config.n_shared_experts * config.moe_intermediate_size,
            precision,
            group,
            what="n_shared_experts * moe_intermediate_size",
            device=device,
        )

    def forward(self, u: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """Both sums share one all-reduce and one rounding."""
        flat = u.flatten(0, 1)
        weights, chosen = self.gate(flat)
        out = self.experts(flat, weights, chosen) + self.shared_experts.partial_sum(flat)  # eq. 12
        return self.group.all_reduce(out).to(u.dtype).view(u.shape)
