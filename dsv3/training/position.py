"""Where a run stands, and the clock that runs beside it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Position:
    """A place in a run; with recipe, text, weights and moments, all that the next step needs.

    step: updates made. tokens: read so far; their number decides the phase and all schedules.
    phase_start: tokens that were read before this phase. seconds, cpu_seconds: of all steps, on
    the clock and of the processor, those of earlier processes included; no step depends on them.
    """

    step: int = 0
    tokens: int = 0
    phase_start: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def after_step(self, read: int, seconds: float, cpu_seconds: float) -> Position:
        """The place one step further on, which has read so many tokens in so much time."""
        return replace(
            self,
            step=self.step + 1,
            tokens=self.tokens + read,
            seconds=self.seconds + seconds,
            cpu_seconds=self.cpu_seconds + cpu_seconds,
        )

    def at_phase_start(self) -> Position:
        """The same place as the first of a phase."""
        return replace(self, phase_start=self.tokens)


class Stopwatch:
    """Two clocks that are read together: this machine's, and the time of the processor."""

    def __init__(self):
        self._last = time.monotonic(), time.process_time()

    def lap(self) -> tuple[float, float]:
        """(seconds, seconds of the processor) since the last call, or since it was made."""
        last, self._last = self._last, (time.monotonic(), time.process_time())
        return self._last[0] - last[0], self._last[1] - last[1]
