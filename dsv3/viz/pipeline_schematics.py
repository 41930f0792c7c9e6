"""Chapter 7, drawn: a model cut by depth, who has which stage, and what overlaps.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed. Whole schedules
with their bubbles and memory are drawn in ``dsv3.viz.pipeline_scene``, in the same colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dsv3.config import ModelConfig
from dsv3.costs import stage_layers
from dsv3.parallel.schedules import SCHEDULES, Schedule, one_f_one_b
from dsv3.parallel.timeline import Durations, Timeline, simulate
from dsv3.viz.pipeline_scene import COLOURS
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, WIDTH, Box, arrow, box, headline, legend, number

RANKS = ("blue", "orange", "green", "purple")
BUBBLE = ("vermillion", 0.25)

# Cut by depth -----------------------------------------------------------------------------------


def pipeline_cut(
    ranks: int = 4,
    micro_batches: int = 4,
    durations: Durations | None = None,
    config: ModelConfig | None = None,
) -> Scene:
    """The model cut by depth, with what the stages send each other; below, how long ranks wait
    with one micro-batch and with several, in the order of 1F1B.

    config: the 671B model's by default, cut as ``costs.stage_layers`` does.
    """
    if not 2 <= ranks <= 4 or not 1 <= micro_batches <= 4:
        raise ValueError(f"2 to 4 ranks and 1 to 4 micro-batches, not {ranks}, {micro_batches}")
    config, durations = config or ModelConfig.deepseek_v3(), durations or Durations()
    stages = stage_layers(config, ranks)
    times = [simulate(one_f_one_b(ranks, n), durations) for n in sorted({1, micro_batches})]
    row, top = 28, 194
    scene = Scene(
        WIDTH,
        top + ranks * row + 58,
        f"The model cut by depth into {ranks} stages, one for each rank: "
        + "; ".join(_stage_words(config, stages, rank)[0] for rank in range(ranks))
        + ". States go to the next stage, gradients come back. Below, rows of ranks over time. "
        + " ".join(
            f"With {_batches(time)} each rank waits {_waits(time)} of the time." for time in times
        ),
    )
    _stages(scene, config, stages)
    longer = number(durations.backward / durations.forward)
    unit = (WIDTH - 60 - 46) / sum(time.end for time in times)
    left = 60.0
    for rank in range(ranks):
        scene.text(0, top + row * (rank + 0.5), f"rank {rank}", size=SMALL)
    for time in times:
        scene.text(left, top - 14, f"{_batches(time)}: {_waits(time)} waiting", bold=True)
        _times(scene, left, top, unit, row, time)
        left += unit * time.end + 46
    legend(
        scene,
        60,
        scene.height - 12,
        [
            (COLOURS["F"], 0.6, "forward F"),
            (COLOURS["B"], 0.6, f"backward B, {longer} × as long"),
            (*BUBBLE, "the bubble: the rank waits"),
        ],
    )
    return scene


def _batches(time: Timeline) -> str:
    count = time.schedule.micro_batches
    return f"{count} micro-batch{'es' * (count > 1)}"


def _waits(time: Timeline) -> str:
    return f"{100 * time.bubble / time.end:.0f}%"


def _stage_words(config: ModelConfig, stages: Sequence[range], rank: int) -> list[str]:
    """What a stage consists of, in lines."""
    layers, depth = stages[rank], config.num_hidden_layers
    own = [layer for layer in layers if layer < depth]
    words = [f"layers {own[0]} to {own[-1]}"]
    if rank == 0:
        words.append("and embedding")
    if rank == len(stages) - 1:
        words.append("head and MTP" if len(own) < len(layers) else "and head")
    return words


def _stages(scene: Scene, config: ModelConfig, stages: Sequence[range]) -> None:
    ranks = len(stages)
    room = WIDTH / ranks
    wide = room - 74
    shape = f"(b, s, {number(config.hidden_size)})"
    boxes = []
    for rank in range(ranks):
        words = _stage_words(config, stages, rank)
        x = wide / 2 + rank * (WIDTH - wide) / (ranks - 1)
        boxes.append(box(scene, x, 84, wide, 76, f"stage {rank}", *words, colour=RANKS[rank]))
    headline(scene, "Cut by depth")
    for before, after in pairwise(boxes):
        start, end = before.right[0] + 4, after.left[0] - 4
        arrow(scene, (start, 68), (end, 68))
        arrow(scene, (end, 100), (start, 100), dashed=True)
    middle = (boxes[0].right[0] + boxes[1].left[0]) / 2
    scene.text(middle, 34, f"states {shape}", anchor="middle", size=SMALL, fill="soft")
    scene.line((middle, 42), (middle, 62), stroke="line")
    scene.text(middle, 138, f"gradients {shape}", anchor="middle", size=SMALL, fill="soft")
    scene.line((middle, 106), (middle, 130), stroke="line")


def _times(scene: Scene, left: float, top: float, unit: float, row: float, time: Timeline) -> None:
    """Rows of ranks: what is computed, and in red what is left over."""
    for rank, events in enumerate(time.events):
        y = top + row * rank + 2
        scene.rect(left, y, unit * time.end, row - 4, fill=BUBBLE[0], opacity=BUBBLE[1])
        for event in events:
            x, wide = left + unit * event.start, unit * (event.end - event.start)
            (work,) = event.step
            for fill, opacity, stroke in (("paper", None, None), (COLOURS[work.kind], 0.6, "ink")):
                scene.rect(x, y, wide, row - 4, fill=fill, opacity=opacity, stroke=stroke)
            scene.text(x + wide / 2, y + row / 2 - 2, str(work.micro), anchor="middle", size=SMALL)
    y = top + row * len(time.events) + 6
    arrow(scene, (left, y), (left + unit * time.end, y), colour="soft", width=1.2)
    scene.text(left, y + 12, "time", size=SMALL, fill="soft")


# Who has which stage ----------------------------------------------------------------------------


def placed(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """(direction, stage) of all that each rank has, read from its order of work."""
    return [
        sorted({(work.direction, work.stage) for step in order for work in step})
        for order in schedule.orders
    ]


def stage_placement(
    ranks: int = 4, names: Sequence[str] = ("1F1B", "DualPipe", "DualPipeV")
) -> Scene:
    """Which stages the ranks have under each schedule, and the way of a micro-batch."""
    if not 2 <= ranks <= 4 or ranks % 2:
        raise ValueError(f"2 or 4 ranks, not {ranks}")
    schedules = [SCHEDULES[name](ranks, 2 * ranks) for name in names]
    tall, left = 122, 196
    room = (WIDTH - left) / ranks
    scene = Scene(
        WIDTH, tall * len(names) + 20, " ".join(_placement_alt(schedule) for schedule in schedules)
    )
    for rank in range(ranks):
        scene.text(left + room * (rank + 0.5), 8, f"rank {rank}", anchor="middle", bold=True)
    for place, schedule in enumerate(schedules):
        y = 30 + tall * place
        scene.line((0, y - 8), (WIDTH, y - 8), stroke="line")
        held = placed(schedule)
        scene.text(0, y + 14, schedule.name, bold=True, size=14)
        words = (
            f"{schedule.stages} stages on {ranks} ranks",
            f"each has {len(held[0])} of {schedule.stages}"
            + (", so all twice" if len(held[0]) * ranks > schedule.stages else ""),
            "in at both ends" if schedule.directions == 2 else "in at one end",
        )
        for line, text in enumerate(words):
            scene.text(0, y + 36 + 17 * line, text, size=SMALL, fill="soft")
        _ways(scene, left, y, room, schedule)
    return scene


def _ways(scene: Scene, left: float, y: float, room: float, schedule: Schedule) -> None:
    """The stages of each rank, joined in the order in which micro-batches pass them."""
    held = placed(schedule)
    folded = schedule.directions == 1 and len(held[0]) == 2
    wide, high = room - 44, 36
    boxes: dict[tuple[int, int], Box] = {}
    for rank, own in enumerate(held):
        for line, (direction, stage) in enumerate(own):
            colour = "orange" if direction or line else "blue"
            at = y + (26 + 50 * line if len(own) > 1 else 50)
            x = left + room * (rank + 0.5)
            boxes[direction, stage] = box(scene, x, at, wide, high, f"stage {stage}", colour=colour)
    for direction in range(schedule.directions):
        for stage in range(schedule.stages - 1):
            one, two = boxes[direction, stage], boxes[direction, stage + 1]
            if abs(one.x - two.x) < 1:
                arrow(scene, one.bottom, two.top)
            elif one.x < two.x:
                arrow(scene, one.right, two.left)
            else:
                arrow(scene, one.left, two.right)
        first = boxes[direction, 0]
        inward = 1 if first.x < WIDTH / 2 + left / 2 or folded else -1
        edge = first.left if inward == 1 else first.right
        arrow(scene, (edge[0] - 20 * inward, first.y), edge)


def _placement_alt(schedule: Schedule) -> str:
    ranks = "; ".join(
        f"rank {rank}: "
        + " and ".join(
            f"{stage}" + " of the other direction" * direction for direction, stage in own
        )
        for rank, own in enumerate(placed(schedule))
    )
    return f"{schedule.name}, stages by rank: {ranks}."


# Computing and communicating at once ------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of a chunk. stream: 0 computes, 1 communicates; kind: F, B, or W for gradients of
    weights; after: the parts of this picture that it needs."""

    name: str
    kind: str
    stream: int
    time: float
    after: tuple[str, ...] = ()


