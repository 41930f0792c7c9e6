"""Every widget of the book, once: for what all of them must do, the browser, the benchmark."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TEXT = "To be, or not to be"
SETUP = f"""\
from dsv3 import load_model, load_tokenizer
from dsv3.viz.widgets import *
shipped, text = {str(Path(__file__).parents[1] / "assets" / "dsv3-mini")!r}, {TEXT!r}
model, tokenizer = load_model(shipped, precision="fp32"), load_tokenizer(shipped)
from dsv3.training.samples import Sample
samples = [
    Sample(step=step, tokens=8192 * step, prompt=prompt, text=f"{{text}}  # {{step}}")
    for step in (400, 1600)
    for prompt, text in (("def f(x):\\n", "    return x\\n\\n"), ("1 + 1 =", " 2"))
]"""


@dataclass(frozen=True)
class Case:
    """code: of its cell, after ``SETUP``; slider: the name of one that can move both ways."""

    code: str
    slider: str


CASES = {
    "Routing explorer": Case("RoutingExplorer(model, tokenizer, text)", "Bias strength"),
    "KV-cache calculator": Case("KVCacheCalculator()", "Tokens a text"),
    "Load-balancing simulator": Case("LoadBalanceSimulator()", "Skew of experts"),
    "Number line": Case("NumberLine()", "Drag the value"),
    "Scale microscope": Case("ScaleMicroscope(shipped)", "Layer"),
    "Draft explorer": Case("DraftExplorer(model, tokenizer, text)", "Stage"),
    "Timeline explorer": Case("TimelineExplorer()", "Micro-batches"),
    "Placement explorer": Case("PlacementExplorer(replicas=24)", "Replicas"),
    "Training run": Case("TrainingRun(shipped, samples, step=1200)", "Step"),
}


def names() -> dict:
    """What ``SETUP`` defines."""
    defined: dict = {}
    exec(SETUP, defined)
    return defined


def make(title: str, defined: dict):
    """The widget of this title; defined: ``names()``."""
    return eval(CASES[title].code, defined)
