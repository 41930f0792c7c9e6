"""A product of few rows with a matrix of plain numbers, summed in float64, on a CPU.

Precision "fp8" keeps its head in bfloat16 and takes its logits from float64 sums. torch would first
write the matrix down in float64, four times its size.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dsv3.kernels.cpu import ANY_ORDER, array, in_threads, loop, number

# Rows of w that are taken together: x is read once for them.
_TOGETHER = 4


@loop(fastmath=ANY_ORDER)
def _times(x, w, first, last, out):
    """x w^T for the rows of w from ``first`` to ``last``."""
    for n in range(first, last, _TOGETHER):
        one, two = w[n], w[min(n + 1, last - 1)]
        three, four = w[min(n + 2, last - 1)], w[min(n + 3, last - 1)]
        for m in range(x.shape[0]):
            a = b = c = d = 0.0
            for k in range(x.shape[1]):
                value = x[m, k]
                a += np.float64(number(one[k])) * value
                b += np.float64(number(two[k])) * value
                c += np.float64(number(three[k])) * value
                d += np.float64(number(four[k])) * value
            for i, total in enumerate((a, b, c, d)):
                if n + i < last:
                    out[m, n + i] = total


def product(x: Tensor, w: Tensor) -> Tensor:
    """x W^T (rows, out) in float64 for x (rows, inner) and w (out, inner), float32 or bfloat16."""
    out = x.new_empty(len(x), len(w), dtype=torch.float64)
    inputs = (array(x.double()), array(w))
    work = x.shape[0] * w.numel()
    in_threads(lambda *rows: _times(*inputs, *rows, array(out)), w.shape[0], _TOGETHER, work)
    return out
