"""Quantise activations: one E4M3 scale for each token and 128 channels (TR 3.3.2).

Each program reads a few rows of one 128-wide tile once and writes their codes and scales:

    amax = max |x|;   scale = amax / 448, or the next power of two;   code = E4M3(x / scale)

Memory traffic is all this costs: 4 or 2 bytes in, 1 byte and a 128th of 4 bytes out.

How a tile is rounded is in ``dsv3.kernels.rounding``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.fields import BLOCK
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input
from dsv3.kernels.rounding import sign_as_read, tile_codes, tile_scale


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
    scale, divisor = tile_scale(x, 1, POWER_OF_TWO)
    divisor = tl.broadcast_to(divisor[:, None], (ROWS, BLOCK))
    tl.store(code_ptr + where, tile_codes(x, divisor, sign_as_read(read)), mask=inside)
    tl.store(scale_ptr + row * tiles + tile, scale, mask=row < rows)


def act_quant(x: torch.Tensor, scale_format: str = "float32"):
    """x (..., K), float32, bfloat16 or float16, to codes (..., K) E4M3 and float32 scales."""
    check_input(x, "act_quant", (torch.float32, torch.bfloat16, torch.float16))
    cols = x.shape[-1]
    tiles = cdiv(cols, BLOCK)
    x = x.contiguous()
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], tiles), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return codes, scale
    rows = x.numel() // cols
    rows_at_once = 256 if INTERPRETING else 16
    act_quant_kernel[(cdiv(rows, rows_at_once), tiles)](
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
