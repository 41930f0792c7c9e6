"""The one exception of the house.

An error is written for the person who meets it. It says in one line what is wrong, where, what
was found, what was expected, and the way out. The command line prints that line and ends with a
code other than 0; it never shows a traceback for a mistake in a file, a field or a flag.
"""

from __future__ import annotations


class DSV3Error(Exception):
    """A mistake in an input: a file, a field, a shape, a flag, a world size.

    what: what is wrong, as a short clause ("wrong shape").
    where: the file, tensor, field or flag.
    found, expected: the two values that disagree; any object, shown with ``str``.
    fix: what the reader can do about it.
    """

    def __init__(self, what: str, *, where=None, found=None, expected=None, fix: str | None = None):
        self.what, self.where, self.fix = what, where, fix
        self.found, self.expected = found, expected
        super().__init__(what, where, found, expected, fix)

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        facts = []
        if self.found is not None:
            facts.append(f"found {self.found}")
        if self.expected is not None:
            facts.append(f"expected {self.expected}")
        if facts:
            text += " (" + ", ".join(facts) + ")"
        if self.fix:
            text += f". {self.fix}"
        return " ".join(text.split())
