"""Routed experts in FP8, all of them in two kernels: w2( silu(w1 x) * w3 x ) (TR 2.1.2).

Rows come sorted by expert, and ``ends`` says where each expert's rows end. It stays on the GPU:
were the host to read it, everything would wait for that. Every program works out on its own which
tile is whose: an expert of c rows has ceil(c / ROWS) rows of tiles, the running sum of those says
where its tiles begin. An expert without rows has none; its weights are not read.

*Hidden*: a program makes a tile of w1 x and the same tile of w3 x from one load of x, multiplies
silu of the one by the other and quantises the result where it stands. A tile is 128 wide, which is
as much as shares one scale, so what leaves is codes and scales: an eighth of the two products in
float32. *Out*: the product with w2, in float32, for a sum over experts that goes on.

Numbers are rounded where ``Precision.Fp8`` rounds without the kernels: both products to bfloat16,
silu and its product with the other too, then E4M3. The tiles are those of ``persistent_gemm``: for
few rows the weights take the rows' place, and a step of decoding reads each chosen expert once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.fields import BLOCK
from dsv3.kernels.act_quant import act_quant_spec
from dsv3.kernels.fp8_gemm import fp8_gemm_spec
from dsv3.kernels.launch import cdiv, fits_descriptor, is_hopper, multiprocessors, power_of_two
from dsv3.kernels.persistent_gemm import Tile, scaled_block, store_sums
from dsv3.kernels.rounding import round_to_bf16, sign_as_read, tile_codes, tile_scale


def experts_spec(
    x: torch.Tensor,
    sx: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    w2: torch.Tensor,
    s2: torch.Tensor,
    ends: torch.Tensor,
    scale_format: str = "float32",
) -> torch.Tensor:
    """What the kernels compute, in plain torch; rows past the last end come out as zeros."""
    codes, scales = hidden_spec(x, sx, w13, s13, ends, scale_format)
    out = x.new_zeros(len(x), w2.shape[1], dtype=torch.float32)
    for expert, rows in _shares(ends):
        out[rows] = fp8_gemm_spec(codes[rows], scales[rows], w2[expert], s2[expert])
    return out


def hidden_spec(
    x: torch.Tensor,
    sx: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    ends: torch.Tensor,
    scale_format: str = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(w1 x) * w3 x of each expert's rows, in codes and scales."""
    hidden = x.new_zeros(len(x), w13.shape[2], dtype=torch.bfloat16)
    for expert, rows in _shares(ends):
        gate, up = (
            fp8_gemm_spec(x[rows], sx[rows], w13[expert, i], s13[expert, i]).to(torch.bfloat16)
            for i in (0, 1)
        )
        hidden[rows] = torch.nn.functional.silu(gate) * up
    return act_quant_spec(hidden, scale_format)


def _shares(ends: torch.Tensor) -> list[tuple[int, slice]]:
    starts = [0, *ends.tolist()]
    return [(e, slice(*starts[e : e + 2])) for e in range(len(ends)) if starts[e] < starts[e + 1]]


# Rows that an expert has on average, up to: the tiles of the two kernels.
_TILES = (
    (16, (Tile(16, 128, 4, 5, swap=True), Tile(16, 64, 4, 8, swap=True))),
    (32, (Tile(32, 128, 8, 5, swap=True), Tile(32, 64, 4, 7, swap=True))),
    (64, (Tile(64, 128, 8, 4), Tile(64, 128, 8, 5))),
)
_LARGE = Tile(128, 128, 8, 3), Tile(128, 128, 8, 4)


@triton.jit
def shares_of_experts(ends_ptr, experts, col_tiles, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of each expert, where its rows start and end, and how many tiles they make."""
    expert = tl.arange(0, EXPERTS)
    start = tl.load(ends_ptr + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    end = tl.load(ends_ptr + expert, mask=expert < experts, other=0)
    start, end = start.to(tl.int32), end.to(tl.int32)
    tiles = tl.where(expert < experts, tl.cdiv(end - start, ROWS) * col_tiles, 0)
    return start, end, tiles


@triton.jit
def tile_of_item(item, start, end, tiles, col_tiles, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """Which expert's tile the item is: (expert, first row, end of its rows, column of tiles)."""
    number = tl.arange(0, EXPERTS)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= item).to(tl.int32), 0)
    here = number == expert
    start, end = tl.sum(tl.where(here, start, 0), 0), tl.sum(tl.where(here, end, 0), 0)
    # The tiles that read the same weights follow one another.
    row_tiles = tl.cdiv(end - start, ROWS)
    inside = item - tl.sum(tl.where(number < expert, tiles, 0), 0)
    return expert, start + inside % row_tiles * ROWS, end, inside // row_tiles


