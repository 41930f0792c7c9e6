"""RMSNorm and the 1x128 quantisation behind it, in one pass over the rows.

Apart, they read a row of 7,168 numbers twice and write it twice between two products. Together it
is read once and leaves as codes and scales, and as bfloat16 only for who asks (the router reads
unquantised values):

    y = bf16(x / sqrt(mean(x^2) + eps) * weight);   codes, scales of y

The codes are those that ``act_quant`` makes of y, byte for byte. y itself has to be the same bits
everywhere for that, so the mean is summed in float64, where no order of the terms shows once it is
rounded to float32, and root and quotient round correctly. torch's own norm sums in float32: its y
differs from this one in a last bit now and then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.kernels.act_quant import act_quant_spec
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input, power_of_two
from dsv3.kernels.rounding import bf16_bits, round_to_bf16, sign_as_read, tile_codes, tile_scale


def norm_quant_spec(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale_format: str = "float32"
):
    """What the kernel computes, in plain torch: codes and scales of y, and y."""
    wide = x.float()
    mean = (wide.double().square().sum(-1, keepdim=True) / x.shape[-1]).float()
    y = (wide * (1.0 / (mean + eps).sqrt()) * weight).to(x.dtype)
    return (*act_quant_spec(y, scale_format), y)


@triton.jit
def norm_quant_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    code_ptr,
    scale_ptr,
    cols,
    eps,
    KEEPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    TILES: tl.constexpr,
    TILES_WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES_WIDE)
    col = tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = col < cols
    at = row * cols + col
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    wide = x.to(tl.float64)
    mean = (tl.sum(tl.sum(wide * wide, axis=1), axis=0) / cols).to(tl.float32)
    one = tl.full((TILES_WIDE, BLOCK), 1.0, tl.float32)
    root = tl.sqrt_rn(one * (mean + eps))
    weight = tl.load(weight_ptr + col, mask=inside, other=0.0)
    y = round_to_bf16(x * tl.div_rn(one, root) * weight)
    if KEEPS:
        tl.store(y_ptr + at, bf16_bits(y), mask=inside)

    scale, divisor = tile_scale(y, 1, POWER_OF_TWO)
    divisor = tl.broadcast_to(divisor[:, None], (TILES_WIDE, BLOCK))
    tl.store(code_ptr + at, tile_codes(y, divisor, sign_as_read(y)), mask=inside)
    tl.store(scale_ptr + row * TILES + tile, scale, mask=tile < TILES)


def norm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    scale_format: str = "float32",
    keeps: bool = False,
):
    """x (..., d) bfloat16 to codes (..., d) E4M3 and float32 scales of its norm, and the norm in
    bfloat16 if ``keeps``, else None."""
    check_input(x, "norm_quant", (torch.bfloat16,))
    check_input(weight, "norm_quant", (torch.float32,))
    cols = x.shape[-1]
    if tuple(weight.shape) != (cols,):
        raise DSV3Error(
            "shapes do not fit",
            where="norm_quant",
            found=[tuple(x.shape), tuple(weight.shape)],
            expected="rows of one width, and a weight of that width",
        )
    x = x.contiguous()
    tiles = cdiv(cols, BLOCK)
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], tiles), dtype=torch.float32, device=x.device)
    y = torch.empty_like(x) if keeps else None
    if x.numel():
        norm_quant_kernel[(x.numel() // cols,)](
            x,
            weight.contiguous(),
            (x if y is None else y).view(torch.int16),
            codes.view(torch.uint8),
            scale,
            cols,
            eps,
            KEEPS=keeps,
            POWER_OF_TWO=scale_format == "ue8m0",
            TILES=tiles,
            TILES_WIDE=power_of_two(tiles),
            BLOCK=BLOCK,
            num_warps=8 if tiles > 16 else 4,
            **({} if INTERPRETING else {"enable_fp_fusion": False}),
        )
    return codes, scale, y
