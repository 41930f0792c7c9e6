"""Chapter 6, drawn: the parts of a run, and a run that is killed and goes on.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.training.phases import Phase
from dsv3.training.schedules import Schedules
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, WIDTH, arrow, box, headline, lines, number
from dsv3.viz.training_schematics import COLOURS, STRONG, tens

# Two phases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stretch:
    """A part of a run with windows of one length. windows: in a step, at the end of it; tokens:
    read in it; rates: learning rate at its start and end; yarn: factor, 1 without."""

    name: str
    seq_len: int
    windows: int
    tokens: float
    rates: tuple[float, float]
    yarn: float = 1.0


def _report() -> tuple[Stretch, ...]:
    whole = Schedules.deepseek_v3()
    rate, windows = whole.learning_rate, whole.batch.last
    first = Stretch("pre-training", 4096, windows, whole.total, (rate.peak, rate.last))
    longer = [
        Stretch(name, length, count, 1000 * length * count, (rate.last, rate.last), 40.0)
        for name, length, count in (("extension to 32K", 32768, 1920), ("to 128K", 131072, 480))
    ]
    return first, *longer


REPORT_STRETCHES = _report()  # TR 4.2, 4.3: the extensions are 1,000 steps each


def stretches(phases: Sequence[Phase]) -> tuple[Stretch, ...]:
    """Those of a run of ours."""
    result = []
    for phase in phases:
        rate, ends = phase.schedules.learning_rate, phase.tokens
        scaling = phase.config.rope_scaling
        result.append(
            Stretch(
                "extension" if phase.number else "pre-training",
                phase.seq_len,
                phase.schedules.batch.last,
                ends,
                (rate.peak, rate.at(10**9, ends)),
                scaling.factor if scaling else 1.0,
            )
        )
    return tuple(result)


def two_phases(parts: Sequence[Stretch] = REPORT_STRETCHES) -> Scene:
    """A step of each part of a run as a surface, windows down and tokens across, and what changes
    from part to part."""
    if not 2 <= len(parts) <= 3:
        raise ValueError(f"2 or 3 parts, not {len(parts)}")
    longest, most = max(p.seq_len for p in parts), max(p.windows for p in parts)
    across, high = 470, 128
    tall = [max(high * part.windows / most, 4) for part in parts]
    scene = Scene(WIDTH, sum(max(t, 66) + 40 for t in tall) + 40, _phases_alt(parts))
    headline(scene, "One step, drawn to scale: windows down, tokens across")
    y = 40.0
    for part, down, colour in zip(parts, tall, COLOURS):
        wide = across * part.seq_len / longest
        room = max(down, 66)
        scene.text(0, y + 6, part.name, bold=True)
        scene.rect(0, y + 22, wide, down, fill=colour, opacity=STRONG, stroke=colour)
        words = f"{number(part.windows)} windows × {number(part.seq_len)} tokens"
        step = _tokens(part.windows * part.seq_len)
        if wide < 200:
            lines(scene, wide + 12, y + 22 + min(down, 40) / 2 - 2, words, f"= {step} per step")
        else:
            scene.text(0, y + 22 + down + 16, f"{words} = {step} per step")
        lines(
            scene,
            across + 30,
            y + 22,
            f"{_tokens(part.tokens)} in all",
            f"learning rate {_rates(part.rates)}",
            f"YaRN, factor {number(part.yarn)}" if part.yarn > 1 else "no YaRN",
            size=SMALL,
            step=18,
        )
        y += room + 40
    scene.text(0, scene.height - 8, "the weights go on from part to part", fill="soft", size=SMALL)
    return scene


def _tokens(count: float) -> str:
    """62,914,560 as 62.9M tokens."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{number(count / size)}{letter} tokens"
    return f"{number(count)} tokens"


def _rates(rates: tuple[float, float]) -> str:
    first, last = map(tens, rates)
    return first if first == last else f"{first} to {last}"


def _phases_alt(parts: Sequence[Stretch]) -> str:
    return "A step of each part of a run as a rectangle of windows by tokens. " + " ".join(
        f"{part.name[0].upper()}{part.name[1:]}: {number(part.windows)} windows of "
        f"{number(part.seq_len)} tokens, {_tokens(part.windows * part.seq_len)} in a step, "
        f"{_tokens(part.tokens)} in all, learning rate {_rates(part.rates)}, "
        + (f"YaRN with factor {number(part.yarn)}." if part.yarn > 1 else "no YaRN.")
        for part in parts
    )


