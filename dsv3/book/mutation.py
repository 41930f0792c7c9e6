"""One line of the package changed for a moment: how the book breaks things on purpose.

    with mutated(Router.forward, "scores.gather(-1, chosen)",
                 "(scores + self.bias).gather(-1, chosen)"):
        broken = model(tokens)

Inside the block the function runs with that part of its source replaced; behind it the right one
is back. The reader sees in one line what the mistake is, and the tests show with the same line
that the mistake would be noticed. The part must stand in the source exactly once: when the
package changes, a mutation fails loudly instead of changing nothing.
"""

from __future__ import annotations
import __future__

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def mutated(function: Callable, old: str, new: str) -> Iterator[None]:
    """Run the block with ``old`` replaced by ``new`` in the source of ``function``.

    function: a function of a module, a method (``Class.method``) or a property's function
    (``Class.name.fget``). Modules of the package that imported a plain function by name see the new
    one too; a notebook's own imports keep the old. Decorators are left out inside the block, and
    so are loops that stand in for plain functions on a CPU (``dsv3.kernels.cpu``).
    Raises ValueError when ``old`` does not stand in the source exactly once, and TypeError for
    what this cannot rebuild: closures, and methods that call super() without arguments.
    """
    original = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(original))
    if source.count(old) != 1:
        raise ValueError(
            f"{old!r} stands {source.count(old)} times in the source of "
            f"{original.__qualname__}; once is needed"
        )
    if original.__closure__:
        raise TypeError(
            f"{original.__qualname__} refers to {original.__code__.co_freevars} "
            "outside itself and cannot be rebuilt from its source"
        )
    module = sys.modules[original.__module__]
    lines = source.replace(old, new)
    start = next(
        i for i, line in enumerate(lines.splitlines()) if line.startswith(("def ", "async def "))
    )
    body = "\n".join(lines.splitlines()[start:])  # without decorators: they are put back below
    made: dict = {}
    code = compile(
        body,
        f"<{original.__qualname__}, mutated>",
        "exec",
        flags=__future__.annotations.compiler_flag,
    )
    exec(code, vars(module), made)
    with _installed(function, original, made[original.__name__], module), _without_loops():
        yield


@contextmanager
def _without_loops() -> Iterator[None]:
    """Compiled loops know nothing of a changed source: inside, FP8 on a CPU does without them."""
    from dsv3.fp8 import backend

    found = backend._is_installed
    backend._is_installed = lambda name: name != "numba" and found(name)  # type: ignore
    try:
        yield
    finally:
        backend._is_installed = found


@contextmanager
def _installed(function, original, replacement, module) -> Iterator[None]:
    """Put the replacement wherever the function is found, and the function back at the end."""
    owner, name = module, original.__name__
    for part in original.__qualname__.split(".")[:-1]:
        owner = getattr(owner, part)
    places = [(owner, name)]
    if owner is module:
        places += [
            (other, key)
            for other in list(sys.modules.values())
            if getattr(other, "__name__", "").startswith("dsv3") and other is not module
            for key, value in list(vars(other).items())
            if value is function
        ]
    before = [(place, key, place.__dict__[key]) for place, key in places]
    for place, key, value in before:
        wrap = {staticmethod: staticmethod, classmethod: classmethod, property: property}.get(
            type(value), lambda f: f
        )
        setattr(place, key, wrap(replacement))
    try:
        yield
    finally:
        for place, key, value in before:
            setattr(place, key, value)
