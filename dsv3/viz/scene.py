"""A picture as data: marks on a page, drawn as a still image or live in the browser.

The book shows its interactive pictures twice: live in JupyterLab, and as a still first frame for
those who read on the web. Both are drawn from one ``Scene``, so they cannot drift apart. A scene
is made by plain functions from plain numbers, which is also what makes it easy to test: what a
reader would see stands in its marks.

Lengths are in pixels of the live picture, y grows downwards. Colours are names, since the live
picture has to be read on dark pages too: "ink" and "soft" for text, "line" for thin lines, "pale"
for backgrounds, "grey", and the names of Okabe and Ito's colours. "white" and "black" are the same
on every page: for text on a colour.
"""

from __future__ import annotations

import base64
import io
import unicodedata
from dataclasses import dataclass, field
from functools import cache

import numpy
from matplotlib import font_manager
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Ellipse, FancyBboxPatch
from matplotlib.patches import Polygon as PolygonArtist
from matplotlib.text import Text as TextArtist
from PIL import Image as Raster

from dsv3.viz import figure as book

COLOURS = {
    "ink": book.BLACK,
    "soft": "#5c5c5c",
    "line": "#b5b5b5",
    "pale": "#f1f1f1",
    "paper": "#ffffff",
    "white": "#ffffff",
    "black": book.BLACK,
    "grey": "#9d9d9d",
    "blue": book.BLUE,
    "orange": book.ORANGE,
    "sky": book.SKY,
    "green": book.GREEN,
    "vermillion": book.VERMILLION,
    "purple": book.PURPLE,
    "yellow": book.YELLOW,
}

# Pixels of the live picture in one inch of the still one, as in ``dsv3.viz.show``.
_PIXELS = 80
# Pixels around a still picture: it stands on a card of its own.
_MARGIN = 14


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What all marks share.

    fill, stroke: names of colours, or None; opacity: of the fill, None where it covers what is
    below it; stroke_width: pixels; label: what is said of it under
    the pointer, on keyboard focus and by a screen reader; key: what is reported when it is
    chosen, None where there is nothing to choose; chosen: whether it is the chosen one.
    """

    fill: str | None = None
    opacity: float | None = None
    stroke: str | None = None
    stroke_width: float = 1.0
    label: str | None = None
    key: str | None = None
    chosen: bool = False

    def __post_init__(self):
        for name in (self.fill, self.stroke):
            if name is not None and name not in COLOURS:
                raise ValueError(f"no such colour: {name!r}; there are {', '.join(COLOURS)}")


@dataclass(frozen=True, kw_only=True)
class Rect(Mark):
    """A rectangle by its upper left corner; rounded: radius of the corners; hatched: with
    slanted lines in the colour of the stroke, which then is no border."""

    x: float
    y: float
    width: float
    height: float
    rounded: float = 0.0
    hatched: bool = False


@dataclass(frozen=True, kw_only=True)
class Circle(Mark):
    """A disc or ring."""

    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Line(Mark):
    """Straight strokes through the points."""

    points: tuple[tuple[float, float], ...]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Polygon(Mark):
    """A surface with straight edges from corner to corner."""

    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True)
class Text(Mark):
    """One line of text. x, y: its anchor, on the vertical middle of the line; anchor: "start",
    "middle" or "end"; size: of the font, in pixels; code: in a font of fixed width."""

    x: float
    y: float
    text: str
    size: float = 12.0
    anchor: str = "start"
    bold: bool = False
    code: bool = False


@dataclass(frozen=True, kw_only=True)
class Image(Mark):
    """Many small cells in one mark, drawn without smoothing: ``url`` is a PNG, as ``png`` writes
    it, stretched over the rectangle. Its colours are the same on every page."""

    x: float
    y: float
    width: float
    height: float
    url: str


_DATA = "data:image/png;base64,"


def png(colours: numpy.ndarray) -> str:
    """The url of an image of cells (rows, columns, 3), uint8: red, green and blue of each."""
    buffer = io.BytesIO()
    Raster.fromarray(colours).save(buffer, format="png")
    return _DATA + base64.b64encode(buffer.getvalue()).decode()


@dataclass(frozen=True)
class Scene:
    """Marks on a page of width x height, from back to front; alt: what is to be seen, in words."""

    width: float
    height: float
    alt: str
    marks: list[Mark] = field(default_factory=list)

    def rect(self, x: float, y: float, width: float, height: float, **more) -> None:
        self.marks.append(Rect(x=x, y=y, width=width, height=height, **more))

    def circle(self, x: float, y: float, radius: float, **more) -> None:
        self.marks.append(Circle(x=x, y=y, radius=radius, **more))

    def line(self, *points: tuple[float, float], stroke: str = "line", **more) -> None:
        self.marks.append(Line(points=points, stroke=stroke, **more))

    def polygon(self, *points: tuple[float, float], **more) -> None:
        self.marks.append(Polygon(points=points, **more))

    def text(self, x: float, y: float, text: str, *, fill: str = "ink", **more) -> None:
        self.marks.append(Text(x=x, y=y, text=text, fill=fill, **more))

    def image(self, x: float, y: float, width: float, height: float, colours, **more) -> None:
        """colours: (rows, columns, 3) uint8, see ``png``."""
        self.marks.append(Image(x=x, y=y, width=width, height=height, url=png(colours), **more))

    def labels(self) -> list[str]:
        """What the marks say of themselves."""
        return [mark.label for mark in self.marks if mark.label]

    def keys(self) -> list[str]:
        """What can be chosen."""
        return [mark.key for mark in self.marks if mark.key is not None]

    def as_dict(self) -> dict:
        """For the browser: plain values, what stands at its default left out."""
        return {
            "width": self.width,
            "height": self.height,
            "alt": self.alt,
            "marks": [_plain(mark) for mark in self.marks],
        }


def _plain(mark: Mark) -> dict:
    values = {"kind": type(mark).__name__.lower()}
    for name, value in vars(mark).items():
        if value not in (None, False, "", 0.0):
            values[name] = round(value, 2) if isinstance(value, float) else value
    if isinstance(mark, (Line, Polygon)):
        values["points"] = [[round(x, 2), round(y, 2)] for x, y in mark.points]
    for name in ("x", "y"):
        if hasattr(mark, name):
            values.setdefault(name, 0)
    return values


def columns(text: str) -> int:
    """Letter widths that a text takes in a font of fixed width; ideographs and emoji take two."""
    return sum(
        2
        if unicodedata.east_asian_width(letter) in "WF"
        else 0
        if unicodedata.combining(letter)
        else 1
        for letter in text
    )


def below(scene: Scene, words: str) -> Scene:
    """The scene with a line of words under it."""
    more = Scene(scene.width, scene.height + 34, f"{scene.alt} {words}", list(scene.marks))
    more.text(0, scene.height + 22, words, fill="soft")
    return more


# The still picture ----------------------------------------------------------------------------


@book.styled
def still(scene: Scene) -> Figure:
    """The scene as a matplotlib figure: one artist a mark, on a white card."""
    width, height = scene.width + 2 * _MARGIN, scene.height + 2 * _MARGIN
    figure = Figure(figsize=(width / _PIXELS, height / _PIXELS))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-_MARGIN, scene.width + _MARGIN), ylim=(scene.height + _MARGIN, -_MARGIN))
    axes.axis("off")
    for order, mark in enumerate(scene.marks):
        axes.add_artist(_artist(mark, axes)).set(zorder=order, clip_on=False)
    return figure


def _artist(mark: Mark, axes: Axes) -> Artist:
    return _image(mark, axes) if isinstance(mark, Image) else _ARTIST[type(mark)](mark)


def draw(scene: Scene) -> book.Picture:
    """The still picture for a notebook cell, with the scene's own alt text."""
    return book.show(still(scene), alt=scene.alt)


