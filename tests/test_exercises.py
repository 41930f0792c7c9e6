"""Exercises: the gap is open, the solution is right, planted mistakes are caught and named.

A chapter's notebook holds the gaps, its solutions notebook the answers, under the same cell ids;
``dsv3/book/chNN.py`` holds the checks. ``tests/planted/chNN.py`` holds answers with mistakes that
readers make. No kernel is started here: nbval runs the notebooks as they are.
"""

from __future__ import annotations

import importlib
import inspect
import linecache
import re
from pathlib import Path

import nbformat
import pytest
import torch

from dsv3.book.exercise import Verdict, judge, judge_statements, judge_value
from dsv3.book.ready import NotReady

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
CHAPTERS = {path.name[:2]: path for path in sorted((ROOT / "chapters").glob("0[0-7]_*.ipynb"))}
KINDS = ("Warm-up", "Implement", "Explain", "Measure", "Transfer", "Debug", "Rebuild")


def checks(number: str) -> dict:
    """Name -> check of a chapter, in the order of the module."""
    module = importlib.import_module(f"dsv3.book.ch{number}")
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and value.__module__ == module.__name__
        and value.__annotations__.get("return") == "Verdict"
    }


def cells(path: Path) -> dict:
    return {cell.id: cell for cell in nbformat.read(path, as_version=4).cells}


def execute(source: str, names: dict) -> None:
    """Run a cell as a notebook would: its source can be found, as Triton's decorator needs."""
    file = f"<cell {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)


def cell_id(name: str) -> str:
    return "ex-" + name.replace("_", "-")


EXERCISES = [(number, name) for number in CHAPTERS for name in checks(number)]
exercises = pytest.mark.parametrize(
    "number, name", EXERCISES, ids=[f"{n}-{name}" for n, name in EXERCISES]
)


def test_there_are_exercises():
    assert {number for number, _ in EXERCISES} >= {"00", "01", "02", "03"}


@pytest.mark.parametrize("number", CHAPTERS)
def test_at_least_five_a_chapter_of_rising_difficulty(number):
    book = cells(CHAPTERS[number])
    end = list(book).index("exercises") if "exercises" in book else 0
    placed = [
        (place > end, cell.source)
        for place, (id, cell) in enumerate(book.items())
        if re.fullmatch(r"ex-.*-text", id)
    ]
    texts = [text for _, text in placed]
    heads = [
        re.search(rf"^\*({'|'.join(KINDS)}) · ([★☆]{{3}}) · \d+ minutes?\*$", text, re.MULTILINE)
        for text in texts
    ]
    assert len(texts) == len(checks(number)) >= 5 and all(heads)
    assert len({head[1] for head in heads}) >= 4
    stars = [(at_end, head[2].count("★")) for (at_end, _), head in zip(placed, heads)]
    assert stars == sorted(stars) and len(set(stars)) >= 2, "in the story, and again at the end"
    numbers = [re.match(r"### Exercise (\d+) · ", text) for text in texts]
    assert [int(match[1]) for match in numbers] == list(range(1, len(texts) + 1))


@exercises
def test_gap_help_and_solution_stand_where_they_should(number, name):
    chapter = CHAPTERS[number]
    book, solved = cells(chapter), cells(chapter.parent / "solutions" / chapter.name)
    gap, text = book[cell_id(name)], book[cell_id(name) + "-text"]
    assert f"check.{name}(" in gap.source.splitlines()[-1]
    assert ("# your" in gap.source) or "None" in gap.source
    folded = re.findall(
        r"<details><summary>(\w+)</summary>\n\n(.+?)</details>", text.source, re.DOTALL
    )
    assert [title for title, _ in folded] == ["Help", "Hint", "Solution"]
    assert all(len(inside.split()) >= 4 for _, inside in folded)
    assert f"(solutions/{chapter.name})" in folded[-1][1]
    said = gap.outputs[-1].data["text/plain"]
    assert said.startswith("[open] "), said
    said = solved[cell_id(name)].outputs[-1].data["text/plain"]
    assert said.startswith("[right] "), said


@pytest.mark.parametrize("number", CHAPTERS)
def test_solutions_fill_the_readers_gaps(number, monkeypatch):
    """Setup and exercise cells of the chapter, run in order: with gaps, then with solutions."""
    chapter = CHAPTERS[number]
    monkeypatch.chdir(chapter.parent)
    book, solved = cells(chapter), cells(chapter.parent / "solutions" / chapter.name)
    threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        for filled, state in ((False, "open"), (True, "right")):
            names: dict = {"__name__": "__main__"}
            execute(book["setup"].source, names)
            for name in checks(number):
                cell = (solved if filled else book)[cell_id(name)]
                *body, call = cell.source.rstrip().splitlines()
                execute("\n".join(body), names)
                verdict = eval(call, names)
                assert verdict.state == state, verdict
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(grad)


