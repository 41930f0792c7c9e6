"""What a row of the scoreboard is, and how it is measured: checked first, then timed in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dsv3.bench.models import Models
from dsv3.bench.peers import Missing
from dsv3.bench.rounds import ENOUGH, Clock, Spread, in_turn, ratio


@dataclass(frozen=True)
class Goal:
    """What a ratio should reach, or, of memory and minutes, not exceed."""

    bound: float
    most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.most else value >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.most else '>='} {self.bound:.3g}"


@dataclass(frozen=True)
class Check:
    """How far ours is from what it should be. what: the measure; most: the bound."""

    what: str
    found: float
    most: float

    @property
    def passed(self) -> bool:
        return self.found <= self.most  # NaN is not

    def __str__(self) -> str:
        if self.most == 0:
            return self.what if self.passed else f"{self.what}: {self.found:.0f} differ"
        return f"{self.what} {self.found:.1e} ({'<=' if self.passed else 'over'} {self.most:.0e})"


def bit_equal(found: Tensor, expected: Tensor) -> Check:
    """Every number the same bit by bit; NaNs are equal to NaNs."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return Check(f"bit-equal ({found.dtype}, not {expected.dtype})", float("inf"), 0)
    same = found.contiguous().view(kind) == expected.contiguous().view(kind)
    if found.itemsize > 1:
        same |= found.isnan() & expected.isnan()
    return Check("bit-equal", float((~same).sum()), 0)


def gap(found: Tensor, expected: Tensor, most: float) -> Check:
    """max |found - expected| / max |expected|."""
    wanted = expected.double()
    apart = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30)
    return Check("gap", float(apart), most)


@dataclass(frozen=True)
class Peer:
    """What ours is measured against.

    call: None where it is missing, which ``why`` explains. goal: of its time over ours; None: the
    ratio is shown and no more. check: of the peer's own answer, where it might be wrong. seconds:
    in the place of a call, how long a limit of the chip makes it last.
    """

    name: str
    call: Callable[[], object] | None
    goal: Goal | None = None
    check: Callable[[], Check] | None = None
    seconds: float | None = None
    why: str = ""


def peer(
    name: str,
    make: Callable[[], Callable[[], object]],
    goal: float | None = None,
    check: Callable[[Callable], Check] | None = None,
) -> Peer:
    """A peer whose call is made here, or the word that it is missing."""
    bound = None if goal is None else Goal(goal)
    try:
        call = make()
    except Missing as missing:
        return Peer(name, None, bound, why=str(missing))
    return Peer(name, call, bound, None if check is None else lambda: check(call))


def limit(name: str, seconds: float, share: float) -> Peer:
    """A limit of the chip, of which ours is to reach this share."""
    return Peer(name, None, Goal(share), seconds=seconds)


@dataclass(frozen=True)
class Trial:
    """A row with its inputs: ours, the peers, and the check that comes first.

    tokens: of one call; speeds are then told in tokens a second, and otherwise in milliseconds.
    """

    ours: Callable[[], object]
    peers: Sequence[Peer]
    check: Callable[[], Check]
    tokens: int = 0


@dataclass(frozen=True)
class Workbench:
    """What all rows share: the device, its clock, and the models, made once."""

    device: torch.device
    clock: Clock
    models: Models


@dataclass(frozen=True)
class Row:
    """measure: from the bench and the seconds there are to the lines of this row's table.

    number: on the scoreboard. least: seconds below which it is not worth a try. weight: how many
    times the usual row's share of the time it is given, since its calls take long.
    """

    number: int
    name: str
    case: str
    measure: Callable[[Row, Workbench, float], Iterator[Line]]
    least: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True)