def _points(pixels: float) -> float:
    return pixels * 72 / _PIXELS


def _look(mark: Mark) -> dict:
    return {
        "facecolor": to_rgba(COLOURS[mark.fill], mark.opacity) if mark.fill else "none",
        "edgecolor": COLOURS[mark.stroke] if mark.stroke else "none",
        "linewidth": _points(mark.stroke_width) if mark.stroke else 0,
    }


def _rect(mark: Rect) -> FancyBboxPatch:
    look = _look(mark)
    if mark.hatched:
        look |= {"hatch": "///", "linewidth": 0}
    radius = min(mark.rounded, mark.width / 2, mark.height / 2)
    style = f"round,pad=0,rounding_size={radius}" if radius > 0 else "square,pad=0"
    return FancyBboxPatch((mark.x, mark.y), mark.width, mark.height, boxstyle=style, **look)


def _circle(mark: Circle) -> Ellipse:
    return Ellipse((mark.x, mark.y), 2 * mark.radius, 2 * mark.radius, **_look(mark))


def _line(mark: Line) -> Line2D:
    return Line2D(
        *zip(*mark.points),
        color=COLOURS[mark.stroke],
        linewidth=_points(mark.stroke_width),
        dashes=(4, 3) if mark.dashed else (),
        solid_joinstyle="round",
    )


def _polygon(mark: Polygon) -> PolygonArtist:
    return PolygonArtist(mark.points, closed=True, joinstyle="miter", **_look(mark))


def _text(mark: Text) -> TextArtist:
    return TextArtist(
        mark.x,
        mark.y,
        _printable(mark.text, mark.code),
        color=COLOURS[mark.fill],
        fontsize=_points(mark.size),
        va="center_baseline",
        parse_math=False,
        ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
        family="DejaVu Sans Mono" if mark.code else "DejaVu Sans",
        weight="bold" if mark.bold else "normal",
    )


def _image(mark: Image, axes: Axes) -> AxesImage:
    extent = (mark.x, mark.x + mark.width, mark.y + mark.height, mark.y)
    image = AxesImage(axes, extent=extent, origin="upper", interpolation="nearest")
    image.set_data(Raster.open(io.BytesIO(base64.b64decode(mark.url.removeprefix(_DATA)))))
    return image


def _printable(text: str, code: bool) -> str:
    """The text with a box for each letter that the font lacks (a browser has more fonts)."""
    font = _font("DejaVu Sans Mono" if code else "DejaVu Sans")
    return "".join(letter if font.get_char_index(ord(letter)) else "▯" for letter in text)


def text_width(text: str, size: float, *, bold: bool = False, code: bool = False) -> float:
    """Pixels that a line of text takes in the still picture."""
    font = _font("DejaVu Sans Mono" if code else "DejaVu Sans", "bold" if bold else "normal")
    font.set_size(8 * size, 72)  # large: no letter is moved to a whole pixel
    font.set_text(_printable(text, code))
    return font.get_width_height()[0] / (8 * 64)


@cache
def _font(family: str, weight: str = "normal") -> FT2Font:
    described = font_manager.FontProperties(family=family, weight=weight)
    return font_manager.get_font(font_manager.findfont(described))


_ARTIST = {Rect: _rect, Circle: _circle, Line: _line, Polygon: _polygon, Text: _text}
