"""Many small products at once: rows sorted by expert, each times its own expert's matrix.

*Grouped*: torch's ``grouped_mm`` takes all rows, all matrices and the places where one expert's
rows end. *One by one*: the plain form, which any product can take part in, and which has to know
on the host how many rows each expert has. On a CPU that costs nothing, and a compiler does not look
into it (``dsv3.opaque``). A test holds one form to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor

from dsv3 import bfloat16, fp8
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.product import ROWS_IN_LOOPS
from dsv3.opaque import opaque
from dsv3.plain import FEW_ROWS, in_loops, linear

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


@opaque(
    "plain_experts(Tensor x, Tensor stack, Tensor ends) -> Tensor",
    like=lambda x, stack, ends: x.new_empty(len(x), stack.shape[1]),
)
def plain_experts(
    x: Float[Tensor, "choices in"],
    stack: Float[Tensor, "experts out in"],
    ends: Int[Tensor, " experts"],
) -> Float[Tensor, "choices out"]:
    """Products of plain numbers, in x's dtype, in whichever form there is."""
    share, sums = -(-len(x) // len(stack)), torch.promote_types(x.dtype, torch.float32)
    if x.dtype == stack.dtype and in_loops(x, stack, share, sums):
        return _plain_in_loops(x, stack, ends, sums)
    if can_group(x, stack) and not bfloat16.widens(x):  # else all experts' would be widened at once
        return grouped(x, stack.to(x.dtype), ends)
    return one_by_one(linear, x, stack.unbind(), ends)


def _plain_in_loops(
    x: Float[Tensor, "choices in"],
    stack: Float[Tensor, "experts out in"],
    ends: Int[Tensor, " experts"],
    sums: torch.dtype,
) -> Float[Tensor, "choices out"]:
    """``one_by_one`` on a CPU: all experts with few rows in one call."""
    from dsv3.kernels import cpu_linear

    out = cpu_linear.products(x, stack, ends, FEW_ROWS, sums).to(x.dtype)
    return _with_the_others(linear, out, FEW_ROWS, x, stack, ends)


@opaque(
    "fp8_experts(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, Tensor ends, ScalarType sums)"
    " -> Tensor",
    like=lambda x, x_scale, w, w_scale, ends, sums: x.new_empty(
        len(x), w.shape[1:-1].numel(), dtype=sums
    ),
)
def fp8_experts(
    x: Float8e4m3fn[Tensor, "choices in"],
    x_scale: Float32[Tensor, "choices tiles"],
    w: Float8e4m3fn[Tensor, "experts *parts out in"],
    w_scale: Float32[Tensor, "experts *parts blocks tiles"],
    ends: Int[Tensor, " experts"],
    sums: torch.dtype,
) -> Float[Tensor, "choices _"]:
    """Products of FP8 codes, in ``sums``; the outputs of an expert's parts stand side by side."""

    def product(rows, matrix):
        parts = [matrix] if len(matrix.shape) == 2 else matrix
        return torch.cat([fp8.matmul(rows, part, sums) for part in parts], -1)

    codes, stack = QuantizedTensor(x, x_scale, fp8.ACTIVATION_BLOCK), QuantizedTensor(w, w_scale)
    if len(x) and pick_backend(x.device) == "numba":
        return _codes_in_loops(product, codes, stack, ends).to(sums)
    return one_by_one(product, codes, stack, ends)


def _codes_in_loops(
    product: Callable, x: QuantizedTensor, w: QuantizedTensor, ends: Int[Tensor, " experts"]
) -> Float[Tensor, "choices _"]:
    """``one_by_one`` on a CPU: all experts with few rows in one call."""
    from dsv3.kernels import cpu_fp8

    grids = (w.data, w.scale) if len(w.shape) == 4 else (w.data[:, None], w.scale[:, None])
    out = cpu_fp8.products(x.data, x.scale, *grids, ends, ROWS_IN_LOOPS).flatten(1)
    return _with_the_others(product, out, ROWS_IN_LOOPS, x, w, ends)


def _with_the_others(
    product: Callable,
    out: Float[Tensor, "choices out"],
    most: int,
    x: Tensor | QuantizedTensor,
    stack: Tensor | QuantizedTensor,
    ends: Int[Tensor, " experts"],
) -> Float[Tensor, "choices out"]:
    """out, with the rows filled in of experts that have more than ``most`` of them."""
    if len(out) <= most:
        return out
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end - start > most:
            out[start:end] = product(x[start:end], stack[expert])
        start = end
    return out


def spread(
    ends: Int[Tensor, " experts"], rows: int
) -> tuple[Int[Tensor, " {rows}"], Int[Tensor, " experts"]]:
    """Places for rows sorted by expert such that each expert's share is a multiple of 64 rows.

    A bfloat16 product by a CPU's units is compiled for its shape, which takes longer than itself.
    Rounded up, the few shapes there are come again and again. Rows that belong to nobody (behind
    the last end) go behind the last share. Returns the place of each row, and the new ends.
    """
    starts = F.pad(ends, (1, 0))
    shares = (starts.diff() + _SHARE - 1) // _SHARE * _SHARE
    new_ends = shares.cumsum(0, dtype=ends.dtype)
    moved = F.pad(new_ends, (1, 0)) - starts
    row = torch.arange(rows, device=ends.device)
    return row + moved[torch.searchsorted(ends, row, right=True)], new_ends
