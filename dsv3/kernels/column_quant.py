"""Quantise activations for weight gradients: a scale for each channel and 128 tokens (TR 3.3.2).

The gradient dW = dy^T x sums over tokens, so both operands get their scales along that axis. A
Hopper chip multiplies E4M3 only where the numbers of a sum lie side by side in memory; of dy and x
the tokens lie under one another. So each program reads a tile of 128 tokens once and writes its
codes transposed: a channel's tokens in a row, rows starting at multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.fields import BLOCK
from dsv3.kernels.act_quant import act_quant_spec
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input
from dsv3.kernels.rounding import sign_as_read, tile_codes, tile_scale


def column_quant_spec(x: torch.Tensor, scale_format: str = "float32"):
    """What the kernel computes, in plain torch: codes (C, T) E4M3 and scales (C, T/128)."""
    return act_quant_spec(x.T, scale_format)


@triton.jit(do_not_specialize=["tokens"])
def column_quant_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    tokens,
    channels,
    token_stride,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    COLS: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = (token < tokens)[:, None] & (col < channels)[None, :]
    at = x_ptr + token.to(tl.int64)[:, None] * channels + col[None, :]
    read = tl.load(at, mask=inside, other=0.0)
    x = read.to(tl.float32)
    scale, divisor = tile_scale(x, 0, POWER_OF_TWO)
    codes = tile_codes(x, tl.broadcast_to(divisor[None, :], (BLOCK, COLS)), sign_as_read(read))
    tl.store(code_ptr + col[None, :] * token_stride + token[:, None], codes, mask=inside)
    scale_at = scale_ptr + tl.program_id(0).to(tl.int64) * channels + col
    tl.store(scale_at, scale, mask=col < channels)


def column_quant(x: torch.Tensor, scale_format: str = "float32"):
    """x (T, C), float32, bfloat16 or float16, to codes (C, T) E4M3 and scales (C, T/128).

    Rows of codes start at multiples of 16 bytes, whatever T is.
    """
    check_input(x, "column_quant", (torch.float32, torch.bfloat16, torch.float16))
    (tokens, channels), x = x.shape, x.contiguous()
    room = torch.empty(
        (channels, cdiv(tokens, 16) * 16), dtype=torch.float8_e4m3fn, device=x.device
    )
    scale = torch.empty((cdiv(tokens, BLOCK), channels), device=x.device)
    cols_at_once = 256 if INTERPRETING else 64
    if x.numel():
        column_quant_kernel[(len(scale), cdiv(channels, cols_at_once))](
            x,
            room.view(torch.uint8),
            scale,
            tokens,
            channels,
            room.stride(0),
            POWER_OF_TWO=scale_format == "ue8m0",
            BLOCK=BLOCK,
            COLS=cols_at_once,
        )
    return room[:, :tokens], scale.T
