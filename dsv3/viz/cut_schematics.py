"""Chapter 7, drawn: a product that two ranks share out, with every value, right and wrong.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, TEXT, WIDTH, Box, arrow, cells, headline, lines, number, plus

RANKS = ("blue", "orange")
SUM = "yellow"
STRONG = 0.35
Row = Sequence[int]
Matrix = Sequence[Row]

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

    x: two values; first: A, 2 by 4; second: B, 4 by 2; of small whole numbers.
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
