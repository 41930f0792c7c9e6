"""Notebooks are whole. nbval passes a cell that was never executed, so that is checked here."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dsv3.book.saved import WIDGET

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "chapters").rglob("*.ipynb")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_every_code_cell_was_executed_in_order(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_output_is_an_error_or_a_warning(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_saved_clean(notebook):
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata  # a site that shows notebooks refuses these
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    views = [
        cell.id
        for cell in code_cells(notebook)
        for output in cell.outputs
        if WIDGET in output.get("data", {})
    ]
    assert views == [], "a stored widget shows an error where its kernel is gone"
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))


def test_code_cells_fit_on_a_screen(notebook):
    for cell in code_cells(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= 25, f"{cell.id}: {len(lines)} lines"
        assert max(map(len, lines)) <= 79, f"{cell.id}: {max(map(len, lines))} columns"


def test_small_enough_to_be_shown():
    for path in NOTEBOOKS:
        assert path.stat().st_size < 1 << 20, path.name


def test_no_raw_tensor_and_no_address_is_printed(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            texts = [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
            for text in texts:
                assert not re.search(r"tensor\(|array\(| at 0x[0-9a-f]+", text), (cell.id, text)


def test_every_picture_says_what_is_to_be_seen(notebook):
    """In the metadata of the image and, for pages that do not read those, as plain text."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                alt = output.metadata["image/png"]["alt"]
                assert len(alt.split()) >= 8, f"{cell.id}: {alt}"
                assert output.data["text/plain"] == f"[Figure: {alt}]"
        if cell.cell_type == "markdown":
            assert not re.search(r"!\[\s*\]\(|<img(?![^>]*alt=)", cell.source), cell.id


def anchors(notebook) -> set[str]:
    """What #... can point at: headings, as JupyterLab and GitHub name them."""
    titles = re.findall(
        r"^#+ (.*)$",
        "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"),
        re.MULTILINE,
    )
    return {title.replace(" ", "-") for title in titles} | {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    notebook = nbformat.read(path, as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    texts += [
        "".join(output.data["text/markdown"])
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]
    for text in texts:
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in link:
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), link
            if anchor:
                assert unquote(anchor) in anchors(nbformat.read(target, as_version=4)), link


def test_no_cell_is_called_by_a_name_that_jupyterlab_does_not_show(notebook):
    """Sections have headings and links; what a cell is called stands nowhere on the page."""
    ids = {cell.id for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells}
    for cell in notebook.cells:
        texts = (
            [cell.source]
            if cell.cell_type == "markdown"
            else [
                output.data["text/markdown"]
                for output in cell.get("outputs", [])
                if "text/markdown" in output.get("data", {})
            ]
        )
        for text in texts:
            named = set(re.findall(r"`([\w-]+)`", text)) & {id for id in ids if "-" in id}
            assert not named and "misread-" not in text, (cell.id, named)


def test_the_package_is_imported_before_torch(notebook):
    """``import dsv3`` sets how torch's threads wait; torch reads that once, when it is loaded."""
    source = "\n".join(cell.source for cell in code_cells(notebook))
    first = {
        name: re.search(rf"^(?:import|from) {name}\b", source, re.MULTILINE)
        for name in ("dsv3", "torch")
    }
    assert first["dsv3"].start() < first["torch"].start()


def test_imports_come_with_the_book(notebook):
    """What `make lab` installs is enough: the core and the extra "book"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["book"]
    book = {canonicalize_name(Requirement(text).name) for text in texts} | {"dsv3"}
    homes = packages_distributions()
    for cell in code_cells(notebook):
        if cell.source.startswith("%%"):
            continue
        source = "\n".join(
            "pass" if line.lstrip().startswith(("%", "!")) else line
            for line in cell.source.splitlines()
        )
        for node in ast.walk(ast.parse(source)):
            names = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in (name.split(".")[0] for name in names):
                if name not in sys.stdlib_module_names | {"dsv3"}:
                    assert {canonicalize_name(home) for home in homes.get(name, [])} & book, name
