"""Chapter 6, drawn: what one update does, to a weight, to a bad gradient, to the routing bias.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed. The whole step
is drawn in ``dsv3.viz.training_schematics``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch

from dsv3.config import ModelConfig
from dsv3.costs import REPORT, Formats, parameter_count
from dsv3.costs.training import ITEM_BYTES
from dsv3.training.balance import max_violation, update_bias
from dsv3.training.schedules import Schedules
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, WIDTH, arrow, headline, lines, number
from dsv3.viz.training_schematics import tens

STRONG = 0.35

# What is kept of a weight -----------------------------------------------------------------------


def adamw_state(formats: Formats = REPORT, config: ModelConfig | None = None) -> Scene:
    """All that training keeps of one weight, a cell for each byte, and of all weights.

    formats: the report's by default; config: the 671B model's.
    """
    parameters = parameter_count(config or ModelConfig.deepseek_v3())
    assumed = " (format: our assumption)" if formats == REPORT else ""  # see costs.REPORT
    read = f"forward and backward read it{assumed}"
    parts = (
        ("weight", "w", formats.weights, "blue", read),
        ("master weight", "w", formats.master, "green", "steps are added here; w is its rounding"),
        ("gradient", "g", formats.gradients, "orange", "the sum over the batch"),
        ("first moment", "m", formats.moments, "purple", "0.9 m + 0.1 g: which way on average"),
        ("second moment", "v", formats.moments, "purple", "0.95 v + 0.05 g²: how large on average"),
    )
    each = formats.bytes_per_parameter
    whole = f"{each * parameters / 1e12:.2f} TB"
    scene = Scene(
        WIDTH,
        356,
        "What training keeps of one weight, a cell for each byte: "
        + "; ".join(
            f"{name} in {format_.upper()}, {number(ITEM_BYTES[format_])} bytes"
            for name, _, format_, *_ in parts
        )
        + f". Together {number(each)} bytes, {whole} for {number(parameters / 1e9)} billion "
        f"weights. {' '.join(_rounding())}",
    )
    top, row, side = 44, 38, 24
    headline(scene, "One weight")
    scene.text(WIDTH, 10, f"× {number(parameters / 1e9)} billion", anchor="end", bold=True)
    for place, (name, letter, format_, colour, words) in enumerate(parts):
        y, size = top + row * place, ITEM_BYTES[format_]
        scene.text(0, y + side / 2, name)
        scene.text(122, y + side / 2, letter, anchor="middle", bold=True)
        for byte in range(round(size)):
            scene.rect(
                146 + (side + 2) * byte, y, side, side, fill=colour, opacity=STRONG, stroke=colour
            )
        scene.text(262, y + side / 2, f"{format_.upper()}, {number(size)} bytes", size=SMALL)
        scene.text(372, y + side / 2, words, size=SMALL, fill="soft")
        scene.text(WIDTH, y + side / 2, f"{size * parameters / 1e12:.2f} TB", anchor="end")
    y = top + row * len(parts)
    scene.line((0, y), (WIDTH, y), stroke="line")
    scene.text(0, y + 20, "all of it", bold=True)
    scene.text(262, y + 20, f"{number(each)} bytes", bold=True)
    scene.text(WIDTH, y + 20, whole, anchor="end", bold=True)
    scene.text(0, y + 58, "Why a master weight in FP32?", bold=True)
    lines(scene, 0, y + 80, *_rounding(), size=SMALL, step=18)
    return scene


def _rounding() -> tuple[str, str]:
    """A weight of 0.5 after one step of the report's highest learning rate, in two formats."""
    step = Schedules.deepseek_v3().learning_rate.peak
    wide = float(torch.tensor(0.5) - step)
    narrow = float(torch.tensor(wide).bfloat16())
    gap = 2.0**-9  # between neighbours in BF16 from 0.25 to 0.5: 8 bits of a number
    assert narrow == 0.5 and gap / 2 > step
    return (
        f"A step of {tens(step)} from 0.5 leads to {number(wide, 5)} in FP32, but in BF16 back to "
        f"{number(narrow)}: its next number below is {number(0.5 - gap, 5)}.",
        "Steps that are rounded away never add up.",
    )


