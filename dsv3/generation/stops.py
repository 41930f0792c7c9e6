"""The text of a row while it is being made, and the strings that end it.

A stop string may lie across tokens, begin in the middle of one and end in the middle of another.
Whoever prints each token at once has printed half of it before the other half comes. So a token
is held back as long as its end may be the beginning of a stop string, or of a character whose last
byte is missing. What is released is certain.

All this is done on bytes: UTF-8 never finds a string across the borders of characters.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dsv3.generation.sampling import Choice


class Released(NamedTuple):
    """A token whose text is certain, and that text."""

    choice: Choice
    text: str


class RowText:
    """One row's tokens, held back until their text is certain.

    token_bytes: the bytes that a token adds to the text; None where there is no tokenizer, then
    nothing is held back and texts are empty. stopped: whether a stop string has been found. The
    text ends before it; the last token may run on into it.
    """

    def __init__(self, token_bytes: Callable[[int], bytes] | None, stop: Iterable[str] = ()):
        self._token_bytes, self._stops = token_bytes, [text.encode() for text in stop]
        self._held: list[tuple[Choice, bytes]] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stopped = False

    def push(self, choice: Choice) -> list[Released]:
        """The tokens that are certain now that ``choice`` has come."""
        if self._token_bytes is None:
            return [Released(choice, "")]
        self._held.append((choice, self._token_bytes(choice.id)))
        text = b"".join(part for _, part in self._held)
        # The one that is whole first counts, so that nothing depends on how tokens cut the text.
        found = [
            (place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0
        ]
        if found:
            self.stopped = True
            return self._release(min(found)[1], cut=True)
        text = text[: len(text) - self._open_stop(text)]
        return self._release(len(text) - _open_character(text))

    def flush(self) -> list[Released]:
        """What was held back, at the end of the row: an unfinished character becomes U+FFFD."""
        return self._release(sum(len(part) for _, part in self._held), cut=True)

    def _release(self, certain: int, cut: bool = False) -> list[Released]:
        """The held tokens that end within so many bytes. cut: the text ends there, so one that
        begins within them comes too, without its rest, and nothing is held any more."""
        out, start = [], 0
        while self._held:
            choice, part = self._held[0]
            end = start + len(part)
            inside = start < certain if self.stopped else end <= certain
            if not inside:
                break
            out.append(Released(choice, self._utf8.decode(part[: certain - start])))
            del self._held[0]
            start = end
        if cut:
            self._held.clear()
            rest = self._utf8.decode(b"", final=True)
            if rest:
                out[-1] = out[-1]._replace(text=out[-1].text + rest)
        return out

    def _open_stop(self, text: bytes) -> int:
        """How many bytes at the end may be the beginning of a stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stops)
            ),
            0,
        )


def _open_character(text: bytes) -> int:
    """How many bytes at the end begin a character of UTF-8 that is not whole yet."""
    for size in range(1, min(4, len(text)) + 1):
        byte = text[-size]
        if byte >= 0xC0:  # the first byte of a character, which says how long it is
            return size if size < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0
