"""One number read through a small float format, and what there is to say of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from dsv3.fp8.small_floats import Neighbours, SmallFloat


@dataclass(frozen=True)
class Reading:
    """``value`` stored in ``format`` with a scale: code(value / scale) * scale."""

    format: SmallFloat
    value: float
    scale: float

    @cached_property
    def scaled(self) -> float:
        """What is rounded."""
        return self.value / self.scale

    @cached_property
    def code(self) -> int:
        return self.format.encode(self.scaled)

    @cached_property
    def rounded(self) -> float:
        """What the code stands for."""
        return self.format.value(self.code)

    @cached_property
    def around(self) -> Neighbours:
        return self.format.neighbours(self.scaled)

    @property
    def result(self) -> float:
        return self.rounded * self.scale

    @property
    def error(self) -> float:
        """How far off the result is; NaN where there is no telling."""
        if math.isinf(self.value) and self.result == self.value:
            return 0.0
        return self.result - self.value

    def verdict(self) -> str:
        """What happens to the scaled number, in a sentence."""
        y, format = self.scaled, self.format
        said, got = written(y), written(self.rounded)
        most = written(math.copysign(format.largest, y))
        if math.isnan(y):
            return f"NaN stays NaN, in {format.name} too"
        if math.isinf(self.rounded):
            if math.isinf(y):
                return f"infinity stays infinity: {format.name} has a code for it"
            return f"{said} lies beyond {most}, the largest number: it becomes infinity"
        if format.is_scale and y < format.smallest:
            return f"{said} lies below {got}, the smallest number: a scale is never 0 or negative"
        if abs(y) > format.largest:
            return f"{said} lies beyond {most}, the largest number: it saturates, to {got}"
        if self.rounded == y:
            kind = " (subnormal)" if format.kind(self.code) == "subnormal" else ""
            return f"{said} is a number of {format.name}{kind}: nothing is lost"
        below, above = written(self.around.below), written(self.around.above)
        if format.is_scale:
            return f"{said} lies between {below} and {above}: a scale is rounded up, to {got}"
        if self.around.tie:
            return f"{said} is halfway from {below} to {above}: a tie, and {got} has the even code"
        if self.rounded == 0:
            return f"{said} is nearer to 0 than to {written(format.smallest)}: it becomes 0"
        kind = ", in the even steps of the subnormals" if abs(y) < format.smallest_normal else ""
        return f"{said} lies between {below} and {above}: it becomes {got}, the nearer{kind}"


def errors(reading: Reading) -> tuple[str, str]:
    """The error as it is and as a share of the value, in words."""
    error = reading.error
    if math.isnan(error):
        return "−", "−"
    if math.isinf(error):
        return written(error), "without limit"
    if error == 0:
        return "0", "exact"
    share = abs(error / reading.value) if reading.value else math.inf
    relative = f"{100 * share:.3g}%" if share < 1e4 else f"× {share:.2g}"
    return written(error), relative


def written(value: float) -> str:
    """Up to eight digits, a minus sign, powers of ten as such."""
    if math.isinf(value):
        return "−∞" if value < 0 else "∞"
    if math.isnan(value):
        return "NaN"
    text = f"{value:.8g}"
    if "e" in text:
        digits, _, power = f"{value:.4g}".partition("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"{digits}·10{raised}"
    return text.replace("-", "−")
