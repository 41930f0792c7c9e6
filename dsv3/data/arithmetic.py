"""The third domain: arithmetic made by rule, with answers, so that right and wrong can be counted.

One line is one task::

    37 + 45 = [7+5=12, 3+4+1=8] 82        x + 7 = 12, x = 5
    8 - 12 = -4                           ? * 6 = 54, ? = 9
    56 / 7 = 8                            37 < 45 is true

About half of all lines are sums. A sum of longer numbers shows its working in brackets: one
column after another from the right, with what is carried, as it is taught at school. Without it a
small model must find the whole rule before it gets any sum right, and a million tokens are not
enough for that; with it, each step is a table of one-digit sums or a copy. The other kinds are
mostly of such table facts.

Every tenth pair of numbers (a fixed hash of the unordered pair) is held out from every kind of
task: neither a + b nor b + a, nor (a + b) - b, nor x + b = (a + b) is ever trained on. A model
that is right there has learned to add, not the sums by heart. Pairs of one-digit numbers are never
held out; they are the table that everyone must know by heart, and the columns of longer sums.

A fifth of the documents is in chat form. Three in ten ask for memory over a distance: names are
given values, arithmetic follows, and later lines ask for the values::

    let q = 58
    4 * 3 = 12
    get q = 58

Both lines write the name after a space, so that it is the same token in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_lowercase

import numpy as np

from dsv3.data.vocabulary import ASSISTANT, BOS, EOS, USER
from dsv3.errors import DSV3Error

# Characters; a token has 1.2 of them.
TRAIN_CHARACTERS, HELD_OUT_CHARACTERS = 1_110_000, 48_000

# Names for values to recall; x is the unknown of the equations.
NAMES = ascii_lowercase.replace("x", "")

# Kind of task -> share of lines; in recall documents, which need short lines, without the sums.
_KINDS = {
    "sum": 0.5,
    "difference": 0.14,
    "product": 0.09,
    "quotient": 0.07,
    "equation": 0.08,
    "missing": 0.05,
    "comparison": 0.07,
}
# Kinds that are one short line, for what stands between a fact and the question about it.
SHORT_LINES = {"difference": 0.3, "product": 0.3, "quotient": 0.2, "comparison": 0.2}
_SHORT_KINDS = {kind: share for kind, share in _KINDS.items() if kind != "sum"}
# Digits of the two numbers -> share, in sums and in other kinds.
_SUM_DIGITS = {(2, 2): 0.82, (1, 2): 0.04, (2, 1): 0.04, (1, 1): 0.06, (3, 3): 0.04}
_DIGITS = {(1, 1): 0.7, (1, 2): 0.1, (2, 1): 0.1, (2, 2): 0.1}


def is_held_out(a: int, b: int) -> bool:
    """Whether the unordered pair of numbers, at least one above 9, is kept from training."""
    small, large = sorted((abs(a), abs(b)))
    # Fibonacci hashing: the high bits of a product with 2^32 / golden ratio are well mixed.
    mixed = (large * 1000 + small) * 2_654_435_769 % 2**32
    return large > 9 and (mixed >> 16) % 10 == 0


def sums(held_out: bool) -> list[tuple[int, int]]:
    """All ordered pairs of two-digit numbers (10 to 99) that are, or are not, held out."""
    return [(a, b) for a in range(10, 100) for b in range(10, 100) if is_held_out(a, b) == held_out]


def working(a: int, b: int) -> str:
    """The columns of a + b from the right, ``"[7+5=12, 3+4+1=8] "``; empty for one-digit numbers.

    A carry is the last summand of its column. Where only one digit is left it is copied.
    """
    columns, carry = [], 0
    while a or b:
        digits = [number % 10 for number in (a, b) if number] + [1] * carry
        step = "+".join(map(str, digits))
        columns.append(step if len(digits) == 1 else f"{step}={sum(digits)}")
        a, b, carry = a // 10, b // 10, int(sum(digits) > 9)
    return f"[{', '.join(columns)}] " if len(columns) > 1 else ""


def final_answer(text: str) -> str:
    """What an answer comes to: its first line without the working, ``"82"``."""
    return text.split("\n")[0].rpartition("]")[2].strip()


def task(
    rng: np.random.Generator, held_out: bool = False, kinds: dict[str, float] = _KINDS
) -> tuple[str, str]:
    """One line of arithmetic as (question, answer), ``("7 + 5 =", "12")``.

    Its pair of numbers is held out or not, as asked; kinds: share by kind of task.
    """
    kind = choose(rng, kinds)
    while True:
        question, answer, pair = _draw(rng, kind)
        if is_held_out(*pair) == held_out:
            return question, answer


def recall_document(
    rng: np.random.Generator, lines: int, lets: int, asks: int, held_out: bool = False
) -> str:
    """``lines`` lines between begin and end token: ``lets`` values, ``asks`` questions, arithmetic.

    A value is given as ``let q = 58`` and later asked for as ``get q = 58``; places are random,
    but in half of the documents all values come first. Of the names given so far, one that was
    asked for least often is asked for: the answer should be far away, not in the line before.
    Names are single letters, so there are at most 25 lets.
    """
    if not 1 <= lets <= len(NAMES) or lets + asks > lines:
        raise DSV3Error(
            "does not fit",
            where="recall document",
            found=f"{lets} lets and {asks} asks in {lines} lines",
            expected=f"1 to {len(NAMES)} lets, and lets + asks at most lines",
        )
    kinds = ["let"] * (lets - 1) + ["get"] * asks
    if rng.random() < 0.5:
        kinds = rng.permutation(kinds).tolist()
    places = np.sort(rng.permutation(lines)[: lets + asks])
    special = dict(zip(places.tolist(), ["let", *kinds]))
    names = iter(rng.permutation(list(NAMES)).tolist())
    values: dict[str, int] = {}
    asked: dict[str, int] = {}
    result = []
    for number in range(lines):
        kind = special.get(number)
        if kind is None:
            result.append(" ".join(task(rng, held_out, _SHORT_KINDS)))
            continue
        if kind == "let":
            name = next(names)
            values[name], asked[name] = int(rng.integers(10, 100)), 0
        else:
            fewest = [name for name in asked if asked[name] == min(asked.values())]
            name = fewest[rng.integers(len(fewest))]
            asked[name] += 1
        result.append(f"{kind} {name} = {values[name]}")
    return BOS + "\n".join(result) + "\n" + EOS


def arithmetic_documents(seed: int, held_out: bool = False) -> list[str]:
    """Documents between begin and end token: lines, chats and recall; the same for equal seeds."""
    rng = np.random.default_rng([seed, int(held_out)])
    size, result = HELD_OUT_CHARACTERS if held_out else TRAIN_CHARACTERS, []
    while size > 0:
        form = rng.random()
        if form < 0.5:
            lines = [" ".join(task(rng, held_out)) for _ in range(rng.integers(5, 31))]
            text = BOS + "\n".join(lines) + "\n" + EOS
        elif form < 0.7:
            text = BOS + "".join(_turns(rng, held_out, int(rng.integers(3, 13))))
        else:
            # 3 to 92 lines, 30 to 900 tokens; short ones as often as long ones per doubling.
            lines = int(3 * (93 / 3) ** rng.random())
            lets = int(rng.integers(1, 2 + lines // 4))
            asks = int(rng.integers(lets, 1 + min(2 * lets, lines - lets)))
            text = recall_document(rng, lines, lets, asks, held_out)
        result.append(text)
        size -= len(_plain(text))
    return result


def _draw(rng: np.random.Generator, kind: str) -> tuple[str, str, tuple[int, int]]:
    """Question, answer, and the pair of numbers whose sum or product the line gives away."""
    if kind in ("product", "quotient") or (kind == "missing" and rng.random() < 0.4):
        a, b = int(rng.integers(2, 10)), int(rng.integers(2, 10 if rng.random() < 0.7 else 100))
        if rng.random() < 0.5:
            a, b = b, a
        if kind == "product":
            return f"{a} * {b} =", f"{a * b}", (a, b)
        if kind == "quotient":
            return f"{a * b} / {a} =", f"{b}", (a, b)
        return f"? * {a} = {a * b}, ? =", f"{b}", (a, b)
    digits = choose(rng, _SUM_DIGITS if kind == "sum" else _DIGITS)
    a, b = (int(rng.integers(10 ** (n - 1), 10**n)) for n in digits)
    c = a + b
    if kind == "sum":
        return f"{a} + {b} =", f"{working(a, b)}{c}", (a, b)
    if kind == "missing":
        return f"? + {b} = {c}, ? =", f"{a}", (a, b)
    if kind == "comparison":
        sign = "<>"[rng.integers(2)]
        return f"{a} {sign} {b} is", str(a < b if sign == "<" else a > b).lower(), (a, b)
    if kind == "difference":
        if rng.random() < 0.3:
            return f"{b} - {c} =", f"{-a}", (a, b)
        return f"{c} - {b} =", f"{a}", (a, b)
    if rng.random() < 0.5:
        return f"x + {b} = {c}, x =", f"{a}", (a, b)
    return f"x - {b} = {a}, x =", f"{c}", (a, b)


def _turns(rng: np.random.Generator, held_out: bool, turns: int) -> Iterator[str]:
    for _ in range(turns):
        question, answer = task(rng, held_out)
        if question.endswith(" is"):
            text = f"Is {question.removesuffix(' is')}?"
            answer = "yes" if answer == "true" else "no"
        elif ", " in question:
            equation, unknown = question.split(", ")
            text, answer = f"Solve {equation}.", f"{unknown} {answer}"
        else:
            text = f"What is {question.removesuffix(' =')}?"
        yield USER + text + ASSISTANT + answer + EOS


def choose(rng: np.random.Generator, shares: dict):
    """A key of ``shares`` (what -> share), drawn by its share."""
    draw, keys = rng.random() * sum(shares.values()), list(shares)
    for key in keys[:-1]:
        draw -= shares[key]
        if draw < 0:
            return key
    return keys[-1]


def _plain(text: str) -> str:
    """The text with one character for each special token."""
    for token in (BOS, EOS, USER, ASSISTANT):
        text = text.replace(token, "\n")
    return text
