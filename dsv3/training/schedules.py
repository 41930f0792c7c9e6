"""Schedules: what changes during pre-training, and when (TR 4.2).

The report gives its schedules in tokens, and so do the objects here: each is asked for its value
after so many tokens have been read. Counting tokens instead of steps keeps them right while the
batch grows.

==============  ==================================================================================
learning rate   0 to 2.2e-4 in 2,000 steps, constant to 10T tokens, cosine to 2.2e-5 at 14.3T,
                constant for 333B, then 7.3e-6 for the last 167B
batch           3,072 to 15,360 sequences over the first 469B tokens, then constant
lambda (MTP)    0.3 for 10T, then 0.1
gamma (bias)    0.001 for 14.3T, then 0
==============  ==================================================================================

The shape of the batch ramp is not stated; a straight line in tokens is assumed. ``scaled`` keeps
all proportions and gives a run of any length the same shape. Nothing here reads a clock: a run
that is stopped and goes on computes the same values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

# Breakpoints of the report, in tokens.
PAPER_TOKENS = 14.8e12
_CONSTANT_UNTIL, _COSINE_UNTIL, _LOW_UNTIL = 10e12, 14.3e12, 14.633e12
_RAMP_UNTIL = 469e9


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """Linear warm-up in steps, constant, cosine, constant, and a last lower constant.

    peak, low, last: the three levels. constant_until, cosine_until, low_until: tokens.
    """

    peak: float
    low: float
    last: float
    warmup_steps: int
    constant_until: float
    cosine_until: float
    low_until: float

    def at(self, step: int, tokens: float) -> float:
        """The rate of step 0, 1, ..., before which ``tokens`` were read."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if tokens < self.constant_until:
            return self.peak
        if tokens < self.cosine_until:
            done = (tokens - self.constant_until) / (self.cosine_until - self.constant_until)
            return self.low + (self.peak - self.low) * (1 + math.cos(math.pi * done)) / 2
        return self.low if tokens < self.low_until else self.last


@dataclass(frozen=True, kw_only=True)
class Fall:
    """From ``peak`` on a straight line to a tenth of it, ``until`` tokens."""

    peak: float
    until: float

    def at(self, step: int, tokens: float) -> float:
        """The rate before which ``tokens`` were read; asked as ``LearningRate`` is."""
        return self.peak * (1 - 0.9 * (tokens / self.until))


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Sequences in a step: from ``first`` to ``last`` on a straight line, ``until`` tokens."""

    first: int
    last: int
    until: float

    def at(self, tokens: float) -> int:
        """Sequences of the step before which ``tokens`` were read, rounded to the nearest."""
        done = min(tokens / self.until, 1.0) if self.until else 1.0
        return round(self.first + (self.last - self.first) * done)


@dataclass(frozen=True, kw_only=True)
class Switch:
    """One value before ``until`` tokens, another one from there on: lambda and gamma."""

    before: float
    after: float
    until: float

    def at(self, tokens: float) -> float:
        """The value after ``tokens`` were read."""
        return self.before if tokens < self.until else self.after


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Tokens over which a text made by rule looks back: doubling at an even pace from ``first`` to
    ``last``, ``until`` tokens. Not in the report, whose text is not made by rule."""

    first: float
    last: float
    until: float

    def at(self, tokens: float) -> float:
        """The longest document at the place in the text behind ``tokens`` tokens."""
        done = min(tokens / self.until, 1.0) if self.until else 1.0
        return self.first * (self.last / self.first) ** done


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """All of a run's schedules. total: tokens of the whole run."""

    total: float
    learning_rate: LearningRate | Fall
    batch: BatchRamp
    mtp_weight: Switch
    bias_speed: Switch

    @classmethod
    def deepseek_v3(cls) -> Schedules:
        """The report's own numbers (TR 4.2)."""
        return cls(
            total=PAPER_TOKENS,
            learning_rate=LearningRate(
                peak=2.2e-4,
                low=2.2e-5,
                last=7.3e-6,
                warmup_steps=2000,
                constant_until=_CONSTANT_UNTIL,
                cosine_until=_COSINE_UNTIL,
                low_until=_LOW_UNTIL,
            ),
            batch=BatchRamp(first=3072, last=15360, until=_RAMP_UNTIL),
            mtp_weight=Switch(before=0.3, after=0.1, until=_CONSTANT_UNTIL),
            bias_speed=Switch(before=0.001, after=0.0, until=_COSINE_UNTIL),
        )

    def scaled(
        self, total: float, *, peak: float, warmup_steps: int, batch_first: int, batch_last: int
    ) -> Schedules:
        """The same shape over ``total`` tokens, with levels that suit another model.

        All breakpoints in tokens shrink alike; the two low learning rates keep their ratio to the
        peak (0.1 and 0.033).
        """
        by, rate = total / self.total, self.learning_rate
        assert isinstance(rate, LearningRate)  # an extension's Fall has no shape to keep
        level = peak / rate.peak
        return Schedules(
            total=total,
            learning_rate=LearningRate(
                peak=peak,
                low=rate.low * level,
                last=rate.last * level,
                warmup_steps=warmup_steps,
                constant_until=rate.constant_until * by,
                cosine_until=rate.cosine_until * by,
                low_until=rate.low_until * by,
            ),
            batch=BatchRamp(first=batch_first, last=batch_last, until=self.batch.until * by),
            mtp_weight=replace(self.mtp_weight, until=self.mtp_weight.until * by),
            bias_speed=replace(self.bias_speed, until=self.bias_speed.until * by),
        )
