"""E4M3 numbers and power-of-two scales, bit by bit.

FP8 training and inference keep a number in one byte (TR 3.3). E4M3 spends it like this:

    bit   7      6 5 4 3     2 1 0
          sign   exponent    mantissa

    exponent e > 0:  (-1)^sign * 2^(e - 7) * (1 + mantissa / 8)       normal
    exponent e = 0:  (-1)^sign * 2^-6 * (mantissa / 8)                subnormal
    all seven low bits set (0x7F, 0xFF):  NaN.  There is no infinity.

The largest number is 448 = 2^8 * 1.75, the smallest above zero is 2^-9. Neighbours lie 6 to 12.5
percent apart, so a tensor is stored as bytes times a scale, one scale for each block of numbers.

Three things go wrong in careless code, and this module is where they are settled:

* Rounding. A tie goes to the neighbour whose last bit is 0. ``encode_e4m3`` does it with integers
  alone; the Triton kernel does the same, and a test holds both to torch's own cast.
* Range. What lies beyond 448 becomes 448, never NaN, on every version of torch.
* NaN codes. ``decode_e4m3`` returns NaN for them. ``decode_finite``, the fast form inside the
  products, does not look for them and would return 480; so the bytes of a checkpoint are checked
  once, when they are loaded (``QuantizedTensor.check``).

Training keeps one kind of activation in E5M6 (TR 3.3.3): a sign, five bits of exponent and six of
mantissa. It is IEEE's float16 with four bits less of mantissa, so a float16 holds it.

Everything here works on whole tensors and is fast. The plain definition, of these and of other
small formats, one number at a time, is ``dsv3.fp8.small_floats``; a test holds the two together.

A scale in the format "ue8m0" is a power of two. It can be stored in one byte, the exponent + 127
(0xFF is NaN). Its exponent is read from the bits of the float: log2 in FP32 says 10 for
1024 * (1 + 2^-23), where the next power of two is 2^11.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float8e4m3fn, Float16, Float32, Shaped, UInt8
from torch import Tensor

from dsv3.errors import DSV3Error

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
E4M3_NAN = 0x7F
E5M6_MAX = 65024.0  # 2^15 * (2 - 2^-6)
SMALLEST_SCALE = 1e-12  # the scale of a block of zeros; dividing by 0 would give NaN

_INFINITY = 0x7F800000  # bits of +inf in FP32: larger bits are NaN
_MANTISSA = 0x007FFFFF
_MAGNITUDE = 0x7FFFFFFF


def encode_e4m3(x: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """FP32 values to E4M3 codes in integer arithmetic.

    Round to nearest, ties to even; magnitudes above 448 (infinity too) become 448; NaN becomes
    0x7F; the sign is kept, that of zero and NaN as well.
    """
    bits = x.to(torch.float32).view(torch.int32)
    sign = (bits >> 24) & 0x80
    magnitude = bits & _MAGNITUDE
    is_nan = magnitude > _INFINITY
    # The bits of positive floats are ordered as their values, so this is min(|x|, 448).
    magnitude = magnitude.clamp(max=0x43E00000)

    # Normal: drop 20 of the 23 mantissa bits. Adding just under half of the dropped range, plus
    # the lowest bit that stays, rounds to nearest even; a carry runs into the exponent as it
    # should. FP32 counts exponents from -127, E4M3 from -7: take 120 off.
    lowest = (magnitude >> 20) & 1
    normal = (magnitude + 0x7FFFF + lowest - (120 << 23)) >> 20
    # Below 2^-6 codes step by 2^-9, which is the step of FP32 at 2^14: the addition rounds for us.
    shifted = magnitude.view(torch.float32) + 16384.0
    subnormal = shifted.view(torch.int32) - 0x46800000

    code = torch.where(magnitude < 0x3C800000, subnormal, normal)
    code = torch.where(is_nan, E4M3_NAN, code)
    return (code | sign).to(torch.uint8)


def to_e4m3(x: Float32[Tensor, "*shape"]) -> Float8e4m3fn[Tensor, "*shape"]:
    """FP32 values to an E4M3 tensor by torch's cast: what ``encode_e4m3`` does, in one pass.

    The clamp makes it saturate on every version of torch; it lets NaN through. ``x`` is
    overwritten.
    """
    return x.clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)


def round_e4m3(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """FP32 values to the E4M3 values nearest to them: ``encode_e4m3`` and back, without codes.

    Numbers between 2^e and 2^(e+1) step by 2^(e-3), those below 2^-6 by 2^-9. Next to 1.5 * 2^23
    steps FP32 itself counts in whole steps: adding that and taking it off rounds, ties to even.
    ``x`` is overwritten. The sign of a zero is lost.
    """
    x.clamp_(-E4M3_MAX, E4M3_MAX)
    binade = (x.view(torch.int32) & _INFINITY).clamp_(0x3C800000, 0x43800000)  # 2^-6 to 2^8
    anchor = binade.add_((20 << 23) | 0x00400000).view(torch.float32)  # 2^e to 1.5 * 2^(e+20)
    return x.add_(anchor).sub_(anchor)


def round_e5m6(x: Float32[Tensor, "*shape"]) -> Float16[Tensor, "*shape"]:
    """FP32 values to the E5M6 values nearest to them, in float16; ties to even, saturating.

    The four lowest bits of each float16 are 0, so that 12 bits would do. NaN stays NaN.
    """
    bits = x.clamp(-E5M6_MAX, E5M6_MAX).view(torch.int32)
    magnitude = bits & _MAGNITUDE
    # As in encode_e4m3: 17 of 23 mantissa bits go, and below 2^-14 numbers step by 2^-20.
    lowest = (magnitude >> 17) & 1
    normal = (magnitude + 0xFFFF + lowest) & ~0x1FFFF
    subnormal = (magnitude.view(torch.float32) + 8.0) - 8.0
    rounded = torch.where(magnitude < 0x38800000, subnormal, normal.view(torch.float32))
    return torch.where(x.isnan(), x, rounded.copysign(x)).to(torch.float16)


def decode_e4m3(codes: Shaped[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """E4M3 codes (uint8, int8 or float8_e4m3fn) to their FP32 values; NaN codes to NaN."""
    values = decode_finite(codes) * 256.0
    return torch.where(is_nan_code(codes), torch.nan, values)


def decode_finite(
    codes: Shaped[Tensor, "*shape"], out: Float[Tensor, "*shape"] | None = None
) -> Float[Tensor, "*shape"]:
    """E4M3 codes to FP32 values times 2^-8, for codes that are not NaN: the fast form. ``out``,
    where given, takes them in its own dtype.

    Moved left by 7 bits, with its sign on top, a code is a float16. That format counts its
    exponents from -15 instead of -7, hence the factor 2^-8, and its subnormals take in those of
    E4M3. The caller folds the missing 256 into the scale, which makes it free. torch's own cast
    on the CPU takes one number at a time and is some ten times slower.
    """
    half = codes.view(torch.int8).to(torch.int16)  # the sign now fills bits 7 to 15
    half.mul_(128).bitwise_and_(-16512)  # shift by 7; keep bit 15 (sign) and bits 7 to 13
    half = half.view(torch.float16)
    return half.to(torch.float32) if out is None else out.copy_(half)


def is_nan_code(codes: Shaped[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """True where an E4M3 code is NaN (0x7F or 0xFF)."""
    return (codes.view(torch.uint8) & 0x7F) == E4M3_NAN


def has_nan_code(codes: Shaped[Tensor, "*shape"]) -> bool:
    """Whether any code is NaN. A maximum of bytes: many times faster than ``any`` on the CPU."""
    return codes.numel() > 0 and int((codes.view(torch.int8) & 0x7F).max()) == E4M3_NAN


def block_scale(
    amax: Float32[Tensor, "*shape"], scale_format: str, largest: float = E4M3_MAX
) -> Float32[Tensor, "*shape"]:
    """The scale of blocks whose largest magnitudes are ``amax``, for codes up to ``largest``.

    "float32": amax / 448, at least 1e-12. "ue8m0": the smallest power of two not below that.
    A block with an infinity or a NaN in it gets the scale NaN, so that nothing computed from it
    can look like a number. The floor only keeps a division by zero away, on purpose: the released
    kernel takes every maximum for 1e-4 at least, which costs tiles of small values their precision.
    """
    scale = (amax / largest).clamp(min=SMALLEST_SCALE)
    if scale_format == "ue8m0":
        scale = next_power_of_two(scale)
    elif scale_format != "float32":
        raise DSV3Error(
            "unknown scale format",
            where="scale_format",
            found=scale_format,
            expected="float32 or ue8m0",
        )
    return torch.where(amax.isfinite(), scale, torch.nan)


def next_power_of_two(x: Float32[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The smallest power of two >= x, for positive normal FP32 x, from its exponent bits."""
    bits = x.view(torch.int32)
    return ((bits + _MANTISSA) & _INFINITY).view(torch.float32)


