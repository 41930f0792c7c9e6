"""The sum over a token's experts (eq. 12), in a fixed order.

Experts' outputs lie sorted by expert. Added into the tokens' rows by many programs at once, a token
would be summed in the order in which the programs happen to come, and two runs would differ. Here
each program has its own tokens and fetches what belongs to them: ``where_stands`` turns the sorting
around and says in which row each choice came to lie.

    out = sum over the token's rows, from the first to the last, of weight * y[row]

From the first row to the last is from the lowest expert to the highest: the order in which
``index_add`` on a CPU meets them, so both give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input, power_of_two


def where_stands(order: torch.Tensor, choices: int) -> torch.Tensor:
    """order: which choice comes where, some or all of ``choices``; turned around: where each choice
    came to lie, -1 for those that did not."""
    places = torch.empty(choices, dtype=torch.int64, device=order.device)
    if len(order) < choices:
        places.fill_(-1)
    return places.scatter_(0, order, torch.arange(len(order), device=order.device))


def combine_spec(
    y: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, used: torch.Tensor | int
) -> torch.Tensor:
    """What the kernel computes, in plain torch. y: (rows, d); weights, places: (n, k); used: rows
    of y that count, the first ones."""
    out = torch.zeros(len(weights), y.shape[1], device=y.device)
    for row, order in enumerate(places.argsort(-1)):
        for pick in order.tolist():
            place = int(places[row, pick])
            if 0 <= place < int(used):
                out[row] += y[place].float() * weights[row, pick]
    return out


@triton.jit
def combine_kernel(
    y_ptr,
    weight_ptr,
    place_ptr,
    used_ptr,
    out_ptr,
    width,
    K: tl.constexpr,
    K_WIDE: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    pick = tl.arange(0, K_WIDE)
    FAR = 1 << 62
    used = tl.load(used_ptr).to(tl.int64)
    left = tl.load(place_ptr + token * K + pick, mask=pick < K, other=-1)
    left = tl.where((left >= 0) & (left < used), left, FAR)
    weights = tl.load(weight_ptr + token * K + pick, mask=pick < K, other=0.0)
    acc = tl.zeros((COLS,), dtype=tl.float32)
    for _ in tl.static_range(K):
        place = tl.min(left, axis=0)
        is_here = left == place
        is_there = place < FAR
        weight = tl.sum(tl.where(is_here & is_there, weights, 0.0), axis=0)
        y_at = y_ptr + tl.where(is_there, place, 0) * width
        y = tl.load(y_at + col, mask=(col < width) & is_there, other=0.0)
        acc += y.to(tl.float32) * weight
        left = tl.where(is_here, FAR, left)
    tl.store(out_ptr + token * width + col, acc, mask=col < width)


def combine(
    y: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, used: torch.Tensor
) -> torch.Tensor:
    """Each token's weighted sum, (n, d) float32.

    y: (rows, d) sorted by expert, float32 or bfloat16; weights: (n, k) float32; places: (n, k)
    int64, the row of y of each choice or -1; used: one integer on the device, rows of y that count.
    """
    check_input(y, "combine", (torch.float32, torch.bfloat16))
    check_input(weights, "combine", (torch.float32,))
    (n, k), width = weights.shape, y.shape[1]
    if places.shape != weights.shape:
        raise DSV3Error(
            "shapes do not fit",
            where="combine",
            found=[tuple(t.shape) for t in (y, weights, places)],
            expected=[("rows", width), (n, k), (n, k)],
        )
    out = torch.empty(n, width, dtype=torch.float32, device=y.device)
    if out.numel() == 0:
        return out
    cols = min(1024, power_of_two(width))
    combine_kernel[(n, cdiv(width, cols))](
        y.contiguous(),
        weights.contiguous(),
        places.contiguous(),
        used,
        out,
        width,
        K=k,
        K_WIDE=power_of_two(k),
        COLS=cols,
        # A product and a sum in one instruction would round once where the plain form rounds twice.
        **({} if INTERPRETING else {"enable_fp_fusion": False}),
    )
    return out
