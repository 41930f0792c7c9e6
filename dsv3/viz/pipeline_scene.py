"""A pipeline at work: who computes what and when, who waits, and what must be kept meanwhile.

A row for each rank, time to the right. A forward pass is blue, the gradient of the input green and
that of the weights yellow, so a whole backward pass is green and yellow in one box; a forward and
a backward that overlap share a box, one above the other. What is left of a row is the bubble.
Below, on the same axis, how many activations the fullest rank holds, and one rank of choice.

The picture is made from a ``Timeline`` alone: one that was simulated, or one that was measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from dsv3.parallel.schedules import Schedule, Work
from dsv3.parallel.timeline import Durations, Event, Timeline, activation_formula, bubble_formula
from dsv3.viz.scene import Scene, text_width

WIDTH, LEFT, RIGHT = 920, 58, 832
COLOURS = {"F": "sky", "B": "green", "I": "green", "W": "yellow"}
NAMES = {
    "F": "forward",
    "B": "backward",
    "I": "gradient of the input",
    "W": "gradient of the weights",
}
# Table 2 of the report; DualPipeV's as published with it.
BUBBLES = {
    "1F1B": "(PP − 1)(F + B)",
    "ZB1P": "(PP − 1)(F + B − 2W)",
    "DualPipe": "(PP/2 − 1)(F&B + B − 3W)",
    "DualPipeV": "(PP/2 − 1)(F&B + B − 3W)",
}
ACTIVATIONS = {"1F1B": "PP", "ZB1P": "PP", "DualPipe": "PP + 1", "DualPipeV": "PP + 1"}
_WAITS = 0.3  # how strong the colour of a bubble is
_FAINTER = 0.4  # micro-batches that enter at the other end are fainter
_DIGIT = 0.64  # width of a digit in sizes of the font
_MEMORY = 104  # height of the plot of activations


def pipeline_scene(
    timeline: Timeline,
    durations: Durations | None = None,
    *,
    rank: int | None = None,
    unit: str = "",
) -> Scene:
    """One timeline, its bubble and its memory.

    durations: those it was simulated with: then the formulae of the report stand beside what the
    picture shows, and each backward is drawn in its two parts. rank: whose activations are shown
    beside the fullest rank's. unit: of time, such as "ms".
    """
    ranks, row = timeline.schedule.ranks, _row(timeline)
    top = 74.0
    bottom = top + ranks * row
    scene = Scene(WIDTH, bottom + 86 + _MEMORY, _alt(timeline, durations, rank, unit))
    scene.text(0, 12, _headline(timeline, unit), bold=True, size=14)
    scene.text(0, 34, _formulae(timeline, durations, unit), fill="soft")
    _legend(scene, [timeline.schedule], 56, durations is not None)
    axis = _Axis(timeline.end)
    _rows(scene, axis, timeline, top, _weights_share(durations), rank, unit)
    axis.draw(scene, bottom, unit)
    _memory(scene, axis, timeline, bottom + 66, rank, durations is not None)
    return scene


def pipelines_scene(timelines: Mapping[str, Timeline], *, unit: str = "") -> Scene:
    """Several timelines, each under its name, on one axis of time: such as what was simulated and
    what was measured. All times are in the same unit."""
    axis = _Axis(max(timeline.end for timeline in timelines.values()))
    heights = [38 + timeline.schedule.ranks * _row(timeline) for timeline in timelines.values()]
    alt = " ".join(f"{name}: {_headline(timeline, unit)}." for name, timeline in timelines.items())
    scene = Scene(WIDTH, 22 + sum(heights) + 36, alt)
    _legend(scene, [timeline.schedule for timeline in timelines.values()], 6, False)
    top = 22.0
    for (name, timeline), height in zip(timelines.items(), heights):
        scene.text(0, top + 16, f"{name}: {_headline(timeline, unit)}", bold=True, size=13)
        _rows(scene, axis, timeline, top + 32, None, None, unit)
        top += height
    axis.draw(scene, top - 6, unit)
    return scene


# In words -------------------------------------------------------------------------------------


def _headline(timeline: Timeline, unit: str) -> str:
    schedule, bubble = timeline.schedule, timeline.bubble
    return (
        f"{schedule.name}, {schedule.ranks} ranks, {schedule.micro_batches} micro-batches: "
        f"bubble {_time(bubble, unit)} of {_time(timeline.end, unit)} "
        f"({_percent(bubble, timeline.end)}), at most {timeline.peak_activations} activations"
    )


def _formulae(timeline: Timeline, durations: Durations | None, unit: str) -> str:
    schedule = timeline.schedule
    if durations is None or schedule.name not in BUBBLES:
        return "Bubble: of the rank that waits longest; activations: of one stage and micro-batch"
    bubble = bubble_formula(schedule.name, schedule.stages, durations)
    held = activation_formula(schedule.name, schedule.stages)
    overlap = f", F&B = {_number(durations.both)}" if schedule.name.startswith("Dual") else ""
    exact = math.isclose(bubble, timeline.bubble, abs_tol=1e-9)
    return (
        f"By table 2, with PP = {schedule.stages} stages{overlap}: bubble "
        f"{BUBBLES[schedule.name]} = {_time(bubble, unit)}"
        f"{'' if exact else ' (exact where B − W = F ≥ W)'}, "
        f"activations {ACTIVATIONS[schedule.name]} = {held}"
    )


def _alt(timeline: Timeline, durations: Durations | None, rank: int | None, unit: str) -> str:
    fullest, slowest = _fullest(timeline), _slowest(timeline)
    longest = f"Rank {slowest[0]} waits longest" if slowest else "All ranks wait equally long"
    said = (
        f"{_headline(timeline, unit)}. {_formulae(timeline, durations, unit)}. {longest}; "
        f"rank {fullest} holds most activations"
    )
    if rank is None or rank == fullest:
        return f"{said}."
    return f"{said}, rank {rank} at most {_peak(timeline, rank)}."


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _time(value: float, unit: str) -> str:
    return f"{_number(0.0 if abs(value) < 1e-9 else value)} {unit}".rstrip()


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else "0%"


def _micro(schedule: Schedule, work: Work) -> int:
    """The number of a micro-batch in the whole batch: those of the other end are the later half."""
    return work.micro + work.direction * (schedule.micro_batches // 2)


def _says(schedule: Schedule, event: Event, unit: str) -> str:
    parts = [
        f"{work.kind}, {NAMES[work.kind]}, of micro-batch {_micro(schedule, work)} on stage "
        f"{work.stage}"
        for work in event.step
    ]
    return (
        f"rank {event.rank}: {' together with '.join(parts)}\n"
        f"from {_time(event.start, unit)} to {_time(event.end, unit)}"
    )


def _peak(timeline: Timeline, rank: int) -> int:
    return max(held for _, held in timeline.live(rank))


def _fullest(timeline: Timeline) -> int:
    return max(range(timeline.schedule.ranks), key=lambda rank: _peak(timeline, rank))


def _slowest(timeline: Timeline) -> list[int]:
    """The ranks that wait longest; none where all wait as long."""
    ranks = range(timeline.schedule.ranks)
    least = timeline.bubble * (1 - 1e-9)
    slowest = [rank for rank in ranks if timeline.idle(rank) >= least]
    return slowest if len(slowest) < len(ranks) else []


def _weights_share(durations: Durations | None) -> float | None:
    return None if durations is None else durations.weights / (durations.backward or 1.0)


# The rows -------------------------------------------------------------------------------------


class _Axis:
    """Time from 0 to ``end`` on the page."""

    def __init__(self, end: float):
        self.end = end or 1.0

    def at(self, time: float) -> float:
        return LEFT + (RIGHT - LEFT) * time / self.end

    def width(self, time: float) -> float:
        return (RIGHT - LEFT) * time / self.end

    def draw(self, scene: Scene, y: float, unit: str) -> None:
        rough = self.end / 10
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough)
        scene.line((LEFT, y + 3), (RIGHT, y + 3), stroke_width=1.2)
        for tick in range(math.floor(self.end / step + 1e-9) + 1):
            x = self.at(tick * step)
            scene.line((x, y + 3), (x, y + 8), stroke_width=1.2)
            scene.text(x, y + 17, _number(tick * step), size=11, fill="soft", anchor="middle")
        words = f"time, {unit}" if unit else "time"
        scene.text(WIDTH, y + 17, words, size=11, fill="soft", anchor="end")


def _row(timeline: Timeline) -> float:
    """Height of a rank's row."""
    return 28.0 if timeline.schedule.ranks <= 8 else 20.0