def encode_scale(scale: Float32[Tensor, "*shape"], dtype: torch.dtype) -> Shaped[Tensor, "*shape"]:
    """FP32 scales in the dtype they are stored in: float32, float8_e8m0fnu or uint8.

    The last two hold one byte, exponent + 127. Raises DSV3Error for a scale that is not a power
    of two, which they cannot hold. NaN becomes 0xFF.
    """
    if dtype == torch.float32:
        return scale
    if dtype not in (torch.float8_e8m0fnu, torch.uint8):
        raise _wrong_scale_dtype(dtype)
    bits = scale.contiguous().view(torch.int32)
    exponent = torch.where(scale.isnan(), 0xFF, bits >> 23)
    back = decode_scale(exponent.to(torch.uint8))
    if not torch.equal(back.nan_to_num(0.0), scale.nan_to_num(0.0)):
        raise DSV3Error(
            "a scale is not a power of two",
            where="ue8m0 scales",
            fix="Quantise with scale_format='ue8m0', or store the scales as float32.",
        )
    return exponent.to(torch.uint8).view(dtype)


def decode_scale(stored: Shaped[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Stored scales as FP32: float32, bfloat16 and float16 as the numbers they are, float8_e8m0fnu
    or uint8 as 2^(byte - 127)."""
    if stored.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return stored.float()
    if stored.dtype not in (torch.float8_e8m0fnu, torch.uint8):
        raise _wrong_scale_dtype(stored.dtype)
    exponent = stored.view(torch.uint8).to(torch.int32)
    bits = exponent << 23
    bits = torch.where(exponent == 0, 0x00400000, bits)  # 2^-127 is subnormal in FP32
    bits = torch.where(exponent == 0xFF, 0x7FC00000, bits)  # NaN
    return bits.view(torch.float32)


def _wrong_scale_dtype(dtype: torch.dtype) -> DSV3Error:
    return DSV3Error(
        "wrong dtype of scales",
        found=dtype,
        expected="float32, bfloat16, float16, float8_e8m0fnu or uint8",
    )
