"""Lines in, text out: the terminal, seen from a model on one rank or several.

Rank 0 alone holds the terminal. What it reads it tells the others, so that all ranks take the
same step; what it is asked to print it prints, and the others are silent. While nobody types, the
others wait in a collective, and a collective has a time limit; so rank 0 says "still waiting"
once a minute.

Ctrl-C has two meanings. While a line is awaited, it drops what was typed. While an answer is being
made, it stops the answer: a flag is set, the next choice of a token carries it to all ranks, and
they stop at the same token. Raising an exception instead would leave one rank in the middle of a
collective that the others have finished.
"""

from __future__ import annotations

import os
import select
import signal
import sys

from dsv3.parallel.tensor import TensorGroup

_KEEP_ALIVE_SECONDS = 60
_PROMPT = "> "


class Terminal:
    """Reads lines and prints text for a group of ranks; everything happens on rank 0."""

    def __init__(self, group: TensorGroup):
        self.group = group
        self.speaks = group.rank == 0
        self.stopped = False  # Ctrl-C since the last answer began
        self._reading = False
        self._pending = b""
        # Control characters that a model writes would move the cursor or worse.
        self._guards = self.speaks and sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Print at once, without a line end."""
        if self.speaks and text:
            sys.stdout.write(_without_controls(text) if self._guards else text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line about the work, on stderr."""
        if self.speaks:
            print(text, file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Take Ctrl-C over from Python: from now on it stops an answer, not the program."""
        if self.speaks:
            signal.signal(signal.SIGINT, self._on_interrupt)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def ask(self) -> str | None:
        """The next line, the same on all ranks; None at the end of the input."""
        prompt = _PROMPT
        while True:
            answer = self._read(prompt) if self.speaks else None
            kind, line = self.group.broadcast_object(answer)
            if kind == "line":
                return line
            if kind == "end":
                return None
            prompt = ""  # still waiting: the prompt stands there already

    def _on_interrupt(self, *_) -> None:
        if self._reading:
            raise KeyboardInterrupt
        self.stopped = True

    def _read(self, prompt: str) -> tuple[str, str]:
        """("line", text), ("end", "") or, after a minute of silence, ("waiting", "")."""
        while True:
            try:
                self._reading = True
                self.write(prompt)
                return self._read_line()
            except KeyboardInterrupt:
                self._pending = b""
                prompt = f"\n(/exit or Ctrl-D leaves)\n{_PROMPT}"
            finally:
                self._reading = False

    def _read_line(self) -> tuple[str, str]:
        # Straight from the descriptor: what Python's own buffer held, select would not see.
        while b"\n" not in self._pending:
            if not select.select([0], [], [], _KEEP_ALIVE_SECONDS)[0]:
                return "waiting", ""
            more = os.read(0, 65536)
            if not more:
                break
            self._pending += more
        if not self._pending:
            return "end", ""
        line, _, self._pending = self._pending.partition(b"\n")
        return "line", line.decode("utf-8", errors="replace").rstrip("\r")


def _without_controls(text: str) -> str:
    """Text with control characters, except tab and line end, shown as U+FFFD."""
    return "".join("\ufffd" if (ord(c) < 32 or 127 <= ord(c) < 160) and c not in "\n\t" else c
                   for c in text)
