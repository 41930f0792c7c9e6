"""``dsv3 experiment``: one of the report's questions, asked of small models."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from dsv3.commands import options
from dsv3.files import unwritable

HELP = "Train small models that differ in one choice, and compare them."
EXAMPLE = "dsv3 experiment balance --work runs/experiments"


# ``--help`` names them without importing torch; a test holds them to ``EXPERIMENTS``.
NAMES = ("fp8", "balance", "mtp", "sparse", "blocks", "attention", "experts")


def add_options(parser: ArgumentParser) -> None:
    """NAME, where runs are kept, how many and how long."""
    words = ", ".join(NAMES) + "; or all"
    parser.add_argument("name", metavar="NAME", choices=(*NAMES, "all"), help=words)
    parser.add_argument(
        "--work",
        type=options.folder,
        default="runs/experiments",
        metavar="DIR",
        help="finished runs are kept here and not made again (default: runs/experiments)",
    )
    parser.add_argument(
        "--out", type=options.folder, metavar="DIR", help="write NAME.json into this folder"
    )
    parser.add_argument("--seeds", type=options.count, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--tokens", type=options.count, metavar="N", help="of each run (default: the experiment's)"
    )
    parser.add_argument(
        "--jobs", type=options.count, default=2, metavar="N", help="runs at a time (default: 2)"
    )


def run(args: Namespace, _: Sequence[str]) -> int:
    """Train what is missing, print a table for each experiment, write JSON where asked."""
    from dsv3.checkpoint.safetensors_io import write_text
    from dsv3.training.experiments import Results, run_experiments

    if args.out:  # before hours of training, not after
        try:
            Path(args.out).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(Path(args.out), error) from None
    names = NAMES if args.name == "all" else (args.name,)
    told = run_experiments(
        names, Path(args.work), seeds=args.seeds, tokens=args.tokens, jobs=args.jobs, say=_say
    )
    for name in names:
        print(f"{told[name]['question']}\n{Results(told[name]).table()}\n", flush=True)
        if args.out:
            write_text(Path(args.out) / f"{name}.json", json.dumps(told[name]) + "\n")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
