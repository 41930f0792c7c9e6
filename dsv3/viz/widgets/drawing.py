"""The live picture: a ``Scene`` as SVG in the notebook, for the pointer and for the keyboard."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets
from traitlets import Unicode

from dsv3.viz.scene import Scene

_HERE = Path(__file__).parent


class Drawing(anywidget.AnyWidget):
    """Shows a scene. ``show`` replaces it; whoever wants to know what is chosen in it calls
    ``on_choose(function of the mark's key)``.

    One tab stop: inside, the arrow keys go from mark to mark, Enter or the space bar chooses.
    """

    _esm = _HERE / "drawing.js"
    _css = _HERE / "drawing.css"
    scene = traitlets.Dict().tag(sync=True)
    title = Unicode().tag(sync=True)

    def __init__(self, scene: Scene, title: str):
        super().__init__(scene=scene.as_dict(), title=title)
        self._choosers = []
        self.on_msg(self._hear)

    def show(self, scene: Scene) -> None:
        self.scene = scene.as_dict()

    def on_choose(self, function) -> None:
        self._choosers.append(function)

    def choose(self, key: str) -> None:
        """What a click on the mark of this key does."""
        if any(mark.get("key") == key for mark in self.scene["marks"]):
            for function in self._choosers:
                function(key)

    def _hear(self, _, content, __) -> None:
        if isinstance(content, dict) and isinstance(content.get("chosen"), str):
            self.choose(content["chosen"])

    def __repr__(self) -> str:
        return f"[{self.title}: run this cell to use it]"
