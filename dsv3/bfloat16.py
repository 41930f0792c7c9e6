"""Products of bfloat16 numbers, on a processor with units for them or without.

A bfloat16 is a float32 without its last 16 bits, and the product of two fits into a float32. So
what such a unit computes, float32 can: widen both operands, sum in float32, round once at the end.
Where a processor has no units, torch does something like it number by number: 16 rows take 6 times,
1,536 rows 11 times as long as in float32, attention forward and back 5 times (one AVX2 machine,
torch 2.13). Widening whole operands costs one more pass over them and leaves the product to the
library's best code: 2.0 and 1.2 times the time of float32. A product rounds at the same points.
Attention rounds less: inside, torch's own form rounds its weights and, on the way back, the slopes
of its scores.
"""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Bool, Float
from torch import Tensor


def _cpu_has_units() -> bool:
    found = torch.cpu.get_capabilities()
    if found.get("architecture") == "x86_64":
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return bool(found.get("bf16", True))


# Asked once, for a compiler does not follow the question. Taken for granted where torch cannot say.
CPU_HAS_UNITS = _cpu_has_units()
# A CPU on which bfloat16 takes this many times as long as float32 had better use float32.
SLOW = 2.0
# To widen a matrix pays from 2 rows (512 x 512) to 8 (1024 x 2048) on, where that was measured.
_ROWS_WORTH_IT = 4


def has_units(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast there; every GPU is taken to have units for them."""
    return device.type != "cpu" or CPU_HAS_UNITS


def widens(x: Tensor) -> bool:
    """Whether x is to be widened for a product."""
    return x.dtype == torch.bfloat16 and not has_units(x.device)


def linear(
    x: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "*lead out"]:
    """x W^T in x's dtype, with W rounded to it: summed in float32, rounded once."""
    weight = weight.to(x.dtype)
    if not widens(x) or x.numel() <= _ROWS_WORTH_IT * x.shape[-1]:
        return F.linear(x, weight)
    flat = widened_product(x.reshape(-1, x.shape[-1]), weight.mT)
    return flat.view(*x.shape[:-1], len(weight))


# One operation, so that what a backward pass or ``dsv3.recompute`` keeps of it is bfloat16.
@torch.library.custom_op(
    "dsv3::widened_product", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor"
)
def widened_product(
    a: BFloat16[Tensor, "rows inner"], b: BFloat16[Tensor, "inner cols"]
) -> BFloat16[Tensor, "rows cols"]:
    """a b, summed in float32, rounded once."""
    return (a.float() @ b.float()).to(a.dtype)


@widened_product.register_fake
def _(a, b):
    return a.new_empty(len(a), b.shape[1])


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _slopes(ctx, grad):
    a, b = ctx.saved_tensors
    of_a = widened_product(grad, b.mT) if ctx.needs_input_grad[0] else None
    # In this order, for b is a weight that was transposed: its slope comes out as the weight lies,
    # as those of other products do, and sums over it have their order.
    of_b = widened_product(grad.mT, a).mT if ctx.needs_input_grad[1] else None
    return of_a, of_b


widened_product.register_autograd(_slopes, setup_context=_keep)


def attention(
    q: Float[Tensor, "b heads s d"],
    k: Float[Tensor, "b heads t d"],
    v: Float[Tensor, "b heads t d"],
    mask: Bool[Tensor, "..."] | None,
    causal: bool,
    scale: float,
) -> Float[Tensor, "b heads s d"]:
    """torch's attention, in q's dtype. mask: True where a query may look."""
    wide = (x.float() for x in (q, k, v)) if widens(q) else (q, k, v)
    o = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, is_causal=causal)
    return o.to(q.dtype)


@cache
def slowdown() -> float:
    """A product of many rows in bfloat16 on this CPU takes so many times as long as in float32.

    Measured once a process, in some hundredths of a second, on 256 x 256 matrices; the best of
    five, since noise only adds time.
    """

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(256, 256, dtype=dtype)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            linear(a, a)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) / seconds(torch.float32)
