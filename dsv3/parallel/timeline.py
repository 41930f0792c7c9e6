"""When each rank of a pipeline works and when it waits: an event simulation (TR table 2).

Given an order of work (``dsv3.parallel.schedules``) and how long each kind takes, every step
begins as soon as its rank is free and what it needs is there:

* F of stage s needs F of stage s - 1; B and I of stage s need F of the same stage and the
  backward of stage s + 1; W needs its I.

Messages take no time: the report overlaps them with computation, and its table has no term for
them. Stages are equal. Nothing else is assumed, and so the table's formulae come out of the
simulation instead of going in: they are in ``bubble_formula`` and the tests compare the two.

F, B, W are times of a forward, of a *whole* backward, and of the part of it that makes weight
gradients; F&B is a forward and a backward that overlap. 1F1B's formula holds for
any of them. The others hold where the gradient of an input takes as long as a forward, B - W = F
(the same multiplications), and that of the weights no longer, W <= F; elsewhere the orders wait
more, or a little less, than the formulae say. When F&B is shorter than F + B, DualPipe's outer
ranks wait less than those in the middle, which wait as long as it says.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.errors import DSV3Error
from dsv3.parallel.schedules import Schedule, Step, Work


@dataclass(frozen=True)
class Durations:
    """How long work on one micro-batch takes on one stage, in any unit. forward_backward: F&B,
    None: as long as one after the other. Raises DSV3Error for what cannot be."""

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0
    forward_backward: float | None = None

    def __post_init__(self):
        longest = self.forward + self.backward
        both = self.both
        if min(self.forward, self.backward, self.weights) < 0 or self.weights > self.backward:
            raise DSV3Error(
                "durations that cannot be",
                where="Durations",
                found=(self.forward, self.backward, self.weights),
                expected="F >= 0 and B >= W >= 0: B is the whole backward, W a part of it",
            )
        if not max(self.forward, self.backward) <= both <= longest:
            raise DSV3Error(
                "an overlap that cannot be",
                where="forward_backward",
                found=both,
                expected=f"{max(self.forward, self.backward)} to {longest}",
            )

    @property
    def both(self) -> float:
        return (
            self.forward + self.backward if self.forward_backward is None else self.forward_backward
        )

    def of(self, step: Step) -> float:
        """How long a step takes."""
        if len(step) == 2:
            return self.both
        return {
            "F": self.forward,
            "B": self.backward,
            "I": self.backward - self.weights,
            "W": self.weights,
        }[step[0].kind]


@dataclass(frozen=True)
class Event:
    """A step on a rank, from ``start`` to ``end``."""

    rank: int
    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The events of a schedule, by rank and in order."""

    schedule: Schedule
    events: tuple[tuple[Event, ...], ...]

    @property
    def end(self) -> float:
        """When the last rank has finished."""
        return max(events[-1].end for events in self.events)

    def idle(self, rank: int) -> float:
        """Time in which a rank waits while others work: its part of the bubble."""
        return self.end - sum(event.end - event.start for event in self.events[rank])

    @property
    def bubble(self) -> float:
        """That of the rank that waits longest."""
        return max(map(self.idle, range(self.schedule.ranks)))

    def live(self, rank: int) -> list[tuple[float, int]]:
        """(time, activations held from then on) of a rank. An activation is what one stage keeps
        of one micro-batch, from the start of its F to the end of its B or I. (Its W still needs
        some of that. Held until then, the peaks are the same.)"""
        changes: list[tuple[float, int]] = []
        for event in self.events[rank]:
            for work in event.step:
                if work.kind == "F":
                    changes.append((event.start, 1))
                elif work.kind in "BI":
                    changes.append((event.end, -1))
        held, curve = 0, []
        for time, change in sorted(changes):  # at one time, what ends makes room first
            held += change
            curve.append((time, held))
        return curve

    @property
    def peak_activations(self) -> int:
        """Most activations held at a time, on any rank."""
        return max(held for rank in range(self.schedule.ranks) for _, held in self.live(rank))

    def chrome_trace(self, microseconds: float = 1000.0) -> dict:
        """The events in the format that Perfetto and chrome://tracing open, as a JSON object.

        microseconds: length of one unit of time.
        """
        events = [
            {
                "name": " & ".join(f"{work.kind}{work.micro}" for work in event.step),
                "cat": "".join(work.kind for work in event.step),
                "ph": "X",
                "ts": event.start * microseconds,
                "dur": (event.end - event.start) * microseconds,
                "pid": 0,
                "tid": event.rank,
                "args": {
                    work.kind: f"micro-batch {work.micro}, stage {work.stage}, direction "
                    f"{work.direction}"
                    for work in event.step
                },
            }
            for events in self.events
            for event in events
        ]
        names = [
            {
                "name": "thread_name",
                "ph": "M",
                "pid": 0,
                "tid": rank,
                "args": {"name": f"rank {rank}"},
            }
            for rank in range(self.schedule.ranks)
        ]
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}


