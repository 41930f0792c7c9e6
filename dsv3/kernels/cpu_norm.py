"""RMSNorm of bfloat16 rows on a CPU, in one loop where torch runs seven operations.

Each step is rounded as ``F.rms_norm`` rounds it in float32, and overflows where it does; only the
squares are summed in float64, so that a last bit of bfloat16 differs now and then.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.kernels.cpu import ANY_ORDER, bits_of_float, float_of_bits, loop, numbers


@loop(fastmath=ANY_ORDER)
def _norm_at(x, weight, out, rows, size, eps):
    values, results = numbers(x, (rows, size), np.int16), numbers(out, (rows, size), np.int16)
    factors = numbers(weight, size, np.float32)
    for row in range(rows):
        total = 0.0
        for k in range(size):
            value = float_of_bits(np.int32(np.int32(values[row, k]) << np.int32(16)))
            total += np.float64(np.float32(value * value))
        mean = np.float32(total) / np.float32(size)
        scale = np.float32(1.0) / np.sqrt(mean + np.float32(eps))
        for k in range(size):
            value = float_of_bits(np.int32(np.int32(values[row, k]) << np.int32(16)))
            result = np.float32(np.float32(value * scale) * factors[k])
            bits = bits_of_float(result)
            even = np.int32((bits >> np.int32(16)) & np.int32(1))
            rounded = np.int16((bits + np.int32(0x7FFF) + even) >> np.int32(16))
            results[row, k] = np.int16(0x7FC0) if np.isnan(result) else rounded


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight for x (..., d) bfloat16 and weight (d) float32."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    size = x.shape[-1]
    places = (x.data_ptr(), weight.data_ptr(), out.data_ptr())
    _norm_at(*places, x.numel() // size, size, eps)
    return out
