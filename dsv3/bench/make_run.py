"""Row 18: what ``make run`` does: the shipped model on two ranks in FP8, from the shell's view.

The command is run as make runs it, each time as new processes; the rate is the one that it tells on
stderr (prefill included), and what is left of the time by the clock went into starting two Pythons
with torch, meeting, loading and ending. Before anything is timed, the text has to be that of one
rank. There is no peer in the same run: what earlier versions reached on two cores is told beside
it, the upper end of which the ratio is taken to.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from dsv3.bench.rounds import Clock, Spread, in_turn, ratio
from dsv3.bench.row import Line, Row, Workbench

PROMPT = """SCENE II. Verona. A garden.

[Enter ROMEO]

ROMEO:
But soft, what light through yonder window breaks?
"""
OPTIONS = (
    "--precision", "fp8", "--temperature", "0.8", "--top-p", "0.95", "--max-new-tokens", "150"
)  # fmt: skip
BEFORE = 8, 23  # tokens a second, on two cores of one machine or another
_LIMIT = 120  # seconds of one run
_TOLD = re.compile(r"^speed +(\d+) new tokens in (\d+\.\d+) s", re.MULTILINE)


def command(ranks: int) -> list[str]:
    """What ``make run`` runs, on so many ranks."""
    model = [sys.executable, "-m", "dsv3", "generate", "dsv3-mini"]
    return [*model, *(("--tp", str(ranks)) if ranks > 1 else ()), *OPTIONS, "--prompt", PROMPT]


def run(ranks: int) -> tuple[str, int, float]:
    """The text, how many tokens of it are new, and in how many seconds they were written."""
    done = subprocess.run(command(ranks), capture_output=True, text=True, timeout=_LIMIT)
    told = _TOLD.search(done.stderr)
    if done.returncode or told is None:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    return done.stdout, int(told[1]), float(told[2])


def two_ranks(row: Row, bench: Workbench, allowed: float, start: Callable = run) -> Iterator[Line]:
    until = time.monotonic() + allowed
    blank = Line(row.number, row.name, row.case, "", "failed", check="text of one rank")
    wanted, *_ = start(1)
    runs: list[tuple[str, int, float]] = []
    whole = in_turn(
        {"": lambda: runs.append(start(2))}, Clock(bench.device), until - time.monotonic()
    )[""]
    if any(text != wanted for text, _, _ in runs):
        yield replace(blank, note="the text is not that of one rank")
        return
    written = [seconds for _, _, seconds in runs[1:]]  # the first was not timed
    rates = [count / seconds for _, count, seconds in runs[1:]]
    least, most = BEFORE
    before = f"{least} to {most} tokens/s, as earlier versions had in other runs"
    yield replace(
        blank, peer=before, state="shown", rounds=len(rates), unit="tokens/s",
        ratio=Spread.of([rate / most for rate in rates]), ours=Spread.of(rates),
        theirs=Spread(most, most, most),
    )  # fmt: skip
    around = [all_of_it - writing for all_of_it, writing in zip(whole, written, strict=True)]
    yield replace(
        blank, peer="starting, loading and ending: the writing", state="shown", unit="s",
        rounds=len(rates), ratio=ratio(around, written), ours=Spread.of(around),
        theirs=Spread.of(written),
    )  # fmt: skip


def rows(suite: str) -> list[Row]:
    if suite == "gpu":
        return []
    return [
        Row(18, "make run", "dsv3-mini, fp8, 2 ranks, 150 tokens", two_ranks, least=30, weight=6)
    ]
