"""Quantise activations: one E4M3 scale for each token and 128 channels (TR 3.3.2).

Each program reads a few rows of one 128-wide tile once and writes their codes and scales:

    amax = max |x|;   scale = amax / 448, or the next power of two;   code = E4M3(x / scale)

Memory traffic is all this costs: 4 or 2 bytes in, 1 byte and a 128th of 4 bytes out.

The rounding is done with integers, although a GPU has an instruction for it. The same bits must
come from every device, and Triton's interpreter casts wrongly (it loses a carry: 124.07 becomes
64) and wraps around above 448. Division is ``div_rn``, which rounds correctly; the plain ``/`` on
a GPU is off by a bit now and then. The maximum is taken over bit patterns: as integers NaN is
larger than infinity and infinity larger than any number, so one comparison finds them both, while
a maximum of floats may drop NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.fields import BLOCK
from dsv3.kernels.launch import INTERPRETING, check_input


def act_quant_spec(x: torch.Tensor, scale_format: str = "float32"):
    """What the kernel computes, in plain torch. Returns (codes (M, K) E4M3, scales (M, K/128))."""
    tiles = torch.nn.functional.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = tiles.abs().amax(-1)
    scale = (amax / 448).clamp(min=1e-12)
    if scale_format == "ue8m0":
        mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2^exponent, mantissa >= 1/2
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    finite = amax.isfinite()
    scale = torch.where(finite, scale, torch.nan)
    scaled = tiles / torch.where(finite, scale, 1.0)[..., None]
    codes = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., : x.shape[-1]], scale


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
def act_quant_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    cols,
    tiles,
    POWER_OF_TWO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    col = tile * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    where = row[:, None] * cols + col[None, :]
    read = tl.load(x_ptr + where, mask=inside, other=0.0)
    x = read.to(tl.float32)

    amax_bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    scale = tl.div_rn(amax_bits.to(tl.float32, bitcast=True), tl.full((ROWS,), 448.0, tl.float32))
    scale = tl.maximum(scale, 1e-12)
    if POWER_OF_TWO:  # a mantissa that is not zero carries into the exponent
        scale_bits = scale.to(tl.int32, bitcast=True)
        scale = ((scale_bits + 0x007FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    finite = amax_bits < 0x7F800000
    divisor = tl.where(finite, scale, 1.0)
    scale = tl.where(finite, scale, float("nan"))

    code = round_to_e4m3(tl.div_rn(x, tl.broadcast_to(divisor[:, None], (ROWS, BLOCK))))
    # A GPU's division makes every NaN positive, and its conversions may too: the sign is that of
    # the bits that were read.
    if read.dtype == tl.float32:
        sign = read.to(tl.int32, bitcast=True) >> 24
    else:
        sign = read.to(tl.int16, bitcast=True).to(tl.int32) >> 8
    code = (code & 0x7F) | (sign & 0x80)
    tl.store(code_ptr + where, code.to(tl.uint8), mask=inside)
    tl.store(scale_ptr + row * tiles + tile, scale, mask=row < rows)


def act_quant(x: torch.Tensor, scale_format: str = "float32"):
    """x (..., K), float32, bfloat16 or float16, to codes (..., K) E4M3 and float32 scales."""
    check_input(x, "act_quant", (torch.float32, torch.bfloat16, torch.float16))
    cols = x.shape[-1]
    tiles = triton.cdiv(cols, BLOCK)
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    # pyrefly: ignore[no-matching-overload] - cdiv of ints is one
    scale = torch.empty((*x.shape[:-1], tiles), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scale
    rows = x.numel() // cols
    rows_at_once = 256 if INTERPRETING else 16
    act_quant_kernel[(triton.cdiv(rows, rows_at_once), tiles)](
        x,
        codes.view(torch.uint8),
        scale,
        rows,
        cols,
        tiles,
        POWER_OF_TWO=scale_format == "ue8m0",
        ROWS=rows_at_once,
        BLOCK=BLOCK,
    )
    return codes, scale
