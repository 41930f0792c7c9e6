"""The router (eq. 13 to 16) in one kernel: scores, bias, groups, the best experts, their weights.

In plain torch it is a dozen small operations on a few hundred numbers a token, each a launch that
takes longer than its work. Here one program has some tokens' scores of all experts before it:

    scores = sigmoid(u W^T), or their softmax;   biased = scores + bias
    a group counts as its two best biased scores together (without a bias: its best score)
    the K_r best of the M best groups;   weights of the scores alone, normalised, scaled

Experts of closed groups are out by -inf. Of equals the one with the lower number goes first, among
experts and among groups; a NaN is larger than any number. ``torch.topk`` promises no order of
equals, so the specification sorts, and the kernel takes one maximum after the other. Maxima are
taken of integers with the order of the floats: one comparison is then right for NaN and infinity.

u is bfloat16 and W float32: W is cut into three bfloat16 parts, which are all of it
(``bf16_parts``), so every product on the tensor cores is exact and sums are float32. For few tokens
one multiprocessor would read all of W alone; then programs share out the depth, and a second kernel
adds their parts in their order and chooses. Where each part begins is decided by the depth alone:
for many tokens one program adds up the same parts in the same order, and a token's experts and
weights are the same, bit for bit, alone and in a batch of thousands.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.kernels.bf16_parts import operand, to_bf16
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input, multiprocessors, power_of_two

_DEPTH = 64 if INTERPRETING else 32
# Of the depth, what is added up in one go: a 28th of 7,168.
_PART = 256


@dataclass(frozen=True)
class Choice:
    """How a router chooses. groups, open_groups: G and M; k: experts a token; scoring: "sigmoid" or
    "softmax"; normalized: whether weights sum to 1; scaling: what they are multiplied by."""

    groups: int
    open_groups: int
    k: int
    scoring: str
    normalized: bool
    scaling: float


def router_spec(
    u: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, choice: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel computes, in plain torch: weights (n, k) float32 and experts (n, k) int64."""
    logits = u.float() @ weight.T
    scores = logits.sigmoid() if choice.scoring == "sigmoid" else logits.softmax(-1)
    biased = scores if bias is None else scores + bias
    if choice.groups > 1:
        grouped = biased.unflatten(-1, (choice.groups, -1))
        if bias is None or grouped.shape[-1] == 1:
            strength = grouped.amax(-1)
        else:
            strength = grouped.topk(2).values.sum(-1)
        opened = _best(strength, choice.open_groups)
        closed = torch.ones_like(strength, dtype=torch.bool).scatter(-1, opened, False)
        biased = biased.masked_fill(
            closed.repeat_interleave(grouped.shape[-1], dim=-1), float("-inf")
        )
    chosen = _best(biased, choice.k)
    weights = scores.gather(-1, chosen)
    if choice.normalized:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * choice.scaling, chosen


