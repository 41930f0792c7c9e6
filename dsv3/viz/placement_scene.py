"""Load of each GPU before and after busy experts get copies: the picture of a plan (TR 3.4).

On the left each expert is there once, in order; on the right the plan's replicas. A bar is a GPU,
a piece of it an expert's load there. Experts with copies have a colour, the same on both sides, so
one can see a heavy piece come apart. Below, what more replicas would bring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dsv3.parallel.replicas import Plan
from dsv3.viz.scene import Scene, text_width

WIDTH, HEIGHT = 920, 214  # of the page, of the bars
LEFT, PANEL, GAP = 44, 414, 48  # axis, width of a side, between the sides
TOP = 92
# By load, the heaviest first; the rest paler.
PALETTE = ("sky", "orange", "green", "yellow", "purple", "blue", "vermillion")
STYLES = {"hierarchical": ("blue", False), "global": ("orange", True)}
Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class _Side:
    """One side of the picture.

    name, left: what it shows and where it begins; loads: of each expert; held: experts of each
    GPU; share: of an expert's load that one copy of it has; copies: of each expert, in the plan.
    """

    name: str
    left: float
    loads: Sequence[float]
    held: Sequence[Sequence[int]]
    share: Sequence[float]
    copies: Sequence[int]

    def part(self, expert: int) -> float:
        """Load of one copy."""
        return self.loads[expert] * self.share[expert]

    @property
    def totals(self) -> list[float]:
        return [sum(map(self.part, gpu)) for gpu in self.held]

    @property
    def ratio(self) -> float:
        """max/mean."""
        return max(self.totals) * len(self.held) / sum(self.totals)


def placement_scene(
    loads: Sequence[float],
    plan: Plan,
    *,
    groups: int = 1,
    nodes: int = 1,
    policy: str = "",
    curves: Curves | None = None,
) -> Scene:
    """loads: of each expert; groups, nodes: of neighbouring experts, of neighbouring GPUs; policy:
    of the plan, "" where it does not matter; curves: policy -> (replicas, max/mean), drawn below.
    """
    before, after = sides = _sides(loads, plan)
    scene = Scene(WIDTH, TOP + HEIGHT + (216 if curves else 78), _alt(before, after, policy))
    scene.text(0, 12, _headline(before, after), bold=True, size=14)
    scene.text(0, 34, _second(plan, len(loads), groups, nodes, policy), fill="soft")
    most, looks = max(max(side.totals) for side in sides), _looks(loads)
    for side in sides:
        _bars(scene, side, most, looks, len(loads) // groups)
        _axis(scene, side, most, nodes)
    _copies(scene, after, looks)
    if curves:
        _curves(scene, curves, len(plan.experts), policy)
    return scene


def in_order(experts: int, gpus: int) -> list[tuple[int, ...]]:
    """Each expert once, neighbours together, as evenly in number as can be: experts by GPU."""
    each, more = divmod(experts, gpus)
    starts = [gpu * each + min(gpu, more) for gpu in range(gpus + 1)]
    return [tuple(range(start, end)) for start, end in pairwise(starts)]


def _sides(loads: Sequence[float], plan: Plan) -> tuple[_Side, _Side]:
    copies = [plan.experts.count(expert) for expert in range(len(loads))]
    once, held = in_order(len(loads), plan.gpus), [plan.on(gpu) for gpu in range(plan.gpus)]
    shares = [1 / count for count in copies]
    return (
        _Side("before: each expert once, in order", LEFT, loads, once, [1.0] * len(loads), copies),
        _Side("after: by the plan", LEFT + PANEL + GAP, loads, held, shares, copies),
    )


# In words -------------------------------------------------------------------------------------


def _headline(before: _Side, after: _Side) -> str:
    replicas = sum(map(len, after.held))
    return (
        f"{replicas} replicas of {len(after.loads)} experts on {len(after.held)} GPUs: the busiest "
        f"GPU has {before.ratio:.3f} times the mean before, {after.ratio:.3f} after"
    )


def _second(plan: Plan, experts: int, groups: int, nodes: int, policy: str) -> str:
    each = len(plan.experts) // plan.gpus
    words = f"{each} {'replica' if each == 1 else 'replicas'} on each GPU"
    if policy:
        words = f"{policy}: {words}"
    if groups > 1 and nodes > 1 and policy != "global":
        size, own = experts // groups, len(plan.experts) // nodes
        by_node = [
            sorted({expert // size for expert in plan.experts[node * own : (node + 1) * own]})
            for node in range(nodes)
        ]
        words += ", groups " + "; ".join(
            f"{', '.join(map(str, held))} on node {node}" for node, held in enumerate(by_node)
        )
    return words if text_width(words, 12) <= WIDTH else words[:120].rpartition(" ")[0] + " …"


def _alt(before: _Side, after: _Side, policy: str) -> str:
    by_gpu = ", ".join(map(_number, after.totals[:16])) + " …" * (len(after.totals) > 16)
    way = f", {policy}" if policy else ""
    return f"{_headline(before, after)}{way}. Loads of the GPUs after: {by_gpu}."


def _number(load: float) -> str:
    return f"{load:.4g}" if load < 1000 else f"{load:,.0f}"


# The bars -------------------------------------------------------------------------------------


def _looks(loads: Sequence[float]) -> dict[int, tuple[str, float | None, str]]:
    """Expert -> fill, opacity and colour of the text, by its place among the loads."""
    looks = {}
    for place, expert in enumerate(sorted(range(len(loads)), key=lambda expert: -loads[expert])):
        paler, number = divmod(place, len(PALETTE))
        fill = PALETTE[number]
        on_it = "white" if fill in ("blue", "vermillion") else "black"
        looks[expert] = (fill, 0.45, "ink") if paler % 2 else (fill, None, on_it)
    return looks


def _bars(scene: Scene, side: _Side, most: float, looks: dict, size: int) -> None:
    """most: load of the highest bar; size: experts of a group."""
    pitch, bottom = PANEL / len(side.held), TOP + HEIGHT
    width = 0.8 * pitch
    named = width >= text_width(str(len(side.loads) - 1), 10)
    level = bottom - HEIGHT * sum(side.totals) / len(side.totals) / most
    words = []
    for gpu, held in enumerate(side.held):
        x, y = side.left + (gpu + 0.1) * pitch, bottom
        for expert in held:
            part, copies = side.part(expert), side.copies[expert]
            tall = HEIGHT * part / most
            y -= tall
            fill, opacity, ink = looks[expert] if copies > 1 else ("pale", None, "ink")
            label = f"expert {expert} of group {expert // size} on GPU {gpu}: {_number(part)}"
            if side.share[expert] < 1:
                label += f", one of {copies} copies of {_number(side.loads[expert])}"
            scene.rect(
                x,
                y,
                width,
                tall,
                fill=fill,
                opacity=opacity,
                stroke="line" if copies < 2 else "paper",
                label=label,
            )
            if named and tall >= 11:
                middle = y + tall / 2
                if abs(middle - level) < 7 and tall >= 30:  # out of the way of the mean's line
                    middle = level + (10 if level - y < tall / 2 else -10)
                words.append((x + width / 2, middle, str(expert), ink))
    scene.line((side.left, level), (side.left + PANEL, level), stroke="ink", dashed=True)
    for x, y, word, ink in words:
        scene.text(x, y, word, size=10, anchor="middle", fill=ink)


def _axis(scene: Scene, side: _Side, most: float, nodes: int) -> None:
    """What stands around the bars: their totals, names of GPUs and nodes, the mean."""
    left, pitch, bottom = side.left, PANEL / len(side.held), TOP + HEIGHT
    scene.text(left, 58, side.name, bold=True, size=13)
    scene.text(left + PANEL, 58, f"max/mean {side.ratio:.3f}", anchor="end", bold=True,
               fill="vermillion")  # fmt: skip
    scene.line((left, bottom), (left + PANEL, bottom), stroke_width=1.2)
    for gpu, total in enumerate(side.totals):
        middle, tall = left + (gpu + 0.5) * pitch, HEIGHT * total / most
        on, word = total >= max(side.totals) * (1 - 1e-9), _number(total)
        if on:
            scene.rect(middle - 0.4 * pitch - 1.5, bottom - tall - 1.5, 0.8 * pitch + 3,
                       tall + 1.5, stroke="vermillion", stroke_width=2)  # fmt: skip
        wide = text_width(word, 10, bold=on)
        if on or wide < pitch:
            scene.rect(middle - wide / 2, bottom - tall - 16, wide, 13, fill="paper")
            scene.text(middle, bottom - tall - 9, word, size=10, anchor="middle", bold=on,
                       fill="vermillion" if on else "soft")  # fmt: skip
        if len(side.held) <= 16 or gpu % 8 == 0:
            scene.text(middle, bottom + 12, str(gpu), size=11, anchor="middle", fill="soft")
    if left == LEFT:
        level = bottom - HEIGHT * sum(side.totals) / len(side.totals) / most
        for place, name in ((level, "mean"), (bottom + 12, "GPU")):
            scene.text(left - 8, place, name, size=11, anchor="end", fill="soft")
    for node in range(nodes if nodes > 1 else 0):
        start, end = (left + (node + edge) * PANEL / nodes for edge in (0, 1))
        scene.line((start + 3, bottom + 23), (end - 3, bottom + 23), stroke="soft")
        scene.text((start + end) / 2, bottom + 33, f"node {node}", size=11, anchor="middle",
                   fill="soft")  # fmt: skip


def _copies(scene: Scene, side: _Side, looks: dict) -> None:
    """Which colour is which expert, and how many copies it has."""
    y, x = TOP + HEIGHT + 60.0, 0.0
    copied = [expert for expert in looks if side.copies[expert] > 1]
    if not copied:
        scene.text(0, y, "no expert has a copy", fill="soft")
    for expert in copied:
        fill, opacity, _ = looks[expert]
        words = f"expert {expert} × {side.copies[expert]}"
        if x + 30 + text_width(words, 12) > WIDTH - 30:
            scene.text(x, y, "…", fill="soft")
            break
        scene.rect(x, y - 5.5, 11, 11, fill=fill, opacity=opacity, stroke="line")
        scene.text(x + 16, y, words, fill="soft")
        x += 30 + text_width(words, 12)


# What more would bring ------------------------------------------------------------------------


def _curves(scene: Scene, curves: Curves, replicas: int, policy: str) -> None:
    top, tall = TOP + HEIGHT + 116.0, 62.0
    counts = sorted({count for curve in curves.values() for count, _ in curve})
    most = max(ratio for curve in curves.values() for _, ratio in curve)
    left, right = LEFT + 24, WIDTH - 24

    def at(count: int, ratio: float) -> tuple[float, float]:
        share = counts.index(count) / max(1, len(counts) - 1)
        return left + (right - left) * share, top + tall * (1 - (ratio - 1) / (most - 1 or 1))

    scene.text(0, top - 28, "max/mean by number of replicas", bold=True, size=13)
    x = 250.0
    for name in curves:
        colour, dashed = STYLES[name]
        scene.line((x, top - 28), (x + 24, top - 28), stroke=colour, stroke_width=2, dashed=dashed)
        scene.text(x + 30, top - 28, name, fill="soft", bold=name == policy)
        x += 54 + text_width(name, 12)
    for ratio in (1.0, most):
        scene.line((LEFT, at(counts[0], ratio)[1]), (WIDTH, at(counts[0], ratio)[1]),
                   stroke_width=0.5)  # fmt: skip
        scene.text(LEFT - 8, at(counts[0], ratio)[1], f"{ratio:.3f}", size=11, anchor="end",
                   fill="soft")  # fmt: skip
    for name, curve in curves.items():
        colour, dashed = STYLES[name]
        points = [at(count, ratio) for count, ratio in curve]
        scene.line(*points, stroke=colour, stroke_width=2, dashed=dashed)
        for (count, _), (x, y) in zip(curve, points):
            on = count == replicas and name == policy
            scene.circle(x, y, 5 if on else 3, fill=colour, stroke="ink" if on else None)
    for count in counts:
        x = at(count, 1)[0]
        words = ", ".join(
            f"{name} {ratio:.3f}" for name, curve in curves.items() for at_, ratio in curve
            if at_ == count
        )  # fmt: skip
        scene.text(x, top + tall + 15, str(count), size=11, anchor="middle",
                   fill="ink" if count == replicas else "soft", bold=count == replicas)  # fmt: skip
        half = min(24.0, (right - left) / max(1, len(counts) - 1) / 2)
        scene.rect(x - half, top - 8, 2 * half, tall + 32, rounded=3, key=f"replicas {count}",
                   chosen=count == replicas, label=f"{count} replicas: {words}")  # fmt: skip
