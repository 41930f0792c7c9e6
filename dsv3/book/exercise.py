"""Exercises that check themselves, and name the mistake instead of saying "wrong".

An exercise is a cell with a gap and a call of its check at the end. Left open it says so, which
is no error: the chapter runs from top to bottom before any exercise is done. A wrong answer is
compared with the answers that common mistakes would give; the check names all that fit. If none
does, it says how far off the answer is and on which input. Either way it shows the first element
that differs, as a place to look.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Verdict:
    """What a check says. state: "open" (nothing written yet), "wrong" or "right"."""

    name: str
    state: str
    message: str

    def __repr__(self) -> str:
        return f"[{self.state}] {self.name}: {self.message}"


def judge(
    name: str,
    answer: Callable,
    right: Callable,
    cases: Sequence[tuple],
    mistakes: Mapping[str, Callable] | None = None,
    tolerance: float = 1e-5,
    praise: str = "",
) -> Verdict:
    """Compare the reader's function with ``right`` on every case.

    cases: tuples of arguments; each call gets copies of its own. mistakes: what to say -> a
    function that makes that mistake; all that agree with the answer on all cases, and differ from
    ``right`` on one, are named. tolerance: of the largest difference, relative to the
    largest value where that is above 1. praise: what the reader now has, said after "right".

    Results may be tensors, arrays, numbers, booleans, strings, and lists, tuples or dicts of them.
    """
    if not callable(answer):
        return (
            _open(name)
            if answer is None or answer is ...
            else Verdict(
                name, "wrong", f"give the function itself, not {_kind(answer)}; leave out the ()"
            )
        )
    found, wanted = [], []
    for number, case in enumerate(cases, 1):
        given = deepcopy(case)
        try:
            result = answer(*given)
        except NotImplementedError:
            return _open(name)
        except Exception as error:
            text = str(error).splitlines()[0] if str(error) else ""
            return Verdict(
                name,
                "wrong",
                f"on {_input(number, case)} your function stops with "
                f"{type(error).__name__}: {text}",
            )
        if result is None or result is ...:
            if number == 1:
                return _open(name)
            return Verdict(
                name,
                "wrong",
                f"on {_input(number, case)} your function returns nothing. Is a return missing?",
            )
        if _difference(given, case) != 0:
            return Verdict(
                name,
                "wrong",
                "your function changes its input in place; whoever gave "
                "it still needs it. Make a copy",
            )
        found.append(result)
        wanted.append(right(*deepcopy(case)))
    worst, where = 0.0, 0
    for number, (result, target) in enumerate(zip(found, wanted)):
        gap = _difference(result, target)
        if isinstance(gap, str) or gap > worst or math.isnan(gap):
            worst, where = gap, number
            if isinstance(gap, str) or math.isnan(gap):
                break
    if not isinstance(worst, str) and worst <= tolerance:
        return Verdict(name, "right", praise or f"equal on {_cases(len(cases))}")
    fitting = [
        message
        for message, mistake in (mistakes or {}).items()
        if _explains(mistake, cases, found, wanted, tolerance)
    ]
    if fitting:
        at, first = next(
            (at, text)
            for at, (result, target) in enumerate(zip(found, wanted))
            if (text := _first_difference(result, target, tolerance))
        )
        return Verdict(
            name, "wrong", f"{_together(fitting)} (on {_input(at + 1, cases[at])} {first})"
        )
    on = f"on {_input(where + 1, cases[where])}"
    if isinstance(worst, str):
        return Verdict(name, "wrong", f"{on} {worst}")
    first = _first_difference(found[where], wanted[where], tolerance)
    if math.isnan(worst):
        return Verdict(name, "wrong", f"{on} the result holds NaN (not a number), {first}")
    return Verdict(
        name,
        "wrong",
        f"{on} the result is off by up to {worst:.2g} (relative to the largest value), {first}",
    )


def judge_value(
    name: str,
    answer,
    right: float,
    mistakes: Mapping[float, str] | None = None,
    tolerance: float = 1e-3,
    unit: str = "",
    praise: str = "",
) -> Verdict:
    """Compare the reader's number; tolerance is relative. None is still open.

    mistakes: the number a mistake gives -> what to say.
    """
    if answer is None or answer is ...:
        return _open(name)
    if isinstance(answer, torch.Tensor) and answer.numel() == 1:
        answer = answer.item()
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return Verdict(name, "wrong", f"a number is asked for, and this is {_kind(answer)}")

    def near(value: float) -> bool:
        return math.isclose(answer, value, rel_tol=tolerance, abs_tol=1e-12)

    if near(right):
        shown = f"{right:,.6g}" if isinstance(right, float) else f"{right:,}"
        return Verdict(name, "right", praise or f"{shown} {unit}".rstrip())
    if fitting := [message for value, message in (mistakes or {}).items() if near(value)]:
        return Verdict(name, "wrong", _together(fitting))
    if answer == 0 or right == 0 or (answer < 0) != (right < 0):
        return Verdict(name, "wrong", "this is not near; go back to the formula")
    side, ratio = (
        ("large", answer / right) if abs(answer) > abs(right) else ("small", right / answer)
    )
    times = f"{ratio:,.0f}" if ratio >= 99.95 else f"{ratio:.3g}"
    return Verdict(name, "wrong", f"this is {times} times too {side}")


def judge_statements(
    name: str,
    answers: Mapping[str, bool | None],
    right: Mapping[str, bool],
    why: Mapping[str, str],
    praise: str = "",
) -> Verdict:
    """Compare true and false with the truth; every wrong one is explained by ``why``."""
    if not isinstance(answers, Mapping):
        return (
            _open(name)
            if answers is None
            else Verdict(
                name,
                "wrong",
                f"a dict of True and False is asked for, and this is {_kind(answers)}",
            )
        )
    if set(answers) != set(right):
        odd = sorted(map(str, set(answers) ^ set(right)))
        return Verdict(name, "wrong", f"keep the keys as they were; these differ: {odd}")
    if all(value is None for value in answers.values()):
        return _open(name)
    wrong = [
        f'"{key}": {why[key]}'
        for key, truth in right.items()
        if answers[key] is not None and bool(answers[key]) != truth
    ]
    if wrong:
        return Verdict(name, "wrong", "look again at " + "; and at ".join(wrong))
    for key in right:
        if answers[key] is None:
            return Verdict(name, "open", f'"{key}" has no answer yet')
    return Verdict(name, "right", praise or f"all {len(right)} statements")


def judge_numbers(
    name: str,
    answer: Mapping[str, int | None] | None,
    right: Mapping[str, int],
    why: Callable[[str, int], str],
    praise: str,
) -> Verdict:
    """Compare a table of whole numbers line by line; why(key, number) explains a wrong one."""
    if answer is None:
        return _open(name)
    if not isinstance(answer, Mapping) or set(answer) != set(right):
        return Verdict(name, "wrong", f"keep the table and its keys: {', '.join(right)}")
    if all(value is None for value in answer.values()):
        return _open(name)
    wrong: dict[str, list[str]] = {}  # what to say -> the lines it is said of
    for key, value in answer.items():
        if value is None or (value == right[key] and not isinstance(value, bool)):
            continue
        whole = isinstance(value, int) and not isinstance(value, bool)
        said = why(key, value) if whole else "a whole number is asked for"
        wrong.setdefault(said, []).append(f'"{key}"')
    if wrong:
        lines = (f"{', '.join(keys)}: {message}" for message, keys in wrong.items())
        return Verdict(name, "wrong", "; ".join(lines))
    missing = [key for key, value in answer.items() if value is None]
    if missing:
        return Verdict(name, "open", f'right so far; "{missing[0]}" has no answer yet')
    return Verdict(name, "right", praise)


def _open(name: str) -> Verdict:
    return Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")


def _together(messages: list[str]) -> str:
    """All mistakes that fit; where these inputs cannot tell them apart, it may be either."""
    return "; or: ".join(messages)


def _cases(count: int) -> str:
    return "the one input tried" if count == 1 else f"all {count} inputs tried"


def _kind(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if isinstance(value, (bool, str)) else f"of type {type(value).__name__}"


def _input(number: int, case: tuple) -> str:
    """Case number, and what it was made of."""
    parts = [
        f"shape {tuple(part.shape)}" if isinstance(part, torch.Tensor) else repr(part)
        for part in case
    ]
    text = ", ".join(part if len(part) <= 40 else part[:37] + "..." for part in parts)
    return f"input {number} ({text})"


def _explains(mistake: Callable, cases, found, wanted, tolerance: float) -> bool:
    """Whether a mistake's results are the reader's, and not right."""
    differs = False
    for case, result, target in zip(cases, found, wanted):
        try:
            other = mistake(*deepcopy(case))
        except Exception:  # the mistake does not even run on this input, the reader's answer did
            return False
        gap = _difference(result, other)
        if isinstance(gap, str) or not gap <= tolerance:
            return False
        apart = _difference(target, other)
        differs = differs or isinstance(apart, str) or not apart <= tolerance
    return differs


def _difference(found, wanted) -> float | str:
    """Largest difference, relative to the largest wanted value where that is above 1; NaN where
    only one side is NaN; a sentence where type, shape or length is another."""
    if isinstance(wanted, Mapping):
        if not isinstance(found, Mapping) or set(found) != set(wanted):
            return f"the result should be a dict with the keys {sorted(map(str, wanted))}"
        return _largest([_difference(found[key], wanted[key]) for key in wanted])
    if isinstance(wanted, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(wanted):
            return f"the result should have {len(wanted)} parts"
        return _largest([_difference(a, b) for a, b in zip(found, wanted)])
    if isinstance(wanted, torch.Tensor) and wanted.dim():
        if not isinstance(found, torch.Tensor):
            return f"the result should be a tensor and is {_kind(found)}"
        if found.shape != wanted.shape:
            return f"the result has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
        if wanted.is_complex() != found.is_complex():
            return f"the result has dtype {found.dtype}, expected {wanted.dtype}"
        return float(_apart(found, wanted).max()) if wanted.numel() else 0.0
    if isinstance(wanted, torch.Tensor):
        wanted = wanted.item()
    if isinstance(found, torch.Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(wanted, (bool, str)) or wanted is None:
        return (
            0.0
            if found == wanted and type(found) is type(wanted)
            else (f"the result is {found!r}, expected {wanted!r}")
        )
    if isinstance(wanted, (int, float)):
        if isinstance(found, bool) or not isinstance(found, (int, float)):
            return f"the result should be a number and is {_kind(found)}"
        if found == wanted or (found != found and wanted != wanted):
            return 0.0
        return abs(found - wanted) / max(abs(wanted), 1.0)
    return 0.0  # anything else is passed through and not compared


def _apart(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """|found - wanted| of every element, relative to the largest wanted one where that is above 1.
    0 for equal infinities, and for NaN where it belongs."""
    a, b = (
        t.detach().to(torch.complex128 if wanted.is_complex() else torch.float64)
        for t in (found, wanted)
    )
    same = (a == b) | (a.isnan() & b.isnan())
    size = b.abs().where(b.abs().isfinite(), 0.0).max().clamp(min=1.0)
    return (a - b).abs().where(~same, 0.0) / size


def _largest(gaps: list) -> float | str:
    for gap in gaps:
        if isinstance(gap, str) or math.isnan(gap):
            return gap
    return max(gaps, default=0.0)


def _first_difference(found, wanted, tolerance: float, place: str = "") -> str:
    """The first element that is off by more than the tolerance, and what it should be; "" if none.

    As in ``_difference``, off is relative to the largest wanted value where that is above 1.
    """
    gap = _difference(found, wanted)
    if isinstance(gap, str):
        return f"at {place}: {gap}" if place else gap
    if gap <= tolerance:
        return ""
    if isinstance(wanted, Mapping):
        parts = [(f"[{key!r}]", found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, (list, tuple)):
        parts = [(f"[{i}]", a, b) for i, (a, b) in enumerate(zip(found, wanted))]
    elif isinstance(wanted, torch.Tensor) and wanted.dim():
        at = int((~(_apart(found, wanted) <= tolerance)).flatten().nonzero()[0])
        index = [int(i) for i in torch.unravel_index(torch.tensor(at), wanted.shape)]
        return f"first at {place}{index}: {_shown(found[*index])}, not {_shown(wanted[*index])}"
    else:
        where = f"first at {place}: " if place else ""
        return f"{where}{_shown(found)}, not {_shown(wanted)}"
    texts = (_first_difference(a, b, tolerance, place + name) for name, a, b in parts)
    return next((text for text in texts if text), "")


def _shown(value) -> str:
    value = value.item() if isinstance(value, torch.Tensor) else value
    return f"{value:.5g}" if isinstance(value, float) else repr(value)
