"""Row 14: how long the chapters of the book take, each run from top to bottom and compared.

The same run as that of ``make test``, solutions apart: nbval on two processes. Needs the checkout.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from dsv3.bench.peers import Missing
from dsv3.bench.row import Goal, Line, Row, Workbench, quantity

FOLDER = Path(__file__).parents[2] / "chapters"
LEAST, LIMIT = 300, 900  # seconds
_TOOLS = {"nbval": "nbval", "xdist": "pytest-xdist", "jupyterlab": "jupyterlab"}


def command(folder: Path) -> list[str]:
    """What runs them."""
    return [
        *(sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env"),
        *("--nbval-cell-timeout=120", "--nbval-sanitize-with", str(folder / "nbval_sanitize.cfg")),
        *("-p", "dsv3.book.times", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadscope"),
        *("--ignore", str(folder / "solutions"), str(folder)),
    ]


def seconds_of(told: str) -> dict[str, float]:
    """Of each notebook, from what ``dsv3.book.times`` prints."""
    lines = re.findall(r"^ *(\d+\.\d)  (\S+\.ipynb)$", told, re.MULTILINE)
    return {Path(name).name: float(took) for took, name in lines}


def all_chapters(folder: Path, row: Row, bench: Workbench, allowed: float) -> Iterator[Line]:
    if not folder.is_dir():
        raise Missing("the chapters are in the checkout; run it there")
    for module, package in _TOOLS.items():
        if importlib.util.find_spec(module) is None:
            raise Missing(f"{package} is not installed; in the checkout: make test, or "
                          "pip install -c constraints.txt -e '.[book,test]'")  # fmt: skip
    environment = os.environ | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    began = time.perf_counter()
    done = subprocess.run(
        command(folder),
        cwd=folder.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=min(LIMIT, max(allowed, LEAST)),
    )
    took = time.perf_counter() - began
    each = seconds_of(done.stdout)
    if done.returncode or not each:
        last = (done.stdout.strip().splitlines() or ["it said nothing"])[-1]
        yield Line(row.number, row.name, row.case, "", "failed", note=last)
        return
    slowest = max(each, key=each.__getitem__)
    mean = sum(each.values()) / len(each)
    less, same = partial(Goal, most=True), "outputs compared"
    yield quantity(row, "together: 5 minutes", took, 300, "s", less(1), same)
    yield quantity(row, f"the slowest, {slowest}: 60 s", each[slowest], 60, "s", less(1), same)
    yield quantity(row, f"the mean of {len(each)}: 20 s", mean, 20, "s", None, same)


def rows(suite: str) -> list[Row]:
    name = "chapters under nbval"
    return [Row(14, name, "two processes", partial(all_chapters, FOLDER), least=LEAST)]
