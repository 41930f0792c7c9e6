"""Many small products at once: rows sorted by expert, each times its own expert's matrix.

*Grouped*: torch's ``grouped_mm`` takes all rows, all matrices and the places where one expert's
rows end. *One by one*: the plain form, which any product can take part in. A test holds one to the
other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.fp8 import QuantizedTensor

# A grouped product wants rows that start at multiples of so many bytes.
_ROW_BYTES = 16
# Rows that an expert's share is rounded up to, see ``spread``.
_SHARE = 64


def can_group(x: Float[Tensor, "choices in"], stack: Float[Tensor, "experts out in"]) -> bool:
    """Whether one grouped product serves all experts: rows at all, aligned ones, and, on a CPU,
    where it visits every expert, enough choices to go round."""
    if len(x) == 0 or (len(x) < len(stack) and not x.is_cuda):
        return False
    return all(size * x.itemsize % _ROW_BYTES == 0 for size in stack.shape[1:])


def grouped(
    x: Float[Tensor, "choices in"],
    stack: Float[Tensor, "experts out in"],
    ends: Int[Tensor, " experts"],
) -> Float[Tensor, "choices out"]:
    """All products in one call; rows past the last end are junk."""
    ends = ends.to(torch.int32)
    place = None
    if not x.is_cuda and x.dtype == torch.bfloat16 and len(x) >= len(stack) * _SHARE:
        place, ends = spread(ends, len(x))
        room = x.new_zeros(len(x) + len(stack) * _SHARE, x.shape[1])
        x = room.index_copy(0, place, x)
    y = F.grouped_mm(x, stack.transpose(1, 2), offs=ends)
    return y if place is None else y.index_select(0, place)


def one_by_one(
    product: Callable,
    x: Float[Tensor, "choices in"] | QuantizedTensor,
    matrices: Sequence[Tensor] | QuantizedTensor,
    ends: Int[Tensor, " experts"],
) -> Float[Tensor, "choices out"]:
    """product(rows, matrix) for expert after expert; rows past the last end come out as zeros.

    An expert without rows is not visited. matrices: of all experts; for plain ones in training, a
    stack that was taken apart once: the gradient of stack[e] is a stack full of zeros.
    """
    parts, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            parts.append(product(x[start:end], matrices[expert]))
        start = end
    if not parts:
        parts.append(product(x[:0], matrices[0]))
    if start < len(x):
        parts.append(parts[0].new_zeros(len(x) - start, parts[0].shape[1]))
    return torch.cat(parts)


def spread(
    ends: Int[Tensor, " experts"], rows: int
) -> tuple[Int[Tensor, " {rows}"], Int[Tensor, " experts"]]:
    """Places for rows sorted by expert such that each expert's share is a multiple of 64 rows.

    A bfloat16 product on a CPU is compiled for its shape, which takes longer than the product.
    Rounded up, the few shapes there are come again and again. Rows that belong to nobody (behind
    the last end) go behind the last share. Returns the place of each row, and the new ends.
    """
    starts = F.pad(ends, (1, 0))
    shares = (starts.diff() + _SHARE - 1) // _SHARE * _SHARE
    new_ends = shares.cumsum(0, dtype=ends.dtype)
    moved = F.pad(new_ends, (1, 0)) - starts
    row = torch.arange(rows, device=ends.device)
    return row + moved[torch.searchsorted(ends, row, right=True)], new_ends