# A forward chunk and a backward chunk of two micro-batches, in the order of TR figure 4, with as
# much communication as computation (TR 3.2.1: about 1 : 1).
PARTS = (
    Part("MLP B", "B", 0, 1.0),
    Part("MLP W", "W", 0, 1.0, ("MLP B",)),
    Part("MLP F", "F", 0, 1.0, ("dispatch F",)),
    Part("attention B", "B", 0, 1.0, ("dispatch B",)),
    Part("attention W", "W", 0, 1.0, ("attention B",)),
    Part("attention F", "F", 0, 1.0, ("combine F",)),
    Part("dispatch F", "F", 1, 1.5),
    Part("dispatch B", "B", 1, 1.5, ("MLP B",)),
    Part("combine F", "F", 1, 1.5, ("MLP F",)),
    Part("combine B", "B", 1, 1.5, ("attention B",)),
)


def streams(parts: Sequence[Part] = PARTS) -> dict[str, tuple[float, float]]:
    """(start, end) of each part: as soon as its stream is free and what it needs is there."""
    waiting = [[part for part in parts if part.stream == stream] for stream in (0, 1)]
    free, times = [0.0, 0.0], {}
    while any(waiting):
        ready = [line for line in waiting if line and all(name in times for name in line[0].after)]
        if not ready:
            raise ValueError(f"{waiting[0][0].name} and {waiting[1][0].name} wait for each other")
        part = ready[0].pop(0)
        start = max([free[part.stream], *(times[name][1] for name in part.after)])
        times[part.name] = start, start + part.time
        free[part.stream] = start + part.time
    return times