@exercises
def test_an_exercise_in_a_new_kernel_names_the_section_to_run_first(number, name):
    """And with the setup cell run, nothing else is needed (the test above)."""
    book = cells(CHAPTERS[number])
    said = re.search(
        r"“(.+)”",
        str(
            pytest.raises(
                NotReady, exec, book[cell_id(name)].source, {"__name__": "__main__"}
            ).value
        ),
    )[1]
    heading = next(id for id, cell in book.items() if cell.source.startswith(f"## {said}\n"))
    assert list(book)[list(book).index(heading) + 1] == "setup"


def test_how_many_exercises_chapter_0_says_there_are():
    said = cells(CHAPTERS["00"])["exercises"].source
    counts = {number: len(checks(number)) for number in CHAPTERS}
    words = dict(enumerate("zero one two three four five six seven eight nine ten".split()))
    others = [counts[number] for number in ("01", "02", "03")]
    assert f"This chapter has {words[counts['00']]}" in said
    assert f"have {words[min(others)]} to {words[max(others)]} each" in said
    last = next((ROOT / "chapters").glob("08_*.ipynb"))
    assert "has none yet" in said and not [id for id in cells(last) if id.startswith("ex-")]


@exercises
def test_planted_mistakes_are_caught_and_named(number, name):
    planted = importlib.import_module(f"planted.ch{number}").PLANTED
    wrong = planted[name]
    assert len(wrong) >= 2
    said = []
    for answer, phrase in wrong:
        verdict = checks(number)[name](answer)
        assert verdict.state == "wrong", f"{phrase}: {verdict}"
        assert phrase in verdict.message, verdict
        said.append(verdict.message)
    assert len(set(said)) >= 2, "two mistakes, two messages"


@pytest.mark.parametrize("number", CHAPTERS)
def test_no_planted_mistake_without_its_exercise(number):
    assert set(importlib.import_module(f"planted.ch{number}").PLANTED) == set(checks(number))


# --- the judges -------------------------------------------------------------------------------


def halve(x):
    return x / 2


CASES = [(torch.tensor([2.0, 4.0]),), (torch.tensor([1e4, -6.0, 8.0]),)]


def verdict(answer, **options) -> Verdict:
    return judge("halve", answer, halve, CASES, **options)


@pytest.mark.parametrize(
    "answer, state, message",
    [
        (halve, "right", "all 2 inputs"),
        (lambda x: None, "open", "nothing written"),
        (lambda x: ..., "open", "nothing written"),
        (None, "open", "nothing written"),
        (lambda x: 1 / 0, "wrong", "on input 1 (shape (2,)) your function stops with ZeroDivision"),
        (
            lambda x: x / 2 if len(x) == 2 else None,
            "wrong",
            "on input 2 (shape (3,)) your function returns nothing",
        ),
        (lambda x: x.div_(2), "wrong", "changes its input"),
        (lambda x: (x / 2)[:1], "wrong", "has shape (1,), expected (2,)"),
        (lambda x: x * torch.nan, "wrong", "NaN"),
        (lambda x: 1.0, "wrong", "should be a tensor and is of type float"),
        (
            lambda x: x / 4,
            "wrong",
            "you halved twice (on input 1 (shape (2,)) first at [0]: 0.5, not 1)",
        ),
        (
            lambda x: x / 2 + 1e-3,
            "wrong",
            "on input 1 (shape (2,)) the result is off by up to 0.0005 (relative to the largest "
            "value), first at [0]: 1.001, not 1",
        ),
        (halve(torch.ones(2)), "wrong", "give the function itself, not a tensor of shape (2,)"),
    ],
)
def test_judge_says_what_is_wrong(answer, state, message):
    found = verdict(
        answer, mistakes={"you never halve": lambda x: x, "you halved twice": lambda x: x / 4}
    )
    assert (found.state, found.name) == (state, "halve") and message in found.message
    assert repr(found) == f"[{state}] halve: {found.message}"


def test_not_implemented_is_an_open_gap():
    def gap(x):
        raise NotImplementedError

    assert verdict(gap).state == "open"


def test_a_mistake_must_explain_all_inputs():
    """Right on the first input and wrong on the second is not "you never halve"."""
    found = verdict(
        lambda x: x / 2 if len(x) == 2 else x, mistakes={"you never halve": lambda x: x}
    )
    assert found.state == "wrong" and "off by up to 0.5" not in found.message
    assert "input 2" in found.message


def test_a_mistake_that_is_right_on_the_cases_names_nobody():
    found = verdict(lambda x: x / 3, mistakes={"innocent": halve, "guilty": lambda x: x / 3})
    assert found.message.startswith("guilty (") and "innocent" not in found.message