@triton.jit(do_not_specialize=["sx_row", "sx_block", "experts"])
def expert_hidden_kernel(
    x_desc,
    sx_ptr,
    w13_desc,
    s13_ptr,
    ends_ptr,
    code_ptr,
    scale_ptr,
    experts,
    inner,
    k,
    sx_row,
    sx_block,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAP: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    blocks = tl.cdiv(k, BLOCK)
    col_tiles = tl.cdiv(inner, COLS)
    start, end, tiles = shares_of_experts(ends_ptr, experts, col_tiles, ROWS, EXPERTS)
    for item in tl.range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        expert, first, stop, col_tile = tile_of_item(
            item, start, end, tiles, col_tiles, ROWS, EXPERTS
        )
        row = first + tl.arange(0, ROWS)
        sx_at = sx_ptr + row.to(tl.int64) * sx_row
        s1_at = s13_ptr + (expert * 2 * col_tiles + col_tile) * blocks
        s3_at = s1_at + col_tiles * blocks
        w1_row = expert * 2 * inner + col_tile * COLS
        if SWAP:
            gate = tl.zeros((COLS, ROWS), dtype=tl.float32)
        else:
            gate = tl.zeros((ROWS, COLS), dtype=tl.float32)
        up = tl.zeros_like(gate)
        for block in tl.range(0, blocks):
            x = x_desc.load([first, block * BLOCK])
            w1 = w13_desc.load([w1_row, block * BLOCK])
            w3 = w13_desc.load([w1_row + inner, block * BLOCK])
            sx = tl.load(sx_at + block * sx_block, mask=row < stop, other=0.0)
            gate += scaled_block(x, sx, w1, tl.load(s1_at + block), SWAP)
            up += scaled_block(x, sx, w3, tl.load(s3_at + block), SWAP)

        gate, up = round_to_bf16(gate), round_to_bf16(up)
        gate = round_to_bf16(tl.div_rn(gate, 1.0 + tl.exp(-gate)))
        hidden = round_to_bf16(gate * up)
        if SWAP:
            hidden = tl.trans(hidden)
        col = col_tile * COLS + tl.arange(0, COLS)
        hidden = tl.where((col < inner)[None, :], hidden, 0.0)
        scale, divisor = tile_scale(hidden, 1, POWER_OF_TWO)
        divisor = tl.broadcast_to(divisor[:, None], (ROWS, COLS))
        codes = tile_codes(hidden, divisor, sign_as_read(hidden))
        where = row.to(tl.int64)[:, None] * inner + col[None, :]
        tl.store(code_ptr + where, codes, mask=(row < stop)[:, None] & (col < inner)[None, :])
        tl.store(scale_ptr + row.to(tl.int64) * col_tiles + col_tile, scale, mask=row < stop)


@triton.jit(do_not_specialize=["experts"])
def expert_out_kernel(
    x_desc,
    sx_ptr,
    w2_desc,
    s2_ptr,
    ends_ptr,
    out_ptr,
    experts,
    n,
    inner,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    BLOCK: tl.constexpr,
    SWAP: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    blocks = tl.cdiv(inner, BLOCK)
    col_tiles = tl.cdiv(n, COLS)
    start, end, tiles = shares_of_experts(ends_ptr, experts, col_tiles, ROWS, EXPERTS)
    for item in tl.range(tl.program_id(0), tl.sum(tiles, 0), tl.num_programs(0)):
        expert, first, stop, col_tile = tile_of_item(
            item, start, end, tiles, col_tiles, ROWS, EXPERTS
        )
        row = first + tl.arange(0, ROWS)
        sx_at = sx_ptr + row.to(tl.int64) * blocks
        s2_at = s2_ptr + (expert * tl.cdiv(n, BLOCK) + col_tile * COLS // BLOCK) * blocks
        if SWAP:
            acc = tl.zeros((COLS, ROWS), dtype=tl.float32)
        else:
            acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for block in tl.range(0, blocks):
            x = x_desc.load([first, block * BLOCK])
            w = w2_desc.load([expert * n + col_tile * COLS, block * BLOCK])
            sx = tl.load(sx_at + block, mask=row < stop, other=0.0)
            acc += scaled_block(x, sx, w, tl.load(s2_at + block), SWAP)
        store_sums(out_ptr, acc, row, col_tile * COLS + tl.arange(0, COLS), stop, n, SWAP)


def serves(w13: torch.Tensor, w2: torch.Tensor) -> bool:
    """Whether the kernels can take these, and with them any rows: on a Hopper chip, and aligned."""
    return is_hopper(w13.device) and fits_descriptor(w13, w2)


def experts(
    x: torch.Tensor,
    sx: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    w2: torch.Tensor,
    s2: torch.Tensor,
    ends: torch.Tensor,
    scale_format: str = "float32",
) -> torch.Tensor:
    """w2( silu(w1 x) * w3 x ) of rows sorted by expert, float32 (choices, d), not rounded.

    x (choices, d) and stacks w13 (E, 2, inner, d), w2 (E, d, inner) in E4M3, with their scales; d
    and inner multiples of 16. ends (E,): where each expert's rows end; what follows the last is
    not written. scale_format: of what goes into w2.
    """
    rows, (count, _, inner, _) = len(x), w13.shape
    out = torch.empty((rows, w2.shape[1]), dtype=torch.float32, device=x.device)
    if rows == 0:
        return out
    codes, scales = hidden(x, sx, w13, s13, ends, scale_format)
    tile = _tiles(rows, count)[1]
    expert_out_kernel[(_programs(tile, rows, count, w2.shape[1], x.device),)](
        TensorDescriptor.from_tensor(codes, [tile.rows, BLOCK]),
        scales,
        TensorDescriptor.from_tensor(w2.flatten(0, 1), [tile.cols, BLOCK]),
        s2.contiguous(),
        ends,
        out,
        count,
        w2.shape[1],
        inner,
        ROWS=tile.rows,
        COLS=tile.cols,
        BLOCK=BLOCK,
        SWAP=tile.swap,
        EXPERTS=power_of_two(count),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def hidden(
    x: torch.Tensor,
    sx: torch.Tensor,
    w13: torch.Tensor,
    s13: torch.Tensor,
    ends: torch.Tensor,
    scale_format: str = "float32",
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(w1 x) * w3 x of each expert's rows: codes (choices, inner) and scales."""
    (rows, d), (count, _, inner, _) = x.shape, w13.shape
    codes = torch.empty((rows, inner), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, cdiv(inner, BLOCK)), device=x.device)
    tile = _tiles(rows, count)[0]
    expert_hidden_kernel[(_programs(tile, rows, count, inner, x.device),)](
        TensorDescriptor.from_tensor(x, [tile.rows, BLOCK]),
        sx,
        TensorDescriptor.from_tensor(w13.flatten(0, 2), [tile.cols, BLOCK]),
        s13.contiguous(),
        ends,
        codes.view(torch.uint8),
        scales,
        count,
        inner,
        d,
        *sx.stride(),
        ROWS=tile.rows,
        COLS=tile.cols,
        BLOCK=BLOCK,
        SWAP=tile.swap,
        POWER_OF_TWO=scale_format == "ue8m0",
        EXPERTS=power_of_two(count),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return codes, scales


def _tiles(rows: int, experts: int) -> tuple[Tile, Tile]:
    return next((tiles for most, tiles in _TILES if rows <= most * experts), _LARGE)


def _programs(tile: Tile, rows: int, experts: int, cols: int, device: torch.device) -> int:
    """As many as run at once, or as there can be tiles, if that is less."""
    most = (cdiv(rows, tile.rows) + experts) * cdiv(cols, tile.cols)
    return min(most, multiprocessors(device) * (2 if tile.cols == 64 else 1))
