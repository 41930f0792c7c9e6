"""Generated arithmetic: every answer is right, held-out pairs never appear in training."""

import re
from collections import Counter

import numpy as np
import pytest

from dsv3 import data
from dsv3.errors import DSV3Error


@pytest.fixture(scope="module")
def train():
    return data.arithmetic_documents(1)


@pytest.fixture(scope="module")
def held_out():
    return data.arithmetic_documents(1, held_out=True)


def lines(documents: list[str]) -> list[str]:
    """All lines but chats and recall."""
    return [line for text in documents if data.USER not in text
            for line in text.removeprefix(data.BOS).removesuffix(data.EOS).splitlines()
            if not line.startswith(("let ", "get "))]


def check(line: str) -> tuple[int, int]:
    """Prove one line right and return its two numbers, as the sum or the product uses them."""
    if found := re.fullmatch(r"(\d+) ([<>]) (\d+) is (true|false)", line):
        a, sign, b, truth = found.groups()
        assert ((int(a) < int(b)) if sign == "<" else int(a) > int(b)) == (truth == "true"), line
        return int(a), int(b)
    if ", " in line:
        equation, solution = line.split(", ")
        name, value = solution.split(" = ")
        left, right = equation.replace(name, value).split(" = ")
    else:
        left, right = line.split(" = ")
    a, sign, b = left.split()
    a, b, result = int(a), int(b), int(right)
    if sign == "+":
        assert a + b == result, line
        return a, b
    if sign == "-":
        assert a - b == result, line
        return (result, b) if result >= 0 else (a, -result)
    if sign == "*":
        assert a * b == result, line
        return a, b
    assert sign == "/" and b * result == a, line
    return b, result


def test_all_answers_are_right_and_pairs_lie_on_their_side(train, held_out):
    for documents, side in ((train, False), (held_out, True)):
        for line in lines(documents):
            pair = check(line)
            assert data.is_held_out(*pair) == side, line
            assert data.is_held_out(*pair[::-1]) == side, line


def test_no_operation_in_training_shows_a_held_out_pair(train):
    for line in lines(train):
        numbers = [int(n) for n in re.findall(r"\d+", line.split(",")[0])]
        if len(numbers) > 1:
            assert not data.is_held_out(*numbers[:2]) or "x" in line or "?" in line, line


def test_chats_ask_and_answer(train):
    chats = [text for text in train if data.USER in text]
    turn = re.compile(f"{re.escape(data.USER)}(.*?){re.escape(data.ASSISTANT)}(.*?)"
                      + re.escape(data.EOS))
    for text in chats:
        turns = turn.findall(text)
        assert text == data.BOS + "".join(
            data.USER + q + data.ASSISTANT + a + data.EOS for q, a in turns)
        for question, answer in turns:
            if question.startswith("What is "):
                line = f"{question[8:-1]} = {answer}"
            elif question.startswith("Solve "):
                line = f"{question[6:-1]}, {answer}"
            else:
                line = f"{question[3:-1]} is {({'yes': 'true', 'no': 'false'})[answer]}"
            assert not data.is_held_out(*check(line))
    assert 0.15 < len(chats) / len(train) < 0.25


def test_half_of_all_lines_are_sums_mostly_of_two_digits(train):
    every = lines(train)
    sums = [line for line in every if re.fullmatch(r"\d+ \+ \d+ = \d+", line)]
    assert 0.47 < len(sums) / len(every) < 0.53
    digits = Counter(tuple(map(len, re.findall(r"\d+", line)[:2])) for line in sums)
    assert digits[2, 2] > 0.6 * len(sums)
    kinds = Counter(re.sub(r"\d+", "n", line) for line in every)
    assert kinds["n - n = -n"] > 0.02 * len(every) and kinds["n * n = n"] > 0.05 * len(every)
    assert kinds["x + n = n, x = n"] > 0.02 * len(every) < 2 * kinds["n / n = n"]
    # Most of the sums that may be trained on are, so that what is missing was held out.
    seen = {tuple(map(int, re.findall(r"\d+", line)[:2])) for line in sums}
    assert len(seen & set(data.sums(False))) > 0.85 * len(data.sums(False))


def test_a_tenth_of_the_pairs_is_held_out_evenly():
    held, kept = data.sums(True), data.sums(False)
    assert len(held) + len(kept) == 8100 and not set(held) & set(kept)
    assert set(held) == {(b, a) for a, b in held}
    assert 0.09 < len(held) / 8100 < 0.11
    # For every last digit of each number, so that no column of a sum is missing from training.
    ends = Counter((a % 10, b % 10) for a, b in held)
    assert len(ends) == 100 and max(ends.values()) < 20
    assert not any(data.is_held_out(a, b) for a in range(10) for b in range(10))


def test_equal_seeds_give_equal_documents(train):
    assert data.arithmetic_documents(1)[:50] == train[:50]
    assert data.arithmetic_documents(2)[:50] != train[:50]


def test_recall_asks_for_what_was_given():
    rng = np.random.default_rng(0)
    distances = []
    for _ in range(100):
        text = data.recall_document(rng, 60, 6, 9)
        assert text.startswith(data.BOS) and text.endswith("\n" + data.EOS)
        rows = text.removeprefix(data.BOS).removesuffix(data.EOS).splitlines()
        assert len(rows) == 60
        given, asked = {}, Counter()
        for number, row in enumerate(rows):
            if found := re.fullmatch(r"let ([a-wyz]) = (\d\d)", row):
                assert found[1] not in given
                given[found[1]] = (found[2], number)
            elif found := re.fullmatch(r"get ([a-wyz]) = (\d\d)", row):
                assert given[found[1]][0] == found[2]
                asked[found[1]] += 1
                if asked[found[1]] == 1:
                    distances.append(number - given[found[1]][1])
            else:
                check(row)
        assert len(given) == 6 and asked.total() == 9
    assert min(distances) == 1 and max(distances) > 40 and np.median(distances) > 5


def test_recall_that_does_not_fit_is_refused():
    rng = np.random.default_rng(0)
    assert data.recall_document(rng, 2, 1, 1).count("\n") == 2
    assert data.recall_document(rng, 50, 25, 25).count("let ") == 25
    for lines_, lets, asks in ((2, 1, 2), (5, 0, 1), (60, 26, 1)):
        with pytest.raises(DSV3Error, match="does not fit"):
            data.recall_document(rng, lines_, lets, asks)


def test_recall_documents_have_all_lengths(train):
    recall = [text.count("\n") for text in train if "let " in text]
    assert 0.15 < len(recall) / len(train) < 0.25
    assert min(recall) == 3 and max(recall) > 70
    assert 10 < np.median(recall) < 25
