"""``dsv3 bench``: the cells of ``commands.speed``, one line each, or one JSON object."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3.commands import options
from dsv3.errors import DSV3Error

HELP = "Speed against peers, in one run."
EXAMPLE = None


def add_options(parser: ArgumentParser) -> None:
    """Where to measure, how long it may take, how to print."""
    parser.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--minutes",
        type=options.minutes,
        default=5.0,
        metavar="M",
        help="fit the rounds to about M minutes (default: 5)",
    )
    parser.add_argument("--json", action="store_true")


def run(args: Namespace, _: Sequence[str]) -> int:
    """Measure and print all cells; what is being done is said on stderr."""
    import torch

    from dsv3.commands.speed import measure

    if args.suite == "gpu" and not torch.cuda.is_available():
        raise DSV3Error("no GPU to measure", where="--suite", found=args.suite, expected="cpu")
    threads = torch.get_num_threads()
    _say(
        f"prefill and decode, dsv3 and transformers in turn, on {threads} "
        f"thread{'s' * (threads != 1)}: about {args.minutes:g} minutes"
    )
    rows = []
    for row in measure(torch.device("cuda" if args.suite == "gpu" else "cpu"), args.minutes, _say):
        rows.append(row)
        if not args.json:
            print(
                "{dtype:9} {what:8}{length:5}   dsv3 {dsv3:8.1f}   transformers "
                "{transformers:8.1f} tokens/s   ratio {ratio:.2f}   ({rounds} rounds)".format(
                    **row
                ),
                flush=True,
            )
    if args.json:
        print(json.dumps({"threads": threads, "minutes": args.minutes, "cells": rows}))
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
