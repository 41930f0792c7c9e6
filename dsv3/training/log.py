"""``log.jsonl``: one JSON object a line, written as it happens.

A run that is killed and goes on repeats the steps since its last checkpoint, and their lines with
them. A checkpoint therefore knows how long the log was, and whatever comes after is cut off. The
log is for people and plots; no step depends on it, so a run goes on when its log was removed or
cut.

``read_log`` reads it again. Two kinds of lines are in it: of a step (its losses, what the schedules
said, how many tokens each expert got), and of a look at held-out text (losses by domain).
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import median

from dsv3.errors import DSV3Error
from dsv3.files import open_plain, parse_json, read_text, unwritable

LOG_FILE = "log.jsonl"


class Log:
    """The log in a folder."""

    def __init__(self, folder: Path):
        self.path = folder / LOG_FILE

    @property
    def bytes(self) -> int:
        """How long it is now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self) -> None:
        """Begin an empty one, whatever was there."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def go_on(self, size: int) -> None:
        """Cut off what came after the first ``size`` bytes, and a line that has no end."""
        if not self.path.exists():
            return
        with open_plain(self.path) as file:
            kept = file.read(size)
        try:
            os.truncate(self.path, kept.rfind(b"\n") + 1)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def add(self, **values) -> None:
        """One line more."""
        if self.path.exists() and not self.path.is_file():
            raise DSV3Error(
                "cannot be written",
                where=self.path,
                found="not a plain file",
                fix="Move it out of the way",
            )
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from None


@dataclass(frozen=True)
class Stretch:
    """A part of a run that reads windows of one length, as its log shows it.

    first: step of its first line; before: step of the line before that, 0 where there is none, so
    it began between the two; seq_len: tokens of a window.
    """

    before: int
    first: int
    seq_len: int


@dataclass(frozen=True)
class RunLog:
    """The lines of a log by kind, each as it was written, in order of their steps.

    steps: lines with a loss; held_out: lines with figures by domain. All have a "step" and the
    "tokens" that were read up to it.
    """

    steps: tuple[dict, ...] = field(repr=False)
    held_out: tuple[dict, ...] = field(repr=False)

    @classmethod
    def of(cls, lines: Sequence[dict]) -> RunLog:
        """Of the lines of one run, in their order."""
        kinds = ("loss", "held_out")
        return cls(*(tuple(line for line in lines if kind in line) for kind in kinds))

    @cached_property
    def moments(self) -> tuple[int, ...]:
        """Every step that has a line, from the first with a loss on."""
        first = self.steps[0]["step"]
        found = {line["step"] for line in (*self.steps, *self.held_out)}
        return tuple(sorted(step for step in found if step >= first))

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """Names of the routers whose loads were logged; none for a model without one."""
        return _names(line.get("load", {}) for line in self.steps)

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Of the held-out text."""
        return _names(line["held_out"] for line in self.held_out)

    @cached_property
    def stretches(self) -> tuple[Stretch, ...]:
        """Where the windows become longer. No line of a step says their length: it is the tokens
        that were read since the line before, by its number of windows."""
        before = ({"step": 0, "tokens": 0}, *self.steps)
        lengths = [
            (now["tokens"] - last["tokens"]) / max(1, now["step"] - last["step"]) / now["windows"]
            for last, now in pairwise(before)
        ]
        starts, longest = [0], lengths[0]
        for index, length in enumerate(lengths):
            # While a batch grows, its last size is a little more than the mean since the line
            # before. That is no new length: a context grows by more than half.
            if length > 1.5 * longest:
                starts.append(index)
            longest = max(longest, length)
        return tuple(
            Stretch(before[at]["step"], before[at + 1]["step"], round(median(lengths[at:end])))
            for at, end in zip(starts, [*starts[1:], len(lengths)])
        )

    def step_at(self, step: int) -> dict:
        """The last line with a loss up to this step; before all of them the first."""
        return self.steps[max(0, bisect_right(self.steps, step, key=_step) - 1)]

    def held_out_at(self, step: int) -> dict | None:
        """The last line with held-out figures up to this step, if there is one."""
        count = bisect_right(self.held_out, step, key=_step)
        return self.held_out[count - 1] if count else None


def _names(groups: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Each once, in the order in which they came."""
    return tuple(dict.fromkeys(name for names in groups for name in names))


def _step(line: dict) -> int:
    return line["step"]


def read_log(path: str | Path) -> RunLog:
    """The log of a run; path: the file, or the folder that it lies in.

    A last line without its end, of a run that is being written or was killed, is left out. Raises
    DSV3Error for a file that is no such log, or has no step in it yet.
    """
    path = Path(path)
    path = path / LOG_FILE if path.is_dir() else path
    lines = []
    for number, text in enumerate(read_text(path).split("\n")[:-1], 1):
        try:
            line = parse_json(text)
        except ValueError:
            line = {}
        if not _is_line(line):
            raise DSV3Error(
                "not a line of a training log",
                where=f"{path}, line {number}",
                found=f"{text:.60}",
                expected='a JSON object with "step" and "tokens", of a step also with "loss", "lr" '
                'and "windows"',
            )
        lines.append(line)
    log = RunLog.of(lines)
    if not log.steps:
        raise DSV3Error(
            "no step is logged yet", where=path, fix="Wait for the first line with a loss"
        )
    return log


def _is_line(line: object) -> bool:
    """Whether it has what every line has; a loss may be NaN, for runs that break have logs too."""
    if not isinstance(line, dict):
        return False
    whole, numbers = ("step", "tokens"), ()
    if "loss" in line:
        whole, numbers = (*whole, "windows"), ("loss", "lr")
    return all(type(line.get(name)) is int and line[name] > 0 for name in whole) and all(
        type(line.get(name)) in (int, float) for name in numbers
    )
