"""``dsv3 diff``: the table of ``dsv3.checkpoint.comparison``, and what it says in one sentence."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3.commands import options

HELP = "Name the first layer whose output departs from transformers'."
EXAMPLE = None


def add_options(parser: ArgumentParser) -> None:
    """MODEL_DIR."""
    parser.add_argument("model", metavar="MODEL_DIR", type=options.model)


def run(args: Namespace, _: Sequence[str]) -> int:
    """Print the table; 0 when all parts agree, 1 when one departs."""
    from dsv3.checkpoint.comparison import diff

    report = diff(args.model)
    print(report)
    if report.first is None:
        print(f"\nno part differs by more than {report.tolerance:.0e} of its largest value")
        return 0
    print(
        f"\n{report.first.part} is the first to depart, by {report.first.difference:.1e} of its "
        f"largest value (tolerance {report.tolerance:.0e})"
    )
    return 1
