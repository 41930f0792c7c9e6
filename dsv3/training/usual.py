"""The precision of a run whose user names none.

The shipped model was trained with products in bfloat16. On a CPU where those take twice as long as
in float32, or longer, the precision is fp32. A run that is resumed keeps what it began with, on
whatever machine.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dsv3 import bfloat16
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
    slower = bfloat16.slowdown()
    if slower < bfloat16.SLOW:
        return usual, f"precision {usual}: it is fast on this CPU"
    return "fp32", (
        f"precision fp32: on this CPU a product in bfloat16 takes {slower:.0f} times "
        "as long (--precision bf16 asks for it all the same)"
    )
