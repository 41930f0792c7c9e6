"""Parts of schematics: boxes with shapes, arrows, grids of cells, brackets, legends.

A chapter draws a mechanism before it writes of it. Its pictures are put together from these few
parts, so that a box looks like a box in all of them, and a wide arrow never means something new.
Each part is a function that adds marks to a ``Scene``; ``viz.draw`` shows the result. Lengths are
in pixels, y grows downwards, a box is given by its centre.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dsv3.viz.scene import Scene, text_width

WIDTH = 760  # of a page, unless a picture needs less
SMALL, TEXT, HEAD = 11, 12, 14  # sizes of letters
TINT = 0.2  # of a box's colour inside its border

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A place on the page by its centre, with the middles of its sides for arrows."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> Point:
        return self.x - self.width / 2, self.y

    @property
    def right(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def top(self) -> Point:
        return self.x, self.y - self.height / 2

    @property
    def bottom(self) -> Point:
        return self.x, self.y + self.height / 2


def number(value: float, digits: int = 3) -> str:
    """A value with so many significant digits, a true minus sign and no power of ten."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if value == round(value) and abs(value) < 1e7:
        text = f"{int(value):,}"
    else:
        text = f"{value:.{digits}g}"
        if "e" in text:
            places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
            text = f"{value:.{places}f}"
    return text.replace("-", "−")


def power(exponent: int, base: str = "2") -> str:
    """2³, in letters that stand above the line."""
    return base + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def box(
    scene: Scene,
    x: float,
    y: float,
    width: float,
    height: float,
    title: str = "",
    *notes: str,
    colour: str = "blue",
    shared: bool = False,
    size: float = TEXT,
) -> Box:
    """A part of the model: its title, and lines under it for its shape.

    shared: with a second border, for weights that are used in two places.
    """
    corner = {"x": x - width / 2, "y": y - height / 2}
    scene.rect(**corner, width=width, height=height, rounded=5, fill="paper")
    scene.rect(
        **corner,
        width=width,
        height=height,
        rounded=5,
        fill=colour,
        opacity=TINT,
        stroke=colour,
        stroke_width=1.6,
    )
    if shared:
        scene.rect(
            corner["x"] + 3.5,
            corner["y"] + 3.5,
            width - 7,
            height - 7,
            rounded=3,
            stroke=colour,
            stroke_width=1,
        )
    step = 15
    first = y - step * len(notes) / 2 if title else y - step * (len(notes) - 1) / 2
    if title:
        scene.text(x, first, title, anchor="middle", size=size, bold=bool(notes))
    for line, note in enumerate(notes):
        scene.text(
            x, first + step * (line + bool(title)), note, anchor="middle", size=SMALL, fill="ink"
        )
    return Box(x, y, width, height)


def arrow(
    scene: Scene,
    *points: Point,
    label: str = "",
    side: str = "",
    at: int | None = None,
    colour: str = "ink",
    dashed: bool = False,
    width: float = 1.6,
    head: bool = True,
) -> None:
    """From the first point over the others to the last.

    label: along segment ``at`` (counted from 0; None: the longest), on the ``side`` "above",
    "below", "left" or "right" of its middle; by default above a level one, right of another.
    """
    if len(points) < 2:
        raise ValueError(f"an arrow needs two points or more, not {len(points)}")
    (x0, y0), (x1, y1) = points[-2:]
    length = math.dist((x0, y0), (x1, y1))
    tip = points[-1]
    if head and length:
        along = ((x1 - x0) / length, (y1 - y0) / length)
        neck = (x1 - 8 * along[0], y1 - 8 * along[1])
        scene.line(*points[:-1], neck, stroke=colour, stroke_width=width, dashed=dashed)
        scene.polygon(
            tip,
            (neck[0] - 4 * along[1], neck[1] + 4 * along[0]),
            (neck[0] + 4 * along[1], neck[1] - 4 * along[0]),
            fill=colour,
        )
    else:
        scene.line(*points, stroke=colour, stroke_width=width, dashed=dashed)
    if label:
        segments = list(pairwise(points))
        chosen = max(segments, key=lambda ends: math.dist(*ends)) if at is None else segments[at]
        beside(scene, *chosen, label, side)


