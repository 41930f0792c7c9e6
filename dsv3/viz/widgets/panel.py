"""What the three widgets share: controls above a drawing, a line for messages, a still picture."""

from __future__ import annotations

import html

import ipywidgets
from matplotlib.figure import Figure

from dsv3.viz.figure import show
from dsv3.viz.scene import Scene, below, still
from dsv3.viz.widgets.drawing import Drawing

_STYLE = {"description_width": "118px"}
_LAYOUT = {"width": "440px"}
# A box of ipywidgets scrolls inside when it is a pixel too small.
_OPEN = {"overflow": "visible"}
# Said where nothing moves, of a picture that could.
AT_REST = (
    "A still picture. To move it: choose this cell, then in the menu Run > Run All Above "
    "Selected Cell, and run it."
)


class Panel(ipywidgets.VBox):
    """Controls, a line of words about them, and a picture that follows them.

    A subclass makes its controls, gives them to ``super().__init__``, and says in ``scene`` what
    is to be drawn.
    """

    title = "Widget"
    hint = "Point at a bar to read its numbers, or Tab into the picture and use the arrow keys."

    def __init__(self, controls: list[ipywidgets.Widget]):
        self._note = ipywidgets.HTML()
        self.drawing = Drawing(self.scene(), self.title)
        rows = ipywidgets.HBox(controls, layout={"flex_flow": "row wrap", **_OPEN})
        super().__init__([rows, self._note, self.drawing], layout=_OPEN)
        for control in controls:
            control.observe(self._changed, "value")
        self._say()

    def scene(self) -> Scene:
        """The picture at the controls' present values."""
        raise NotImplementedError

    def message(self) -> str:
        """A sentence where a control asks for more than there is; "" where all is well."""
        return ""

    @property
    def alt(self) -> str:
        """What is to be seen, in words."""
        return self.scene().alt

    def still(self) -> Figure:
        """The picture as a matplotlib figure with a line that says how to make it move, for pages
        on which nothing does."""
        return still(below(self.scene(), AT_REST))

    def refresh(self) -> None:
        """Draw again."""
        self.drawing.show(self.scene())
        self._say()

    def _changed(self, _) -> None:
        self.refresh()

    def _say(self) -> None:
        text, style = self.message(), "line-height: 1.5"
        words = f"⚠ {text}" if text else self.hint
        if not text:
            style += "; opacity: 0.75"
        self._note.value = f'<div role="status" style="{style}">{html.escape(words)}</div>'

    def _repr_mimebundle_(self, **kwargs) -> tuple[dict, dict]:
        """What a cell's output holds: the widget, and the still picture for all who read the
        stored notebook, when the kernel behind the widget is gone."""
        data, metadata = show(self.still(), alt=f"{self.title}. {self.alt}")._repr_mimebundle_()
        return {**super()._repr_mimebundle_(**kwargs), **data, "text/plain": repr(self)}, metadata

    def __repr__(self) -> str:
        return f"[Figure: {self.title}. {self.alt}]"


def control(kind: type[ipywidgets.Widget], description: str, **more) -> ipywidgets.Widget:
    """A control with its description, as wide as all others."""
    return kind(description=description, style=_STYLE, layout=_LAYOUT, **more)
