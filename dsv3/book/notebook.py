"""Running a chapter, saving it clean, and writing what it cost at its head.

A notebook is a text and its outputs in one file, and much that an editor leaves in it differs
from run to run: times, widget states, kernel versions. ``run`` executes all cells in a fresh
kernel and keeps what is meant for the reader and nothing else, so that a notebook changes only
when the book does.
"""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from dsv3.book.saved import clean
from dsv3.errors import DSV3Error
from dsv3.machine import cores

BUDGET = re.compile(r"^\| Budget \|.*\|$", re.MULTILINE)
_NUMBERS = {1: "one CPU core", 2: "two CPU cores"}


@dataclass(frozen=True)
class Budget:
    """What one run took: seconds from the start of the kernel to the last cell, and the largest
    memory of the kernel and its children together, in bytes (resident set)."""

    seconds: float
    memory: int

    def __str__(self) -> str:
        count = cores()
        return (
            f"{self.seconds:.0f} s on {_NUMBERS.get(count, f'{count} CPU cores')}, "
            f"{self.memory / 1e9:.1f} GB of memory, no download (measured)"
        )


def run(path: Path, timeout: int = 120) -> Budget:
    """Execute a notebook in its own folder, save it clean with its outputs and its budget.

    timeout: seconds for one cell. Raises DSV3Error when a cell fails; the file is then unchanged.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except FileNotFoundError:
        raise DSV3Error("no such notebook", where=path) from None
    except Exception as error:  # whatever the parser says about a file that is no notebook
        raise DSV3Error("not a notebook", where=path, found=error) from None
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.resolve().parent)}},
    )
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # debugger notes on stderr are no output
    began = time.perf_counter()
    with _peak_of_children() as peak:
        try:
            client.execute()
        except CellExecutionError as error:
            raise DSV3Error("a cell failed", where=path, found=str(error)[-2000:]) from None
        seconds = time.perf_counter() - began
    budget = Budget(seconds, peak.bytes)
    clean(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and BUDGET.search(cell.source):
            cell.source = BUDGET.sub(f"| Budget | {budget} |", cell.source)
            break
    beside = path.with_name(path.name + ".new")
    nbformat.write(notebook, beside)
    beside.replace(path)
    return budget


class _peak_of_children:
    """Context that watches the memory of all processes that this one has started."""

    bytes = 0

    def __enter__(self) -> _peak_of_children:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.Error:  # it has just ended
                    continue
            self.bytes = max(self.bytes, total)

    def __exit__(self, *failure) -> None:
        self._done.set()
        self._thread.join()
