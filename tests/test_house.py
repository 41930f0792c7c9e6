"""Data flows one way through the house: which module may stand on which."""

import ast
from pathlib import Path
from xml.etree import ElementTree

from dsv3.viz.house_map import ROOMS, arrows, imports, in_words, top

PACKAGE = Path(__file__).parents[1] / "dsv3"

# From the ground up; a module may import from lower floors and from its own room.
FLOORS = [
    ["errors"],
    ["families", "fields", "backward", "opaque", "files", "machine", "shipped"],
    ["translation", "unfinished", "kernels", "bfloat16"],
    ["config"],
    ["costs", "rope", "fp8"],
    ["parallel", "plain"],
    ["grouped"],
    ["cache", "precision", "recompute"],
    ["layers", "listening"],
    ["attention", "mla", "moe"],
    ["block", "placement"],
    ["mtp"],
    ["compiling"],
    ["model"],
    ["checkpoint"],
    ["generation", "data"],
    ["training"],
    ["bench"],
    ["commands"],
    ["viz"],
    ["book"],
    ["cli"],
    ["__main__", "__init__"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
HEAVY = {"matplotlib", "ipywidgets", "anywidget", "jupyterlab", "IPython"}


def test_every_module_has_a_floor_and_stands_on_lower_ones():
    for path in sorted(PACKAGE.rglob("*.py")):
        here = top(path)
        assert here in FLOOR, f"{path.name}: give {here} a floor"
        if here == "__init__":
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "dsv3" or len(parts) == 1 or parts[1] not in FLOOR or parts[1] == here:
                continue
            assert FLOOR[parts[1]] < FLOOR[here], f"{path.name} stands on {name}"


def test_only_figures_import_figure_libraries():
    for path in PACKAGE.rglob("*.py"):
        used = {name.split(".")[0] for name in imports(path)} & HEAVY
        assert not used or top(path) in ("viz", "book") or path.stem == "doctor", (
            f"{path.name} imports {used}"
        )


def test_modules_fit_in_a_head():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 420, f"{path.name} is two modules"


def test_the_size_of_a_block_is_written_once():
    written = [
        path.stem
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and node.value.value == 128
    ]
    assert written == ["fields"]


def test_every_module_is_in_one_room_of_the_map():
    named = [module for room in ROOMS for module in room.modules.split()]
    assert sorted(named) == sorted({top(path) for path in PACKAGE.rglob("*.py")} - {"__init__"})


def test_rooms_stand_on_lower_rooms():
    height = {room.name: room.place[1] for room in ROOMS}
    assert arrows() and all(height[upper] > height[lower] for upper, lower in arrows())


def test_the_map_in_the_readme_is_todays():
    drawn = ElementTree.parse(PACKAGE.parent / "assets" / "figures" / "house_map.svg")
    stored = drawn.find(".//{http://purl.org/dc/elements/1.1/}description").text
    assert stored == in_words(), "draw it again: python -m dsv3.viz assets/figures assets/dsv3-mini"


def test_every_room_has_a_test_in_make_quick():
    quick = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        if "pytestmark = pytest.mark.slow" not in path.read_text():
            quick |= {name.split(".")[1] for name in imports(path) if name.startswith("dsv3.")}
    for room in ROOMS:
        assert quick & set(room.modules.split()), f"nothing of {room.name} is tested quickly"