# Stopping and going on --------------------------------------------------------------------------


def resume(losses: Sequence[float], saved: int = 5, killed: int = 8) -> Scene:
    """What a checkpoint has in it, and a run that is killed and goes on from it on the same line.

    losses: of steps 1, 2 ...; saved: the step after which the checkpoint was written; killed: the
    last step that the first process made.
    """
    if not 1 <= saved < killed < len(losses):
        raise ValueError("a checkpoint, then a kill, then the end")
    left, right, top, floor = 40, WIDTH - 8, 116, 236
    scene = Scene(
        WIDTH,
        416,
        f"A loss falls over {len(losses)} steps. A checkpoint is written after step {saved}; the "
        f"process is killed after step {killed}. A second one reads the checkpoint, repeats steps "
        f"{saved + 1} to {killed} with equal losses and goes on along the same line. The "
        "checkpoint holds weights and biases, two moments, random state, position, and "
        "fingerprints of recipe and text.",
    )
    low, high = min(losses), max(losses)
    again = f"step{'s' * (killed - saved > 1)} {saved + 1}" + f" to {killed}" * (killed - saved > 1)
    points = [
        (
            left + (right - left - 20) * place / (len(losses) - 1) + 10,
            floor - (floor - top) * (loss - low) / (high - low),
        )
        for place, loss in enumerate(losses)
    ]
    headline(scene, "Killed, and the same line goes on")
    scene.line((left, top - 10), (left, floor + 14), (right, floor + 14), stroke="line")
    scene.text(left - 8, top - 18, "loss", anchor="end", size=SMALL, fill="soft")
    scene.text(left - 8, top, f"{high:.1f}", anchor="end", size=SMALL, fill="soft")
    scene.text(left - 8, floor, f"{low:.1f}", anchor="end", size=SMALL, fill="soft")
    scene.line(*points, stroke="line", stroke_width=1.4)
    for place, (x, y) in enumerate(points, start=1):
        if place <= killed:
            scene.circle(x, y, 7, fill="paper", stroke="blue", stroke_width=2)
        if place > saved:
            scene.circle(x, y, 3.6, fill="orange")
        scene.text(x, floor + 26, str(place), anchor="middle", size=SMALL, fill="soft")
    scene.text(right, floor + 42, "step", anchor="end", size=SMALL, fill="soft")
    x = points[killed - 1][0] + 14
    scene.line((x, 72), (x, floor + 10), stroke="vermillion", stroke_width=2, dashed=True)
    at, anchor = (x + 8, "start") if x < WIDTH - 180 else (x - 8, "end")
    scene.text(at, 78, f"killed after step {killed}", bold=True, anchor=anchor)
    scene.text(at, 95, "what was in memory is gone", size=SMALL, fill="soft", anchor=anchor)
    key = left + (right - left) * 0.5
    for line, (fill, stroke, radius, words) in enumerate(
        (
            ("paper", "blue", 7, "the first process"),
            ("orange", None, 3.6, f"the second: {again} again, bit for bit"),
        )
    ):
        scene.circle(key, 28 + 20 * line, radius, fill=fill, stroke=stroke, stroke_width=2)
        scene.text(key + 14, 28 + 20 * line, words, size=SMALL, fill="soft")
    _checkpoint(scene, 308, saved, points[saved - 1])
    return scene


def _checkpoint(scene: Scene, top: float, saved: int, point: tuple[float, float]) -> None:
    """The checkpoint's contents, with what would be lost without them."""
    arrow(scene, (point[0], point[1] + 10), (point[0], 233), colour="green", width=2)
    arrow(scene, (point[0], 272), (point[0], top - 2), colour="green", width=2)
    scene.rect(0, top, WIDTH, 104, rounded=6, fill="green", opacity=0.1, stroke="green")
    scene.text(
        12, top + 16, f"checkpoint after step {saved}: all that the next step reads", bold=True
    )
    parts = (
        ("weights", "and router biases"),
        ("two moments", "of every weight"),
        ("random state", "of torch"),
        ("position", "step, tokens, phase"),
        ("recipe, fingerprints", "of text, tokenizer"),
    )
    wide = (WIDTH - 20) / len(parts)
    for place, (title, words) in enumerate(parts):
        box(
            scene, 10 + wide * (place + 0.5), top + 64, wide - 10, 52, title, words,
            colour="blue" if place < 3 else "purple",
        )  # fmt: skip
