"""Chapter 7, drawn: what is cut up and shared out among ranks, a product or what training keeps.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig
from dsv3.viz.scene import Scene, text_width
from dsv3.viz.schematic import (
    SMALL,
    TEXT,
    WIDTH,
    Box,
    arrow,
    cells,
    headline,
    legend,
    lines,
    number,
    plus,
)

RANKS = ("blue", "orange")
SUM = "yellow"
STRONG = 0.35
Row = Sequence[int]
Matrix = Sequence[Row]

# One product ------------------------------------------------------------------------------------

X: Row = (2, 1)
FIRST: Matrix = ((2, -1, -2, 1), (-1, 3, 1, 0))
SECOND: Matrix = ((1, 2), (3, -1), (1, 1), (-1, 1))
_CELL, _HIGH = 30, 24  # of a value


def times(row: Row, matrix: Matrix) -> list[int]:
    """A row times a matrix."""
    return [sum(a * b for a, b in zip(row, column)) for column in zip(*matrix)]


def relu(row: Row) -> list[int]:
    """max(0, ·) of each value: the plainest non-linearity."""
    return [max(0, value) for value in row]


def add(*rows: Row) -> list[int]:
    """The sum of rows: what an all-reduce gives."""
    return [sum(column) for column in zip(*rows)]


@dataclass
class _Line:
    """A formula with its values, written from left to right around the height y."""

    scene: Scene
    x: float
    y: float

    def values(self, rows: Matrix, colour: str = "", name: str = "") -> Box:
        """A matrix with its name above it; without a colour it is only passing through."""
        edge = "ink" if colour == SUM else colour
        look = {"fill": colour, "opacity": STRONG, "stroke": edge} if colour else {}
        drawn = cells(
            self.scene,
            self.x,
            self.y - _HIGH * len(rows) / 2,
            [[number(value) for value in row] for row in rows],
            width=_CELL,
            height=_HIGH,
            size=TEXT,
            look=lambda row, column: look or {"fill": "paper", "stroke": "line"},
        )
        if name:
            self.scene.text(
                drawn.x, drawn.top[1] - 10, name, anchor="middle", size=SMALL, fill="soft"
            )
        self.x += drawn.width
        return drawn

    def sign(self, words: str, room: float = 20) -> None:
        self.scene.text(self.x + room / 2, self.y, words, anchor="middle")
        self.x += room

    def f(self) -> None:
        """The non-linearity, on an arrow."""
        arrow(self.scene, (self.x + 4, self.y), (self.x + 34, self.y), label="f")
        self.x += 38


def column_row_cut(x: Row = X, first: Matrix = FIRST, second: Matrix = SECOND) -> Scene:
    """y = f(x A) B with f = max(0, ·) on two ranks: A cut by columns and B by rows, one sum at
    the end. Below, A cut by rows: f needs whole sums, so there must be a sum before it too.

    x: two values; first: A, 2 by 4; second: B, 4 by 2.
    """
    _check(x, first, second)
    columns = [[row[2 * rank : 2 * rank + 2] for row in first] for rank in (0, 1)]
    seen = [times(x, part) for part in columns]
    parts = [times(relu(own), second[2 * rank : 2 * rank + 2]) for rank, own in enumerate(seen)]
    partial = [times(x[rank : rank + 1], first[rank : rank + 1]) for rank in (0, 1)]
    early = add(*map(relu, partial))
    whole = relu(times(x, first))
    scene = Scene(
        WIDTH,
        390,
        f"Two ranks, x = {_row(x)}. Above, each has two columns of A and the two rows of B that "
        f"belong to them. Negatives of x A are set to 0; the ranks get {_row(parts[0])} and "
        f"{_row(parts[1])}, and one sum gives {_row(add(*parts))}. Below, each has one row of A: "
        f"their partial sums {_row(partial[0])} and {_row(partial[1])} with negatives set to 0 "
        f"add up to {_row(early)}, but the negatives of the whole sum set to 0 are {_row(whole)}.",
    )
    headline(scene, "A by columns, B by rows: one sum, at the end")
    scene.text(WIDTH, 10, "y = f(x A) B,  f = max(0, ·)", anchor="end", fill="soft")
    for rank, y in enumerate((78, 162)):
        low = 2 * rank
        line = _begun(scene, rank, y)
        line.values([x], name="x")
        line.sign("·")
        line.values(columns[rank], RANKS[rank], f"A, columns {low} and {low + 1}")
        line.sign("=")
        line.values([seen[rank]])
        line.f()
        line.values([relu(seen[rank])])
        line.sign("·")
        line.values(second[low : low + 2], RANKS[rank], f"B, rows {low} and {low + 1}")
        line.sign("=")
        line.values([parts[rank]], RANKS[rank])
        at = (line.x + 58, 120)
        arrow(scene, (line.x + 4, y), (at[0], y), (at[0], 109 if rank == 0 else 131))
    summed = plus(scene, *at)
    line = _Line(scene, at[0] + 42, 120)
    arrow(scene, summed.right, (line.x - 3, 120))
    line.values([add(*parts)], SUM, "y")
    scene.text(summed.x, 190, "all-reduce", anchor="middle", size=SMALL, fill="soft")
    scene.line((0, 214), (WIDTH, 214), stroke="line")
    headline(scene, "A by rows: f comes too early", 238)
    for rank, y in enumerate((292, 362)):
        line = _begun(scene, rank, y)
        line.values([x[rank : rank + 1]], name=f"x, value {rank}")
        line.sign("·")
        line.values(first[rank : rank + 1], RANKS[rank], f"A, row {rank}")
        line.sign("=")
        line.values([partial[rank]], name="partial sums" if rank == 0 else "")
        line.f()
        line.values([relu(partial[rank])], RANKS[rank])
        at = (line.x + 40, 327)
        arrow(scene, (line.x + 4, y), (at[0], y), (at[0], 316 if rank == 0 else 338))
    summed = plus(scene, *at)
    line = _Line(scene, at[0] + 42, 327)
    arrow(scene, summed.right, (line.x - 3, 327))
    got = line.values([early], "vermillion")
    _under(scene, got, f"f of the sum is {_row(whole)}")
    return scene


def _check(x: Row, first: Matrix, second: Matrix) -> None:
    if (len(x), len(first), len(second)) != (2, 2, 4) or {*map(len, first)} != {4}:
        raise ValueError("x of 2 values, a first matrix of 2 by 4 and a second of 4 by 2")


def _begun(scene: Scene, rank: int, y: float) -> _Line:
    scene.text(0, y, f"rank {rank}", bold=True)
    return _Line(scene, 58, y)


def _under(scene: Scene, what: Box, words: str) -> None:
    scene.text(what.x, what.bottom[1] + 15, words, anchor="middle", size=SMALL, fill="soft")


def _row(values: Row) -> str:
    return "(" + ", ".join(number(value) for value in values) + ")"


def where_bias_goes(
    bias: Row = (10, 20), x: Row = X, first: Matrix = FIRST, second: Matrix = SECOND
) -> Scene:
    """A bias added on every rank before the sum, which counts it once per rank, and after it.

    The product is that of ``column_row_cut``; bias: two values.
    """
    _check(x, first, second)
    hidden = relu(times(x, first))
    parts = [times(hidden[2 * rank : 2 * rank + 2], second[2 * rank :][:2]) for rank in (0, 1)]
    wrong, right = add(*(add(part, bias) for part in parts)), add(*parts, bias)
    scene = Scene(
        WIDTH,
        350,
        f"Two ranks with partial sums {_row(parts[0])} and {_row(parts[1])}, and a bias "
        f"{_row(bias)}. Above, each rank adds the bias and then both are summed: {_row(wrong)}, "
        f"with the bias in it twice. Below, they are summed first and the bias is added once: "
        f"{_row(right)}.",
    )
    headline(scene, "Before the sum: every rank adds it")
    for rank, y in enumerate((52, 118)):
        line = _begun(scene, rank, y)
        line.values([parts[rank]], RANKS[rank], "partial sums" if rank == 0 else "")
        line.sign("+")
        line.values([bias], "purple", "bias" if rank == 0 else "")
        line.sign("=")
        line.values([add(parts[rank], bias)], RANKS[rank])
        wide = (line.x + 4, line.x + 50)
        arrow(scene, (wide[0], y), (wide[1], y), (wide[1], 74 if rank == 0 else 96), at=0)
    summed = plus(scene, wide[1], 85)
    line = _Line(scene, wide[1] + 46, 85)
    arrow(scene, summed.right, (line.x - 3, 85))
    got = line.values([wrong], "vermillion")
    _under(scene, got, "the bias is in it twice")
    scene.line((0, 160), (WIDTH, 160), stroke="line")
    headline(scene, "After the sum: it is added once", 184)
    for rank, y in enumerate((226, 292)):
        line = _begun(scene, rank, y)
        line.values([parts[rank]], RANKS[rank], "partial sums" if rank == 0 else "")
        arrow(scene, (line.x + 4, y), (wide[1], y), (wide[1], 248 if rank == 0 else 270), at=0)
    summed = plus(scene, wide[1], 259)
    line = _Line(scene, wide[1] + 46, 259)
    arrow(scene, summed.right, (line.x - 3, 259))
    line.values([add(*parts)], SUM, "all-reduce")
    line.sign("+")
    line.values([bias], "purple", "bias")
    line.sign("=")
    line.values([right], "green", "y")
    lines(
        scene,
        0,
        330,
        "The same holds for the residual and for anything else that every rank has whole.",
        fill="soft",
        size=SMALL,
    )
    return scene


# What training keeps ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What training keeps of each parameter: ``bytes`` of it, in numbers of ``dtype``."""

    name: str
    dtype: str
    bytes: float
    colour: str


