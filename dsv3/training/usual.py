"""The precision of a run whose user names none.

The shipped model was trained with products in bfloat16. A CPU without units for it converts every
number on the way into a product, and a run of an hour would take days: there it is float32. A run
that is resumed keeps what it began with, on whatever machine.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3 import machine
from dsv3.training.recipe import Recipe
from dsv3.training.resuming import CHECKPOINTS, Stored


def usual_precision(out_dir: str | Path, device: torch.device) -> tuple[str, str]:
    """(precision, why it is that one in one line)."""
    stored = Stored.newest(Path(out_dir) / CHECKPOINTS)
    if stored:
        kept = Recipe.from_dict(stored.facts["recipe"]).precision
        return kept, f"precision {kept}: this run began with it"
    usual = Recipe().precision
    if device.type != "cpu":
        return usual, f"precision {usual}: as the shipped model was trained"
    slower = machine.bf16_slowdown()
    if slower < machine.SLOW:
        return usual, f"precision {usual}: it is fast on this CPU"
    return "fp32", (
        f"precision fp32: on this CPU a product in bfloat16 takes {slower:.0f} times "
        "as long (--precision bf16 asks for it all the same)"
    )
