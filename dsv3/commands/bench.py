"""``dsv3 bench``: the scoreboard of ``dsv3.bench`` as a table, or as one JSON object."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3.commands import options
from dsv3.errors import DSV3Error
from dsv3.files import unwritable

if TYPE_CHECKING:
    from dsv3.bench.row import Line

HELP = "Speed and memory beside peers, in one run: ratios, and the goals for them."
EXAMPLE = "dsv3 bench --only 3 4 --minutes 1"
ROWS = range(1, 19)
MINUTES = 60.0
STDOUT = "-"


def add_options(parser: ArgumentParser) -> None:
    """Where to measure, what, how long it may take, where to write."""
    parser.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--only",
        type=options.count,
        nargs="+",
        metavar="ROW",
        help="these rows of the scoreboard, 1 to 18 (default: all that the suite has)",
    )
    parser.add_argument(
        "--minutes",
        type=options.minutes,
        default=MINUTES,
        metavar="M",
        help="take about M minutes at most; rows that have fewer than 20 rounds in their share say "
        f"so (default: {MINUTES:g}, in which all have 20 on most machines)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="one JSON object: into FILE, beside the table, or without FILE in its place",
    )
    parser.add_argument(
        "--curves",
        metavar="FILE",
        help="measure instead how costs grow with context, tokens and experts; JSON into FILE",
    )


def run(args: Namespace, _: Sequence[str]) -> int:
    """Measure and print line by line; what is being done is said on stderr. 1 if a check failed."""
    for row in args.only or ():
        if row not in ROWS:
            raise DSV3Error(
                "no such row", where="--only", found=row, expected=f"{ROWS[0]} to {ROWS[-1]}"
            )
    for file in (args.json, args.curves):
        if file not in (None, STDOUT):
            check_writable(Path(file))
    import torch

    from dsv3.bench import machine

    if args.suite == "gpu" and not torch.cuda.is_available():
        raise DSV3Error("no GPU to measure", where="--suite", found=args.suite, expected="cpu")
    described = machine.described()
    if args.curves:
        return _curves(args, described)
    from dsv3.bench.rounds import ENOUGH
    from dsv3.bench.suite import measure, rows, workbench

    chosen = rows(args.suite, args.only or ())
    for row in args.only or ():
        if row not in {each.number for each in chosen}:
            raise DSV3Error(
                f"the {args.suite} suite has no such row", where="--only", found=row,
                expected=f"one of {sorted({each.number for each in rows(args.suite)})}",
            )  # fmt: skip
    table = args.json != STDOUT
    if table:
        told = f"at most {args.minutes:g} minutes, {ENOUGH} rounds a row where they suffice"
        print(f"{machine.in_words(described)}\n{told}", HEADER, sep="\n\n", flush=True)
    lines = []
    for line in measure(chosen, workbench(args.suite), args.minutes, _say):
        lines.append(line)
        if table:
            print(in_words(line), flush=True)
    found = {
        "suite": args.suite,
        "minutes": args.minutes,
        "machine": described,
        "rows": [line.to_dict() for line in lines],
    }
    if table:
        print(summary(lines))
    _write(args.json, found)
    return int(any(line.state == "failed" for line in lines))


def _curves(args: Namespace, described: dict) -> int:
    from dsv3.bench import curves

    found = {"machine": described, "curves": []}
    for curve in curves.measure(args.suite, args.minutes, _say):
        found["curves"].append(curve.to_dict())
        print(curve.in_words(), flush=True)
    _write(args.curves, found)
    return 0


HEADER = f"{'ratio':>7} {'half of all':>15}  {'goal':9} {'':8} row  what and against what"


def in_words(line: Line) -> str:
    """A line of the table: the ratio first, the goal beside it."""
    where = f"{line.row:3}  {line.name}: {line.case}" + f" | {line.peer}" * bool(line.peer)
    if line.ratio is None or line.ours is None or line.theirs is None:
        why = "; ".join(filter(None, (line.check, line.note)))
        return f"{'':7} {'':15}  {line.goal or ''!s:9} {line.state:8} {where}: {why}"
    r = line.ratio
    half = f"{_short(r.low)} to {_short(r.high)}" if r.low < r.high else ""
    return (
        f"{_short(r.middle):>7} {half:>15}  {line.goal or ''!s:9} {line.state:8} {where} | "
        f"{_short(line.ours.middle)} and {_short(line.theirs.middle)} {line.unit}, {_rounds(line)}"
        + "".join(f", {more}" for more in (line.check, line.note) if more)
    )


def _rounds(line: Line) -> str:
    if not line.rounds:
        return "measured once"
    few = " (its share of the time held no more)" if line.hurried else ""
    return f"{line.rounds} round{'s' * (line.rounds != 1)}{few}"


def _short(value: float) -> str:
    """Three digits, without exponents up to a million."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def summary(lines: Sequence[Line]) -> str:
    """How many are met, short, and so on."""
    states = [line.state for line in lines]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    hurried = sum(line.hurried for line in lines)
    few = f"; {hurried} with fewer rounds than they should have: --minutes M gives more"
    return (
        f"\n{counted or 'nothing was measured'}{few if hurried else ''}; "
        "ratio: the peer's time over ours, or size by size"
    )


def check_writable(path: Path) -> None:
    """Before minutes of measuring: that the answer can be written. Raises DSV3Error."""
    if path.is_dir():
        raise DSV3Error("a folder, not a file", where=path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        with path.open("a"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise unwritable(path, error) from None


def _write(file: str | None, found: dict) -> None:
    """Whole or not at all: beside it first, then in its place."""
    if file is None:
        return
    text = json.dumps(found, indent=1)
    if file == STDOUT:
        print(text)
        return
    path = Path(file)
    beside = path.with_name(path.name + ".part")
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise unwritable(path, error) from None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
