"""``dsv3 inspect``: what ``dsv3.checkpoint.inspect`` finds out, as a table or as JSON."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dsv3.commands import options
from dsv3.config import PRESETS
from dsv3.families import FAMILIES

if TYPE_CHECKING:
    from dsv3.checkpoint.inspect import Contents

HELP = "Parameters, bytes and tensors of a model, and what each rank holds."
EXAMPLE = "dsv3 inspect --preset deepseek-v3"


def add_options(parser: ArgumentParser) -> None:
    """MODEL_DIR or --preset, over how many ranks, how to print."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL_DIR", nargs="?", type=options.model)
    which.add_argument("--preset", choices=tuple(PRESETS), help="no files needed")
    parser.add_argument(
        "--tp", type=options.count, metavar="N", help="show what each of N ranks holds"
    )
    parser.add_argument("--json", action="store_true")


def run(args: Namespace, _: Sequence[str]) -> int:
    """Print what the files hold; nothing is loaded."""
    from dsv3.checkpoint.inspect import contents

    found = contents(args.model, preset=args.preset, ranks=args.tp)
    print(json.dumps(found.report(), indent=2) if args.json else table(found))
    return 0


def table(found: Contents) -> str:
    """A report as text, with what fits on which GPUs."""
    from dsv3.checkpoint.inspect import GPUS, USABLE, cache_bytes_per_token

    config, result = found.config, found.report()
    p = result["parameters"]
    family = FAMILIES[config.model_type]
    embedding = config.vocab_size * config.hidden_size
    lines = [
        f"{config.model_type}, the name of {family.models}:",
        f"  {family.adds}",
        "parameters",
        _row("main model", p["main"]),
        _row("activated per token", p["activated"]),
        _row("  without embedding", p["activated"] - embedding),
        _row("MTP", p["mtp"]),
        "in the files",
        *(_row(f"{dtype} values", count) for dtype, count in p["by_dtype"].items()),
        _row("all values", p["total"]),
        _row("bytes", result["bytes"]),
        _row("tensors", result["tensors"]),
        f"cache, bytes per token   {cache_bytes_per_token(config):>19,}",
        "",
        f"in the memory of GPU 0 of {found.ranks}, {found.precision}",
        *(_row(f"{kind}, bytes", count) for kind, count in found.held.items()),
        "",
        f"A rank's weights, and tokens of cache (thousands) that fit beside them in "
        f"{USABLE:.0%} of a GPU",
        "(GB of 10^9 bytes, of GPUs too: more than their names say, which count in GiB)",
        f"{'ranks':>5} {'files GB':>9} {found.precision + ' GB':>9}"
        + "".join(f"{f'{name} {gb}':>16}" for name, gb in GPUS.items()),
    ]
    for fit in found.fits():
        cells = [f"{tokens / 1e3:,.0f}" if tokens > 0 else "-" for tokens in fit.tokens]
        lines.append(
            f"{fit.ranks:>5} {fit.stored / 1e9:>9.3f} {fit.memory / 1e9:>9.3f}"
            + "".join(f"{cell:>16}" for cell in cells)
        )
    return "\n".join(lines)


def _row(what: str, count: int) -> str:
    return f"  {what:<23}{count:>19,}"
