"""Generated arithmetic: every answer is right, held-out pairs never appear in training."""

import re
from collections import Counter

import numpy as np
import pytest

from dsv3 import data
from dsv3.errors import DSV3Error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def train():
    return data.arithmetic_documents(1)


@pytest.fixture(scope="module")
def held_out():
    return data.arithmetic_documents(1, held_out=True)


def lines(documents: list[str]) -> list[str]:
    """All lines but chats and recall."""
    return [
        line
        for text in documents
        if data.USER not in text
        for line in text.removeprefix(data.BOS).removesuffix(data.EOS).splitlines()
        if not line.startswith(("let ", "get "))
    ]


def check_working(a: int, b: int, text: str) -> None:
    """Follow the columns of a + b and put the sum together from them."""
    columns, total = text.split(", "), 0
    assert len(columns) == max(len(str(a)), len(str(b)))
    for place, column in enumerate(columns):
        summands, _, result = column.partition("=")
        digits = [str(n)[::-1][place] for n in (a, b) if len(str(n)) > place]
        carry = ["1"] * (a % 10**place + b % 10**place >= 10**place)
        assert summands.split("+") == digits + carry, text
        assert sum(map(int, summands.split("+"))) == int(result or summands), text
        total += (int(result or summands) - len(carry)) * 10**place
    assert total == a + b


def check(line: str) -> tuple[int, int]:
    """Prove one line right and return its two numbers, as the sum or the product uses them."""
    if found := re.fullmatch(r"(\d+) \+ (\d+) = \[(.*)\] (\d+)", line):
        check_working(*map(int, found.group(1, 2)), found[3])
        line = re.sub(r"\[.*\] ", "", line)
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


def test_working_is_shown_where_there_is_more_than_one_column(train):
    assert data.working(37, 45) == "[7+5=12, 3+4+1=8] "
    assert data.working(7, 5) == "" and data.working(305, 95) == "[5+5=10, 0+9+1=10, 3+1=4] "
    assert data.working(3, 40) == "[3+0=3, 4] "
    for line in lines(train):
        if found := re.match(r"(\d+) \+ (\d+) = ", line):
            assert ("[" in line) == (max(map(len, found.groups())) > 1), line


def test_final_answer_leaves_out_the_working():
    assert data.final_answer(" [7+5=12, 3+4+1=8] 82\n3 + 4 = 7") == "82"
    assert data.final_answer(" 12") == "12" and data.final_answer("") == ""
    assert data.final_answer(" [7+5=12, 3") == "[7+5=12, 3"


def test_chats_ask_and_answer(train):
    chats = [text for text in train if data.USER in text]
    turn = re.compile(
        f"{re.escape(data.USER)}(.*?){re.escape(data.ASSISTANT)}(.*?)" + re.escape(data.EOS)
    )
    for text in chats:
        turns = turn.findall(text)
        assert text == data.BOS + "".join(
            data.USER + q + data.ASSISTANT + a + data.EOS for q, a in turns
        )
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
    every = [
        re.sub(r"\[.*\] ", "", line)
        for line in lines([text for text in train if "let " not in text])
    ]
    sums = [line for line in every if re.fullmatch(r"\d+ \+ \d+ = \d+", line)]
    assert 0.47 < len(sums) / len(every) < 0.53
    digits = Counter(tuple(map(len, re.findall(r"\d+", line)[:2])) for line in sums)
    assert digits[2, 2] > 0.6 * len(sums)
    kinds = Counter(re.sub(r"\d+", "n", line) for line in every)
    assert kinds["n - n = -n"] > 0.02 * len(every) and kinds["n * n = n"] > 0.05 * len(every)
    assert kinds["x + n = n, x = n"] > 0.02 * len(every) and kinds["n / n = n"] > 0.05 * len(every)
    # Most of the sums that may be trained on are, so that what is missing was held out.
    seen = {tuple(map(int, re.findall(r"\d+", line)[:2])) for line in sums}
    assert len(seen & set(data.sums(False))) > 0.8 * len(data.sums(False))


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
    assert 0.25 < len(recall) / len(train) < 0.35
    assert min(recall) == 3 and max(recall) > 70
    assert 10 < np.median(recall) < 25