def _best(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.sort(stable=True, dim=-1, descending=True).indices[..., :count]


@triton.jit
def ordered(x):
    """Floats to integers of the same order; NaN largest, both zeros equal."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    bits = tl.where(x != x, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choose(
    logits,
    row,
    rows,
    bias_ptr,
    weight_out_ptr,
    chosen_ptr,
    scaling,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS_WIDE: tl.constexpr,
    EACH_WIDE: tl.constexpr,
    OPEN: tl.constexpr,
    K: tl.constexpr,
    K_WIDE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """From logits (ROWS, GROUPS_WIDE * EACH_WIDE) to what is stored: experts stand in their groups,
    and groups are padded to powers of two."""
    NOBODY = -2147483648  # below every float
    CLOSED = -2139095041  # ordered(-inf)
    column = tl.arange(0, GROUPS_WIDE * EACH_WIDE)
    is_expert = ((column // EACH_WIDE < GROUPS) & (column % EACH_WIDE < EACH))[None, :]
    if SIGMOID:
        scores = tl.sigmoid(logits)
    else:
        logits = tl.where(is_expert, logits, float("-inf"))
        scores = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = scores / tl.sum(scores, axis=1)[:, None]
    biased = scores
    if BIASED:
        expert = (column // EACH_WIDE) * EACH + column % EACH_WIDE
        bias = tl.load(bias_ptr + expert[None, :], mask=is_expert, other=0.0)
        biased = scores + bias
    key = tl.where(is_expert, ordered(biased), NOBODY)

    if GROUPS > 1:
        grouped = tl.where(is_expert, biased, float("-inf"))
        grouped = tl.reshape(grouped, (ROWS, GROUPS_WIDE, EACH_WIDE))
        strength = tl.max(grouped, axis=2)
        if BIASED and EACH > 1:
            place = tl.arange(0, EACH_WIDE)[None, None, :]
            first = tl.min(tl.where(grouped == strength[:, :, None], place, EACH_WIDE), axis=2)
            others = tl.where(place == first[:, :, None], float("-inf"), grouped)
            strength += tl.max(others, axis=2)
        group = tl.arange(0, GROUPS_WIDE)[None, :]
        left = tl.where(group < GROUPS, ordered(strength), NOBODY)
        opened = tl.zeros((ROWS, GROUPS_WIDE), dtype=tl.int32)
        for _ in tl.static_range(OPEN):
            best = tl.max(left, axis=1)[:, None]
            here = tl.min(tl.where(left == best, group, GROUPS_WIDE), axis=1)[:, None]
            opened = tl.where(group == here, 1, opened)
            left = tl.where(group == here, NOBODY, left)
        is_open = tl.broadcast_to(opened[:, :, None], (ROWS, GROUPS_WIDE, EACH_WIDE))
        is_open = tl.reshape(is_open, (ROWS, column.shape[0]))
        key = tl.where(is_expert & (is_open == 0), CLOSED, key)

    pick = tl.arange(0, K_WIDE)[None, :]
    weights = tl.zeros((ROWS, K_WIDE), dtype=tl.float32)
    chosen = tl.zeros((ROWS, K_WIDE), dtype=tl.int32)
    for number in tl.static_range(K):
        best = tl.max(key, axis=1)[:, None]
        here = tl.min(tl.where(key == best, column[None, :], column.shape[0]), axis=1)[:, None]
        is_here = column[None, :] == here
        score = tl.sum(tl.where(is_here, scores, 0.0), axis=1)[:, None]
        weights = tl.where(pick == number, score, weights)
        chosen = tl.where(pick == number, (here // EACH_WIDE) * EACH + here % EACH_WIDE, chosen)
        key = tl.where(is_here, NOBODY, key)
    if NORMALIZED:
        weights = weights / (tl.sum(weights, axis=1)[:, None] + 1e-20)
    at = row.to(tl.int64)[:, None] * K + pick
    inside = (row < rows)[:, None] & (pick < K)
    tl.store(weight_out_ptr + at, weights * scaling, mask=inside)
    tl.store(chosen_ptr + at, chosen.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def router_kernel(
    u_ptr,
    w_ptr,
    bias_ptr,
    part_ptr,
    weight_out_ptr,
    chosen_ptr,
    rows,
    width,
    scaling,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS_WIDE: tl.constexpr,
    EACH_WIDE: tl.constexpr,
    OPEN: tl.constexpr,
    K: tl.constexpr,
    K_WIDE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    PART: tl.constexpr,
    SPLIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, depth = tl.arange(0, GROUPS_WIDE * EACH_WIDE), tl.arange(0, DEPTH)
    is_expert = (column // EACH_WIDE < GROUPS) & (column % EACH_WIDE < EACH)
    expert = (column // EACH_WIDE) * EACH + column % EACH_WIDE
    begin, end = 0, width
    if SPLIT:
        begin = tl.program_id(1) * PART
        end = tl.minimum(begin + PART, width)
    whole = tl.zeros((ROWS, GROUPS_WIDE * EACH_WIDE), dtype=tl.float32)
    logits = tl.zeros_like(whole)
    for start in range(begin, end, DEPTH):
        here = start + depth
        u = tl.load(
            u_ptr + row.to(tl.int64)[:, None] * width + here[None, :],
            mask=(row < rows)[:, None] & (here < end)[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + expert[None, :] * width + here[:, None],
            mask=is_expert[None, :] & (here < end)[:, None],
            other=0.0,
        )
        u = operand(u, INTERPRETED)
        high = to_bf16(w, INTERPRETED)
        w -= high.to(tl.float32)
        middle = to_bf16(w, INTERPRETED)
        low = to_bf16(w - middle.to(tl.float32), INTERPRETED)
        logits = tl.dot(u, high, logits)
        logits = tl.dot(u, middle, logits)
        logits = tl.dot(u, low, logits)
        if not SPLIT:  # noqa: SIM102 - a constant, then a question
            if (start + DEPTH) % PART == 0:
                whole += logits
                logits = tl.zeros_like(whole)
    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * rows + row[:, None]) * column.shape[0] + column
        tl.store(part_ptr + at, logits, mask=(row < rows)[:, None])
    else:
        choose(
            whole + logits,
            row,
            rows,
            bias_ptr,
            weight_out_ptr,
            chosen_ptr,
            scaling,
            GROUPS,
            EACH,
            GROUPS_WIDE,
            EACH_WIDE,
            OPEN,
            K,
            K_WIDE,
            SIGMOID,
            BIASED,
            NORMALIZED,
            ROWS,
        )


@triton.jit(do_not_specialize=["rows", "splits"])
def router_choose_kernel(
    part_ptr,
    bias_ptr,
    weight_out_ptr,
    chosen_ptr,
    rows,
    splits,
    scaling,
    GROUPS: tl.constexpr,
    EACH: tl.constexpr,
    GROUPS_WIDE: tl.constexpr,
    EACH_WIDE: tl.constexpr,
    OPEN: tl.constexpr,
    K: tl.constexpr,
    K_WIDE: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALIZED: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, GROUPS_WIDE * EACH_WIDE)
    logits = tl.zeros((ROWS, GROUPS_WIDE * EACH_WIDE), dtype=tl.float32)
    for split in range(splits):
        at = (split * rows + row[:, None]).to(tl.int64) * column.shape[0] + column
        logits += tl.load(part_ptr + at, mask=(row < rows)[:, None], other=0.0)
    choose(
        logits,
        row,
        rows,
        bias_ptr,
        weight_out_ptr,
        chosen_ptr,
        scaling,
        GROUPS,
        EACH,
        GROUPS_WIDE,
        EACH_WIDE,
        OPEN,
        K,
        K_WIDE,
        SIGMOID,
        BIASED,
        NORMALIZED,
        ROWS,
    )


def router(
    u: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    choice: Choice,
    *,
    split: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (..., k) float32 and experts (..., k) int64 of each token.

    u: (..., d) bfloat16; weight: (experts, d) and bias: (experts,) or None, float32. split: whether
    programs share out the depth (default: where tiles of tokens leave most of the device idle).
    """
    check_input(u, "router", (torch.bfloat16,))
    check_input(weight, "router", (torch.float32,))
    experts, width = weight.shape
    if u.shape[-1] != width or experts % choice.groups:
        raise DSV3Error(
            "shapes do not fit",
            where="router",
            found=[tuple(u.shape), tuple(weight.shape)],
            expected=f"rows of {width}, and a multiple of {choice.groups} experts",
        )
    shape = (*u.shape[:-1], choice.k)
    weights = torch.empty(shape, dtype=torch.float32, device=u.device)
    chosen = torch.empty(shape, dtype=torch.int64, device=u.device)
    rows = u.numel() // width
    if rows == 0:
        return weights, chosen
    each = experts // choice.groups
    # tl.dot wants 16 columns or more.
    groups_wide = power_of_two(choice.groups)
    each_wide = max(power_of_two(each), cdiv(16, groups_wide))
    rule = dict(
        GROUPS=choice.groups,
        EACH=each,
        GROUPS_WIDE=groups_wide,
        EACH_WIDE=each_wide,
        OPEN=choice.open_groups,
        K=choice.k,
        K_WIDE=power_of_two(choice.k),
        SIGMOID=choice.scoring == "sigmoid",
        BIASED=bias is not None,
        NORMALIZED=choice.normalized,
        ROWS=16,
    )
    tiles = cdiv(rows, 16)
    if split is None:
        split = 4 * tiles <= multiprocessors(u.device)
    splits = cdiv(width, _PART) if split else 1
    parts = torch.empty(
        (splits, rows, groups_wide * each_wide) if splits > 1 else 0,
        dtype=torch.float32,
        device=u.device,
    )
    bias = weight if bias is None else bias.contiguous()
    router_kernel[(tiles, splits)](
        u.contiguous(),
        weight.contiguous(),
        bias,
        parts,
        weights,
        chosen,
        rows,
        width,
        choice.scaling,
        **rule,
        DEPTH=_DEPTH,
        PART=_PART,
        SPLIT=splits > 1,
        INTERPRETED=INTERPRETING,
    )
    if splits > 1:
        router_choose_kernel[(tiles,)](
            parts, bias, weights, chosen, rows, splits, choice.scaling, **rule
        )
    return weights, chosen
