"""Lines in, text out: the terminal, seen from a model on one rank or several.

Rank 0 alone holds the terminal. What it reads it tells the others, so that all ranks take the
same step; what it is asked to print it prints, and the others are silent. While nobody types, the
others wait in a collective, and a collective has a time limit; so a thread of rank 0 says "still
waiting" once a minute.

On a terminal, lines are read with readline: arrow keys move in the line and through earlier ones,
and a text of several lines that is pasted arrives as one. Readline is Python's own, and where it
is missing lines are read all the same.

Ctrl-C has two meanings. While a line is awaited, it drops what was typed. While an answer is being
made, it stops the answer: a flag is set, the next choice of a token carries it to all ranks, and
they stop at the same token. Raising an exception instead would leave one rank in the middle of a
collective that the others have finished.
"""

from __future__ import annotations

import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

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
        self._edits = self.speaks and sys.stdin.isatty() and sys.stdout.isatty()

    def write(self, text: str) -> None:
        """Print at once, without a line end."""
        if self.speaks and text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """A line about the work, on stderr."""
        if self.speaks:
            print(text, file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Take Ctrl-C over from Python: from now on it stops an answer, not the program."""
        if self._edits:
            _set_up_readline()
        if self.speaks:
            signal.signal(signal.SIGINT, self._on_interrupt)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    def ask(self) -> str | None:
        """The next line, the same on all ranks; None at the end of the input."""
        answer = None
        if self.speaks:
            with self._others_know():
                line = self._read()
            answer = ["end", ""] if line is None else ["line", line]
        while True:
            kind, line = self.group.broadcast_object(answer)
            if kind != "waiting":
                return line if kind == "line" else None

    @contextmanager
    def _others_know(self) -> Iterator[None]:
        """Tell the other ranks once a minute that the line is still awaited."""
        done = threading.Event()

        def tell() -> None:
            if self.group.device.type == "cuda":
                torch.cuda.set_device(self.group.device)
            # Where the others are gone, the next word to them says so, and better.
            with suppress(RuntimeError):
                while not done.wait(_KEEP_ALIVE_SECONDS):
                    self.group.broadcast_object(["waiting", ""])

        thread = threading.Thread(target=tell, daemon=True)
        if self.group.size > 1:
            thread.start()
        try:
            yield
        finally:
            done.set()
            if self.group.size > 1:
                thread.join()

    def _on_interrupt(self, *_) -> None:
        if self._reading:
            raise KeyboardInterrupt
        self.stopped = True

    def _read(self) -> str | None:
        """A line, or None at the end of the input."""
        while True:
            try:
                self._reading = True
                return self._read_line()
            except KeyboardInterrupt:
                self.write("\n(/exit or Ctrl-D leaves)\n")
            finally:
                self._reading = False

    def _read_line(self) -> str | None:
        if self._edits:
            try:
                return input(_PROMPT)
            except EOFError:
                line = b""
        else:
            self.write(_PROMPT)
            line = sys.stdin.buffer.readline()
        if not line:
            self.write("\n")  # the shell's own prompt begins on a line of its own
            return None
        return line.decode("utf-8", errors="replace").rstrip("\r\n")


@contextmanager
def settings_kept() -> Iterator[None]:
    """Give the terminal its settings back in the end: a rank that is killed while it reads a line
    cannot."""
    try:
        before = termios.tcgetattr(0)
    except termios.error:  # no terminal
        before = None
    try:
        yield
    finally:
        if before is not None:
            with suppress(termios.error):  # it has gone
                termios.tcsetattr(0, termios.TCSADRAIN, before)


def _set_up_readline() -> None:
    """Line editing for ``input``, which uses readline once it is imported."""
    try:
        import readline
    except ImportError:
        return
    if "libedit" not in (readline.__doc__ or ""):  # which has other words for its settings
        if os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind("set disable-completion on")  # Tab is a tab
