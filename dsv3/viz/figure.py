"""One style for all figures, and one way to put a figure into a notebook."""

from __future__ import annotations

import io
from functools import wraps
from pathlib import Path

import matplotlib.style
from IPython.display import Image
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image as Raster  # matplotlib writes its PNG files with it

STYLE = Path(__file__).with_name("book.mplstyle")

# Okabe and Ito's colours by name.
BLACK, GREY, LIGHT = "#222222", "#888888", "#e8e8e8"
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


def styled(draw):
    """Decorator: whatever the function draws has the look of the book, and nothing else has."""

    @wraps(draw)
    def inside(*args, **kwargs):
        with matplotlib.style.context(STYLE):
            return draw(*args, **kwargs)

    return inside


@styled
def new_figure(width: float, height: float, **axes):
    """(figure, axes) of width x height inches; keywords as in matplotlib's ``subplots``.

    Made without pyplot, so no window is opened and no figure is kept behind the scenes.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(**axes)


class Picture(Image):
    """An image that prints as what is to be seen on it, where images cannot be shown."""

    def __repr__(self) -> str:
        return f"[Figure: {self.alt}]"


def _has_shades(artist: Artist) -> bool:
    """Whether its colours stand for values."""
    return isinstance(artist, (AxesImage, QuadMesh))


@styled
def show(figure: Figure, alt: str) -> Picture:
    """The figure as an image for a notebook cell. alt: what is to be seen, for those who cannot.

    The image is as wide on the page as the figure in inches times 80 pixels. The text goes into
    the image's metadata and, since not every page that shows a notebook reads those, also stands
    for the image as plain text. It is stored with the drawing's own colours and shades of its
    edges, 64 together, or 256 where shades mean something: a quarter to a third of the bytes, and a
    notebook stays small enough to be shown.
    """
    if not alt.strip():
        raise ValueError("a figure needs its alt text")
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    drawn = Raster.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    colours = 256 if figure.findobj(_has_shades) else 64
    drawn.convert("RGB").quantize(colours, dither=Raster.Dither.NONE).save(
        buffer, format="png", optimize=True
    )
    return Picture(
        buffer.getvalue(), format="png", alt=alt, width=round(80 * figure.get_figwidth())
    )