def _legend(scene: Scene, schedules: Sequence[Schedule], y: float, split: bool) -> None:
    """split: whether the boxes of whole backwards show their two parts."""
    steps = [step for schedule in schedules for order in schedule.orders for step in order]
    kinds = {work.kind for step in steps for work in step}
    green = [] if split or "B" not in kinds else ["backward B"]
    if split or "I" in kinds:
        green.append("gradient of the input" + " I" * ("I" in kinds))
    entries: list[tuple[str, float | None, str]] = [
        ("sky", None, "forward F"),
        ("green", None, ", ".join(green)),
    ]
    if split or "W" in kinds:
        entries.append(("yellow", None, "of the weights" + " W" * ("W" in kinds)))
    entries.append(("vermillion", _WAITS, "waits: the bubble"))
    for half in {one.micro_batches // 2 for one in schedules if one.directions == 2}:
        entries.append(("sky", _FAINTER, f"fainter: {half} and up, from the other end"))
    x = 0.0
    for fill, opacity, words in entries:
        scene.rect(x, y - 5.5, 11, 11, fill=fill, opacity=opacity, stroke="line")
        scene.text(x + 16, y, words, fill="soft")
        x += 32 + text_width(words, 12)
    if any(len(step) == 2 for step in steps):
        scene.rect(x, y - 5.5, 11, 5.5, fill="sky")
        scene.rect(x, y, 11, 5.5, fill="green")
        scene.rect(x, y - 5.5, 11, 11, stroke="ink")
        scene.text(x + 16, y, "overlap", fill="soft")


def _rows(
    scene: Scene,
    axis: _Axis,
    timeline: Timeline,
    top: float,
    share: float | None,
    chosen: int | None,
    unit: str,
) -> None:
    schedule, row = timeline.schedule, _row(timeline)
    slowest, size = _slowest(timeline), _size(axis, timeline)
    for rank, events in enumerate(timeline.events):
        y, idle = top + rank * row, timeline.idle(rank)
        if chosen is not None:
            scene.rect(
                0,
                y + 1,
                LEFT - 6,
                row - 4,
                rounded=3,
                fill="pale" if rank == chosen else None,
                stroke="blue" if rank == chosen else None,
                key=f"rank {rank}",
                chosen=rank == chosen,
                label=f"rank {rank}: at most {_peak(timeline, rank)} activations\n"
                f"waits {_time(idle, unit)} of {_time(timeline.end, unit)}",
            )
        scene.text(4, y + row / 2 - 1, f"rank {rank}", size=11, bold=rank == chosen)
        words = f"waits {_time(idle, unit)}"
        scene.text(
            WIDTH, y + row / 2 - 1, words, size=11, anchor="end", bold=rank in slowest,
            fill="vermillion" if rank in slowest else "soft",
        )  # fmt: skip
        free = 0.0
        for event in events:
            _wait(scene, axis, (free, event.start), (y, row), rank, unit)
            _box(scene, axis, schedule, event, (y, row - 2), share, size)
            free = event.end
        _wait(scene, axis, (free, timeline.end), (y, row), rank, unit)
        for event in sorted(events, key=lambda event: len(event.step)):
            _frame(scene, axis, schedule, event, (y, row - 2), unit)


def _wait(
    scene: Scene,
    axis: _Axis,
    span: tuple[float, float],
    place: tuple[float, float],
    rank: int,
    unit: str,
) -> None:
    start, end = span
    y, row = place
    if axis.width(end - start) > 0.05:
        scene.rect(
            axis.at(start),
            y + 1,
            axis.width(end - start),
            row - 4,
            fill="vermillion",
            opacity=_WAITS,
            label=f"rank {rank} waits {_time(end - start, unit)}, from {_time(start, unit)} to "
            f"{_time(end, unit)}",
        )


def _size(axis: _Axis, timeline: Timeline) -> float:
    """Of the numbers: the largest at which that of the narrowest box fits, or the smallest."""
    digits = len(str(timeline.schedule.micro_batches - 1))
    widths = [axis.width(event.end - event.start) for events in timeline.events for event in events]
    least = min((width for width in widths if width > 1), default=0.0)
    return next((size for size in (11, 10, 9) if _DIGIT * size * digits + 2 <= least), 8)


def _box(
    scene: Scene,
    axis: _Axis,
    schedule: Schedule,
    event: Event,
    place: tuple[float, float],
    share: float | None,
    size: float,
) -> None:
    """One step: one piece of work, or two that overlap, one above the other."""
    x, width = axis.at(event.start), axis.width(event.end - event.start)
    if width <= 0:
        return
    y, height = place
    each = height / len(event.step)
    for at, work in enumerate(event.step):
        opacity = _FAINTER if work.direction else None
        parts = [(COLOURS[work.kind], 1.0)]
        if work.kind == "B" and share is not None:
            parts = [("green", 1 - share), ("yellow", share)]
        left = x
        for fill, part in parts:
            if part > 0:
                scene.rect(left, y + at * each, width * part, each, fill=fill, opacity=opacity)
            left += width * part
        number = str(_micro(schedule, work))
        if _DIGIT * size * len(number) + 1 <= width and each >= size + 2:
            scene.text(
                x + width / 2,
                y + (at + 0.5) * each,
                number,
                size=size,
                anchor="middle",
                fill="ink" if work.direction else "black",
            )


def _frame(
    scene: Scene,
    axis: _Axis,
    schedule: Schedule,
    event: Event,
    place: tuple[float, float],
    unit: str,
) -> None:
    """What keeps a step apart from the next, and says what it is."""
    width = axis.width(event.end - event.start)
    if width > 0:
        scene.rect(
            axis.at(event.start),
            place[0],
            width,
            place[1],
            stroke="ink" if len(event.step) == 2 else "paper",
            stroke_width=1 if width > 6 else 0.5,
            label=_says(schedule, event, unit),
        )


# The memory -----------------------------------------------------------------------------------


def _memory(
    scene: Scene, axis: _Axis, timeline: Timeline, top: float, rank: int | None, formula: bool
) -> None:
    """Activations that are held: of the fullest rank, of the chosen one, by the formula."""
    schedule, fullest = timeline.schedule, _fullest(timeline)
    bottom, peak = top + _MEMORY, timeline.peak_activations
    known = formula and schedule.name in ACTIVATIONS
    by_table = activation_formula(schedule.name, schedule.stages) if known else peak
    most = max(peak, by_table)

    def height(held: float) -> float:
        return bottom - _MEMORY * held / most

    curves = [("vermillion", fullest, 2.5)]
    if rank is not None and rank != fullest:
        curves.append(("blue", rank, 2.0))
    scene.text(0, top - 20, "Activations held", bold=True, size=13)
    x = 130.0
    for colour, of, thick in curves:
        words = f"rank {of}: at most {_peak(timeline, of)}"
        words += " (the fullest)" if of == fullest else ""
        scene.line((x, top - 20), (x + 24, top - 20), stroke=colour, stroke_width=thick)
        scene.text(x + 30, top - 20, words, fill="soft")
        x += 54 + text_width(words, 12)
    if known:
        scene.line((x, top - 20), (x + 24, top - 20), stroke="ink", dashed=True)
        words = f"by table 2: {ACTIVATIONS[schedule.name]} = {by_table}"
        scene.text(x + 30, top - 20, words, fill="soft")
        scene.line((LEFT, height(by_table)), (RIGHT, height(by_table)), stroke="ink", dashed=True)
    step = next(step for step in (1, 2, 5, 10, 20, 50) if most / step <= 6)
    for held in range(0, most + 1, step):
        y = height(held)
        scene.line((LEFT, y), (RIGHT, y), stroke_width=1.2 if held == 0 else 0.5)
        scene.text(LEFT - 8, y, str(held), size=11, fill="soft", anchor="end")
    for colour, of, thick in reversed(curves):
        scene.line(*_stairs(axis, timeline, of, height), stroke=colour, stroke_width=thick)


def _stairs(axis: _Axis, timeline: Timeline, rank: int, height) -> list[tuple[float, float]]:
    """Corners of the curve of what a rank holds, from the start to the end."""
    points, held = [(axis.at(0), height(0))], 0
    for time, now in dict(timeline.live(rank)).items():  # of one moment, what holds after it
        if now != held:
            points += [(axis.at(time), height(held)), (axis.at(time), height(now))]
        held = now
    return [*points, (axis.at(timeline.end), height(held))]
