"""One number on its way through a small float format: the picture of the number line.

From above: the number divided by its scale, its code, and what the code times the scale gives
back; the code bit by bit; the grid of the format around it, with the way to the nearest point;
and, on an axis of powers of two, how far each format reaches.
"""

from __future__ import annotations

import math

from dsv3.fp8.small_floats import FORMATS, SmallFloat
from dsv3.viz.reading import Reading, errors, written
from dsv3.viz.scene import Scene

WIDTH, LEFT, RIGHT = 920, 40, 880
AXIS_LEFT, AXIS_RIGHT, LOWEST, HIGHEST = 210, 900, -152, 136  # of the ranges, in powers of two
BITS = (("sign", "purple"), ("exponent", "blue"), ("mantissa", "green"))


def number_line_scene(reading: Reading) -> Scene:
    scene = Scene(WIDTH, 486, _alt(reading))
    scene.text(0, 12, reading.verdict(), bold=True, size=14)
    _chain(scene, reading, 36)
    _bits(scene, reading, 108)
    _line(scene, reading, 246)
    _ranges(scene, reading, 342)
    return scene


def _alt(reading: Reading) -> str:
    absolute, relative = errors(reading)
    sign, exponent, mantissa = reading.format.fields(reading.code)
    bits = ", ".join(
        f"{name} {digits}"
        for name, digits in zip(("sign", "exponent", "mantissa"), (sign, exponent, mantissa))
        if digits
    )
    return (
        f"{written(reading.value)} in {reading.format.name} with scale {written(reading.scale)}: "
        f"{reading.verdict()}. Code {_hex(reading.format, reading.code)} ({bits}), result "
        f"{written(reading.result)}, off by {absolute}, {relative}."
    )


def _hex(format: SmallFloat, code: int) -> str:
    return f"0x{code:0{-(-format.bits // 4)}X}"


# From the value to the result -----------------------------------------------------------------


def _chain(scene: Scene, reading: Reading, top: float) -> None:
    """Value, scale, code, result, each with its name."""
    absolute, relative = errors(reading)
    steps = [
        ("value", written(reading.value), "vermillion"),
        ("÷ scale", written(reading.scale), None),
        ("is rounded", written(reading.scaled), None),
        ("code", _hex(reading.format, reading.code), None),
        ("stands for", written(reading.rounded), None),
        ("× scale", written(reading.scale), None),
        ("becomes", written(reading.result), "blue"),
        ("off by", absolute, None),
    ]
    width = WIDTH / len(steps)
    for at, (name, value, colour) in enumerate(steps):
        x = at * width
        scene.rect(x + 2, top, width - 8, 46, rounded=4, fill="pale", stroke=colour)
        middle = x + width / 2 - 2
        if name == "off by":
            name = f"off by {relative}" if relative not in ("−", "exact") else name
        scene.text(middle, top + 14, name, size=11, fill="soft", anchor="middle")
        scene.text(middle, top + 32, value, anchor="middle", bold=colour is not None)
        scene.rect(x + 2, top, width - 8, 46, rounded=4, label=f"{name}: {value}")


def _bits(scene: Scene, reading: Reading, top: float) -> None:
    """The code's bits by what they are for, and the formula with its numbers."""
    format, x = reading.format, 2.0
    for (name, colour), digits in zip(BITS, format.fields(reading.code)):
        for bit in digits:
            scene.rect(x, top, 24, 30, rounded=3, fill=colour)
            scene.text(x + 12, top + 15, bit, code=True, bold=True, anchor="middle", fill="white")
            x += 27
        if digits:
            left = x - 27 * len(digits)
            what = name if len(digits) > 1 or name == "sign" else name[:4]
            scene.text(
                left + (27 * len(digits) - 3) / 2,
                top + 42,
                what,
                size=11,
                anchor="middle",
                fill="soft",
            )
            scene.rect(
                left,
                top,
                27 * len(digits) - 3,
                30,
                rounded=3,
                label=_bits_say(format, name, digits),
            )
            x += 8
    scene.text(x + 14, top + 8, _formula(reading), size=13)
    scene.text(x + 14, top + 28, _kind(reading), fill="soft")


def _bits_say(format: SmallFloat, name: str, digits: str) -> str:
    number = int(digits, 2)
    if name == "sign":
        return "sign: " + ("1, negative" if number else "0, positive")
    if name == "exponent":
        return f"exponent: {digits} is {number}; the bias {format.bias} is taken off"
    return f"mantissa: {digits} is {number} of {1 << format.mantissa_bits}"


