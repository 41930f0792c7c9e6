"""Calls measured in turn, and what is kept of their times.

A B C, A B C, ...: each round calls everything once, so that a slow minute of the machine slows all
alike. Of the times and of the ratios within each round three numbers are kept, the quartiles: half
of all rounds lie between the first and the last, and the one in the middle is hardly moved by the
few rounds in which something else ran.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ENOUGH = 20  # rounds
# Calls that take no time are repeated beyond that, up to so many rounds and seconds.
MOST, SHORT = 200, 1.0
# Bytes that are written before a call on a GPU, so that it finds nothing of its own in the cache.
_FLUSHED = 256 << 20


@dataclass(frozen=True)
class Spread:
    """The quartiles of some numbers: a quarter is below ``low``, half below ``middle``."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(*values, *values, *values)
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def each(self, change: Callable[[float], float]) -> Spread:
        """The same in another unit."""
        return Spread(*sorted(map(change, (self.low, self.middle, self.high))))


class Clock:
    """Seconds of a call: by the wall on a CPU, by the GPU's own events there, cache emptied."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            self._junk = torch.empty(_FLUSHED, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        if not self.on_gpu:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began
        self._junk.zero_()  # and time for the call to be queued, so that launching it is not timed
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    clock: Clock,
    allowed: float,
    before: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call in every round, after one call of each that is not counted.

    ENOUGH rounds, or as many as ``allowed`` seconds hold, one at least; more where they are short.
    before: what is done ahead of a call, by its name, and not timed.
    """

    def one_round() -> list[float]:
        times = []
        for name, call in calls.items():
            before(name)
            times.append(clock.seconds(call))
        return times

    began = time.monotonic()
    one_round()
    rounds: list[list[float]] = []
    last = 0.0
    while not rounds or _goes_on(len(rounds), time.monotonic() - began + last, allowed):
        start = time.monotonic()
        rounds.append(one_round())
        last = time.monotonic() - start
    return {name: list(times) for name, times in zip(calls, zip(*rounds))}


def _goes_on(rounds: int, spent: float, allowed: float) -> bool:
    """Whether another round is worth its time; spent: with that round."""
    if spent > allowed:
        return False
    return rounds < ENOUGH or (rounds < MOST and spent <= SHORT)


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """How many times as long theirs took, round by round."""
    return Spread.of([b / a for a, b in zip(ours, theirs, strict=True)])
