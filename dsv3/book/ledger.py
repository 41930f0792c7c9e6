"""Ledgers: which code computes an equation, which test holds it, which cell teaches it.

A claim in a book grows old when the code moves on. So the links are not written by hand: they are
gathered from tags, comments of the form ``# eq. 16`` or ``# fact 7`` that stand in the package's
functions, in the tests and in the notebooks' code cells. What an equation or a fact says stands
in a data file. The tests compare the two: no equation without code and test, none without a
teaching cell once its chapter is there, no fact that nothing recomputes, no tag that leads
nowhere.
"""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from IPython.display import Markdown

from dsv3.book.notation import markdown_table

ROOT = Path(__file__).resolve().parents[2]
_TAG = re.compile(r"\b(eq\.|fact) (\d+(?:-\d+)?(?:, \d+(?:-\d+)?)*)")


@dataclass(frozen=True, order=True)
class Place:
    """Where a tag stands. file: from the project's root. name: of the function or the cell;
    section: the heading that a cell stands under (JupyterLab shows no cell's name)."""

    file: str
    name: str
    section: str = ""

    @property
    def chapter(self) -> str | None:
        """The file's name, if it is a chapter (a solution is none)."""
        path = Path(self.file)
        return path.name if path.suffix == ".ipynb" and path.parent.name == "chapters" else None

    @property
    def link(self) -> str:
        """As Markdown, from a notebook in chapters/."""
        if self.chapter:
            # Only what would end the link: JupyterLab compares the rest as it stands.
            anchor = quote(self.section.replace(" ", "-"), safe="!#$&'*+,/:;=?@[]·×")
            return f"[{int(self.chapter[:2])} · {self.section}]({self.chapter}#{anchor})"
        return f"[`{self.name}`](../{self.file})"


def tags(comment: str) -> Iterator[tuple[str, int]]:
    """("eq." or "fact", number) of each tag in a comment; "eq. 6-9, 11" are five."""
    for kind, numbers in _TAG.findall(comment):
        for part in numbers.split(", "):
            first, _, last = part.partition("-")
            yield from ((kind, number) for number in range(int(first), int(last or first) + 1))


def tags_of_source(source: str) -> Iterator[tuple[str, str, int]]:
    """(function, kind, number) of each tag in a comment of Python source.

    The function is the innermost one, with its class: "Router.choose"; "" outside of any.
    """
    spans = sorted(_functions(ast.parse(source), ""), key=lambda span: span[1] - span[0])
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        name = next((name for start, end, name in spans if start <= line <= end), "")
        for kind, number in tags(token.string):
            yield name, kind, number


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[int, int, str]]:
    """(first line, last line, dotted name) of all functions in a tree; inner ones count as the
    function they stand in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child.lineno, child.end_lineno, prefix + child.name


@cache
def places() -> dict[tuple[str, int], tuple[Place, ...]]:
    """("eq." or "fact", number) -> where it is tagged: in dsv3/, tests/ and chapters/.

    Read once from the project's folder. Raises FileNotFoundError where there is none: an
    installed package comes without its tests and its chapters.
    """
    if not (ROOT / "chapters").is_dir():
        raise FileNotFoundError(f"{ROOT}: no chapters/ here; the ledgers need the whole project")
    found: defaultdict[tuple[str, int], set[Place]] = defaultdict(set)
    for path in [*sorted((ROOT / "dsv3").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]:
        for name, kind, number in tags_of_source(path.read_text(encoding="utf-8")):
            found[kind, number].add(Place(path.relative_to(ROOT).as_posix(), name))
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        section = ""
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                section = ([section] + re.findall(r"^#+ (.+)$", source, re.MULTILINE))[-1]
            if cell["cell_type"] == "code":
                for line in source.splitlines():
                    for kind, number in tags(line.partition("#")[2]):
                        found[kind, number].add(Place(f"chapters/{path.name}", cell["id"], section))
    return {key: tuple(sorted(value)) for key, value in found.items()}


def load(name: str) -> list[dict]:
    """One of the data files beside this module: "equations", "facts", "misreadings"."""
    return json.loads(files("dsv3.book").joinpath(name + ".json").read_text(encoding="utf-8"))


def split(found: tuple[Place, ...]) -> tuple[list[Place], list[Place], list[Place]]:
    """Places in the package, in the tests, in chapters."""
    return (
        [place for place in found if place.file.startswith("dsv3/")],
        [place for place in found if place.file.startswith("tests/")],
        [place for place in found if place.chapter],
    )


def equation_ledger() -> Markdown:
    """Equations 1-25 of the report: what, computed where, held by which test, taught where."""
    rows = []
    for equation in load("equations"):
        code, tests, cells = split(places().get(("eq.", equation["number"]), ()))
        rows.append(
            (
                equation["number"],
                f"${equation['tex']}$<br>{equation['about']}",
                f"{_links(code)}<br>{_links(tests)}",
                _links(cells),
            )
        )
    return Markdown(markdown_table(("eq.", "equation", "computed by, held by", "taught in"), rows))


def fact_ledger() -> Markdown:
    """Facts that the book states, their source, and the tests and cells that recompute them."""
    rows = []
    for fact in load("facts"):
        _, tests, cells = split(places().get(("fact", fact["number"]), ()))
        rows.append((fact["number"], fact["fact"], fact["source"], _links([*cells, *tests])))
    return Markdown(markdown_table(("no.", "fact", "source", "recomputed by"), rows))


def misreadings(chapter: int) -> Markdown:
    """What is often read about a chapter's subject, and what is right."""
    return Markdown(
        markdown_table(
            ("often read", "right"),
            [
                (row["often"], row["right"])
                for row in load("misreadings")
                if row["chapter"] == chapter
            ],
        )
    )


def _links(found: list[Place], most: int = 3) -> str:
    links = list(dict.fromkeys(place.link for place in found))  # cells of one section: one link
    return ", ".join(links[:most]) + (f" and {len(links) - most} more" if len(links) > most else "")
