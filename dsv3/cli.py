"""The command line: ``dsv3 generate``, ``convert``, ``cast``, ``inspect``, ``diff``, ``train``,
``experiment``, ``bench``, ``doctor``.

Each command is a module of ``dsv3.commands``, with its options and its work. This module puts their
parsers together, runs the one that was named, and turns failures into one line and an exit code.
Nothing heavy is imported before a command runs, so that ``--help`` is instant and ``doctor`` runs
where torch is missing.

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
from dsv3.commands import (
    bench,
    cast,
    convert,
    diff,
    doctor,
    experiment,
    generate,
    inspect,
    streams,
    train,
)
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

# In the order in which --help lists them.
COMMANDS = (generate, convert, cast, inspect, diff, train, experiment, bench, doctor)


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
    if args.run is not doctor.run:  # which shows it among the other things to fix
        check_threads()
    return args.run(args, arguments)


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
    """One parser with a subparser for each of ``COMMANDS``, called as its module is."""
    parser = _Parser(prog="dsv3", description="DeepSeek-V3: generate, train, and look inside.")
    parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        own = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.HELP,
            allow_abbrev=False,
            epilog=command.EXAMPLE and f"Example: {command.EXAMPLE}",
        )
        command.add_options(own)
        own.set_defaults(run=command.run)
    return parser
