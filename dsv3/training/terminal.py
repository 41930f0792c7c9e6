"""What a person sees of a run: lines and bars on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

from tqdm import tqdm

from dsv3.training.position import Position


class Terminal:
    """Says what a run does, or keeps silent. shown: which of the two."""

    def __init__(self, shown: bool):
        self.shown = shown

    def say(self, text: str) -> None:
        """A line about the work."""
        if self.shown:
            print(text, file=sys.stderr, flush=True)

    def bar(self, total: int, *, unit: str, done: int = 0, **options) -> tqdm:
        """A bar that fills; the time left stands beside it. options: of tqdm."""
        return tqdm(total=total, initial=done, unit=unit, disable=not self.shown, **options)

    def begin(self, position: Position, total: int, precision: str) -> None:
        """What will be done before the run's first step."""
        start = f"from step {position.step} on" if position.step else "from the start"
        self.say(
            f"this run has ended, after {position.tokens:,} tokens; validation and export again"
            if position.tokens >= total
            else f"training in {precision} {start}: {total:,} tokens. The first step cuts all "
            "text into tokens; then the bar shows the time left. Stop it at any time: the same "
            "command goes on"
        )

    def end(self, folder: Path) -> None:
        """Where the model is, and how to try it."""
        self.say(
            f"the model is in {folder}; try: dsv3 generate {folder} "
            "--temperature 0.8 --prompt 'SCENE I. Verona. A street.'"
        )
