"""A word is explained before it is used, once: ``dsv3/book/terms.json`` says where.

For each chapter of the second edition the file lists terms, how each is written, and the cell that
explains it. Between the aims and that cell the term may not stand, in text or in code that a
reader has to understand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
TERMS = json.loads((ROOT / "dsv3" / "book" / "terms.json").read_text(encoding="utf-8"))
CHAPTERS = {int(path.name[:2]): path for path in (ROOT / "chapters").glob("0*.ipynb")}


def story(chapter: int) -> list:
    """The cells after the aims."""
    cells = nbformat.read(CHAPTERS[chapter], as_version=4).cells
    return cells[[cell.id for cell in cells].index("aims") + 1 :]


def test_the_chapters_of_the_second_edition_list_their_terms():
    for chapter in (4, 5, 6, 7):
        assert len([term for term in TERMS if term["chapter"] == chapter]) >= 12
    names = [term["term"] for term in TERMS]
    assert len(names) == len(set(names)), "a term has one home"


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term["term"].replace(" ", "-"))
def test_no_term_is_used_before_it_is_explained(term):
    cells = story(term["chapter"])
    uses = [cell.id for cell in cells if re.search(term["pattern"], cell.source)]
    assert uses, "the term is not used at all"
    assert uses[0] == term["cell"]
    home = next(cell for cell in cells if cell.id == term["cell"])
    assert home.cell_type == "markdown"
