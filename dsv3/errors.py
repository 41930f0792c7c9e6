"""The one exception of the house, and its one warning.

An error is written for the person who meets it. It says in one line what is wrong, where, what
was found, what was expected, and the way out. The command line prints that line and ends with a
code other than 0; it never shows a traceback for a mistake in a file, a field or a flag.

Names and values in it often come from files of others. A terminal obeys what is printed on it: a
file name may hold the sequence that clears the screen or changes its title. So what is shown is
made harmless here, in one place: whatever does not print is written as an escape, and long values
are cut in their middle.
"""

from __future__ import annotations

_MOST = 400  # characters of one name or value


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
        text = shown(self.what)
        if self.where is not None:
            text = f"{shown(self.where)}: {text}"
        facts = []
        if self.found is not None:
            facts.append(f"found {shown(self.found)}")
        if self.expected is not None:
            facts.append(f"expected {shown(self.expected)}")
        if facts:
            text += " (" + ", ".join(facts) + ")"
        if self.fix:
            text += f". {shown(self.fix)}"
        return text


class Notice(UserWarning):
    """Something worth one line that is no error: the work goes on.

    Given with ``warnings.warn``; the command line shows it as such a line on stderr.
    """

    def __str__(self) -> str:
        return shown(super().__str__())


def shown(value: object, most: int = _MOST) -> str:
    """A value as one line that any terminal can show: printable, at most ``most`` characters."""
    try:
        text = str(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a deep nest
        return f"a {type(value).__name__} too large to show"
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} ... {text[len(text) - most // 4 :]}"
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in " ".join(text.split())
    )
