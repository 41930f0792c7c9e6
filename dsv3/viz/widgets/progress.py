"""A bar that fills while a cell trains, and is a fixed line of text in the stored notebook."""

from __future__ import annotations

from collections.abc import Iterator

import ipywidgets
from IPython.display import display


class _Bar(ipywidgets.IntProgress):
    def __repr__(self) -> str:
        return f"[A bar of {self.max} {self.description} that filled while this cell ran]"


def progress(count: int, what: str = "steps") -> Iterator[int]:
    """0, 1, ... count - 1, with a bar below the cell that shows how many are done."""
    bar = _Bar(max=count, description=what)
    display(bar)
    for number in range(count):
        yield number
        bar.value = number + 1
