"""``dsv3 convert``: one file a rank, as ``dsv3.checkpoint.convert`` cuts them."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3.commands import options

HELP = "Cut a released checkpoint into one file a rank."
EXAMPLE = None


def add_options(parser: ArgumentParser) -> None:
    """HF_DIR OUT_DIR --tp N [--dry-run]."""
    parser.add_argument("source", metavar="HF_DIR", type=options.model)
    parser.add_argument("target", metavar="OUT_DIR", type=options.folder)
    parser.add_argument(
        "--tp", type=options.count, metavar="N", required=True, help="number of ranks"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")


def run(args: Namespace, _: Sequence[str]) -> int:
    """Convert with a progress bar; a dry run prints its plan instead."""
    from dsv3.checkpoint.convert import convert
    from dsv3.checkpoint.jobs import plan_text

    plan = convert(
        args.source, args.target, tp=args.tp, dry_run=args.dry_run, progress=not args.dry_run
    )
    if args.dry_run:
        print(plan_text(plan))
    return 0