def simulate(schedule: Schedule, durations: Durations = Durations()) -> Timeline:
    """Run a schedule. Raises DSV3Error when ranks wait for each other for ever."""
    finished: dict[Work, float] = {}
    free = [0.0] * schedule.ranks
    events: list[list[Event]] = [[] for _ in schedule.orders]
    moving = True
    while moving:
        moving = False
        for rank, order in enumerate(schedule.orders):
            while len(events[rank]) < len(order):
                step = order[len(events[rank])]
                needed = [before for work in step for before in _needs(work, schedule.stages)]
                ready = [end for before in needed if (end := _when(finished, before)) is not None]
                if len(ready) < len(needed):
                    break
                start = max([free[rank], *ready])
                end = start + durations.of(step)
                events[rank].append(Event(rank, step, start, end))
                free[rank] = end
                finished.update((work, end) for work in step)
                moving = True
    stuck = [rank for rank, order in enumerate(schedule.orders) if len(events[rank]) < len(order)]
    if stuck:
        waiting = schedule.orders[stuck[0]][len(events[stuck[0]])]
        raise DSV3Error(
            "the ranks wait for each other for ever",
            where=f"{schedule.name}, rank {stuck[0]}, step {len(events[stuck[0]])}",
            found=waiting,
            fix="Some rank must send before it waits; look at what this step needs",
        )
    return Timeline(schedule, tuple(map(tuple, events)))


def bubble_formula(name: str, stages: int, durations: Durations) -> float:
    """The bubble by the report's table 2; ``stages``: PP. DualPipeV's is DualPipe's, on half as
    many ranks (its published README)."""
    d = durations
    if name == "1F1B":
        return (stages - 1) * (d.forward + d.backward)
    if name == "ZB1P":
        return (stages - 1) * (d.forward + d.backward - 2 * d.weights)
    return (stages // 2 - 1) * (d.both + d.backward - 3 * d.weights)


def activation_formula(name: str, stages: int) -> int:
    """Most activations on a rank by the report's table 2."""
    return stages + 1 if name.startswith("DualPipe") else stages


def _needs(work: Work, stages: int) -> list[Work]:
    """What must be finished before; a backward may have been taken whole or in halves."""
    if work.kind == "F":
        return [] if work.stage == 0 else [_at(work, "F", work.stage - 1)]
    if work.kind == "W":
        return [_at(work, "I", work.stage)]
    own = [_at(work, "F", work.stage)]
    return own if work.stage == stages - 1 else [*own, _at(work, "B", work.stage + 1)]


def _at(work: Work, kind: str, stage: int) -> Work:
    return Work(kind, stage, work.micro, work.direction)


def _when(finished: dict[Work, float], work: Work) -> float | None:
    """When a piece of work ended; for a backward its input gradient is what counts."""
    if work.kind == "B" and work not in finished:
        work = _at(work, "I", work.stage)
    return finished.get(work)
