"""The sum over a token's experts (eq. 12), on a CPU.

In torch's operations it is half a dozen of them on a few rows, the last of which wakes threads for
less work than the waking. The loop takes the rows in their order, from the lowest expert to the
highest, and gives the bits of ``index_add``.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from dsv3.kernels.cpu import NEIGHBOURS, ONE, in_threads, loop, numbers, numbers_like


@loop()
def _combine(y, weights, order, used, out, rows, width, tokens, k, one, first, last):
    """Columns ``first`` to ``last`` of out (tokens, width)."""
    values, sums = numbers_like(y, (rows, width), one), numbers_like(out, (tokens, width), one)
    factors, choices = numbers_like(weights, tokens * k, one), numbers(order, rows, np.int64)
    for row in range(numbers(used, 1, np.int64)[0]):
        choice = choices[row]
        factor, mine = factors[choice], sums[choice // k]
        for column in range(first, last):
            mine[column] += values[row, column] * factor


def combine(y: Tensor, weights: Tensor, order: Tensor, used: Tensor) -> Tensor:
    """Each token's weighted sum, (tokens, d) in y's dtype.

    y (rows, d) float32 or float64: outputs of experts, of which the first ``used`` (1) count;
    weights (tokens, k); order (rows): the choice that each row is of, of tokens * k.
    """
    (tokens, k), (rows, width) = weights.shape, y.shape
    out = y.new_zeros(tokens, width)
    tensors = [each.contiguous() for each in (y, weights.to(y.dtype), order, used.long(), out)]
    inputs = (*(each.data_ptr() for each in tensors), rows, width, tokens, k, ONE[y.dtype])
    in_threads(lambda *columns: _combine(*inputs, *columns), width, NEIGHBOURS, 2 * y.numel())
    return out
