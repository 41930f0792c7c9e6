"""Every chapter has the same parts in the same order, so that a reader finds them.

The chapters of the book's first part follow the pattern in full. Chapter 8 was written before it
and has the parts that all share.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from dsv3.book import ledger

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
TAUGHT = [path for path in CHAPTERS if path.name[:2] in ("01", "02", "03")]


def name_of(path: Path) -> str:
    return path.stem


@pytest.fixture(params=CHAPTERS, ids=name_of)
def chapter(request) -> dict:
    """id -> cell, in order."""
    return {cell.id: cell for cell in nbformat.read(request.param, as_version=4).cells}


@pytest.fixture(params=TAUGHT, ids=name_of)
def taught(request) -> dict:
    return {cell.id: cell for cell in nbformat.read(request.param, as_version=4).cells}


def test_the_book_has_its_chapters_in_order():
    assert [path.name for path in CHAPTERS][:4] == [
        "00_start_here.ipynb",
        "01_attention.ipynb",
        "02_mla.ipynb",
        "03_moe_gating.ipynb",
    ]
    for path in TAUGHT:
        assert (path.parent / "solutions" / path.name).exists()


def test_head_with_measured_budget(chapter):
    title = chapter["title"].source
    assert re.match(r"# \d · \S", title)
    for row in ("Paper", "Prerequisites", "Budget"):
        assert re.search(rf"^\| {row} \| .+ \|$", title, re.MULTILINE), row
    budget = re.search(
        r"^\| Budget \| (\d+) s on .*, [\d.]+ GB of memory, no download "
        r"\(measured\) \|$",
        title,
        re.MULTILINE,
    )
    assert budget, "run python -m dsv3.book on the chapter"
    aims = chapter["aims"].source
    assert aims.startswith("## What you will be able to do")
    assert 3 <= len(re.findall(r"^\d\. ", aims, re.MULTILINE)) <= 5


def test_end_with_summary_and_the_way_on(chapter):
    text = "\n".join(cell.source for cell in chapter.values() if cell.cell_type == "markdown")
    places = [text.find(f"\n## {part}\n") for part in ("Summary", "Quiz", "What comes next")]
    assert -1 not in places and places == sorted(places)
    quiz = text[places[1] : places[2]]
    assert quiz.count("<details><summary>") >= 4


def test_parts_of_a_taught_chapter_stand_in_order(taught):
    ids = list(taught)
    parts = [
        "title",
        "aims",
        "setup-text",
        "setup",
        "map",
        "notation",
        "oracle",
        "exercises",
        "summary",
        "quiz",
        "next",
    ]
    places = [ids.index(part) for part in parts]
    assert places[0] == 0 and places[-1] == len(ids) - 1
    assert places == sorted(places)
    assert "model_map" in taught["map"].source and "lit=" in taught["map"].source
    assert "book.notation_table(" in taught["notation"].source


def test_the_first_cell_has_a_heading_that_others_can_name(chapter):
    ids = list(chapter)
    assert chapter["setup-text"].source.startswith("## Before you start\n")
    assert ids.index("setup") == ids.index("setup-text") + 1


def test_the_books_sentence_runs_through(chapter):
    assert any("To be, or not to be" in cell.source for cell in chapter.values())


def test_the_oracle_is_transformers_and_says_how_near(taught):
    """In the cell itself or in those right behind it."""
    ids = list(taught)
    at = ids.index("oracle")
    code = [taught[id] for id in ids[at - 3 : at + 3] if taught[id].cell_type == "code"]
    assert any("transformers" in cell.source for cell in code)
    said = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert re.search(r"max\|diff\|[^\n]* < [\d.e-]+: +True", said)


def test_predictions_have_their_answers(taught):
    """Each prompt to predict is answered in a fold further on, each fold is closed."""
    text = "\n".join(cell.source for cell in taught.values() if cell.cell_type == "markdown")
    assert text.count("**Predict before you run.**") >= 2
    assert text.count("<summary>Answer</summary>") >= text.count("**Predict before you run.**")
    assert text.count("<details>") == text.count("</details>")


def test_where_paper_and_code_disagree_is_boxed(taught):
    assert any(
        cell.source.startswith("> **Paper and code.**") or "\n> **Paper and code.**" in cell.source
        for cell in taught.values()
    )


def test_what_is_often_read_stands_beside_what_is_right(taught):
    number = int(re.match(r"# (\d)", taught["title"].source)[1])
    assert any(f"book.misreadings({number})" in cell.source for cell in taught.values())
    assert [row for row in ledger.load("misreadings") if row["chapter"] == number]


def test_every_widget_stores_its_still_picture(taught):
    """With the line that says how to make it move, for those who open the chapter the next day."""
    widgets = [
        cell
        for cell in taught.values()
        if cell.cell_type == "code"
        and re.search(
            r"^(KVCacheCalculator|RoutingExplorer|LoadBalanceSimulator)\(",
            cell.source,
            re.MULTILINE,
        )
    ]
    assert widgets
    for cell in widgets:
        data = cell.outputs[-1].data
        assert {"image/png", "text/plain"} == set(data), cell.id


def test_few_outputs_are_left_uncompared(chapter):
    code = [cell for cell in chapter.values() if cell.cell_type == "code"]
    ignored = [cell.id for cell in code if "NBVAL" in cell.source]
    assert len(ignored) <= max(3, len(code) // 8), ignored
    assert not any("NBVAL_SKIP" in cell.source for cell in code)
