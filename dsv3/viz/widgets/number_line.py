"""The number line: what becomes of a number in a format of few bits."""

from __future__ import annotations

import math
import re

import ipywidgets

from dsv3.errors import DSV3Error
from dsv3.fp8.small_floats import FORMATS, SmallFloat
from dsv3.viz.number_line_scene import number_line_scene
from dsv3.viz.reading import Reading
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control

CASES = {
    "a telling case ...": "",
    "11.4: between two numbers": "11.4",
    "10.5: a tie": "10.5",
    "11.5: a tie, the other way": "11.5",
    "448: the largest of E4M3": "448",
    "464: half a step beyond it": "464",
    "500: out of range": "500",
    "0.001: among the subnormals": "0.001",
    "1e-9: too small": "1e-9",
    "-0: zero with a sign": "-0",
    "infinity": "inf",
    "NaN": "nan",
}
POWERS = 16  # scales from 2^-16 to 2^16 on the slider
_PART, _BEYOND = 8, 24  # moves of the slider from one number to the next; numbers past the last


def parsed(text: str, what: str) -> float:
    """A number as people write it: 11.4, 1e-9, 2^-6, 3/8, inf, nan. DSV3Error for all else."""
    cleaned = text.strip().lower().replace("−", "-").replace("∞", "inf")
    try:
        if power := re.fullmatch(r"(-?)2\s*(?:\^|\*\*)\s*\(?([+-]?\d{1,4})\)?", cleaned):
            return math.copysign(math.ldexp(1.0, int(power[2])), -1 if power[1] else 1)
        above, slash, below = cleaned.partition("/")
        return float(above) / float(below) if slash else float(cleaned)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise DSV3Error(
            "this is no number",
            where=what,
            found=repr(text.strip()[:40]),
            expected="something like 11.4, 1e-9, 2^-6, inf or nan",
        ) from None


class NumberLine(Panel):
    """Type or drag a number, choose a format and a scale, and see what the number becomes.

    The slider stops at every number of the format and seven times on the way to the next, so that
    the fourth stop is the tie. Choosing a point of the line takes its number.
    """

    title = "Number line"
    hint = (
        "Drag the value, or click a point of the line or a format; or Tab into the picture, use "
        "the arrow keys, and choose with Enter."
    )

    def __init__(self, value: float = 11.4, format: str = "E4M3", scale: float = 1.0):
        self._refusal, self._busy = "", False
        self.format = control(
            ipywidgets.Dropdown, "Format", options=[each.name for each in FORMATS], value=format
        )
        self.case = control(ipywidgets.Dropdown, "Cases", options=list(CASES.items()))
        self.value = control(
            ipywidgets.Text, "Value, then Enter", value=_typed(value), continuous_update=False
        )
        self.drag = control(ipywidgets.FloatSlider, "Drag the value", step=1 / _PART, readout=False)
        self.scale = control(
            ipywidgets.Text, "Scale, then Enter", value=_typed(scale), continuous_update=False
        )
        self.power = control(
            ipywidgets.SelectionSlider,
            "Power of two",
            options=[(f"2^{power}", power) for power in range(-POWERS, POWERS + 1)],
            value=0,
        )
        self._reading = Reading(self._format, parsed(self.value.value, "value"), _scale(scale))
        self._follow()
        super().__init__([self.format, self.case, self.value, self.drag, self.scale, self.power])
        self.drawing.on_choose(self._choose)

    def reading(self) -> Reading:
        """The value, the format and the scale of the picture."""
        return self._reading

    def scene(self) -> Scene:
        return number_line_scene(self._reading)

    def message(self) -> str:
        return self._refusal

    @property
    def _format(self) -> SmallFloat:
        return next(each for each in FORMATS if each.name == self.format.value)

    def _changed(self, change) -> None:
        owner = change["owner"]
        if self._busy or (owner is self.drag and self._stands()):
            return
        self._busy, self._refusal = True, ""
        try:
            if owner is self.case and self.case.value:
                self.value.value = self.case.value
            elif owner is self.drag:
                self.value.value = _typed(_at(self._format, self.drag.value) * self._reading.scale)
            elif owner is self.power:
                self.scale.value = _typed(2.0**self.power.value)
            if owner is not self.case:
                self.case.value = ""
            self._take(moved=owner is self.drag)
        finally:
            self._busy = False
        self.refresh()

    def _take(self, moved: bool) -> None:
        """What the fields say; a field that says no number changes nothing but the message."""
        try:
            self._reading = Reading(
                self._format,
                parsed(self.value.value, "value"),
                _scale(parsed(self.scale.value, "scale")),
            )
        except DSV3Error as error:
            old = self._reading
            self._refusal = f"{str(error).rstrip('.')}. The picture still shows the number before."
            self._reading = Reading(self._format, old.value, old.scale)
        self._follow(moved)

    def _follow(self, moved: bool = False) -> None:
        """The sliders go to where the value and the scale are."""
        format = self._format
        self.drag.max = format.encode(format.largest) + float(_BEYOND)
        self.drag.min = 0.0 if format.is_scale else -self.drag.max
        if not moved:
            self.drag.value = _place(format, self._reading.scaled)
        power = math.log2(self._reading.scale)
        if power.is_integer() and abs(power) <= POWERS:
            self.power.value = int(power)

    def _stands(self) -> bool:
        """Whether the slider is where the value has put it: the browser says so once more, in its
        own sums of steps."""
        return _stop(self.drag.value) == _place(self._format, self._reading.scaled)

    def _choose(self, key: str) -> None:
        what, _, which = key.partition(" ")
        if what == "format":
            self.format.value = which
        else:
            self.value.value = _typed(self._format.value(int(which)) * self._reading.scale)


def _scale(scale: float) -> float:
    if not 0 < scale < math.inf:
        raise DSV3Error(
            "a scale is a positive number",
            where="scale",
            found=scale,
            expected="something like 1, 0.0025 or 2^-6",
        )
    return scale


def _typed(value: float) -> str:
    """As it can be typed again."""
    text = repr(float(value))
    return text.removesuffix(".0")


def _at(format: SmallFloat, place: float) -> float:
    """The number at a place of the slider: the codes of positive numbers are numbered as they
    follow each other, and between two of them the way is even."""
    last, size = format.encode(format.largest), _stop(abs(place))
    if size >= last:
        number = format.largest + (size - last) * format.step(format.largest)
    else:
        code = int(size)
        low, high = format.value(code), format.value(code + 1)
        number = low + (size - code) * (high - low)
    return math.copysign(number, place)


def _place(format: SmallFloat, number: float) -> float:
    """Where the slider stands for a number; at its end for all that lies beyond."""
    last, size = format.encode(format.largest), abs(number)
    if math.isnan(size) or (format.is_scale and number <= format.smallest):
        return 0.0
    if size >= format.largest:
        place = last + min((size - format.largest) / format.step(format.largest), _BEYOND)
    else:
        low, high, *_ = format.neighbours(size)
        code = format.encode(low)
        place = code + ((size - low) / (high - low) if high > low else 0.0)
    return math.copysign(_stop(place), number)


def _stop(place: float) -> float:
    """The stop of the slider nearest to a place."""
    return round(place * _PART) / _PART