# Clipping ---------------------------------------------------------------------------------------

GRADIENTS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"a normal batch": (0.3, -0.4), "a bad batch": (3.0, 4.0)}
)


def clipping(gradients: Mapping[str, tuple[float, float]] = GRADIENTS, bound: float = 1.0) -> Scene:
    """Gradients of two weights against the circle of allowed norms; those outside are shortened,
    their direction stays."""
    if not 1 <= len(gradients) <= 3 or bound <= 0:
        raise ValueError(f"1 to 3 gradients and a bound above 0, not {len(gradients)}, {bound}")
    xs = [-bound, bound, *(x for x, _ in gradients.values())]
    ys = [-bound, bound, *(y for _, y in gradients.values())]
    unit = min(270 / (max(xs) - min(xs)), 290 / (max(ys) - min(ys)))
    zero = (16 - unit * min(xs), 40 + unit * max(ys))
    low = zero[1] - unit * min(ys)
    rows = [
        (name, vector, norm := math.hypot(*vector), min(1.0, bound / norm))
        for name, vector in gradients.items()
    ]
    scene = Scene(
        WIDTH,
        max(low + 20, 60 + 116 * len(rows)),
        f"A circle of radius {number(bound)} around zero, and gradients as arrows. "
        + " ".join(
            f"{name[0].upper()}{name[1:]}: {_vector(vector)}, norm {number(norm)}, "
            + (
                f"shortened to {_vector([value * factor for value in vector])} on the circle."
                if factor < 1
                else "inside, left as it is."
            )
            for name, vector, norm, factor in rows
        ),
    )
    headline(scene, f"Two weights' gradient, norm at most {number(bound)}")
    scene.circle(*zero, unit * bound, fill="green", opacity=0.12, stroke="green", stroke_width=1.6)
    scene.line((4, zero[1]), (zero[0] + unit * max(xs) + 12, zero[1]), stroke="line")
    scene.line((zero[0], zero[1] - unit * max(ys) - 12), (zero[0], low + 12), stroke="line")
    colours = ("blue", "vermillion", "purple")
    for place, ((name, vector, norm, factor), colour) in enumerate(zip(rows, colours)):
        tip = zero[0] + unit * vector[0], zero[1] - unit * vector[1]
        short = zero[0] + unit * factor * vector[0], zero[1] - unit * factor * vector[1]
        if factor < 1:
            arrow(scene, zero, tip, colour=colour, width=1.6, dashed=True)
        arrow(scene, zero, short, colour=colour, width=3)
        _told(scene, 346, 62 + 116 * place, name, vector, norm, factor, bound, colour)
    return scene


def _told(scene: Scene, x, y, name, vector, norm, factor, bound, colour) -> None:
    """A gradient's numbers, and what the optimizer gets."""
    scene.line((x, y - 6), (x + 30, y - 6), stroke=colour, stroke_width=3)
    scene.text(x + 40, y - 6, name, bold=True)
    squares = " + ".join(number(value * value) for value in vector)
    kept = (
        f"× {number(bound)} / {number(norm)} = {_vector([value * factor for value in vector])}: "
        "shorter, same direction"
        if factor < 1
        else f"{_vector(vector)}, as it is"
    )
    for line, (words, value) in enumerate(
        (
            ("gradient", _vector(vector)),
            ("norm", f"√({squares}) = {number(norm)}"),
            ("AdamW gets", kept),
        )
    ):
        scene.text(x, y + 18 + 22 * line, words, fill="soft", size=SMALL)
        scene.text(x + 78, y + 18 + 22 * line, value)


def _vector(values: Sequence[float]) -> str:
    return "(" + ", ".join(number(value) for value in values) + ")"


