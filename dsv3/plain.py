"""Products of plain numbers with matrices, each in whichever form is fast where it is taken.

A form may depend on the processor and on the number of rows, for all round at the same points: sums
in float32 or wider, one rounding at the end. What differs is the order of a sum.

*Loops* (``kernels.cpu_linear``) serve few rows on a CPU: where sums are float64, for which torch
would first write the matrix down in float64, and where the library is slow at few rows. MKL on a
processor without AVX-512 is: for one row it reads a matrix at 5 to 6 GB/s, where a loop gets 9 to
10 and two threads 14; for 2 to 8 rows of 512 numbers it takes 1.1 to 3.2 times as long as the loop,
in bfloat16 1.3 to 5.6 times, and for 16 in float32 0.8 to 1.8 times (one AVX2 machine, torch 2.13).
Beyond few rows the library multiplies, with bfloat16 operands widened where there are no units for
them (``dsv3.bfloat16``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3 import bfloat16
from dsv3.backward import asks_gradient
from dsv3.fp8.backend import pick_backend
from dsv3.kernels.operations import wide_product

# Rows that count as few.
FEW_ROWS = 8
# Rows of a bfloat16 weight that are widened at a time: small enough to stay in a core's cache.
_WIDEN_ROWS = 1024


def _library_streams() -> bool:
    found = torch.cpu.get_capabilities()
    return found.get("architecture") != "x86_64" or found.get("avx512_f", False)


# Asked once, for a compiler does not follow the question.
LIBRARY_STREAMS = _library_streams()


def in_loops(x: Tensor, weight: Tensor, rows: int, sums: torch.dtype) -> bool:
    """Whether loops serve a product of so many rows of x, with sums in ``sums``."""
    return (
        rows <= FEW_ROWS
        and x.device.type == "cpu"
        and (sums == torch.float64 or not LIBRARY_STREAMS)
        and not asks_gradient(x, weight)
        and pick_backend(x.device) == "numba"
    )


def linear(
    x: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "*lead out"]:
    """x W^T in x's dtype, with W rounded to it: summed in float32 or wider, rounded once."""
    sums = torch.promote_types(x.dtype, torch.float32)
    if in_loops(x, weight, x.shape[:-1].numel(), sums):
        return wide_product(x, weight.to(x.dtype), sums).to(x.dtype)
    return bfloat16.linear(x, weight)


def wide_linear(
    x: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"], sums: torch.dtype
) -> Float[Tensor, "*lead out"]:
    """x W^T, summed in ``sums`` and not rounded to fewer bits.

    x and weight come in float32 or bfloat16, the result leaves in ``sums``.
    """
    if in_loops(x, weight, x.shape[:-1].numel(), sums):
        return wide_product(x, weight, sums)
    if weight.dtype == sums:
        return F.linear(x.to(sums), weight)
    if x.is_cuda:
        flat = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=sums)
        return flat.view(*x.shape[:-1], -1)
    wide = x.to(sums)
    if len(weight) <= _WIDEN_ROWS:
        return F.linear(wide, weight.to(sums))
    parts = [F.linear(wide, rows.to(sums)) for rows in weight.split(_WIDEN_ROWS)]
    return torch.cat(parts, dim=-1)
