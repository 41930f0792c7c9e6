"""How kernels round: to E4M3 with a tile's scale, and to bfloat16. One source for all of them.

The rounding is done with integers, although a GPU has an instruction for it. The same bits must
come from every device, and Triton's interpreter casts wrongly (it loses a carry: 124.07 becomes
64) and wraps around above 448; to bfloat16 it cuts off. Division is ``div_rn``, which rounds
correctly; the plain ``/`` on a GPU is off by a bit now and then. The maximum is taken over bit
patterns: as integers NaN is larger than infinity and infinity larger than any number, so one
comparison finds them both, while a maximum of floats may drop NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def round_to_e4m3(value):
    """FP32 to E4M3 codes (int32): nearest, ties to even, saturating at 448, NaN to 0x7F.

    The same integer arithmetic as ``dsv3.fp8.formats.encode_e4m3``, where it is explained.
    """
    bits = value.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    is_nan = magnitude > 0x7F800000
    magnitude = tl.minimum(magnitude, 0x43E00000)
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - 0x3C000000) >> 20
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    return tl.where(is_nan, 0x7F, code) | sign


@triton.jit
def round_to_bf16(value):
    """FP32 to the nearest number of bfloat16, ties to even, still in FP32; NaN to 0x7FC0."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC00000, rounded)
    return rounded.to(tl.float32, bitcast=True)


@triton.jit
def bf16_bits(value):
    """The same as the 16 bits that are stored (int16)."""
    return (round_to_bf16(value).to(tl.int32, bitcast=True) >> 16).to(tl.int16)


@triton.jit
def tile_scale(x, AXIS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """Scales of FP32 tiles that lie along AXIS, and what to divide the tiles by.

    amax / 448, at least 1e-12, or the next power of two. A tile with an infinity or a NaN gets
    the scale NaN and is divided by 1, so that every device writes the same codes.
    """
    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=AXIS)
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    scale = tl.maximum(scale, 1e-12)
    if POWER_OF_TWO:  # a mantissa that is not zero carries into the exponent
        scale_bits = scale.to(tl.int32, bitcast=True)
        scale = ((scale_bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    finite = amax_bits < 0x7F800000
    return tl.where(finite, scale, float("nan")), tl.where(finite, scale, 1.0)


@triton.jit
def tile_codes(x, divisor, negative):
    """E4M3 codes (uint8) of x / divisor; both have the shape of x.

    negative: the sign bit of each number as it was read, in bit 7. A GPU's division makes every
    NaN positive, and its conversions may too.
    """
    code = round_to_e4m3(tl.div_rn(x, divisor))
    return ((code & 0x7F) | (negative & 0x80)).to(tl.uint8)


@triton.jit
def sign_as_read(read):
    """The sign of numbers in FP32 or 16 bits as they came from memory, in bit 7 (int32)."""
    if read.dtype == tl.float32:
        return read.to(tl.int32, bitcast=True) >> 24
    else:
        return read.to(tl.int16, bitcast=True).to(tl.int32) >> 8
