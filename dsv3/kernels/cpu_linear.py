"""Products of few rows with matrices of plain numbers, on a CPU.

One row reads a whole matrix for two operations a number, so what counts is how fast the matrix
comes from memory. A core fetches ahead of a reader that goes straight on: one AVX2 machine reads 9
to 10 GB/s so, and 6 where a loop walks along four rows of the matrix at once, hardly more than its
library (``dsv3.plain``). So here the matrix is read once, row by row, and each number meets up to
four rows of x.

Sums are float32, or float64: precision "fp8" keeps its head in bfloat16 and takes its logits from
float64 sums, for which torch would first write the matrix down in float64, four times its size.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dsv3.kernels.cpu import (
    ANY_ORDER,
    NEIGHBOURS,
    ONE,
    in_threads,
    loop,
    number,
    numbers,
    numbers_like,
)


@njit(nogil=True, fastmath=ANY_ORDER)
def _times(x, w, first, last, out):
    """x w^T for the rows of w from ``first`` to ``last``."""
    zero = out.dtype.type(0.0)
    rows, fours = x.shape[0], x.shape[0] // 4 * 4
    for n in range(first, last):
        row = w[n]
        for m in range(0, fours, 4):
            one, two, three, four = x[m], x[m + 1], x[m + 2], x[m + 3]
            a = b = c = d = zero
            for k in range(x.shape[1]):
                value = out.dtype.type(number(row[k]))
                a += value * one[k]
                b += value * two[k]
                c += value * three[k]
                d += value * four[k]
            out[m, n], out[m + 1, n], out[m + 2, n], out[m + 3, n] = a, b, c, d
        for m in range(fours, rows):
            mine, total = x[m], zero
            for k in range(x.shape[1]):
                total += out.dtype.type(number(row[k])) * mine[k]
            out[m, n] = total


@loop()
def _one(x, w, out, rows, inner, outer, kind, sums, first, last):
    """A matrix w (outer, inner) of numbers like ``kind``, summed in numbers like ``sums``."""
    _times(
        numbers_like(x, (rows, inner), sums),
        numbers_like(w, (outer, inner), kind),
        first,
        last,
        numbers_like(out, (rows, outer), sums),
    )


@loop()
def _each(x, w, ends, out, rows, inner, outer, experts, most, kind, sums, first, last):
    """Of experts with up to ``most`` rows: their rows times their own matrix."""
    values = numbers_like(x, (rows, inner), sums)
    results = numbers_like(out, (rows, outer), sums)
    matrices = numbers_like(w, (experts, outer, inner), kind)
    begin = 0
    for expert, end in enumerate(numbers(ends, experts, np.int64)):
        if begin < end <= begin + most:
            _times(values[begin:end], matrices[expert], first, last, results[begin:end])
        begin = end


def product(x: Tensor, w: Tensor, sums: torch.dtype) -> Tensor:
    """x W^T (..., out) in ``sums``, float32 or float64, for x (..., inner) and w (out, inner), of
    numbers with no more bits than these."""
    rows, (outer, inner) = x.shape[:-1].numel(), w.shape
    out = x.new_empty((*x.shape[:-1], outer), dtype=sums)
    x, w = x.to(sums).contiguous(), w.contiguous()
    inputs = (x.data_ptr(), w.data_ptr(), out.data_ptr(), rows, inner, outer)
    kinds = ONE[w.dtype], ONE[sums]
    in_threads(lambda *part: _one(*inputs, *kinds, *part), outer, NEIGHBOURS, rows * inner * outer)
    return out


def products(x: Tensor, w: Tensor, ends: Tensor, most: int, sums: torch.dtype) -> Tensor:
    """Rows sorted by expert, times their own expert's matrix: (rows, out) in ``sums``.

    x (rows, inner) and w (experts, out, inner), of numbers as above; ends (experts): where each
    expert's rows end. Rows that follow the last come out as 0. Those of experts with more than
    ``most`` of them are left at 0, to be filled in.
    """
    (rows, inner), (experts, outer, _) = x.shape, w.shape
    out = x.new_zeros(rows, outer, dtype=sums)
    tensors = [each.contiguous() for each in (x.to(sums), w, ends.long(), out)]
    sizes = (rows, inner, outer, experts, most, ONE[w.dtype], ONE[sums])
    inputs = (*(each.data_ptr() for each in tensors), *sizes)
    in_threads(lambda *part: _each(*inputs, *part), outer, NEIGHBOURS, rows * inner * outer)
    return out