# The bias rule ----------------------------------------------------------------------------------

LOADS = (9, 2, 6, 4, 12, 6, 3, 6)
BIASES = (-0.002, 0.003, 0.0, 0.001, -0.004, 0.001, 0.002, 0.0)


def bias_rule(
    loads: Sequence[int] = LOADS, biases: Sequence[float] = BIASES, gamma: float | None = None
) -> Scene:
    """Loads of experts against their mean, and the step of each bias: down, up or none.

    gamma: the report's by default.
    """
    if len(loads) != len(biases) or not 2 <= len(loads) <= 12:
        raise ValueError(f"2 to 12 loads with a bias each, not {len(loads)}, {len(biases)}")
    gamma = Schedules.deepseek_v3().bias_speed.at(0) if gamma is None else gamma
    load, old = torch.tensor(loads, dtype=torch.float), torch.tensor(biases, dtype=torch.float64)
    new = old.clone()
    update_bias(new, load, gamma)
    mean, violation = float(load.mean()), max_violation(load)
    moved = [round(float(step)) for step in (new - old) / gamma]
    scene = Scene(
        WIDTH,
        366,
        f"Bars of the tokens that each of {len(loads)} experts got: {', '.join(map(str, loads))}; "
        f"their mean is {number(mean)}, MaxVio {number(violation)}. The bias of those above the "
        f"mean goes down by {number(gamma)}, of those below up by as much: "
        f"{', '.join(_signed(sign) for sign in moved)} times γ.",
    )
    left, top, floor = 96, 50, 232
    wide, unit = (WIDTH - left) / len(loads), (floor - top) / max(loads)
    headline(scene, "Tokens per expert in one step, and the step of the bias")
    level = floor - unit * mean
    for expert, (count, sign) in enumerate(zip(loads, moved)):
        x = left + wide * (expert + 0.5)
        colour = {-1: "vermillion", 0: "grey", 1: "green"}[sign]
        scene.rect(
            x - 17, floor - unit * count, 34, unit * count, fill=colour, opacity=STRONG,
            stroke=colour,
        )  # fmt: skip
        scene.text(x, floor - unit * count - 10, str(count), anchor="middle", bold=True)
        if sign:
            bar = x + 26
            near, far = (284, 308) if sign < 0 else (308, 284)
            arrow(scene, (bar, near), (bar, far), colour=colour, width=2.4)
        for y, words in (
            (floor + 16, f"expert {expert}"),
            (272, _thousandths(old[expert])),
            (296, f"{_signed(sign)}" + " γ" * bool(sign)),
            (320, _thousandths(new[expert])),
        ):
            scene.text(x - 4 * (y > 250), y, words, anchor="middle", size=SMALL, bold=y == 320)
    edges = [left - 6.0]
    for expert in range(len(loads)):
        x = left + wide * (expert + 0.5)
        edges += [x - 19, x + 19]
    edges.append(WIDTH)
    for start, end in zip(edges[::2], edges[1::2]):
        scene.line((start, level), (end, level), stroke="ink", stroke_width=1.4, dashed=True)
    scene.line((left - 6, floor), (WIDTH, floor), stroke="line")
    lines(scene, 0, level - 7, f"mean {number(mean)}", step=15, bold=True)
    lines(scene, 0, level + 9, f"MaxVio {number(violation)}", size=SMALL, fill="soft")
    for y, words in ((272, "bias before"), (296, "step"), (320, "bias after")):
        scene.text(0, y, words, size=SMALL, fill="soft")
    lines(
        scene,
        0,
        352,
        f"biases in thousandths, γ = {number(gamma, 1)}; by the sign alone: twice too many moves a "
        "bias as far as one token too many",
        size=SMALL,
        fill="soft",
    )
    return scene


def _signed(value: int) -> str:
    return {-1: "−1", 0: "0", 1: "+1"}[value]


def _thousandths(value: torch.Tensor) -> str:
    return number(round(1000 * float(value), 2))
