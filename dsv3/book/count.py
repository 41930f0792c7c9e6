"""How long a chapter is, and how much of it is drawn: words, pictures, printed verdicts.

A chapter is a story with a workshop behind it. The story, its *core path*, ends where the section
"Going further" begins (in chapters without one, at the summary). What is counted there, in text
and code together, is what a reader has to get through; the bounds are held by
``tests/test_chapters.py``. ``python -m dsv3.book --count NOTEBOOK ...`` prints the table.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import nbformat

# A cell that draws a mechanism calls one of the modules of schematics, or the map of the model.
SCHEMATIC = re.compile(r"\b\w*schematics\.\w+\(|\bmodel_map\(")
# A cell that shows a widget ends with the call of its class.
WIDGET = re.compile(r"^[A-Z]\w+\(", re.MULTILINE)
VERDICT = re.compile(r"\b(?:True|False)\b")


@dataclass(frozen=True)
class Counts:
    """What a chapter holds. words: those of the core path, of text and code; all_words: of the
    whole chapter; schematics, figures, widgets: pictures in the whole chapter; verdicts: True and
    False printed on the core path; exercises: in the whole chapter."""

    words: int
    all_words: int
    schematics: int
    figures: int
    widgets: int
    verdicts: int
    exercises: int


def core_path(cells: list) -> list:
    """The cells of the story."""
    ids = [cell.id for cell in cells]
    end = next((id for id in ("going-further", "summary") if id in ids), None)
    return cells[: ids.index(end)] if end else cells


def count(path: Path) -> Counts:
    """Counts of a stored notebook; pictures and verdicts are those of its stored outputs."""
    cells = nbformat.read(path, as_version=4).cells
    pictures = [_picture(cell) for cell in cells if _is_picture(cell)]
    story = core_path(cells)
    return Counts(
        words=_words(story),
        all_words=_words(cells),
        schematics=pictures.count("schematic"),
        figures=pictures.count("figure"),
        widgets=pictures.count("widget"),
        verdicts=sum(len(VERDICT.findall(text)) for cell in story for text in _printed(cell)),
        exercises=sum(bool(re.fullmatch(r"ex-.*-text", cell.id)) for cell in cells),
    )


def table(paths: list[Path]) -> str:
    """A line for each chapter, under the names of what is counted."""
    names = [field.name for field in fields(Counts)]
    lines = [f"{'chapter':18}" + "".join(f"{name:>12}" for name in names)]
    for path in paths:
        numbers = "".join(f"{number:12,}" for number in astuple(count(path)))
        lines.append(f"{path.stem:18}{numbers}")
    return "\n".join(lines)


def _words(cells: list) -> int:
    return sum(len(cell.source.split()) for cell in cells)


def _is_picture(cell) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def _picture(cell) -> str:
    if SCHEMATIC.search(cell.source):
        return "schematic"
    return "widget" if WIDGET.search(cell.source) else "figure"


def _printed(cell) -> list[str]:
    return [output.text for output in cell.get("outputs", []) if output.output_type == "stream"]
