"""The block-scaled FP8 product on a GPU: y = x W^T (TR 3.3.2, figure 7b).

Each program makes one tile of y. It walks along K in steps of 128, the width of the scales:

    acc += (x_block @ w_block) * sx[m] * sw

The product in parentheses runs on the tensor core on bare codes. A tensor core adds E4M3 products
with about 14 bits, too few for long sums: the report saw errors near 2 percent at K = 4096
(``dsv3.fp8.accumulation`` emulates it). So after every 128 products the partial sum leaves it, is
scaled, and is added in FP32 (the "promotion").

A tile is at most 128 columns wide and starts on a multiple of its width, so it meets one weight
scale at a time: a single number. Programs are numbered in groups of rows of tiles, so that those
that run at the same time read the same parts of W and find them in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input, power_of_two


def fp8_gemm_spec(
    x: torch.Tensor, sx: torch.Tensor, w: torch.Tensor, sw: torch.Tensor
) -> torch.Tensor:
    """What the kernel computes, in plain torch: the sum over K one block of 128 at a time."""
    out = torch.zeros(x.shape[0], w.shape[0], device=x.device)
    for k in range(sx.shape[1]):
        cols = slice(k * BLOCK, (k + 1) * BLOCK)
        partial = x[:, cols].float() @ w[:, cols].float().T
        per_row_of_w = sw[:, k].repeat_interleave(BLOCK)[: w.shape[0]]
        out += partial * sx[:, k, None] * per_row_of_w
    return out


def _configs() -> list[triton.Config]:
    """Tile shapes to try for each bucket of M; a single one in the interpreter."""
    if INTERPRETING:
        return [triton.Config({"ROWS": 128, "COLS": 128})]
    return [
        triton.Config({"ROWS": rows, "COLS": cols}, num_stages=stages, num_warps=warps)
        for rows, cols, stages, warps in (
            (16, 32, 5, 4),
            (16, 64, 5, 4),
            (16, 128, 5, 4),
            (32, 64, 5, 4),
            (64, 64, 4, 4),
            (64, 128, 4, 4),
            (128, 64, 4, 4),
            (128, 128, 3, 8),
        )
    ]


# M changes from call to call: it must neither recompile the kernel nor tune it anew, so the tuner
# sees only the power of two above it.
@triton.autotune(configs=_configs(), key=["m_bucket", "n", "k"])
@triton.jit(do_not_specialize=["m", "m_bucket"])
def fp8_gemm_kernel(
    x_ptr,
    sx_ptr,
    w_ptr,
    sw_ptr,
    out_ptr,
    m,
    n,
    k,
    m_bucket,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tiles = tl.cdiv(m, ROWS)
    in_group = GROUP * tl.cdiv(n, COLS)
    group = tl.program_id(0) // in_group
    group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
    row_tile = group * GROUP + (tl.program_id(0) % in_group) % group_rows
    col_tile = (tl.program_id(0) % in_group) // group_rows

    row = row_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = col_tile.to(tl.int64) * COLS + tl.arange(0, COLS)
    depth = tl.arange(0, BLOCK)
    blocks = tl.cdiv(k, BLOCK)
    x_at = x_ptr + row[:, None] * k + depth[None, :]
    w_at = w_ptr + col[None, :] * k + depth[:, None]
    sx_at = sx_ptr + row * blocks
    sw_at = sw_ptr + (col_tile * COLS // BLOCK) * blocks

    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for block in range(blocks):
        left = k - block * BLOCK
        x = tl.load(x_at, mask=(row < m)[:, None] & (depth < left)[None, :], other=0.0)
        w = tl.load(w_at, mask=(col < n)[None, :] & (depth < left)[:, None], other=0.0)
        sx = tl.load(sx_at + block, mask=row < m, other=0.0)
        sw = tl.load(sw_at + block)
        acc += tl.dot(x, w) * sx[:, None] * sw
        x_at += BLOCK
        w_at += BLOCK
    inside = (row < m)[:, None] & (col < n)[None, :]
    tl.store(out_ptr + row[:, None] * n + col[None, :], acc, mask=inside)


def check_operands(
    kernel: str,
    x: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    rows_of_w: int = BLOCK,
) -> None:
    """Refuse operands whose dtypes or shapes the kernel would misread.

    rows_of_w: how many rows of w share a scale.
    """
    check_input(x, kernel, (torch.float8_e4m3fn,))
    check_input(w, kernel, (torch.float8_e4m3fn,))
    (m, k), n = x.shape, w.shape[0]
    blocks = cdiv(k, BLOCK)
    expected = (m, blocks), (cdiv(n, rows_of_w), blocks)
    if w.shape[1] != k or (tuple(sx.shape), tuple(sw.shape)) != expected:
        raise DSV3Error(
            "shapes do not fit",
            where=kernel,
            found=[tuple(t.shape) for t in (x, sx, w, sw)],
            expected=[(m, k), expected[0], (n, k), expected[1]],
        )


def fp8_gemm(x: torch.Tensor, sx: torch.Tensor, w: torch.Tensor, sw: torch.Tensor) -> torch.Tensor:
    """x (M, K) and w (N, K) in E4M3, scales sx (M, K/128) and sw (N/128, K/128): float32 (M, N)."""
    check_operands("fp8_gemm", x, sx, w, sw)
    (m, k), n = x.shape, w.shape[0]
    out = torch.zeros((m, n), dtype=torch.float32, device=x.device)
    if out.numel() == 0 or k == 0:
        return out

    def grid(tile):
        return (cdiv(m, tile["ROWS"]) * cdiv(n, tile["COLS"]),)

    fp8_gemm_kernel[grid](
        x.contiguous(),
        sx.contiguous(),
        w.contiguous(),
        sw.contiguous(),
        out,
        m,
        n,
        k,
        power_of_two(m),
        BLOCK=BLOCK,
        GROUP=8,
    )
    return out