def _formula(reading: Reading) -> str:
    format = reading.format
    sign, exponent, mantissa = (int(bits or "0", 2) for bits in format.fields(reading.code))
    minus, steps = "−" if sign else "", 1 << format.mantissa_bits
    if format.is_scale:
        return f"2^({exponent} − {format.bias}) = {written(reading.rounded)}"
    match format.kind(reading.code):
        case "normal":
            return (
                f"{minus}2^({exponent} − {format.bias}) × (1 + {mantissa}/{steps}) = "
                f"{written(reading.rounded)}"
            )
        case "nan" | "infinity":
            return f"no number: it stands for {written(reading.rounded)}"
    return f"{minus}2^{1 - format.bias} × {mantissa}/{steps} = ".replace("^-", "^−") + written(
        reading.rounded
    )


def _kind(reading: Reading) -> str:
    format, kind = reading.format, reading.format.kind(reading.code)
    if kind == "nan":
        return "a code set aside for NaN"
    if kind == "infinity":
        return "a code set aside for infinity"
    if kind in ("zero", "subnormal") and not format.is_scale:
        return f"{kind}: exponent bits all 0, no leading 1, steps of {written(format.smallest)}"
    return f"normal: its neighbours lie {written(format.step(reading.rounded))} further out"


# The grid around it ---------------------------------------------------------------------------


class _Window:
    """The part of the number line that is shown. low, high: its ends; at: where a number lies."""

    def __init__(self, reading: Reading):
        format, y = reading.format, reading.scaled
        least = format.smallest if format.is_scale else -format.largest
        inside = 0.0 if math.isnan(y) else min(max(y, least), format.largest)
        around, step = format.neighbours(inside), format.step(inside)
        self.low, self.high = around.below - 6 * step, around.above + 6 * step
        # Towards zero the points crowd together.
        if around.below >= format.smallest_normal:
            self.low = max(self.low, around.below / 2.6)
        elif around.above <= -format.smallest_normal:
            self.high = min(self.high, around.above / 2.6)
        if format.is_scale:
            self.low, self.high = 0.0, 2.5 * around.above
            self.points = format.grid(around.below / 8, min(self.high, format.largest))
        else:
            self.points = format.grid(self.low, self.high)
        self.beyond = y > format.largest or y < least
        # Beyond the grid the value is marked at the edge.
        self.value = min(max(y, self.low), self.high)

    def at(self, value: float) -> float:
        return LEFT + (RIGHT - LEFT) * (value - self.low) / (self.high - self.low)


def _line(scene: Scene, reading: Reading, y: float) -> None:
    format, window = reading.format, _Window(reading)
    _ends(scene, format, window, y)
    scene.line((LEFT - 20, y), (RIGHT + 20, y), stroke="ink", stroke_width=1.2)
    around, pressed = reading.around, reading.rounded
    pair = [around.below, around.above]
    important = {point for point in (*pair, pressed) if window.low <= point <= window.high}
    if not window.beyond and around.below < around.above and not format.is_scale:
        middle = window.at((around.below + around.above) / 2)
        scene.line((middle, y - 20), (middle, y + 20), stroke="soft", dashed=True)
        scene.text(middle, y + 46, "halfway", size=11, fill="soft", anchor="middle")
    taken: list[tuple[float, float]] = []
    for point in sorted(window.points, key=lambda point: (point not in important, abs(point))):
        on, x = point == pressed, window.at(point)
        step, half = format.step(point), 3.4 * len(written(point)) + 5
        first = format.kind(format.encode(point)) != "subnormal" and math.frexp(point)[0] in (
            0.5,
            -0.5,
        )
        tall = 11 if first else 7
        scene.line((x, y - tall), (x, y + tall), stroke="ink" if first else "soft")
        scene.circle(
            x,
            y,
            7 if on else 5,
            fill="blue" if on else "paper",
            stroke="blue",
            stroke_width=2 if on else 1.4,
            key=f"point {format.encode(point)}",
            chosen=on,
            label=f"{written(point)}, code {_hex(format, format.encode(point))}\n"
            f"the step from here outwards is {written(step)}",
        )
        if all(x + half < low or x - half > high for low, high in taken):
            taken.append((x - half, x + half))
            scene.text(
                x,
                y + 26,
                written(point),
                size=11,
                anchor="middle",
                bold=on,
                fill="ink" if point in important else "soft",
            )
    _way(scene, reading, window, y)