class Line:
    """One ratio. state: "met" or "short" of the goal; "shown" without one; "failed" (the check, or
    the call), "missing" (the peer) or "left out" (no time), of which ``note`` says more.

    ours, theirs: in ``unit``, quartiles over ``rounds``; 0 rounds: measured once, as bytes are.
    """

    row: int
    name: str
    case: str
    peer: str
    state: str
    goal: Goal | None = None
    ratio: Spread | None = None
    ours: Spread | None = None
    theirs: Spread | None = None
    unit: str = "ms"
    rounds: int = 0
    check: str = ""
    note: str = ""

    @property
    def hurried(self) -> bool:
        """Whether its share of the time held fewer rounds than a row should have."""
        return 0 < self.rounds < ENOUGH

    def to_dict(self) -> dict:
        """For JSON: what is not there is left out."""
        optional = {field.name for field in fields(self) if field.default in (None, "")}
        told = asdict(self).items()
        return {name: value for name, value in told if name not in optional or value}

    @classmethod
    def of(cls, told: dict) -> Line:
        """The line that ``to_dict`` told."""
        kinds = {"goal": Goal, "ratio": Spread, "ours": Spread, "theirs": Spread}
        values: dict[str, Any] = dict(told)
        for name in kinds.keys() & told.keys():
            values[name] = kinds[name](**told[name])
        return cls(**values)


def state_of(goal: Goal | None, value: float) -> str:
    if goal is None:
        return "shown"
    return "met" if goal.met(value) else "short"


def quantity(
    row: Row, peer: str, ours: float, theirs: float, unit: str, goal: Goal | None, check: str = ""
) -> Line:
    """A line of what was measured once and is no time: bytes, seconds of a whole run."""
    value = ours / theirs
    return Line(
        row.number, row.name, row.case, peer, state_of(goal, value), goal,
        *map(_once, (value, ours, theirs)), unit=unit, check=check,
    )  # fmt: skip


def _once(value: float) -> Spread:
    return Spread(value, value, value)


def timed(prepare: Callable[[Workbench], Trial], learns: bool = False) -> Callable:
    """The measure of a row that is timed. prepare: makes its inputs when its turn comes, in the
    row's own time. learns: whether gradients are needed."""

    def measure(row: Row, bench: Workbench, allowed: float) -> Iterator[Line]:
        until = time.monotonic() + allowed
        with torch.inference_mode(not learns):
            yield from _measure(row, prepare(bench), bench.clock, until)

    return measure


def _measure(row: Row, trial: Trial, clock: Clock, until: float) -> Iterator[Line]:
    blank = Line(row.number, row.name, row.case, "", "failed")
    check = trial.check()
    if not check.passed:
        yield replace(blank, check=str(check), note="ours is wrong and was not timed")
        return
    blank, calls = replace(blank, check=str(check)), {"": trial.ours}
    for one in trial.peers:
        line = replace(blank, peer=one.name, goal=one.goal)
        if one.why:
            yield replace(line, state="missing", note=one.why)
        elif one.call is not None:
            try:
                wrong = None if one.check is None else one.check()
                one.call()
            except Exception as error:  # a peer that cannot run here: the others still can
                yield replace(line, note=f"the peer: {brief(error)}")
                continue
            if wrong is None or wrong.passed:
                calls[one.name] = one.call
            else:
                yield replace(line, note=f"the peer is wrong: {wrong}")
    times = in_turn(calls, clock, until - time.monotonic())
    mine = times.pop("")

    def told(seconds: Sequence[float]) -> Spread:
        if trial.tokens:
            return Spread.of(seconds).each(lambda took: trial.tokens / took)
        return Spread.of(seconds).each(lambda took: 1e3 * took)

    for one in trial.peers:
        theirs = [one.seconds] * len(mine) if one.seconds else times.get(one.name)
        if theirs:
            found = ratio(theirs, mine)
            yield replace(
                blank, peer=one.name, state=state_of(one.goal, found.middle), goal=one.goal,
                ratio=found, ours=told(mine), theirs=told(theirs), rounds=len(mine),
                unit="tokens/s" if trial.tokens else "ms",
            )  # fmt: skip


def brief(error: Exception) -> str:
    """An error's kind and first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]
