"""FP8 on a CPU: loops over codes, written in Python and compiled by Numba.

A processor has no instruction for E4M3, and torch's operations work on whole tensors: to multiply
by a matrix of codes they first write all its numbers down, four or eight bytes each, and read them
again. A loop decodes a number where it needs it, in a register. The plain forms stand in
``dsv3.fp8``; without Numba they do the work, and write the same text.

Why any order of a sum will do. A product of two E4M3 codes has 8 significant bits, is a multiple of
2^-18 and at most 448^2 < 2^18. So 128 of them add up to less than 2^25, and 43 bits hold every sum
on the way. Float64 has 53: **the sum over one tile is exact**, whatever order a compiler takes it
in. Only the scales and the sum over tiles round, to 2^-53 each.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dsv3.fields import BLOCK
from dsv3.kernels.cpu import (
    ANY_ORDER,
    BF16_NAN,
    LINE,
    array,
    bits_of_float,
    double_of_bits,
    fetch_ahead,
    float_of_bits,
    float_of_half,
    in_threads,
    loop,
    numbers,
    to_bf16,
)

# Rows of w that are taken together: x is read once for them.
_TOGETHER = 4
_SEVEN = np.int8(0x7F)
_SIGN_AND_SEVEN = np.int64(-(1 << 63) | 0x7F << 49)
_SUBNORMAL = np.int32(0x3C800000)  # the bits of 2^-6: below, codes step by 2^-9
_INFINITY = np.int32(0x7F800000)
_SMALLEST = 2.0**-1074  # of float64
_ANCHOR = np.int32(0x46800000)  # the bits of 2^14, whose steps in float32 are 2^-9


@njit(inline="always")
def _decode(code):
    """The value of an int8 times 2^-8, as ``formats.decode_finite``."""
    return float_of_half(np.int16((np.int16(code) << np.int16(7)) & np.int16(-16512)))


@njit(inline="always")
def _shifted(code):
    """The value of an int8 times 2^-1016, in fewer steps. A code below 2^-6 becomes a subnormal
    number, which takes a processor some 80 times as long; among weights there are few."""
    return double_of_bits((np.int64(code) << np.int64(49)) & _SIGN_AND_SEVEN)


@njit(inline="always")
def _encode(value):
    """The int8 nearest to a float32, as ``formats.encode_e4m3``."""
    bits = bits_of_float(value)
    magnitude = np.int32(bits & np.int32(0x7FFFFFFF))
    held = min(magnitude, np.int32(0x43E00000))
    lowest = np.int32((held >> np.int32(20)) & np.int32(1))
    normal = np.int32(np.int32(held + np.int32(0x7FFFF - (120 << 23)) + lowest) >> np.int32(20))
    subnormal = np.int32(bits_of_float(float_of_bits(held) + np.float32(16384.0)) - _ANCHOR)
    code = subnormal if held < _SUBNORMAL else normal
    code = np.int32(0x7F) if magnitude > _INFINITY else code
    return np.int8(code | ((bits >> np.int32(24)) & np.int32(0x80)))


@njit
def _quantize(x, power_of_two, codes, scales, first, last):
    """Each row in tiles of 128: codes and scales, bit for bit those of ``quantize_activation``."""
    for row in range(first, last):
        for tile in range(scales.shape[1]):
            start, width = tile * BLOCK, min(BLOCK, x.shape[1] - tile * BLOCK)
            largest = np.int32(0)  # of positive floats the bits are ordered as the values are
            for k in range(width):
                bits = np.int32(bits_of_float(x[row, start + k]) & np.int32(0x7FFFFFFF))
                largest = max(largest, bits)
            scale = max(float_of_bits(largest) / np.float32(448.0), np.float32(1e-12))
            if power_of_two:
                bits = np.int32(bits_of_float(scale) + np.int32(0x7FFFFF))
                scale = float_of_bits(np.int32(bits & _INFINITY))
            divisor = scale
            if largest >= _INFINITY:
                scale, divisor = np.float32(np.nan), np.float32(1.0)
            scales[row, tile] = scale
            for k in range(width):
                codes[row, start + k] = _encode(x[row, start + k] / divisor)


@loop()
def _quantize_at(x, codes, scales, rows, cols, power_of_two, first, last):
    shape, tiles = (rows, cols), (rows, -(-cols // BLOCK))
    _quantize(
        numbers(x, shape, np.float32),
        power_of_two,
        numbers(codes, shape, np.int8),
        numbers(scales, tiles, np.float32),
        first,
        last,
    )


@loop()
def _dequantize(codes, scales, block_rows, first, last, out):
    """code * scale, in the dtype of ``out``."""
    for row in range(first, last):
        for tile in range(scales.shape[1]):
            start, width = tile * BLOCK, min(BLOCK, codes.shape[1] - tile * BLOCK)
            scale = out.dtype.type(scales[row // block_rows, tile])
            for k in range(width):
                code = codes[row, start + k]
                value = _decode(code) * np.float32(256.0) * scale
                out[row, start + k] = np.nan if (code & _SEVEN) == _SEVEN else value


@loop()
def _dequantize_bf16(codes, scales, block_rows, first, last, out):
    """The same, rounded to the bits of a bfloat16."""
    for row in range(first, last):
        for tile in range(scales.shape[1]):
            start, width = tile * BLOCK, min(BLOCK, codes.shape[1] - tile * BLOCK)
            scale = scales[row // block_rows, tile]
            for k in range(width):
                code = codes[row, start + k]
                out[row, start + k] = to_bf16(_decode(code) * np.float32(256.0) * scale)
                if (code & _SEVEN) == _SEVEN:
                    out[row, start + k] = BF16_NAN


@njit(inline="always")
def _fetch_behind(w, n, tile):
    """Ask for the rows of w that are taken after those from n on: a part as large as their tile.

    A core fetches ahead of who goes straight on through memory, and not of who walks along four
    rows at once: without this, a matrix that is not in the cache takes 1.4 to 2.1 times as long.
    """
    place = w.ctypes.data + (n + _TOGETHER) * w.shape[1] + tile * _TOGETHER * BLOCK
    for line in range(0, _TOGETHER * BLOCK, LINE):
        fetch_ahead(place + line)


@loop(fastmath=ANY_ORDER)
def _times(x, x_scale, w, w_scale, first, last, out):
    """x w^T for the rows of w from ``first`` to ``last``, with x as values of codes, times 2^-8."""
    inner = w.shape[1]
    run = np.empty((_TOGETHER, BLOCK), np.float64)
    sums = np.empty((x.shape[0], _TOGETHER), np.float64)
    for n in range(first, last, _TOGETHER):
        sums[:] = 0.0
        for tile in range(w_scale.shape[1]):
            _fetch_behind(w, n, tile)
            start, width = tile * BLOCK, min(BLOCK, inner - tile * BLOCK)
            for i in range(_TOGETHER):
                row = w[min(n + i, last - 1)]
                for k in range(width):
                    run[i, k] = _decode(row[start + k])
            scale = np.float64(w_scale[n // BLOCK, tile]) * 65536.0
            for m in range(x.shape[0]):
                a = b = c = d = 0.0
                for k in range(width):
                    value = x[m, start + k]
                    a += run[0, k] * value
                    b += run[1, k] * value
                    c += run[2, k] * value
                    d += run[3, k] * value
                both = scale * x_scale[m, tile]
                sums[m, 0] += a * both
                sums[m, 1] += b * both
                sums[m, 2] += c * both
                sums[m, 3] += d * both
        for m in range(x.shape[0]):
            for i in range(min(_TOGETHER, last - n)):
                out[m, n + i] = sums[m, i]


@loop(fastmath=ANY_ORDER)
def _times_row(x, x_scale, w, w_scale, first, last, out):
    """The same for a single row: each number is decoded where it is multiplied.

    Moved into the bits of a float64, a code has its value times 2^-1016, for which x makes up.
    """
    inner = w.shape[1]
    large = x * 2.0**1016
    for n in range(first, last, _TOGETHER):
        one, two = w[n], w[min(n + 1, last - 1)]
        three, four = w[min(n + 2, last - 1)], w[min(n + 3, last - 1)]
        sum_a = sum_b = sum_c = sum_d = 0.0
        for tile in range(w_scale.shape[1]):
            _fetch_behind(w, n, tile)
            start, width = tile * BLOCK, min(BLOCK, inner - tile * BLOCK)
            a = b = c = d = 0.0
            for k in range(width):
                value = large[start + k]
                a += _shifted(one[start + k]) * value
                b += _shifted(two[start + k]) * value
                c += _shifted(three[start + k]) * value
                d += _shifted(four[start + k]) * value
            both = np.float64(w_scale[n // BLOCK, tile]) * 256.0 * x_scale[tile]
            sum_a += a * both
            sum_b += b * both
            sum_c += c * both
            sum_d += d * both
        for i, total in enumerate((sum_a, sum_b, sum_c, sum_d)):
            if n + i < last:
                out[n + i] = total


@njit(nogil=True)
def _times_rows(x, x_scale, w, w_scale, smallest, first, last, out):
    """By the loop that suits so many rows. smallest: 2^-1074, which a processor that was told to
    take subnormal numbers for 0 does so too; then the loop that moves bits will not do."""
    if len(x) == 1 and smallest * 2.0 > 0.0:
        _times_row(x[0], x_scale[0], w, w_scale, first, last, out[0])
    else:
        _times(x, x_scale, w, w_scale, first, last, out)


@njit
def _values(x):
    """Codes as numbers, times 2^-8."""
    values = np.empty(x.shape, np.float64)
    for row in range(x.shape[0]):
        for k in range(x.shape[1]):
            values[row, k] = _decode(x[row, k])
    return values


@loop()
def _one(x, x_scale, w, w_scale, out, rows, inner, outer, smallest, first, last):
    """A matrix w (outer, inner)."""
    tiles, blocks = -(-inner // BLOCK), -(-outer // BLOCK)
    _times_rows(
        _values(numbers(x, (rows, inner), np.int8)),
        numbers(x_scale, (rows, tiles), np.float32),
        numbers(w, (outer, inner), np.int8),
        numbers(w_scale, (blocks, tiles), np.float32),
        smallest,
        first,
        last,
        numbers(out, (rows, outer), np.float64),
    )


@loop()
def _each(
    x,
    x_scale,
    w,
    w_scale,
    ends,
    out,
    rows,
    inner,
    outer,
    experts,
    parts,
    most,
    smallest,
    first,
    last,
):
    """Of experts with up to ``most`` rows: their rows times each of their matrices."""
    tiles, blocks = -(-inner // BLOCK), -(-outer // BLOCK)
    values = _values(numbers(x, (rows, inner), np.int8))
    scales = numbers(x_scale, (rows, tiles), np.float32)
    matrices = numbers(w, (experts, parts, outer, inner), np.int8)
    grids = numbers(w_scale, (experts, parts, blocks, tiles), np.float32)
    sums = numbers(out, (rows, parts, outer), np.float64)
    begin = 0
    for expert, end in enumerate(numbers(ends, experts, np.int64)):
        if begin < end <= begin + most:
            mine = slice(begin, end)
            for part in range(parts):
                _times_rows(
                    values[mine],
                    scales[mine],
                    matrices[expert, part],
                    grids[expert, part],
                    smallest,
                    first,
                    last,
                    sums[mine, part],
                )
        begin = end


def quantize(x: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    """x (..., cols) to codes (..., cols) E4M3 and float32 scales (..., tiles)."""
    lead, cols = x.shape[:-1], x.shape[-1]
    x = x.float().contiguous()
    codes = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale = x.new_empty((*lead, -(-cols // BLOCK)))
    inputs = (x.data_ptr(), codes.data_ptr(), scale.data_ptr(), lead.numel(), cols)
    by_two = scale_format == "ue8m0"
    in_threads(lambda *part: _quantize_at(*inputs, by_two, *part), lead.numel(), 1, 4 * x.numel())
    return codes, scale


def dequantize(codes: Tensor, scale: Tensor, block_rows: int, out: Tensor) -> None:
    """code * scale of codes (rows, cols) and scales (rows / block_rows, tiles) into ``out``, which
    is contiguous, in float32, float64 or, rounded, bfloat16. NaN codes give NaN."""
    run = _dequantize_bf16 if out.dtype == torch.bfloat16 else _dequantize
    inputs, result = (array(codes), array(scale), block_rows), array(out)
    in_threads(lambda *rows: run(*inputs, *rows, result), len(codes), block_rows, codes.numel())


def product(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor) -> Tensor:
    """x W^T (..., out) in float64 for codes x (..., inner) with scales (..., tiles), and w (out,
    inner) with scales (blocks, tiles)."""
    lead, (outer, inner) = x.shape[:-1], w.shape
    out = w_scale.new_empty((*lead, outer), dtype=torch.float64)
    tensors = [each.contiguous() for each in (x, x_scale, w, w_scale, out)]
    inputs = (*(each.data_ptr() for each in tensors), lead.numel(), inner, outer, _SMALLEST)
    in_threads(lambda *part: _one(*inputs, *part), outer, BLOCK, lead.numel() * inner * outer)
    return out


def products(
    x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor, most: int
) -> Tensor:
    """Rows sorted by expert, times the matrices of their own expert: (rows, parts, out) in float64.

    x (rows, inner) and scales (rows, tiles); w (experts, parts, out, inner) and scales (experts,
    parts, blocks, tiles); ends (experts): where each expert's rows end. Rows that follow the last
    come out as 0. Those of experts with more than ``most`` of them are left at 0, to be filled in.
    """
    (rows, inner), (experts, parts, outer, _) = x.shape, w.shape
    out = w_scale.new_zeros(rows, parts, outer, dtype=torch.float64)
    tensors = [each.contiguous() for each in (x, x_scale, w, w_scale, ends.long(), out)]
    sizes = (rows, inner, outer, experts, parts, most)
    inputs = (*(each.data_ptr() for each in tensors), *sizes, _SMALLEST)
    in_threads(lambda *part: _each(*inputs, *part), outer, BLOCK, rows * parts * inner * outer)
    return out
