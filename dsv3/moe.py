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

The bias balances a batch (``dsv3.training.balance`` steps it); one sequence may still crowd a few
experts. So in training a complementary loss remains, with a weight so small (alpha = 1e-4) that it
only guards against extremes:

    L_Bal = alpha * sum_i f_i P_i                                                      (17)
    f_i = N_r / (K_r T) * sum_t 1(s_i,t is among the K_r largest of s_t)               (18)
    s'_i,t = s_i,t / sum_j s_j,t                                                       (19)
    P_i = (1 / T) * sum_t s'_i,t                                                       (20)

T counts the tokens of ONE sequence. With all experts equal, f_i = 1 and P_i = 1 / N_r, and the
loss is alpha; when all tokens crowd the same K_r experts it nears alpha * N_r / K_r. f_i counts
and has no gradient; the gradient comes through P_i. Paper and code disagree here: eq. 18 ranks the
scores without bias and without node limit, while Megatron and torchtitan count the experts that
were actually selected. This is eq. 18.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.fp8 import QuantizedTensor, fused_experts
from dsv3.fp8.experts import can_fuse
from dsv3.grouped import can_group
from dsv3.kernels.operations import combine, combine_loops, router
from dsv3.layers import SwiGLU
from dsv3.parallel.experts import Holding, experts_of
from dsv3.parallel.tensor import TensorGroup
from dsv3.plain import wide_linear
from dsv3.precision import Normed, Precision, unquantized


class Router(nn.Module):
    """The gate: which experts a token goes to, and with which weights; never in few bits."""

    def __init__(self, config: ModelConfig, precision: Precision, device=None):
        super().__init__()
        self.config, self.precision = config, precision
        wide = dict(dtype=torch.float32, device=device)
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, **wide))  # e_i, (N_r, d)
        bias = torch.empty(config.n_routed_experts, **wide) if config.gate_bias else None
        self.register_buffer("bias", bias)  # b_i; no gradient moves it

    def forward(
        self, u: Float[Tensor, "*lead d"]
    ) -> tuple[Float[Tensor, "*lead k"], Int[Tensor, "*lead k"], Float[Tensor, ""] | None]:
        """Of each token, the weights (unrounded) and the numbers of its k = K_r experts; and, where
        a gradient is asked for, the balance loss of these sequences (eq. 17 without alpha)."""
        if self.precision.in_kernels(u, self.weight):
            return (*self.in_kernel(u), None)
        scores = self.scores(u)
        chosen = self.choose(scores)
        weights = scores.gather(-1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # eq. 13
        balance = None
        if scores.requires_grad:
            balance = sequence_balance(scores, self.config.num_experts_per_tok)
        return weights * self.config.routed_scaling_factor, chosen, balance

    def in_kernel(
        self, u: Float[Tensor, "*lead d"]
    ) -> tuple[Float[Tensor, "*lead k"], Int[Tensor, "*lead k"]]:
        """The same weights and experts in one launch, on a GPU."""
        c = self.config
        return router(
            u,
            self.weight,
            self.bias,
            c.n_group,
            c.topk_group,
            c.num_experts_per_tok,
            c.scoring_func,
            c.norm_topk_prob,
            c.routed_scaling_factor,
        )

    def scores(self, u: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead experts"]:
        """Affinities s_i,t of each token to all N_r experts (eq. 15)."""
        logits = wide_linear(u, self.weight, self.precision.sums(u.device))
        return (
            logits.sigmoid()
            if self.config.scoring_func == "sigmoid"  # eq. 15
            else logits.softmax(-1)
        )

    def choose(self, scores: Float[Tensor, "*lead experts"]) -> Int[Tensor, "*lead k"]:
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
        self, biased: Float[Tensor, "*lead experts"]
    ) -> tuple[Float[Tensor, "*lead groups"], Bool[Tensor, "*lead groups"]]:
        """What each group counts as, its two best biased scores together (without a bias: its
        best score), and whether it is one of the M best (TR 2.1.2)."""
        grouped = biased.unflatten(-1, (self.config.n_group, -1))  # (..., G, N_r/G)
        if self.bias is None:
            strength = grouped.amax(-1)
        else:
            strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = strength.topk(self.config.topk_group, dim=-1).indices
        return strength, torch.zeros_like(strength, dtype=torch.bool).scatter(-1, best, True)


def sequence_balance(scores: Float[Tensor, "*lead t experts"], k: int) -> Float[Tensor, ""]:
    """sum_i f_i P_i (eq. 17-20 without alpha), the mean over sequences; 1 when balanced.

    scores: affinities s_i,t (eq. 15) of the t tokens of each sequence, without bias. k: K_r.
    """
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)
    f = chosen.mean(-2) * (scores.shape[-1] / k)  # eq. 18
    p = (scores / scores.sum(-1, keepdim=True)).mean(-2)  # eq. 19, 20
    return (f * p).sum(-1).mean()  # eq. 17


