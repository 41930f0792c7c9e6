"""Products of bfloat16 numbers, on a processor with units for them or without.

A bfloat16 is a float32 without its last 16 bits, and the product of two fits into a float32. So
what such a unit computes, float32 can: widen both operands, sum in float32, round once at the end.
Where a processor has no units, torch does something like it number by number, in 3 to 10 times the
time of a float32 product (in attention's backward pass 5 times; one AVX2 machine, torch 2.13).
Widening whole operands costs one more pass over them and leaves the product to the library's best
code: 1.1 to 1.4 times the time of float32. It rounds at the same points; only attention's weights,
which torch's own form rounds inside, stay float32.
"""

from __future__ import annotations

import time
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from dsv3.backward import asks_gradient


def _cpu_has_units() -> bool:
    found = torch.cpu.get_capabilities()
    x86 = found.get("architecture") == "x86_64"
    return not x86 or found["avx512_bf16"] or found["amx_bf16"]


# Asked once, for a compiler does not follow the question. Elsewhere than on x86: taken for granted.
CPU_HAS_UNITS = _cpu_has_units()
# A CPU on which bfloat16 takes this many times as long as float32 had better use float32.
SLOW = 2.0
# To widen a matrix takes as long as to multiply it by so many rows of bfloat16 numbers.
_ROWS_WORTH_IT = 4


def linear(x: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "..."]:
    """x W^T in x's dtype, with W rounded to it."""
    weight = weight.to(x.dtype)
    if not widens(x) or x.numel() <= _ROWS_WORTH_IT * x.shape[-1]:
        return F.linear(x, weight)
    return _widened(x.reshape(-1, x.shape[-1]), weight, None).view(*x.shape[:-1], -1)


def grouped(
    x: Float[Tensor, "rows in"],
    stack: Float[Tensor, "groups out in"],
    ends: Int32[Tensor, " groups"],
) -> Float[Tensor, "rows out"]:
    """Each group's rows times its own matrix; ``ends``: where its rows end. Both in one dtype."""
    if not widens(x) or len(x) <= _ROWS_WORTH_IT * len(stack):
        return F.grouped_mm(x, stack.mT, offs=ends)
    return _widened(x, stack, ends)


def attention(
    q: Float[Tensor, "b heads s d"],
    k: Float[Tensor, "b heads t d"],
    v: Float[Tensor, "b heads t d"],
    mask: Bool[Tensor, "..."] | None,
    causal: bool,
    scale: float,
) -> Float[Tensor, "b heads s d"]:
    """torch's attention, in q's dtype."""
    wide = (x.float() for x in (q, k, v)) if widens(q) else (q, k, v)
    o = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, is_causal=causal)
    return o.to(q.dtype)


def has_units(device: torch.device) -> bool:
    """Whether products in bfloat16 are fast there; every GPU is taken to have units for them."""
    return device.type != "cpu" or CPU_HAS_UNITS


def widens(x: Tensor) -> bool:
    """Whether x is to be widened for a product."""
    return x.dtype == torch.bfloat16 and not has_units(x.device)


def _widened(x: Tensor, weight: Tensor, ends: Tensor | None) -> Tensor:
    if asks_gradient(x, weight):
        return _Widened.apply(x, weight, ends)
    return _multiply(x.float(), weight.float().mT, ends).to(x.dtype)


def _multiply(a: Tensor, b: Tensor, ends: Int[Tensor, " groups"] | None) -> Tensor:
    return a @ b if ends is None else F.grouped_mm(a, b, offs=ends)


class _Widened(torch.autograd.Function):
    """Kept from forward to backward: the operands as they came, not widened."""

    @staticmethod
    def forward(ctx, x, weight, ends):
        ctx.save_for_backward(x, weight, ends)
        return _multiply(x.float(), weight.float().mT, ends).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, ends = ctx.saved_tensors
        grad, of_x, of_weight = grad.float(), None, None
        if ctx.needs_input_grad[0]:
            of_x = _multiply(grad, weight.float(), ends).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _multiply(grad.mT, x.float(), ends).to(weight.dtype)
        return of_x, of_weight, None


@cache
def slowdown() -> float:
    """A product in bfloat16 on this CPU takes so many times as long as in float32.

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
