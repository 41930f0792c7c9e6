"""Dequantise weights: code * scale of its 128 x 128 block, in FP32, rounded once.

A code becomes a number by moving bits, as in ``dsv3.fp8.formats.decode_finite``: seven places to
the left it is a float16 that is 2^8 too small. NaN codes are looked for here; the kernel waits for
memory anyhow. The product of code and scale is rounded to FP32 and, if bfloat16 is asked for, to
that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input
from dsv3.kernels.rounding import bf16_bits


def weight_dequant_spec(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """What the kernel computes, in plain torch: codes (N, K), scale (N/128, K/128), rounded up."""
    rows, cols = codes.shape
    scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :cols]
    return (codes.float() * scale).to(dtype)


@triton.jit
def weight_dequant_kernel(
    code_ptr,
    scale_ptr,
    out_ptr,
    rows,
    cols,
    tiles,
    BFLOAT16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    col = tile * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    where = row[:, None] * cols + col[None, :]
    code = tl.load(code_ptr + where, mask=inside, other=0).to(tl.int32)
    half = (((code & 0x80) << 8) | ((code & 0x7F) << 7)).to(tl.int16)
    value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    scale = tl.load(scale_ptr + (row // BLOCK) * tiles + tile, mask=row < rows, other=0.0)
    value = value * scale[:, None]
    if BFLOAT16:
        tl.store(out_ptr + where, bf16_bits(value), mask=inside)
    else:
        tl.store(out_ptr + where, value, mask=inside)


def weight_dequant(
    codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """codes (N, K) E4M3 and their float32 block scales to (N, K) in float32 or bfloat16."""
    check_input(codes, "weight_dequant", (torch.float8_e4m3fn,))
    if dtype not in (torch.float32, torch.bfloat16):
        raise DSV3Error(
            "wrong output dtype",
            where="weight_dequant",
            found=dtype,
            expected="torch.float32 or torch.bfloat16",
        )
    rows, cols = codes.shape
    out = torch.empty((rows, cols), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    rows_at_once = 256 if INTERPRETING else 32
    tiles = cdiv(cols, BLOCK)
    weight_dequant_kernel[(cdiv(rows, rows_at_once), tiles)](
        codes.contiguous().view(torch.uint8),
        scale.contiguous(),
        out.view(torch.int16) if dtype == torch.bfloat16 else out,
        rows,
        cols,
        tiles,
        BFLOAT16=dtype == torch.bfloat16,
        ROWS=rows_at_once,
        BLOCK=BLOCK,
    )
    return out
