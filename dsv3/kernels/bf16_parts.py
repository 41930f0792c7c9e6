"""Float32 numbers on tensor cores: as a sum of two bfloat16 numbers.

A tensor core multiplies bfloat16, 8 bits of a number, and adds in float32. The attention core
computes in float32 (``dsv3.precision``), and what it reads from a cache is bfloat16 already. So
only one operand of each of its products has bits to lose, and it is cut in two:

    x = high + low,   high = bf16(x),   low = bf16(x - high)
    x . y = high . y + low . y                         for y in bfloat16

The difference is exact, so high + low has 16 bits or more: the error is 2^-17 of x at most, where
bfloat16 alone has 2^-9. It costs a second product, and no memory traffic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv3.kernels.rounding import round_to_bf16


@triton.jit
def to_bf16(x, INTERPRETED: tl.constexpr):
    """Float32 to the nearest bfloat16, ties to even, as an operand of ``tl.dot``.

    The interpreter's ``tl.dot`` takes bfloat16 for integers: there the result stays float32.
    """
    if INTERPRETED:
        return round_to_bf16(x)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def rest_of(x, high, INTERPRETED: tl.constexpr):
    """What of x is not in ``high``, as the second operand."""
    return to_bf16(x - high.to(tl.float32), INTERPRETED)


@triton.jit
def operand(x, INTERPRETED: tl.constexpr):
    """Numbers read as bfloat16, for ``tl.dot``."""
    if INTERPRETED:
        return x.to(tl.float32)
    else:
        return x
