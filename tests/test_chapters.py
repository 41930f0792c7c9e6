"""Every chapter has the same parts in the same order, so that a reader finds them.

Chapters 1 to 3 follow the pattern of the first edition in full; chapter 8 was written before it
and has the parts that all share. Chapters 4 to 7 are of the second edition: the question first,
one story of at most 5,000 words, and the workshop after it.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from dsv3.book import ledger
from dsv3.book.count import core_path, count
from dsv3.viz.widgets import __all__ as widgets_of_the_book

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
TAUGHT = [path for path in CHAPTERS if path.name[:2] in ("01", "02", "03")]
SECOND = [path for path in CHAPTERS if path.name[:2] in ("04", "05", "06", "07")]


def name_of(path: Path) -> str:
    return path.stem


@pytest.fixture(params=CHAPTERS, ids=name_of)
def chapter(request) -> dict:
    """id -> cell, in order."""
    return {cell.id: cell for cell in nbformat.read(request.param, as_version=4).cells}


@pytest.fixture(params=TAUGHT + SECOND, ids=name_of)
def taught(request) -> dict:
    return {cell.id: cell for cell in nbformat.read(request.param, as_version=4).cells}


@pytest.fixture(params=TAUGHT, ids=name_of)
def first_edition(request) -> dict:
    return {cell.id: cell for cell in nbformat.read(request.param, as_version=4).cells}


@pytest.fixture(params=SECOND, ids=name_of)
def second_edition(request) -> dict:
    return {cell.id: cell for cell in nbformat.read(request.param, as_version=4).cells}


def test_the_book_has_its_chapters_in_order():
    assert [path.name for path in CHAPTERS] == [
        "00_start_here.ipynb",
        "01_attention.ipynb",
        "02_mla.ipynb",
        "03_moe_gating.ipynb",
        "04_fp8.ipynb",
        "05_mtp.ipynb",
        "06_training.ipynb",
        "07_parallelism.ipynb",
        "08_full_model.ipynb",
    ]
    for path in TAUGHT + SECOND:
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


def test_parts_of_a_chapter_of_the_first_edition_stand_in_order(first_edition):
    taught, ids = first_edition, list(first_edition)
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


def test_parts_of_a_chapter_of_the_second_edition_stand_in_order(second_edition):
    ids = list(second_edition)
    parts = [
        "title",
        "setup-text",
        "setup",
        "map",
        "aims",
        "going-further",
        "oracle",
        "misreadings",
        "exercises",
        "summary",
        "quiz",
        "next",
    ]
    places = [ids.index(part) for part in parts]
    assert places[0] == 0 and places[-1] == len(ids) - 1
    assert places == sorted(places)
    assert "model_map" in second_edition["map"].source and "lit=" in second_edition["map"].source
    assert second_edition["going-further"].source.startswith("## Going further\n")
    assert "| Reading | " in second_edition["title"].source
    assert any("book.notation_table([" in cell.source for cell in second_edition.values())


def test_the_question_comes_first(second_edition):
    """Within 150 words of the title, with a number in it."""
    _, _, told = second_edition["title"].source.rpartition("(measured) |\n")
    question = told.partition("?")[0] + "?"
    assert "?" in told and len(question.split()) <= 150
    assert re.search(r"\d", question)


@pytest.mark.parametrize("path", SECOND, ids=name_of)
def test_the_story_is_short_and_drawn(path):
    counts = count(path)
    assert counts.words <= 5000
    assert counts.verdicts <= 8
    assert counts.schematics >= 5
    assert counts.exercises >= 6


def test_two_gaps_stand_in_the_story(second_edition):
    """And there is one exercise in finding a fault, and one in building it again."""
    ids = {cell.id for cell in core_path(list(second_edition.values()))}
    assert sum(id.startswith("ex-") and id.endswith("-text") for id in ids) >= 2
    texts = [cell.source for id, cell in second_edition.items() if id.endswith("-text")]
    for kind in ("Debug", "Rebuild"):
        assert sum(f"\n*{kind} · " in text for text in texts) == 1, kind


def test_often_read_is_said_once_a_section(second_edition):
    text = "\n".join(
        cell.source
        for cell in core_path(list(second_edition.values()))
        if cell.cell_type == "markdown"
    )
    for section in re.split(r"^##+ ", text, flags=re.MULTILINE):
        assert len(re.findall(r"\boften read", section, re.IGNORECASE)) <= 1, section[:60]


def test_promises_are_kept():
    """A cell that promises something for later has the tag promise-NAME; kept-NAME is the tag of
    the cell that keeps it, further on in the book."""
    tags = [
        (tag, path.stem, cell.id)
        for path in CHAPTERS
        for cell in nbformat.read(path, as_version=4).cells
        for tag in cell.metadata.get("tags", [])
    ]
    order = [tag for tag, *_ in tags]
    promised = {tag.removeprefix("promise-") for tag in order if tag.startswith("promise-")}
    kept = {tag.removeprefix("kept-") for tag in order if tag.startswith("kept-")}
    assert promised == kept and promised
    for name in promised:
        assert order.index(f"promise-{name}") < order.index(f"kept-{name}"), name


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
    names = "|".join(name for name in widgets_of_the_book if name != "Drawing")
    widgets = [
        cell
        for cell in taught.values()
        if cell.cell_type == "code" and re.search(rf"^({names})\(", cell.source, re.MULTILINE)
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
