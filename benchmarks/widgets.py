"""How fast the book's widgets answer: first paint, and each move of a slider.

    python benchmarks/widgets.py

Python alone: making the widget, and drawing anew after a control has changed. End to end, where
there is a Chromium: from the key that runs the cell, or that moves the slider, to the frame that
shows the new picture, in a real JupyterLab. The simulator runs anew at every move, while in the
book it remembers the runs it has made. Milliseconds; of the moves the median and the slowest
of 20. The aims are 1000 for the first paint and 200 for a move, on two cores. The draft explorer's
moves are its steps; the text that it writes when the prompt, the temperature, the drafts or the
seed change is a line of its own, and part of its first paint.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path

import nbformat
import torch

from dsv3.commands import doctor
from dsv3.viz.widgets import balance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import every_widget

MOVES = 20

PREPARE = f"""\
import torch
{every_widget.SETUP}
from dsv3.viz.widgets import balance
balance._run = balance._run.__wrapped__
torch.set_num_threads(1)"""
# From the key that is pressed next to the frame that shows another picture of this title.
WATCH = """title => { window.painted = new Promise(resolve => {
    const find = () => document.querySelector(`.dsv3-drawing svg[aria-label^="${title}"]`);
    const before = find()?.lastChild;
    let start = null;
    document.addEventListener("keydown", () => { start ??= performance.now(); },
                              {capture: true, once: true});
    const observer = new MutationObserver(() => {
        const now = find()?.lastChild;
        if (start === null || !now || now === before) return;
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => resolve(performance.now() - start)));
    });
    observer.observe(document.body, {childList: true, subtree: true});
}); }"""


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def moves(title: str, widget) -> Iterator[Callable[[], None]]:
    """Endless moves of a widget's controls in turn, each to a value that it has not now."""
    values = {
        "Routing explorer": {
            "strength": [0.0, 0.5, 2.0],
            "token": [1, 4],
            "layer": [2, 3],
            "groups": [1, 3],
            "top_k": [2, 6],
        },
        "KV-cache calculator": {
            "tokens": [1024, 163_840],
            "texts": [8, 64],
            "itemsize": [1, 4],
            "memory": [10**10, 64 * 10**10],
        },
        "Load-balancing simulator": {
            "gamma": [1e-2, 1e-4, 0.1],
            "skew": [0.25, 1.75],
            "tokens": [64, 512],
            "steps": [100, 200],
        },
        "Number line": {
            "drag": [10.5, 200.25, -3.0],
            "value": ["11.4", "0.001"],
            "format": ["E5M2", "BF16", "E4M3"],
            "scale": ["0.3", "1"],
        },
        "Scale microscope": {
            "layer": ["layers.0", "layers.3"],
            "matrix": ["attn.wq_b", "x of attn.wo", "attn.wkv_b"],
            "show": ["tensor", "value", "exponent"],
        },
        "Draft explorer": {"number": [2, 5, 9], "stage": [0, 1, 2, 3]},
        "Timeline explorer": {
            "schedule": ["ZB1P", "DualPipe", "DualPipeV"],
            "micro_batches": [24, 20],
            "overlap": [50, 0],
            "rank": [1, 2, 3],
        },
        "Placement explorer": {
            "replicas": [24, 16, 32],
            "policy": ["global", "hierarchical"],
            "gpus": [4, 8],
        },
        "Training run": {
            "step": [10, 3541, 2000],
            "router": ["layers.3.ffn.gate", "mtp.0.ffn.gate"],
            "load_of": ["plays", "code"],
        },
    }[title]
    turns = [cycle([(name, value) for value in row]) for name, row in values.items()]
    for name, value in chain.from_iterable(zip(*turns)):

        def move(name=name, value=value):
            getattr(widget, name).value = value

        yield move


def in_python() -> Iterator[tuple[str, float, list[float]]]:
    defined = every_widget.names()
    for title in every_widget.CASES:
        make = partial(every_widget.make, title, defined)
        first = milliseconds(make)
        yield title, first, [milliseconds(move) for move in islice(moves(title, make()), MOVES)]
    drafts = every_widget.make("Draft explorer", defined)

    def write(seed: int) -> None:
        drafts.seed.value = seed

    times = [milliseconds(partial(write, seed)) for seed in range(1, 6)]
    yield "... its text of 40 tokens", times[0], times[1:]


def in_browser() -> Iterator[tuple[str, float, list[float]]]:
    from lab import JupyterLab, Notebook, open_browser

    with tempfile.TemporaryDirectory() as folder:
        for title, case in every_widget.CASES.items():
            cells = [nbformat.v4.new_code_cell(cell) for cell in (PREPARE, case.code)]
            notebook = nbformat.v4.new_notebook(cells=cells)
            notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
            nbformat.write(notebook, Path(folder) / f"{title}.ipynb")
        with JupyterLab(Path(folder)) as lab, open_browser() as browser:
            for title, case in every_widget.CASES.items():
                page = Notebook(browser, lab, f"{title}.ipynb")
                page.select(0)
                page.page.keyboard.press("Shift+Enter")
                page.page.get_by_text("[1]:", exact=True).wait_for()
                page.select(1)
                page.page.evaluate(WATCH, title)
                page.page.keyboard.press("Shift+Enter")
                first = page.page.evaluate("window.painted")
                handle, times = page.slider(title, case.slider).locator("[role='slider']"), []
                handle.focus()
                for key in islice(cycle(["ArrowLeft", "ArrowRight"]), MOVES):
                    page.page.wait_for_timeout(100)  # one move at a time
                    page.page.evaluate(WATCH, title)
                    handle.press(key)
                    times.append(page.page.evaluate("window.painted"))
                page.page.close()
                yield title, first, times


def report(where: str, rows: Iterator[tuple[str, float, list[float]]]) -> dict:
    print(f"{where:<26}{'first paint':>14}{'move, median':>14}{'slowest':>10}   (ms)")
    results = {}
    for title, first, times in rows:
        middle, worst = statistics.median(times), max(times)
        print(f"{title:<26}{first:>14.0f}{middle:>14.0f}{worst:>10.0f}")
        results[title] = {
            "first": round(first, 1),
            "median": round(middle, 1),
            "slowest": round(worst, 1),
        }
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    balance._run = balance._run.__wrapped__
    results = {"python": report("Python alone", in_python())}
    if doctor.browser():
        results["browser"] = report("in JupyterLab", in_browser())
    else:
        print(f"in JupyterLab: not measured, no browser ({', '.join(doctor.BROWSERS)}) found")
    print(json.dumps(results))