def overlap(parts: Sequence[Part] = PARTS) -> Scene:
    """A forward and a backward chunk of two micro-batches, whose parts take turns so that one
    computes while the other's tokens are under way; below, one after the other."""
    times = streams(parts)
    end, serial = max(end for _, end in times.values()), sum(part.time for part in parts)
    left, high, gap = 112, 40, 54
    unit = (WIDTH - left) / serial
    scene = Scene(
        WIDTH,
        316,
        "Two streams side by side. "
        + " ".join(
            f"{('Computing', 'Communicating')[stream]}: "
            + ", ".join(part.name for part in parts if part.stream == stream)
            + "."
            for stream in (0, 1)
        )
        + f" Together they take {number(end)} units of time, one after the other {number(serial)}.",
    )
    headline(scene, "Overlapped: one chunk computes while the other's tokens travel")
    places = {}
    for stream, words in enumerate(("computing", "communicating")):
        y = 32 + stream * (high + gap)
        scene.text(0, y + high / 2, words)
        for part in (part for part in parts if part.stream == stream):
            start, stop = times[part.name]
            places[part.name] = _part(
                scene, left + unit * start, y, unit * (stop - start), high, part
            )
    for part in parts:
        for name in part.after:
            _needs(scene, places[name], places[part.name])
    y = 238
    headline(scene, "One after the other", y - 24)
    scene.text(0, y + high / 2, "everything")
    order = sorted(parts, key=lambda part: times[part.name])
    x = float(left)
    for part in [part for kind in ("B W", "F") for part in order if part.kind in kind]:
        _part(scene, x, y, unit * part.time, high, part)
        x += unit * part.time
    scene.text(left + unit * end + 16, 32 + high + gap / 2, _units(end), bold=True)
    scene.text(WIDTH, y - 24, _units(serial), anchor="end", bold=True)
    x = legend(
        scene,
        left,
        304,
        [
            (COLOURS["F"], 0.6, "forward, one micro-batch"),
            (COLOURS["B"], 0.6, "backward, another"),
            (COLOURS["W"], 0.6, "its gradients of weights"),
        ],
    )
    scene.rect(x + 22, 298, 12, 12, stroke="ink")
    scene.rect(x + 24.5, 300.5, 7, 7, stroke="ink", stroke_width=0.6)
    scene.text(x + 40, 304, "on the network", fill="soft", size=SMALL)
    return scene


def _units(time: float) -> str:
    return f"{number(time)} units of time"


def _part(scene: Scene, x: float, y: float, width: float, high: float, part: Part) -> Box:
    scene.rect(x, y, width, high, fill=COLOURS[part.kind], opacity=0.6, stroke="ink")
    if part.stream:  # a second line: it travels
        scene.rect(x + 3, y + 3, width - 6, high - 6, stroke="ink", stroke_width=0.6)
    name, kind = part.name.split()
    shown = {"attention": "attn"}.get(name, name)
    for line, text in enumerate((shown, kind)):
        scene.text(
            x + width / 2, y + high / 2 - 7 + 14 * line, text, anchor="middle", size=SMALL,
            bold=line == 1,
        )  # fmt: skip
    return Box(x + width / 2, y + high / 2, width, high)


def _needs(scene: Scene, one: Box, two: Box) -> None:
    """From where a part ends to where one on the other stream begins that needs it."""
    if abs(one.y - two.y) < 1:
        return
    start, end = one.x + one.width / 2 - 8, two.x - two.width / 2 + 8
    edge = one.bottom[1] if one.y < two.y else one.top[1]
    tip = two.top[1] if one.y < two.y else two.bottom[1]
    arrow(scene, (start, edge), (end, tip), width=1.4)
