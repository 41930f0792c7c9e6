"""Computations without a backward pass, which say so when somebody calls for one.

Autograd notes every operation on a tensor that asks for a gradient, and goes back along its notes.
Three things here cannot be gone back along. A product of stored E4M3 codes has lost the step from
a number to its code; a collective leaves what the other ranks did out of this rank's notes; and
both write into memory of their own (``out=``), which autograd refuses in words of its own. Left
alone, one of them ends in a traceback that depends on the length of the text, and the other gives
a gradient in silence that is wrong.

So their forward pass runs for whoever asks, and their backward pass raises ``DSV3Error``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv3.errors import DSV3Error


def without_backward(function: Callable, *inputs: torch.Tensor, what: str, fix: str):
    """function(*inputs), a tensor or a tuple of them. A gradient through it is refused with
    ``what`` and ``fix``."""
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
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