def _ends(scene: Scene, format: SmallFloat, window: _Window, y: float) -> None:
    """Where the format has no numbers any more."""
    least = 0.0 if format.is_scale else -format.largest
    if window.high > format.largest:
        x = window.at(format.largest)
        scene.rect(x, y - 14, RIGHT + 20 - x, 28, hatched=True, stroke="line")
        scene.text(
            RIGHT + 20,
            y + 46,
            f"no numbers beyond {written(format.largest)}",
            size=11,
            fill="soft",
            anchor="end",
        )
    if window.low < least or (format.is_scale and window.low <= 0):
        x = window.at(least)
        scene.rect(LEFT - 20, y - 14, x - LEFT + 20, 28, hatched=True, stroke="line")
        words = "no zero, no sign" if format.is_scale else f"no numbers beyond {written(least)}"
        scene.text(LEFT - 20, y + 46, words, size=11, fill="soft")


def _way(scene: Scene, reading: Reading, window: _Window, y: float) -> None:
    """From the value to the point that it becomes."""
    if math.isnan(reading.scaled):
        scene.text((LEFT + RIGHT) / 2, y - 46, "NaN lies nowhere on the line", anchor="middle")
        return
    start = window.at(window.value)
    words = written(reading.scaled)
    if window.beyond and not window.low < reading.scaled < window.high:
        words = f"{words} →" if reading.scaled > 0 else f"← {words}"
    if math.isfinite(reading.rounded) and window.low <= reading.rounded <= window.high:
        end = window.at(reading.rounded)
        scene.line((start, y - 36), (end, y - 12), stroke="vermillion", stroke_width=2)
        scene.line(
            (end - 5, y - 18), (end, y - 10), (end + 5, y - 18), stroke="vermillion", stroke_width=2
        )
    half = 3.8 * len(words)
    scene.text(min(max(start, half), WIDTH - half), y - 54, words, bold=True, anchor="middle")
    scene.circle(
        start, y - 36, 6, fill="vermillion", label=f"{written(reading.scaled)}\n{reading.verdict()}"
    )


# How far the formats reach --------------------------------------------------------------------


def _ranges(scene: Scene, reading: Reading, top: float) -> None:
    """A row a format, on an axis of powers of two; clicking one chooses it."""

    def at(power: float) -> float:
        share = (power - LOWEST) / (HIGHEST - LOWEST)
        return AXIS_LEFT + (AXIS_RIGHT - AXIS_LEFT) * min(max(share, 0), 1)

    scene.text(0, top - 14, "How far each format reaches", bold=True, size=13)
    for x, colour, word in (
        (AXIS_LEFT + 180, "orange", "subnormal"),
        (AXIS_LEFT + 290, "blue", "normal"),
    ):
        scene.rect(x, top - 19, 11, 11, fill=colour)
        scene.text(x + 16, top - 13.5, word, fill="soft")
    bottom = top + 20 * len(FORMATS) + 2
    for power in range(-120, 121, 40):
        if LOWEST < power < HIGHEST:
            scene.line((at(power), top), (at(power), bottom), stroke="line", stroke_width=0.5)
            word = f"2^{power}".replace("-", "−") if power else "1"
            scene.text(at(power), bottom + 10, word, size=11, fill="soft", anchor="middle")
    for row, format in enumerate(FORMATS):
        y, on = top + 20 * row, format == reading.format
        low, normal, high = (
            math.log2(size) for size in (format.smallest, format.smallest_normal, format.largest)
        )
        scene.rect(
            0,
            y + 1,
            WIDTH,
            18,
            rounded=3,
            fill="pale" if on else None,
            stroke="blue" if on else None,
        )
        scene.text(8, y + 10, format.name, bold=on)
        scene.text(80, y + 10, f"{format.bits} bits", fill="soft", size=11)
        gap = (
            f"{100 / (1 << format.mantissa_bits):.3g}% steps"
            if format.mantissa_bits
            else "× 2 steps"
        )
        scene.text(124, y + 10, gap, fill="soft", size=11)
        scene.rect(at(low), y + 6, at(normal) - at(low), 8, fill="orange")
        scene.rect(at(normal), y + 6, at(high) - at(normal), 8, fill="blue")
        scene.rect(
            0,
            y + 1,
            WIDTH,
            18,
            rounded=3,
            key=f"format {format.name}",
            chosen=on,
            label=f"{format.name}: {format.bits} bits, from {written(format.smallest)} "
            f"(normal from {written(format.smallest_normal)}) to {written(format.largest)}",
        )
    size = abs(reading.scaled)
    if size > 0 and math.isfinite(size):
        x = at(math.log2(size))
        scene.line((x, top - 2), (x, bottom), stroke="vermillion", stroke_width=2)