PLAIN = (
    Kept("weights", "BF16", 2, "blue"),
    Kept("gradients", "BF16", 2, "orange"),
    Kept("master weights", "FP32", 4, "green"),
    Kept("two moments", "2 × FP32", 8, "purple"),
)
GPU = 80e9  # bytes


def what_one_gpu_cannot_hold(
    parameters: float | None = None, kept: Sequence[Kept] = PLAIN, gpu: float = GPU
) -> Scene:
    """What plain mixed-precision training keeps, laid out on GPUs of 80 GB one after the other.

    parameters: those of the 671B model by default; gpu: bytes of one.
    """
    if parameters is None:
        weights = layout(ModelConfig.deepseek_v3())
        parameters = sum(t.numel for t in weights if t.part == "main" and not t.scale_of)
    each = sum(part.bytes for part in kept)
    needed = each * parameters / gpu
    if not 1 < needed <= 270:
        raise ValueError(f"something for 2 to 270 GPUs, not {number(needed)}")
    columns, left, wide, high = 27, 0, WIDTH / 27, 24
    rows = -(-needed // columns)
    top = 150
    scene = Scene(WIDTH, top + rows * (high + 6) + 22, _gpus_alt(parameters, kept, gpu, needed))
    billions = number(parameters / 1e9)
    headline(
        scene,
        f"{billions} billion parameters × {number(each)} bytes = {each * parameters / 1e12:.1f} TB",
    )
    at = 0.0
    for part in kept:
        share = part.bytes / each * WIDTH
        scene.rect(
            at,
            34,
            share,
            66,
            fill=part.colour,
            opacity=STRONG,
            stroke=part.colour,
            stroke_width=1.6,
        )
        words = (
            part.name,
            f"{number(part.bytes)} bytes, {part.dtype}",
            f"{part.bytes * parameters / 1e12:.2f} TB",
        )
        for line, text in enumerate(words):
            bold = line == 0 and text_width(text, SMALL, bold=True) < share - 4
            scene.text(at + share / 2, 50 + 17 * line, text, anchor="middle", size=SMALL, bold=bold)
        at += share
    scene.text(0, 128, f"on GPUs of {number(gpu / 1e9)} GB: {needed:.1f} of them", bold=True)
    scene.text(WIDTH, 128, "before the first activation", anchor="end", fill="soft")
    for place in range(-int(-needed // 1)):
        x, y = left + wide * (place % columns), top + (high + 6) * (place // columns)
        scene.rect(x, y, wide - 5, high, fill="paper", stroke="line")
        begun = 0.0
        for part in kept:
            ended = begun + part.bytes * parameters / gpu
            start, end = max(begun, place), min(ended, place + 1)
            if start < end:
                scene.rect(
                    x + (start - place) * (wide - 5),
                    y,
                    (end - start) * (wide - 5),
                    high,
                    fill=part.colour,
                    opacity=0.6,
                )
            begun = ended
    y = top + rows * (high + 6) + 8
    scene.text(0, y, "each box is one GPU, filled in the order of the bar", fill="soft", size=SMALL)
    return scene


def _gpus_alt(parameters, kept, gpu, needed) -> str:
    parts = "; ".join(
        f"{part.name} in {part.dtype}, {number(part.bytes)} bytes each, "
        f"{part.bytes * parameters / 1e12:.2f} TB"
        for part in kept
    )
    return (
        f"A bar of what training keeps of {number(parameters / 1e9)} billion parameters: {parts}. "
        f"Below, GPUs of {number(gpu / 1e9)} GB in rows, filled with it: {needed:.1f} are full."
    )


ZERO = ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def sharded(stage: int, kept: Sequence[Kept] = PLAIN) -> list[bool]:
    """Which parts a ZeRO stage shares out: from 1 on the optimizer's, 2 gradients, 3 weights."""
    first = {"weights": 3, "gradients": 2}
    return [stage >= first.get(part.name, 1) for part in kept]


def zero_shards(ranks: int = 4, kept: Sequence[Kept] = PLAIN) -> Scene:
    """What each rank keeps of every parameter in plain data parallelism and in ZeRO-1, 2 and 3."""
    if not 2 <= ranks <= 4:
        raise ValueError(f"2 to 4 ranks, not {ranks}")
    each = sum(part.bytes for part in kept)
    stages = [
        sum(part.bytes / (ranks if cut else 1) for part, cut in zip(kept, sharded(stage, kept)))
        for stage in range(len(ZERO))
    ]
    left, room, tall, top = 74, 602 / ranks, 62, 26
    unit = (room - 14) / each
    scene = Scene(
        WIDTH,
        top + tall * len(ZERO) + 22,
        f"Bars of what each of {ranks} ranks keeps: {', '.join(part.name for part in kept)}. "
        + "; ".join(f"{name}: {number(size)} bytes" for name, size in zip(ZERO, stages))
        + " per parameter and rank.",
    )
    for rank in range(ranks):
        scene.text(left + room * (rank + 0.5) - 7, 10, f"rank {rank}", anchor="middle", bold=True)
    scene.text(WIDTH, 10, "per parameter", anchor="end", size=SMALL, fill="soft")
    legend(
        scene,
        left,
        scene.height - 8,
        [(part.colour, 0.6, f"{part.name}: {number(part.bytes)} bytes") for part in kept],
    )
    sent = (
        "gradients: all-reduce",
        "gradients: reduce-scatter; then new weights: all-gather",
        "the same, and no rank keeps more gradients than it needs",
        "weights are gathered for every forward and backward, and dropped",
    )
    for stage, (name, size, words) in enumerate(zip(ZERO, stages, sent)):
        y = top + tall * stage
        scene.text(0, y + 15, name, bold=True)
        for rank in range(ranks):
            _bar(scene, left + room * rank, y, unit, kept, sharded(stage, kept), rank, ranks)
        scene.text(WIDTH, y + 15, f"{number(size)} bytes", anchor="end", bold=True)
        scene.text(left, y + 42, words, size=SMALL, fill="soft")
    return scene


def _bar(scene: Scene, x, y, unit, kept, cut, rank: int, ranks: int) -> None:
    """All that is kept of a parameter; of what is shared out, this rank's share in colour."""
    for part, shared in zip(kept, cut):
        wide = unit * part.bytes
        scene.rect(x, y, wide, 30, fill="pale", stroke="line")
        own = wide / ranks if shared else wide
        at = x + own * rank if shared else x
        scene.rect(at, y, own, 30, fill=part.colour, opacity=0.6, stroke=part.colour)
        x += wide