def beside(scene: Scene, start: Point, end: Point, words: str, side: str = "", gap=6) -> None:
    """Words (lines of them) beside the middle of a segment."""
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    side = side or ("above" if abs(start[1] - end[1]) < 1 else "right")
    lines = words.split("\n")
    step = 14
    if side in ("above", "below"):
        first = y - gap - 4 - step * (len(lines) - 1) if side == "above" else y + gap + 5
        anchor = "middle"
    elif side in ("left", "right"):
        first, anchor = y - step * (len(lines) - 1) / 2, "start" if side == "right" else "end"
        x += gap if side == "right" else -gap
    else:
        raise ValueError(f"no such side: {side!r}; there are above, below, left, right")
    for line, text in enumerate(lines):
        scene.text(x, first + step * line, text, size=SMALL, anchor=anchor, fill="soft")


def cells(
    scene: Scene,
    x: float,
    y: float,
    rows: Sequence[Sequence[str]],
    *,
    width: float,
    height: float = 24,
    look: Callable[[int, int], dict] | None = None,
    size: float = SMALL,
    code: bool = False,
) -> Box:
    """A grid of values with its upper left corner at (x, y).

    look: for a row and a column the fill, opacity and so on of that cell (``ink``: its text).
    """
    for row, texts in enumerate(rows):
        for column, text in enumerate(texts):
            seen = {"fill": "pale", "stroke": "line"} | (look(row, column) if look else {})
            ink, bold = seen.pop("ink", "ink"), seen.pop("bold", False)
            scene.rect(x + column * width, y + row * height, width, height, **seen)
            if text:
                scene.text(
                    x + (column + 0.5) * width,
                    y + (row + 0.5) * height,
                    text,
                    size=size,
                    anchor="middle",
                    code=code,
                    fill=ink,
                    bold=bold,
                )
    across = width * max(len(texts) for texts in rows)
    down = height * len(rows)
    return Box(x + across / 2, y + down / 2, across, down)


def bracket(
    scene: Scene, start: float, end: float, at: float, words: str, side: str, *, colour="soft"
) -> None:
    """A span from start to end with words: side "above" and "below" of a row at height ``at``,
    "left" and "right" of a column at ``at``; its ends point at what it spans."""
    if side in ("above", "below"):
        away = -7 if side == "above" else 7
        points = [(start, at), (start, at + away), (end, at + away), (end, at)]
    else:
        away = -7 if side == "left" else 7
        points = [(at, start), (at + away, start), (at + away, end), (at, end)]
    scene.line(*points, stroke=colour, stroke_width=1.2)
    beside(scene, points[1], points[2], words, side)


def legend(scene: Scene, x: float, y: float, entries: Sequence[tuple[str, float, str]]) -> float:
    """Swatches with their meaning, in a line from x on: (colour, opacity, words). Returns where
    the line ends."""
    for colour, opacity, words in entries:
        scene.rect(x, y - 6, 12, 12, rounded=2, fill=colour, opacity=opacity, stroke=colour)
        scene.text(x + 18, y, words, fill="soft", size=SMALL)
        x += 18 + text_width(words, SMALL) + 22
    return x - 22


def headline(scene: Scene, words: str, y: float = 10, x: float = 0) -> None:
    """What the picture is of."""
    scene.text(x, y, words, bold=True, size=HEAD)


def lines(scene: Scene, x: float, y: float, *texts: str, step: float = 16, **more) -> None:
    """Lines of text one below the other, the first at y."""
    for line, text in enumerate(texts):
        scene.text(x, y + step * line, text, **({"size": TEXT} | more))


def plus(scene: Scene, x: float, y: float, sign: str = "+", radius: float = 11) -> Box:
    """A sign in a circle: where two arrows are added, multiplied or joined."""
    scene.circle(x, y, radius, fill="paper", stroke="ink", stroke_width=1.4)
    scene.text(x, y, sign, anchor="middle", size=TEXT)
    return Box(x, y, 2 * radius, 2 * radius)
