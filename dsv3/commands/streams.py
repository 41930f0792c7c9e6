"""Standard input, output and error as programs really meet them.

A service starts its programs with streams closed: the next file that is opened then takes their
number, and what is printed lands in it. A container without a locale gives an output that knows
ASCII and nothing else: the first é ends the program. And a terminal obeys what is printed on it,
so a file name or a model's text can move the cursor, clear the screen or set the window's title.

``prepare`` is called once, before anything else: afterwards there are three streams, every text
can be written (what the encoding lacks is shown as a mark), and a terminal is shown text only. What
goes into a file or a pipe stays as it is.
"""

from __future__ import annotations

import io
import os
import re
import sys

# All control characters but tab and line feed. Progress bars on stderr also need the return.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_CONTROLS_OF_BARS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def prepare() -> None:
    """Open the streams that are closed, let all text pass, and guard terminals."""
    _open_closed()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sys.stdout = _ready(sys.stdout, _CONTROLS)
    sys.stderr = _ready(sys.stderr, _CONTROLS_OF_BARS)


def typed(word: str) -> str:
    """A word of the command line as text. Where the locale knows ASCII only, Python keeps each
    byte of an é as half a surrogate pair; most terminals send UTF-8 all the same."""
    if not any("\udc80" <= letter <= "\udcff" for letter in word):
        return word
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word  # the tokenizer says what is wrong with it


class Guarded(io.TextIOWrapper):
    """A terminal that shows control characters as marks instead of obeying them."""

    def __init__(self, stream: io.TextIOWrapper, controls: re.Pattern[str]):
        super().__init__(stream.buffer, stream.encoding, "replace", line_buffering=True)
        self._inner, self._controls = stream, controls  # the inner stream would close the buffer

    def write(self, text: str) -> int:
        super().write(self._controls.sub("\ufffd", text))
        return len(text)


def _open_closed() -> None:
    """Input that is closed has ended; output that is closed cannot be written, and says so at the
    first attempt; what would go to a closed stderr goes nowhere."""
    for name, access, mode in (
        ("stdin", os.O_RDONLY, "r"),
        ("stdout", os.O_RDONLY, "w"),
        ("stderr", os.O_WRONLY, "w"),
    ):
        if getattr(sys, name) is None:
            # The lowest free number is taken, which is the one that was closed.
            handle = os.open(os.devnull, access)
            os.set_inheritable(handle, True)
            stream = open(handle, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - stays open
            setattr(sys, name, stream)


def _ready(stream, controls: re.Pattern[str]):
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, Guarded):
        return stream
    stream.reconfigure(errors="replace")
    if not stream.isatty():
        return stream
    os.environ.setdefault("NO_COLOR", "1")  # Python's own colours are control characters too
    return Guarded(stream, controls)
