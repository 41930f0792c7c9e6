"""RMSNorm of bfloat16 rows on a CPU, in one loop where torch runs ten operations.

Every step rounds as it does in the plain form, ``layers.exactly_normalised``: squares, which are
exact in float32, are summed in float64, everything else is float32.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dsv3.kernels.cpu import BF16_NAN, loop, number, numbers, to_bf16


@loop(fastmath={"reassoc"})
def _sum_of_squares(row):
    total = 0.0
    for k in range(len(row)):
        value = number(row[k])
        total += np.float64(np.float32(value * value))
    return total


@loop()
def _norm_at(x, weight, out, rows, size, eps):
    values, results = numbers(x, (rows, size), np.int16), numbers(out, (rows, size), np.int16)
    factors = numbers(weight, size, np.float32)
    for row in range(rows):
        mean = np.float32(_sum_of_squares(values[row])) / np.float32(size)
        rms = np.sqrt(np.float32(mean + np.float32(eps)))
        for k in range(size):
            y = np.float32(np.float32(number(values[row, k]) / rms) * factors[k])
            results[row, k] = BF16_NAN if np.isnan(y) else to_bf16(y)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight for x (..., d) bfloat16 and weight (d)."""
    x, weight = x.contiguous(), weight.float().contiguous()
    out, size = x.new_empty(x.shape), x.shape[-1]
    places = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    _norm_at(*places, x.numel() // size, size, eps)
    return out