class Experts(nn.Module):
    """This rank's routed experts, stacked: w13 (E, 2, inner, d) and w2 (E, d, inner).

    Each expert is a SwiGLU; w1 and w3 lie side by side so that one product serves both. A
    state_dict names them one by one, as checkpoints do: "7.w1.weight" is expert 7's.

    layer: which layer's they are, where a plan for copies asks (``dsv3.parallel.experts``).
    held: the numbers of this rank's experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        group: TensorGroup,
        device=None,
        layer: int | None = None,
    ):
        super().__init__()
        self.precision = precision
        shared_out = experts_of(group)
        self.visited = shared_out is not None  # by tokens that travel
        if shared_out is None:
            group.split(config.n_routed_experts, "n_routed_experts")
            self.holding, rank = Holding.even(config.n_routed_experts, group.size), group.rank
        else:
            self.holding = shared_out.holding(config.n_routed_experts, layer)
            rank = shared_out.rank
        self.held = self.holding.held[rank]
        self.count, self.first = len(self.held), rank * self.holding.width
        self.total = self.holding.width * len(self.holding.held)
        d, inner = config.hidden_size, config.moe_intermediate_size
        self.w13, w13_scale = precision.room((self.count, 2, inner, d), device)
        self.w2, w2_scale = precision.room((self.count, d, inner), device)
        self.register_buffer("w13_scale", w13_scale)
        self.register_buffer("w2_scale", w2_scale)
        self.register_state_dict_post_hook(_name_experts)
        self.register_load_state_dict_pre_hook(_take_experts)

    def forward(
        self,
        u: Float[Tensor, "n d"] | QuantizedTensor,
        weights: Float[Tensor, "n k"],
        chosen: Int[Tensor, "n k"],
    ) -> Float[Tensor, "n d"]:
        """The weighted sum of my experts' outputs for each token, unrounded.

        A partial sum over the ranks. Tokens are sorted by expert, so that an expert meets all of
        its tokens in one product and nobody waits for a token that chose somebody else. What
        stands in the rows of other ranks' choices is junk, and counts as zero.

        chosen: numbers of experts, or, where some are held more than once, of their slots.
        """
        order, mine, ends = self.sort_by_expert(chosen)
        token = order // chosen.shape[1]
        y = self.swiglu(self.precision.operand(u).index_select(0, token), ends)
        if self.precision.in_kernels(y, weights):
            return combine(y, weights, order, ends[-1:])
        if self.precision.in_loops(y, weights):
            return combine_loops(y, weights, order, ends[-1:])
        if mine is not None:
            y = y.masked_fill(~mine[:, None], 0.0)
        y = y * weights.flatten()[order, None]
        return y.new_zeros(len(u), y.shape[1]).index_add(0, token, y)

    def sort_by_expert(
        self, chosen: Int[Tensor, "n k"]
    ) -> tuple[Int[Tensor, " choices"], Bool[Tensor, " choices"] | None, Int[Tensor, " experts"]]:
        """All choices in the order of my experts: which choice comes where, whether it is one of
        mine (None: all are), and where each expert's choices end. Other ranks' come last, or are
        left out where tokens travel: there most are not mine, and junk has a gradient too."""
        local, mine = chosen.flatten(), None
        if self.count < self.total:
            local = local - self.first
            local = local.where((local >= 0) & (local < self.count), self.count)
        local, order = local.sort(stable=True)
        if self.count < self.total:
            mine = local < self.count
        experts = torch.arange(self.count, device=chosen.device)
        ends = torch.searchsorted(local, experts, right=True)
        if mine is not None and self.visited:
            order, mine = order[: int(ends[-1])], None
        return order, mine, ends

    def swiglu(
        self, x: Float[Tensor, "choices d"] | QuantizedTensor, ends: Int[Tensor, " experts"]
    ) -> Float[Tensor, "choices d"]:
        """w2( silu(w1 x) * w3 x ) of rows sorted by expert, each by its own expert, unrounded.

        ends: where each of my experts' rows end; what follows the last is junk.
        """
        p = self.precision
        w13, w2 = p.matrix(self.w13, self.w13_scale), p.matrix(self.w2, self.w2_scale)
        fused = fused_experts(x, w13, w2, ends)
        if fused is not None:
            return fused
        gate, up = p.each(x, w13, ends).chunk(2, dim=-1)
        return p.each_wide(F.silu(gate) * up, w2, ends)

    @property
    def waits(self) -> bool:
        """Whether a pass has to know on the host how many rows each expert has."""
        p = self.precision
        if p.quantized:
            return not can_fuse(
                p.matrix(self.w13, self.w13_scale), p.matrix(self.w2, self.w2_scale)
            )
        row = torch.empty(1, 0, dtype=p.dtype, device=self.w13.device)
        return not all(can_group(row, stack) for stack in (self.w13.flatten(1, 2), self.w2))

    def places(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Of each matrix of an expert: its name, its stack, its place there."""
        for index, expert in enumerate(self.held):
            for matrix, stack, place in (
                ("w1", "w13", (index, 0)),
                ("w3", "w13", (index, 1)),
                ("w2", "w2", (index,)),
            ):
                yield f"{expert}.{matrix}.", stack, place


