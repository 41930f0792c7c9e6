"""All rows of the scoreboard, measured one after the other within so many minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import torch

from dsv3.bench import (
    attention,
    chapters,
    decoding,
    drafting,
    experts,
    footprint,
    make_run,
    memory,
    products,
    quantization,
    training,
)
from dsv3.bench.models import Models
from dsv3.bench.peers import Missing
from dsv3.bench.rounds import Clock
from dsv3.bench.row import Line, Row, Workbench, brief

_GROUPS = (
    quantization, products, experts, attention, decoding, memory, drafting, chapters, training,
    footprint, make_run
)  # fmt: skip


def rows(suite: str, only: Collection[int] = ()) -> list[Row]:
    """Those of a suite, "cpu" or "gpu", in the order of their numbers; of these numbers only."""
    found = [row for group in _GROUPS for row in group.rows(suite)]
    return sorted(
        (row for row in found if not only or row.number in only), key=lambda row: row.number
    )


def workbench(suite: str) -> Workbench:
    device = torch.device("cuda" if suite == "gpu" else "cpu")
    if suite == "gpu":  # specifications multiply in float32
        torch.backends.cuda.matmul.allow_tf32 = False
    return Workbench(device, Clock(device), Models(device))


def measure(
    chosen: list[Row],
    bench: Workbench,
    minutes: float,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Line]:
    """The lines of these rows. What is left of the minutes is shared out over the rows to come by
    weight, and each gets at least what it needs; one for which too little is left is left out.
    A row that cannot be measured is a line that says so, and the others go on."""
    end = time.monotonic() + 60 * minutes
    for number, row in enumerate(chosen):
        left = end - time.monotonic()
        later = chosen[number + 1 :]
        share = row.weight / sum(each.weight for each in chosen[number:])
        allowed = max((left - sum(each.least for each in later)) * share, 0.0)
        blank = Line(row.number, row.name, row.case, "", "left out")
        if left <= row.least or left <= 0:
            needs = f" (it takes {row.least / 60:.0f} or more)" * (row.least >= 60)
            note = f"the {minutes:g} minutes are over{needs}: --minutes M gives more"
            yield replace(blank, note=note)
            continue
        say(f"row {row.number}, {row.name}: {row.case}")
        try:
            yield from row.measure(row, bench, allowed)
        except Missing as missing:
            yield replace(blank, state="missing", note=str(missing))
        except Exception as error:  # a finding like others: the rows that follow are still measured
            yield replace(blank, state="failed", note=brief(error))
