"""Functions that a compiler takes as one operation, without looking into them.

``torch.compile`` follows a function to its last tensor operation and writes new code for all of
them together. Where a loop runs as often as a tensor says (experts, each with its own number of
rows) it cannot follow, and the graph would break there; where a matrix is worked through in pieces
that stay in a processor's cache, it had better not. Such a function gets a name among torch's
operations. While a graph is made, the operation stands in it; else the function is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def opaque(schema: str, like: Callable) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator for a function of positional arguments that changes none of them and needs no
    gradient.

    schema: in torch's notation, "name(Tensor x, int n) -> Tensor"; like: given the same arguments,
    gives empty tensors of the shape and dtype of the results. A name that is there already gets
    another function, as when a notebook loads an edited module again.
    """
    name, brace, rest = schema.partition("(")

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = torch.library.custom_op(
            f"dsv3::{name}",
            function,
            mutates_args=(),
            device_types=("cpu", "cuda"),
            schema=brace + rest,
        )
        known.register_fake(like)
        operation = getattr(torch.ops.dsv3, name).default

        @wraps(function)
        def called(*arguments: P.args, **named: P.kwargs) -> R:
            chosen = operation if torch.compiler.is_compiling() else function
            return chosen(*arguments, **named)

        return called

    return decorate
