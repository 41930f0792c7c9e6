"""Computations without a backward pass, which say so when somebody calls for one.

Autograd records every operation on a tensor that asks for a gradient, and walks back along its
record. Two things here cannot be walked back. A product of stored E4M3 codes: the step from a
number to its code has no slope. A collective: what the other ranks did is not in this rank's
record. Left alone, the first ends in a traceback for some lengths of text and not for others (where
it writes into memory that it was given, ``out=``, autograd refuses), and the second gives a wrong
gradient in silence.

So their forward pass runs for whoever asks, and their backward pass raises ``DSV3Error``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv3.errors import DSV3Error


def asks_gradient(*inputs: torch.Tensor) -> bool:
    """Whether what is computed from these goes on autograd's record."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in inputs)


def without_backward(function: Callable, *inputs: torch.Tensor, what: str, fix: str):
    """function(*inputs), a tensor or a tuple of them. A gradient through it is refused with
    ``what`` and ``fix``."""
    if asks_gradient(*inputs):
        return _WithoutBackward.apply(function, what, fix, *inputs)
    return function(*inputs)


class _WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, what, fix, *inputs):
        ctx.what, ctx.fix = what, fix
        return function(*(value.detach() for value in inputs))

    @staticmethod
    def backward(ctx, *_):
        raise DSV3Error(ctx.what, where="backward", fix=ctx.fix)
