"""The block-scaled FP8 product for Hopper: the sums of ``fp8_gemm``, at the speed of the chip.

    acc += (x_block @ w_block^T) * (sx[m] * sw)            every 128 of K, as there

What is different is who does what, and when.

*Persistent*: as many programs as the chip has multiprocessors, each of which makes tile after
tile, so that the loads of the next tile begin while the last one is being stored. *Descriptors*:
a tile is fetched by one instruction of the memory unit (TMA) instead of by an address for each 16
bytes; it fills with zeros what lies beyond the edges. *Swap*: a Hopper chip multiplies E4M3 in
tiles of 64 or more rows by 8 or more columns. Tokens come in any number and rows of W by the
thousand, so for few tokens W takes the place of the rows: y^T = W x^T. *Split*: for few tokens
there are fewer tiles than multiprocessors, and K is cut into parts that run side by side; a second
kernel adds them up.

**The order of a sum does not depend on M.** How many parts K has is decided by the shape of W
alone. Where they do not run side by side, one program adds up the parts one after another: part
by part in FP32, then the parts in their order. A token's numbers come out the same, bit for bit,
alone and in a batch of thousands, as far as the tensor core itself adds up the 128 products of a
block in one way for every shape of tile.

Weight gradients sum over tokens, and there both operands have a scale for each row and 128 of the
sum: W_TILES.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.fields import BLOCK
from dsv3.kernels.fp8_gemm import check_operands
from dsv3.kernels.launch import INTERPRETING, cdiv, fits_descriptor, is_hopper, multiprocessors
from dsv3.kernels.rounding import bf16_bits


def persistent_gemm_spec(
    x: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    rows_of_w: int = BLOCK,
) -> torch.Tensor:
    """What the kernels compute, in plain torch."""
    per_row = sw.repeat_interleave(rows_of_w, 0)[: len(w)]
    whole, in_part = torch.zeros(len(x), len(w), device=x.device), blocks_in_part(*w.shape)
    for part in torch.arange(sx.shape[1]).split(in_part):
        total = torch.zeros_like(whole)
        for block in part.tolist():
            cols = slice(block * BLOCK, (block + 1) * BLOCK)
            products = x[:, cols].float() @ w[:, cols].float().T
            total += products * (sx[:, block, None] * per_row[:, block])
        whole += total
    return whole.to(dtype)


def blocks_in_part(n: int, k: int) -> int:
    """Blocks of 128 that are added up in one go, for W (n, k): with one token, nearly every one of
    a Hopper chip's 132 multiprocessors shall have a tile of 64 rows of W to read, or two."""
    blocks = cdiv(k, BLOCK)
    return cdiv(blocks, max(1, min(192 // cdiv(n, 64), blocks // 4)))


class Tile(NamedTuple):
    """rows of x, rows of W; warps, loads under way; whether W takes the place of the rows; whether
    two tiles may be made from one load of x."""

    rows: int
    cols: int
    warps: int
    stages: int
    swap: bool = False
    pair: bool = False


# Up to so many rows of x: the tile. Chosen by hand: what is under way fills the shared memory, and
# the sums fit the registers.
_TILES = (
    (16, Tile(16, 64, 4, 8, swap=True)),
    (32, Tile(32, 64, 4, 7, swap=True)),
    (64, Tile(64, 128, 8, 5)),
)
_LARGE = Tile(128, 128, 8, 4, pair=True)


def tile_for(rows: int) -> Tile:
    """The tile for so many rows of x."""
    return next((tile for most, tile in _TILES if rows <= most), _LARGE)


@triton.jit
def scaled_block(x, sx, w, sw, SWAP: tl.constexpr):
    """The products of one block of K times their scales: (ROWS, COLS), or its transpose.

    sx (ROWS,). sw: one number, or (COLS,).
    """
    if SWAP:
        products = tl.dot(w, x.T)
        if sw.type.is_block():
            return products * (sx[None, :] * sw[:, None])
        else:
            return products * (sx * sw)[None, :]
    else:
        products = tl.dot(x, w.T)
        if sw.type.is_block():
            return products * (sx[:, None] * sw[None, :])
        else:
            return products * (sx * sw)[:, None]


@triton.jit
def store_sums(out_ptr, sums, row, col, rows, cols, SWAP: tl.constexpr):
    """A tile of sums to its place in out (.., cols), in FP32 or rounded to bfloat16 (as int16)."""
    if SWAP:
        where = row.to(tl.int64)[None, :] * cols + col[:, None]
        inside = (row < rows)[None, :] & (col < cols)[:, None]
    else:
        where = row.to(tl.int64)[:, None] * cols + col[None, :]
        inside = (row < rows)[:, None] & (col < cols)[None, :]
    if out_ptr.dtype.element_ty == tl.int16:
        tl.store(out_ptr + where, bf16_bits(sums), mask=inside)
    else:
        tl.store(out_ptr + where, sums, mask=inside)


@triton.jit(do_not_specialize=["m", "sx_row", "sx_block", "sw_row", "sw_block", "in_part"])
def persistent_gemm_kernel(
    x_desc,
    sx_ptr,
    w_desc,
    sw_ptr,
    out_ptr,
    m,
    n,
    k,
    sx_row,
    sx_block,
    sw_row,
    sw_block,
    in_part,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    FOLD: tl.constexpr,
    PAIR: tl.constexpr,
    W_TILES: tl.constexpr,
):
    """SPLIT: a program makes one part of a tile, for ``add_parts``. FOLD: it adds up all parts.
    PAIR: it makes two tiles beside one another from one load of x."""
    row_tiles = tl.cdiv(m, ROWS)
    col_tiles = tl.cdiv(n, 2 * COLS if PAIR else COLS)
    tiles = row_tiles * col_tiles
    blocks = tl.cdiv(k, BLOCK)
    items = tiles
    if SPLIT:
        items = tiles * tl.cdiv(blocks, in_part)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0)):
        # Groups of rows of tiles: programs that run at one time read the same parts of W.
        tile = item % tiles
        in_group = GROUP * col_tiles
        group = tile // in_group
        group_rows = tl.minimum(row_tiles - group * GROUP, GROUP)
        row_tile = group * GROUP + (tile % in_group) % group_rows
        col_tile = (tile % in_group) // group_rows

        row = row_tile * ROWS + tl.arange(0, ROWS)
        first_col = col_tile * (2 * COLS if PAIR else COLS)
        col = first_col + tl.arange(0, COLS)
        sx_at = sx_ptr + row.to(tl.int64) * sx_row
        sw_at = sw_ptr + (first_col // BLOCK) * sw_row
        # Behind the last column there are codes (zeros), but no scales.
        next_sw_at = sw_at + (sw_row if first_col + COLS < n else 0)
        first, last = 0, blocks
        if SPLIT:
            first = item // tiles * in_part
            last = tl.minimum(first + in_part, blocks)
        if SWAP:
            acc = tl.zeros((COLS, ROWS), dtype=tl.float32)
        else:
            acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        whole = tl.zeros_like(acc)
        beside = tl.zeros_like(acc)
        for block in tl.range(first, last):
            x = x_desc.load([row_tile * ROWS, block * BLOCK])
            w = w_desc.load([first_col, block * BLOCK])
            sx = tl.load(sx_at + block * sx_block, mask=row < m, other=0.0)
            if W_TILES:
                each_at = sw_ptr + col.to(tl.int64) * sw_row + block * sw_block
                sw = tl.load(each_at, mask=col < n, other=0.0)
            else:
                sw = tl.load(sw_at + block * sw_block)
            acc += scaled_block(x, sx, w, sw, SWAP)
            if PAIR:
                w = w_desc.load([first_col + COLS, block * BLOCK])
                sw = tl.load(next_sw_at + block * sw_block)
                beside += scaled_block(x, sx, w, sw, SWAP)
            if FOLD:  # noqa: SIM102 - a constant, then a question
                if (block + 1) % in_part == 0:
                    whole += acc
                    acc = tl.zeros_like(acc)
        to_ptr = out_ptr
        if SPLIT:
            to_ptr += (item // tiles).to(tl.int64) * m * n
        store_sums(to_ptr, whole + acc if FOLD else acc, row, col, m, n, SWAP)
        if PAIR:
            store_sums(to_ptr, beside, row, col + COLS, m, n, SWAP)


@triton.jit(do_not_specialize=["numbers"])
def add_parts_kernel(part_ptr, out_ptr, numbers, parts, SIZE: tl.constexpr):
    """out = part 0 + part 1 + ..., in this order."""
    at = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    whole = tl.zeros((SIZE,), dtype=tl.float32)
    for _ in range(parts):
        whole += tl.load(part_ptr + at, mask=at < numbers, other=0.0)
        part_ptr += numbers
    if out_ptr.dtype.element_ty == tl.int16:
        tl.store(out_ptr + at, bf16_bits(whole), mask=at < numbers)
    else:
        tl.store(out_ptr + at, whole, mask=at < numbers)


def serves(*codes: torch.Tensor) -> bool:
    """Whether the kernel can take these matrices: on a Hopper chip, and aligned."""
    return is_hopper(codes[0].device) and fits_descriptor(*codes)


def persistent_gemm(
    x: torch.Tensor,
    sx: torch.Tensor,
    w: torch.Tensor,
    sw: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    rows_of_w: int = BLOCK,
    tile: Tile | None = None,
) -> torch.Tensor:
    """x (M, K) and w (N, K) in E4M3 to (M, N) in float32 or bfloat16, rounded once.

    sx (M, K/128). sw (N/128, K/128), or (N, K/128) with rows_of_w=1, for weight gradients. Scales
    may lie in any order; of codes ``serves`` must be true. tile: another than the table's, to
    measure.
    """
    check_operands("persistent_gemm", x, sx, w, sw, rows_of_w)
    (m, k), n = x.shape, len(w)
    tile = tile or tile_for(m)
    programs = multiprocessors(x.device)
    in_part = blocks_in_part(n, k)
    parts = cdiv(cdiv(k, BLOCK), in_part)
    row_tiles, col_tiles = cdiv(m, tile.rows), cdiv(n, tile.cols)
    split = parts > 1 and row_tiles * col_tiles < programs
    pair = tile.pair and parts == 1 and rows_of_w > 1 and row_tiles * col_tiles >= 2 * programs
    tiles = row_tiles * cdiv(col_tiles, 2 if pair else 1) * (parts if split else 1)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    stored = out.view(torch.int16) if dtype == torch.bfloat16 else out
    sums = torch.empty((parts, m, n), device=x.device) if split else stored
    at_once = programs * (2 if tile.swap else 1)  # small tiles leave room for a second program
    persistent_gemm_kernel[(min(tiles, at_once),)](
        TensorDescriptor.from_tensor(x, [tile.rows, BLOCK]),
        sx,
        TensorDescriptor.from_tensor(w, [tile.cols, BLOCK]),
        sw,
        sums,
        m,
        n,
        k,
        *sx.stride(),
        *sw.stride(),
        in_part,
        ROWS=tile.rows,
        COLS=tile.cols,
        BLOCK=BLOCK,
        GROUP=8,
        SWAP=tile.swap,
        SPLIT=split,
        FOLD=parts > 1 and not split,
        PAIR=pair,
        W_TILES=rows_of_w == 1,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split:
        size = 4096 if INTERPRETING else 512
        add_parts_kernel[(cdiv(m * n, size),)](sums, stored, m * n, parts, SIZE=size)
    return out