def test_all_mistakes_that_fit_are_named():
    """These inputs cannot tell them apart, and the reader knows which it was."""
    found = verdict(
        lambda x: -x / 2,
        mistakes={"minus": lambda x: -x / 2, "other": halve, "sign": lambda x: x / -2},
    )
    assert found.message.startswith("minus; or: sign (on input 1 ")
    found = judge_value("n", 3, 4, {3.0: "one missing", 3.0001: "counted from 0", 5: "one more"})
    assert found.message == "one missing; or: counted from 0"
    found = judge_statements(
        "s",
        {"a": True, "b": True, "c": None},
        dict(a=False, b=False, c=True),
        dict(a="A", b="B", c="C"),
    )
    assert found.message == 'look again at "a": A; and at "b": B'


@pytest.mark.parametrize(
    "found, wanted, said",
    [
        (
            torch.tensor([[1.0, 2], [9, 9]]),
            torch.tensor([[1.0, 2], [3, 4]]),
            "first at [1, 0]: 9, not 3",
        ),
        (torch.tensor([1e4, 1.0]), torch.tensor([1e4, 7.0]), "first at [1]: 1, not 7"),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), "first at [1]: nan, not 2"),
        (torch.tensor([1, 5]), torch.tensor([1, 2]), "first at [1]: 5, not 2"),
        ([torch.zeros(2), torch.ones(2)], [torch.zeros(2)] * 2, "first at [1][0]: 1, not 0"),
        ({"a": 1, "b": [2, 3]}, {"a": 1, "b": [2, 4]}, "first at ['b'][1]: 3, not 4"),
        ((1, "x"), (1, "y"), "the result is 'x', expected 'y'"),
        (2.5, 5.0, "2.5, not 5"),
        (torch.tensor([1 + 2j]), torch.tensor([1 - 2j]), "first at [0]: (1+2j), not (1-2j)"),
    ],
)
def test_the_first_element_that_differs_is_shown(found, wanted, said):
    for mistakes in (None, {"slip": lambda: found}):
        message = judge("f", lambda: found, lambda: wanted, [()], mistakes).message
        assert said in message and message.startswith("slip" if mistakes else "on input 1")


def test_tolerance_is_relative_to_large_values_and_absolute_below_one():
    assert judge("f", lambda: 1000.005, lambda: 1000.0, [()]).state == "right"
    assert judge("f", lambda: 1.00002, lambda: 1.0, [()]).state == "wrong"
    assert judge("f", lambda: 2e-5, lambda: 0.0, [()]).state == "wrong"


@pytest.mark.parametrize(
    "found, wanted, state",
    [
        ([1, [2, "a"]], [1, [2, "a"]], "right"),
        ([1, [2, "b"]], [1, [2, "a"]], "wrong"),
        ((1, 2), [1, 2], "right"),
        ([1], [1, 2], "wrong"),
        ({"a": 1}, {"a": 1}, "right"),
        ({"b": 1}, {"a": 1}, "wrong"),
        (True, True, "right"),
        (1, True, "wrong"),
        (True, 1, "wrong"),
        (torch.tensor(3), 3, "right"),
        (float("nan"), 1.0, "wrong"),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j]), "right"),
        (torch.tensor([1.0]), torch.tensor([1 + 2j]), "wrong"),
        (torch.tensor([-torch.inf, 1]), torch.tensor([-torch.inf, 1]), "right"),
        (torch.tensor([0.0, 1]), torch.tensor([-torch.inf, 1]), "wrong"),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), "right"),
        (torch.tensor([True]), torch.tensor([False]), "wrong"),
    ],
)
def test_results_of_every_kind(found, wanted, state):
    assert judge("f", lambda: found, lambda: wanted, [()]).state == state


@pytest.mark.parametrize(
    "answer, state, message",
    [
        (70272, "right", "70,272 bytes"),
        (70_273, "right", ""),
        (None, "open", ""),
        (1152, "wrong", "one layer"),
        (35_136, "wrong", "2 times too small"),
        (140_544.0, "wrong", "2 times too large"),
        (-70272, "wrong", "not near"),
        (True, "wrong", "a number"),
        ("70272", "wrong", "a number"),
        (torch.tensor(70272.0), "right", ""),
        (0, "wrong", "not near"),
        (70272 * 1048, "wrong", "this is 1,048 times too large"),
        (70.272, "wrong", "this is 1,000 times too small"),
    ],
)
def test_judge_value(answer, state, message):
    found = judge_value("kv", answer, 70272, {1152: "that is one layer"}, unit="bytes")
    assert found.state == state and message in found.message


@pytest.mark.parametrize(
    "answers, state, message",
    [
        ({"a": True, "b": False}, "right", "all 2"),
        ({"a": None, "b": None}, "open", "nothing"),
        ({"a": True, "b": None}, "open", '"b" has no answer'),
        ({"a": True, "b": True}, "wrong", "b is false"),
        ({"a": True}, "wrong", "['b']"),
        (3, "wrong", "a dict"),
        (None, "open", ""),
    ],
)
def test_judge_statements(answers, state, message):
    found = judge_statements(
        "s", answers, {"a": True, "b": False}, {"a": "a is true", "b": "b is false"}
    )
    assert found.state == state and message in found.message
