"""RMSNorm of rows on a CPU, in one loop where torch runs ten operations.

Every step rounds as it does in the plain form, ``layers.exactly_normalised``: squares, rounded to
float32 (those of bfloat16 numbers are exact), are summed in float64, everything else is float32 and
rounded to the nearest.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

from dsv3.kernels.cpu import BF16_NAN, loop, number, numbers, to_bf16


@loop(fastmath={"reassoc"})
def _sum_of_squares(row):
    total = 0.0
    for k in range(len(row)):
        value = number(row[k])
        total += np.float64(np.float32(value * value))
    return total


def _as(y, element):
    """The float32 y as an element of an array is kept: itself, or the bits of a bfloat16."""
    raise NotImplementedError("only in compiled loops")


@overload(_as, inline="always")
def _kept(y, element):
    if isinstance(element, types.Integer):
        return lambda y, element: BF16_NAN if np.isnan(y) else to_bf16(y)
    return lambda y, element: y


@njit(inline="always")
def _norm(values, factors, results, eps):
    rows, size = values.shape
    for row in range(rows):
        mean = np.float32(_sum_of_squares(values[row])) / np.float32(size)
        rms = np.sqrt(np.float32(mean + np.float32(eps)))
        for k in range(size):
            y = np.float32(np.float32(number(values[row, k]) / rms) * factors[k])
            results[row, k] = _as(y, results[row, k])


@loop()
def _norm_bf16(x, weight, out, rows, size, eps):
    shape = (rows, size)
    factors = numbers(weight, size, np.float32)
    _norm(numbers(x, shape, np.int16), factors, numbers(out, shape, np.int16), eps)


@loop()
def _norm_float32(x, weight, out, rows, size, eps):
    shape = (rows, size)
    factors = numbers(weight, size, np.float32)
    _norm(numbers(x, shape, np.float32), factors, numbers(out, shape, np.float32), eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight for x (..., d) bfloat16 or float32, and weight (d)."""
    x, weight = x.contiguous(), weight.float().contiguous()
    out, size = x.new_empty(x.shape), x.shape[-1]
    places = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    norm_at = _norm_bf16 if x.dtype == torch.bfloat16 else _norm_float32
    norm_at(*places, x.numel() // size, size, eps)
    return out