class MoE(nn.Module):
    """Shared experts for every token, routed experts by choice (eq. 12, without the residual)."""

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        group: TensorGroup,
        device=None,
        layer: int | None = None,
    ):
        super().__init__()
        self.precision, self.group = precision, group
        self.gate = Router(config, precision, device)
        self.experts = Experts(config, precision, group, device, layer)
        self.shared_experts = SwiGLU(
            config.hidden_size,
            config.n_shared_experts * config.moe_intermediate_size,
            precision,
            group,
            what="n_shared_experts * moe_intermediate_size",
            device=device,
        )

    def forward(self, u: Float[Tensor, "b s d"] | Normed) -> Float[Tensor, "b s d"]:
        """Both sums share one rounding, and one all-reduce unless tokens travel to experts."""
        flat = self.precision.operand(u).flatten(0, 1)  # what all experts multiply
        u = unquantized(u)
        weights, chosen, _ = self.gate(u)  # training hears the balance loss by a hook
        weights, chosen = weights.flatten(0, 1), chosen.flatten(0, 1)
        shared = self.shared_experts.partial_sum(flat)
        if self.group.experts is None:
            out = self.group.all_reduce(self.experts(flat, weights, chosen) + shared)  # eq. 12
        else:
            out = self.at_experts(u.flatten(0, 1), weights, chosen) + self.group.all_reduce(shared)
        return out.to(u.dtype).view(u.shape)

    def at_experts(
        self, u: Float[Tensor, "n d"], weights: Float[Tensor, "n k"], chosen: Int[Tensor, "n k"]
    ) -> Float[Tensor, "n d"]:
        """The weighted sum of all chosen experts' outputs, on whichever ranks those are."""
        group = experts_of(self.group)
        assert group is not None
        mine, weights, chosen = (group.share(x) for x in (u, weights, chosen))
        parts = self.precision.parts(self.precision.operand(mine))  # in fp8, codes travel
        arrived = group.dispatch(parts, weights, chosen, self.experts.holding, self.precision.wire)
        operand = self.precision.of_parts(*arrived.x)
        sums = self.experts(operand, arrived.weights, arrived.slots)
        return group.gather(group.combine(sums, arrived), len(u))


# A state_dict names experts one by one; in memory they lie in stacks. ----------------------------


def _name_experts(experts: Experts, state: dict[str, Tensor], prefix: str, *_) -> None:
    """After state_dict(): views of single matrices in the place of the stacks."""
    stacks = {
        name: state.pop(prefix + name)
        for name in ("w13", "w2", "w13_scale", "w2_scale")
        if prefix + name in state
    }
    for name, stack, place in experts.places():
        state[f"{prefix}{name}weight"] = stacks[stack][place]
        if stack + "_scale" in stacks:
            state[f"{prefix}{name}scale"] = stacks[stack + "_scale"][place]


@torch.no_grad()
def _take_experts(
    experts: Experts,
    state: dict[str, Tensor],
    prefix: str,
    metadata,
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Before load_state_dict(): each matrix to its place in the stacks, in the precision's form.

    One by one, so that a layer's experts need not lie in memory twice.
    """
    stacks = dict(experts.named_parameters(recurse=False)) | dict(experts.named_buffers())
    unexpected += [prefix + name for name in stacks if prefix + name in state]
    for name, stack, place in experts.places():
        key = f"{prefix}{name}weight"
        if key not in state:
            missing.append(key)
            continue
        stored = experts.precision.taken(
            key, state.pop(key), state.pop(f"{prefix}{name}scale", None)
        )
        for room, value in zip((stacks[stack], stacks.get(stack + "_scale")), stored, strict=True):
            if room is None or value is None:
                continue
            if room[place].shape != value.shape:
                errors.append(
                    f"size mismatch for {key}: copying {list(value.shape)} to "
                    f"{list(room[place].shape)}"
                )
            else:
                room[place].copy_(value)
    state.update({prefix + name: stack.detach() for name, stack in stacks.items()})
