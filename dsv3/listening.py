"""Listening to a model: its modules are given numbers, and not what a kernel makes of them.

torch's hooks tell what goes into a module and what comes out. On a GPU, in FP8, a kernel makes the
norm and its codes in one go (``dsv3.kernels.norm_quant``): the product behind it is given codes,
and the numbers that they stand for are kept nowhere. Who wants to see them lets the model compute
in plain torch for a moment. That rounds at the same points; sums are taken in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from dsv3.precision import Precision


@contextmanager
def in_plain_torch(model: nn.Module) -> Iterator[None]:
    """Inside, what stands between the products of this model is computed by no kernel."""
    parts: list[tuple[Any, Precision]] = []
    for part in model.modules():
        precision = getattr(part, "precision", None)
        if isinstance(precision, Precision):
            parts.append((part, precision))
    try:
        for part, precision in parts:
            part.precision = replace(precision, kernels=False)
        yield
    finally:
        for part, precision in parts:
            part.precision = precision
