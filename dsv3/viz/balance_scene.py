"""The bias rule at work, step by step: the picture of the load-balancing simulator.

Above, how uneven the load is in each step, against what it would be without a bias and against
what chance alone leaves; below, the load of each expert in the last step and its bias.
"""

from __future__ import annotations

import math

from dsv3.training.simulation import BalanceRun
from dsv3.viz.scene import Scene

WIDTH, LEFT, RIGHT = 920, 66, 914
CURVE, BARS = (74, 180), (322, 110)  # upper edge and height of the two plots
WINDOW = 20  # steps that a mean is taken over


def balance_scene(
    run: BalanceRun, without: BalanceRun, floor: float, steps: int, gamma: float, k: int
) -> Scene:
    """run: at least ``steps`` steps, of which that many are shown; without: one without bias;
    floor: MaxVio of equal experts, by chance alone; k: experts a token."""
    scene = Scene(WIDTH, 478, _alt(run, without, floor, steps, gamma))
    start, late = _start_and_late(run, steps)
    scene.text(
        0,
        12,
        f"γ = {gamma:g}: MaxVio {start:.2f} in step 1, {late:.2f} in the last "
        f"{min(WINDOW, steps)} steps on average",
        bold=True,
        size=14,
    )
    unhelped, x = float(without.max_violation.mean()), 0
    for colour, dashed, words, width in (
        ("blue", False, "MaxVio of each step", 180),
        ("vermillion", True, f"without a bias, on average: {unhelped:.2f}", 255),
        ("green", True, f"equal experts, chance alone: {floor:.2f}", 0),
    ):
        scene.line((x, 36), (x + 27, 36), stroke=colour, stroke_width=2.5, dashed=dashed)
        scene.text(x + 33, 36, words, fill="soft")
        x += width
    _curve(scene, run, unhelped, floor, steps, k)
    _bars(scene, run, without, steps)
    return scene


def _start_and_late(run: BalanceRun, steps: int) -> tuple[float, float]:
    return (
        float(run.max_violation[0]),
        float(run.max_violation[max(0, steps - WINDOW) : steps].mean()),
    )


def _alt(run: BalanceRun, without: BalanceRun, floor: float, steps: int, gamma: float) -> str:
    start, late = _start_and_late(run, steps)
    load = run.loads[steps - 1]
    return (
        f"MaxVio over {steps} steps with bias speed {gamma:g}: {start:.2f} at the start, "
        f"{late:.2f} at the end; without a bias {float(without.max_violation.mean()):.2f}, "
        f"by chance alone {floor:.2f}. Below, the last step's load of {len(load)} experts: "
        f"from {int(load.min())} to {int(load.max())} tokens, mean {float(load.mean()):g}."
    )


def _curve(scene: Scene, run: BalanceRun, without: float, floor: float, steps: int, k: int) -> None:
    top, height = CURVE
    most = run.loads.shape[1] / k - 1
    bottom = top + height

    def at(step: int, value: float) -> tuple[float, float]:
        return (
            LEFT + (RIGHT - LEFT) * step / max(1, steps - 1),
            bottom - height * min(value, most) / most,
        )

    scene.text(LEFT - 9, top - 16, "MaxVio", anchor="end", size=11, fill="soft")
    for tick in range(math.floor(2 * most) + 1):
        y = at(0, tick / 2)[1]
        scene.line((LEFT - 5, y), (RIGHT, y), stroke_width=1.2 if tick == 0 else 0.5)
        scene.text(LEFT - 9, y, f"{tick / 2:g}", anchor="end", size=11, fill="soft")
    for share in range(5):
        step = round(share / 4 * (steps - 1))
        scene.text(
            at(step, 0)[0],
            bottom + 15,
            f"step {step + 1}",
            size=11,
            fill="soft",
            anchor="start" if share == 0 else "end" if share == 4 else "middle",
        )
    for value, colour in ((without, "vermillion"), (floor, "green")):
        scene.line(at(0, value), at(steps - 1, value), stroke=colour, stroke_width=2, dashed=True)
    scene.line(
        *(at(step, value) for step, value in enumerate(run.max_violation[:steps].tolist())),
        stroke="blue",
        stroke_width=2,
    )
    parts = min(30, steps)
    width = (RIGHT - LEFT) / parts
    for part in range(parts):
        step = round(part * (steps - 1) / max(1, parts - 1))
        load = run.loads[step]
        scene.rect(
            LEFT + part * width,
            top,
            width,
            height,
            label=(
                f"step {step + 1}: MaxVio {float(run.max_violation[step]):.2f}\n"
                f"busiest: expert {int(load.argmax())} with {int(load.max())} tokens, "
                f"mean {float(load.mean()):g}"
            ),
        )


def _bars(scene: Scene, run: BalanceRun, without: BalanceRun, steps: int) -> None:
    top, height = BARS
    load, bias, unhelped = run.loads[steps - 1], run.bias[steps - 1], without.loads.mean(0)
    experts, mean = len(load), float(load.mean())
    most = max(float(load.max()), float(unhelped.max()))
    width, bottom = (RIGHT - LEFT) / experts, top + height
    scene.text(0, top - 25, f"Load in step {steps}", bold=True, size=13)
    scene.line((150, top - 25), (172, top - 25), stroke="vermillion", stroke_width=2.5)
    scene.text(178, top - 25, "without a bias, on average", fill="soft")
    for expert in range(experts):
        middle = LEFT + (expert + 0.5) * width
        tall = height * float(load[expert]) / most
        scene.rect(middle - 0.31 * width, bottom - tall, 0.62 * width, tall, fill="sky")
        y = bottom - height * float(unhelped[expert]) / most
        scene.line(
            (middle - 0.4 * width, y),
            (middle + 0.4 * width, y),
            stroke="vermillion",
            stroke_width=2.5,
        )
    level = bottom - height * mean / most
    scene.line((LEFT - 5, bottom), (RIGHT, bottom), stroke_width=1.2)
    scene.line((LEFT - 5, level), (RIGHT, level), stroke="ink", dashed=True)
    for place, words in ((level, f"mean {mean:g}"), (bottom, "0")):
        scene.text(LEFT - 9, place, words, anchor="end", size=11, fill="soft")
    for row, words in ((15, "expert"), (31, "bias b")):
        scene.text(LEFT - 9, bottom + row, words, anchor="end", size=11, fill="soft")
    for expert in range(experts):
        middle, b = LEFT + (expert + 0.5) * width, _signed(float(bias[expert]))
        scene.text(middle, bottom + 15, str(expert), anchor="middle", fill="soft")
        scene.text(middle, bottom + 31, b, anchor="middle", size=11)
        scene.rect(
            middle - width / 2,
            top - 6,
            width,
            height + 46,
            rounded=2,
            label=(
                f"expert {expert}: {int(load[expert])} tokens in step {steps}, mean {mean:g}\n"
                f"without a bias {float(unhelped[expert]):.0f} on average\nbias {b}"
            ),
        )


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−") if round(value, 3) else "0"
