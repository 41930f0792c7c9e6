"""RMSNorm of rows on a CPU, in one loop where torch runs ten operations.

Where it is exact, every step rounds as in the plain form, ``layers.exactly_normalised``: squares,
rounded to float32 (those of bfloat16 numbers are exact), are summed in float64, everything else is
float32. Else they are summed in float32, in an order of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from dsv3.kernels.cpu import BF16_NAN, in_threads, loop, number, numbers, to_bf16


@loop(fastmath={"reassoc"})
def _sum_of_squares(row, zero):
    """In the dtype of ``zero``."""
    total = zero
    for k in range(len(row)):
        value = number(row[k])
        total += np.float32(value * value)
    return total


def _kept(y, kind):
    """The float32 y as an array of this dtype keeps it: itself, or the bits of a bfloat16."""
    raise NotImplementedError("only in compiled loops")


@overload(_kept, inline="always")
def _kept_number(y, kind):
    if isinstance(kind.dtype, types.Integer):
        return lambda y, kind: BF16_NAN if np.isnan(y) else to_bf16(y)
    return lambda y, kind: y


@njit(inline="always", error_model="numpy")
def _norm(values, factors, results, eps, exact):
    rows, size = values.shape
    for row in range(rows):
        if exact:
            total = np.float32(_sum_of_squares(values[row], np.float64(0)))
        else:
            total = _sum_of_squares(values[row], np.float32(0))
        rms = np.sqrt(np.float32(total / np.float32(size)) + np.float32(eps))
        for k in range(size):
            y = np.float32(np.float32(number(values[row, k]) / rms) * factors[k])
            results[row, k] = _kept(y, results.dtype)


@loop(error_model="numpy")
def _norm_bf16(x, weight, out, shape, eps, exact, first, last):
    factors = numbers(weight, shape[1], np.float32)
    values, results = numbers(x, shape, np.int16), numbers(out, shape, np.int16)
    _norm(values[first:last], factors, results[first:last], eps, exact)


@loop(error_model="numpy")
def _norm_float32(x, weight, out, shape, eps, exact, first, last):
    factors = numbers(weight, shape[1], np.float32)
    values, results = numbers(x, shape, np.float32), numbers(out, shape, np.float32)
    _norm(values[first:last], factors, results[first:last], eps, exact)


def rms_norm(x: Tensor, weight: Tensor, eps: float, exact: bool) -> Tensor:
    """x / rms(x) * weight for x (..., d) bfloat16 or float32, and weight (d)."""
    x, weight = x.contiguous(), weight.float().contiguous()
    out, shape = x.new_empty(x.shape), (x.numel() // x.shape[-1], x.shape[-1])
    inputs = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), shape, eps, exact)
    norm = _norm_bf16 if x.dtype == torch.bfloat16 else _norm_float32
    in_threads(lambda *rows: norm(*inputs, *rows), shape[0], 1, 2 * x.numel())
    return out
