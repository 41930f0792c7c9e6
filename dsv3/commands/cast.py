"""``dsv3 cast``: FP8 to BF16 and back, as ``dsv3.checkpoint.cast`` does it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3.commands import options

HELP = "Turn an FP8 checkpoint into BF16, or back."
EXAMPLE = None


def add_options(parser: ArgumentParser) -> None:
    """IN_DIR OUT_DIR --to bf16|fp8 [--scale-fmt F] [--dry-run]."""
    parser.add_argument("source", metavar="IN_DIR", type=options.model)
    parser.add_argument("target", metavar="OUT_DIR", type=options.folder)
    parser.add_argument("--to", choices=("bf16", "fp8"), required=True)
    parser.add_argument(
        "--scale-fmt",
        choices=("float32", "ue8m0"),
        default="float32",
        help="with --to fp8: any scales (V3, default) or powers of two (V3.1)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")


def run(args: Namespace, _: Sequence[str]) -> int:
    """Cast with a progress bar; a dry run prints its plan instead."""
    from dsv3.checkpoint.cast import cast
    from dsv3.checkpoint.jobs import plan_text

    plan = cast(
        args.source,
        args.target,
        to=args.to,
        scale_fmt=args.scale_fmt,
        dry_run=args.dry_run,
        progress=not args.dry_run,
    )
    if args.dry_run:
        print(plan_text(plan))
    return 0
