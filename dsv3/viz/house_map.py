"""The house in one picture: its rooms, who stands on whom, and what one looks for where.

The arrows are the package's own imports, read from its files when the picture is drawn. One that
others imply is left out: who stands on training stands on the model too.
"""

from __future__ import annotations

import ast
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from dsv3.viz.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    YELLOW,
    new_figure,
    styled,
)

PACKAGE = Path(__file__).parents[1]
_HEIGHT = 9.4


class Room(NamedTuple):
    """Modules of one purpose. look_for: what a newcomer finds there; place: its box's centre, and
    its width, on a page of 100 x 80."""

    name: str
    modules: str
    look_for: str
    place: tuple[float, float, float]
    colour: str


ROOMS = (
    Room(
        "Commands",
        "cli commands bench __main__",
        "what dsv3 does when called by name; speed beside peers",
        (25, 74, 46),
        GREY,
    ),
    Room("The book", "book viz", "exercises, figures, things to play with", (75, 74, 46), SKY),
    Room("Training", "training data", "schedules, losses, balance; the text", (50, 60, 46), ORANGE),
    Room(
        "Checkpoints", "checkpoint", "names and cuts of tensors; load, convert", (25, 46, 46), GREEN
    ),
    Room("Text", "generation", "tokenizer, sampling, the loop, drafting", (75, 46, 46), PURPLE),
    Room(
        "The model",
        "layers attention rope mla cache moe grouped block mtp compiling model precision"
        " costs placement recompute",
        "latent attention, experts, multi-token prediction; how each product is taken",
        (50, 32, 96),
        BLUE,
    ),
    Room(
        "FP8",
        "fp8 kernels bfloat16 plain",
        "formats, scales, products; kernels",
        (25, 18, 46),
        VERMILLION,
    ),
    Room(
        "Several ranks",
        "parallel",
        "what a rank holds and sends; how ranks start",
        (75, 18, 46),
        YELLOW,
    ),
    Room(
        "The ground",
        "config families fields translation backward opaque errors files machine shipped"
        " unfinished",
        "configs of the family; errors in one line; files, threads",
        (50, 4.7, 96),
        BLACK,
    ),
)


def imports(path: Path) -> set[str]:
    """Modules that a file names in imports, wherever in the file; type-checking ones too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
            if (PACKAGE.parent / node.module.replace(".", "/")).is_dir():
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def top(path: Path) -> str:
    """The module or folder of ``dsv3/`` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def stands_on() -> dict[str, set[str]]:
    """Of each room, the rooms that its files import from."""
    of = {module: room.name for room in ROOMS for module in room.modules.split()}
    found: dict[str, set[str]] = {room.name: set() for room in ROOMS}
    for path in PACKAGE.rglob("*.py"):
        here = of.get(top(path))
        for name in imports(path) if here else ():
            house, _, rest = name.partition(".")
            there = of.get(rest.split(".")[0])
            if house == "dsv3" and there and there != here:
                found[here].add(there)
    return found


def arrows() -> list[tuple[str, str]]:
    """(room, room that it stands on), without those that others imply. Raises ValueError where
    rooms stand on each other in a circle."""
    direct = stands_on()
    below = {room: set(rooms) for room, rooms in direct.items()}
    for middle in below:
        for rooms in below.values():
            if middle in rooms:
                rooms |= below[middle]
    for one, other in permutations(below, 2):
        if other in below[one] and one in below[other]:
            raise ValueError(f"{one} and {other} stand on each other")
    return [
        (room.name, other.name)
        for room in ROOMS
        for other in ROOMS
        if other.name in direct[room.name]
        and not any(other.name in below[between] for between in direct[room.name])
    ]


def in_words() -> str:
    """What the picture says, one line a room; it is kept in the file, so that a test can tell
    whether a stored picture is still true."""
    under: dict[str, list[str]] = {}
    for room, other in arrows():
        under.setdefault(room, []).append(other)
    return "\n".join(
        f"{room.name} ({room.modules}): {room.look_for}; on {', '.join(under.get(room.name, ()))}"
        for room in ROOMS
    )


@styled
def house_map() -> Figure:
    """The map of ``dsv3/`` as it is now."""
    figure, axes = new_figure(9.6, 7.7)
    axes.set(xlim=(0, 100), ylim=(-1, 80))
    axes.axis("off")
    rooms = {room.name: room for room in ROOMS}
    for room in ROOMS:
        _draw(axes, room)
    for upper, lower in arrows():
        _arrow(axes, rooms[upper].place, rooms[lower].place)
    axes.text(98, 60, "An arrow: stands on it,\nand on all below it.", ha="right", color="#555555")
    return figure


def save(path: Path) -> None:
    """Write the map as SVG, the same bytes for the same house, with ``in_words`` in it."""
    with matplotlib.rc_context({"svg.hashsalt": "dsv3"}):
        house_map().savefig(path, metadata={"Date": None, "Description": in_words()})


def _draw(axes, room: Room) -> None:
    x, y, width = room.place
    corner = (x - width / 2, y - _HEIGHT / 2)
    for face, alpha, edge in ((room.colour, 0.10, "none"), ("none", 1, room.colour)):
        axes.add_patch(
            FancyBboxPatch(
                corner, width, _HEIGHT, "round,pad=0,rounding_size=1",
                facecolor=face, edgecolor=edge, alpha=alpha, linewidth=1.4,
            )
        )  # fmt: skip
    modules = room.modules.replace("__main__", "").split()
    named = ", ".join(f"{name}/" if (PACKAGE / name).is_dir() else name for name in modules)
    left = corner[0] + 1.6
    axes.text(left, y + 2.5, room.name, fontsize=11, fontweight="bold", va="center")
    axes.text(left, y - 0.2, room.look_for, fontsize=9, va="center")
    axes.text(left, y - 2.9, named, fontsize=7, color="#555555", va="center", family="monospace")


def _arrow(axes, upper: tuple, lower: tuple) -> None:
    """Straight down, in the middle of where the two boxes are above each other."""
    (x, y, width), (x2, y2, width2) = upper, lower
    left, right = max(x - width / 2, x2 - width2 / 2), min(x + width / 2, x2 + width2 / 2)
    middle = (left + right) / 2
    axes.annotate(
        "",
        (middle, y2 + _HEIGHT / 2 + 0.3),
        (middle, y - _HEIGHT / 2 - 0.3),
        arrowprops={"arrowstyle": "-|>", "color": "#444444", "linewidth": 1.3},
    )
