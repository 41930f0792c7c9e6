"""Pipeline schedules and their simulation: the report's table 2, and small cases by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise

import pytest

from dsv3.errors import DSV3Error
from dsv3.parallel.schedules import (
    SCHEDULES,
    Schedule,
    Work,
    dualpipe,
    dualpipe_v,
    one_f_one_b,
    zb1p,
)
from dsv3.parallel.timeline import Durations, Event, activation_formula, bubble_formula, simulate

# (stages, micro-batches); DualPipeV has half as many ranks.
SIZES = [(2, 4), (2, 6), (4, 8), (4, 20), (6, 12), (6, 30), (8, 16), (8, 20), (8, 40), (10, 22)]
SIZES += [(12, 24), (16, 32), (16, 64), (32, 64)]
LENGTHS = [
    Durations(1, 2, 1),
    Durations(2, 3, 1),
    Durations(1, 1.25, 0.25, 2),
    Durations(1.13, 1.61, 0.48, 2.4),
    Durations(2, 4, 2, 4.5),
]


def made(name: str, stages: int, micro_batches: int) -> Schedule:
    return SCHEDULES[name](stages // 2 if name == "DualPipeV" else stages, micro_batches)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_reports_table(name, size):
    """The bubble of the worst rank and the most activations, TR table 2, whatever the number of
    micro-batches."""
    schedule = made(name, *size)
    for durations in LENGTHS:
        timeline = simulate(schedule, durations)
        assert timeline.bubble == pytest.approx(bubble_formula(name, size[0], durations))
        assert timeline.peak_activations == activation_formula(name, size[0])


def test_the_formulae_are_the_reports():
    """Typed in from table 2 once more, with other numbers: F 3, B 5, W 2, F&B 7, PP 8."""
    durations = Durations(3, 5, 2, 7)
    assert [bubble_formula(name, 8, durations) for name in SCHEDULES] == [
        7 * (3 + 5),
        7 * (3 + 5 - 2 * 2),
        3 * (7 + 5 - 3 * 2),
        3 * (7 + 5 - 3 * 2),
    ]
    assert [activation_formula(name, 8) for name in SCHEDULES] == [8, 8, 9, 9]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_micro_batch_passes_every_stage_both_ways(name, size):
    schedule = made(name, *size)
    done = Counter(work for order in schedule.orders for step in order for work in step)
    assert set(done.values()) == {1}
    for direction in range(schedule.directions):
        each = schedule.micro_batches // schedule.directions
        for stage in range(schedule.stages):
            for micro in range(each):
                kinds = [k for k in "FBIW" if done[Work(k, stage, micro, direction)]]
                assert kinds in (["F", "B"], ["F", "I", "W"])
    assert sum(done.values()) == sum(len(step) for order in schedule.orders for step in order)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_starts_before_what_it_needs(name):
    """Read from the events, and no rank does two things at a time."""
    timeline = simulate(made(name, 8, 24), Durations(1.3, 2.2, 0.9, 2.9))
    ends = {work: e.end for events in timeline.events for e in events for work in e.step}
    for events in timeline.events:
        assert all(one.end <= two.start for one, two in pairwise(events))
        for event in events:
            for work in event.step:
                at = (work.micro, work.direction)
                if work.kind == "F" and work.stage:
                    assert ends[Work("F", work.stage - 1, *at)] <= event.start
                if work.kind in "BI":
                    assert ends[Work("F", work.stage, *at)] <= event.start
                    if work.stage + 1 < timeline.schedule.stages:
                        later = [ends.get(Work(kind, work.stage + 1, *at)) for kind in "BI"]
                        assert next(end for end in later if end is not None) <= event.start
                if work.kind == "W":
                    assert ends[Work("I", work.stage, *at)] <= event.start


def test_two_ranks_two_micro_batches_by_hand():
    """1F1B with F 1 and B 2, drawn on paper."""
    timeline = simulate(one_f_one_b(2, 2), Durations(1, 2, 1))
    assert [(e.step[0].kind, e.step[0].micro, e.start, e.end) for e in timeline.events[0]] == [
        ("F", 0, 0, 1),
        ("F", 1, 1, 2),
        ("B", 0, 4, 6),
        ("B", 1, 7, 9),
    ]
    assert [(e.step[0].kind, e.step[0].micro, e.start, e.end) for e in timeline.events[1]] == [
        ("F", 0, 1, 2),
        ("B", 0, 2, 4),
        ("F", 1, 4, 5),
        ("B", 1, 5, 7),
    ]
    assert (timeline.end, timeline.idle(0), timeline.idle(1)) == (9, 3, 3)
    assert timeline.live(0) == [(0, 1), (1, 2), (6, 1), (9, 0)]


def test_dualpipe_starts_as_in_the_reports_figure():
    """Figure 5 (TR 3.2.1): 8 ranks, 20 micro-batches; the first rank's first steps."""
    schedule = dualpipe(8, 20)
    kinds = ["".join(work.kind for work in step) for step in schedule.orders[0]]
    assert kinds[:8] == ["F"] * 8 and kinds[8:11] == ["I", "W", "F"]
    assert [step[0].direction for step in schedule.orders[0][:8]] == [0] * 7 + [1]
    assert [step[0].direction for step in schedule.orders[7][:8]] == [1] * 7 + [0]
    middle = ["".join(work.kind for work in step) for step in schedule.orders[3]]
    assert middle[:8] == ["F"] * 8 and middle[8:10] == ["F", "B"]
    assert "FB" in middle


def test_each_rank_of_dualpipe_v_holds_both_ends_of_the_fold():
    for rank, order in enumerate(dualpipe_v(4, 8).orders):
        assert {work.stage for step in order for work in step} == {rank, 7 - rank}


def test_outer_ranks_wait_less_where_the_overlap_saves_time():
    timeline = simulate(dualpipe(8, 20), Durations(2, 4, 2, 4.5))
    waits = [timeline.idle(rank) for rank in range(8)]
    assert waits == waits[::-1] and waits[0] < waits[1] < waits[2]
    assert max(waits) == pytest.approx(bubble_formula("DualPipe", 8, Durations(2, 4, 2, 4.5)))


def test_1f1b_holds_for_any_durations():
    random_ = random.Random(0)
    for _ in range(50):
        forward, weights, rest = (random_.uniform(0.1, 3) for _ in range(3))
        durations = Durations(forward, weights + rest, weights)
        ranks = random_.randint(1, 9)
        timeline = simulate(one_f_one_b(ranks, ranks + random_.randrange(5)), durations)
        assert timeline.bubble == pytest.approx(bubble_formula("1F1B", ranks, durations))


def test_fewer_micro_batches_than_ranks():
    timeline = simulate(one_f_one_b(4, 1), Durations(1, 2, 1))
    assert timeline.end == 12 and timeline.peak_activations == 1


def test_a_deadlock_is_named():
    """Two ranks that both wait for the other's backward."""
    right = one_f_one_b(2, 2)
    first = list(right.orders[0])
    first[1], first[2] = first[2], first[1]  # B of 0 before F of 1
    second = list(right.orders[1])
    second[0], second[1], second[2] = second[0], second[2], second[1]  # F of 1 before B of 0
    broken = Schedule("broken", 2, 2, (tuple(first), tuple(second)))
    with pytest.raises(DSV3Error, match="broken, rank 0, step 1: the ranks wait for each other"):
        simulate(broken)


def test_the_trace_opens_in_a_viewer_of_traces():
    """The trace event format: complete events with times in microseconds, a name for each row."""
    timeline = simulate(zb1p(4, 8), Durations(1, 2, 1))
    trace = json.loads(json.dumps(timeline.chrome_trace(microseconds=10)))
    rows = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert rows == {rank: f"rank {rank}" for rank in range(4)}
    boxes = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(boxes) == sum(len(order) for order in timeline.schedule.orders)
    for event in trace["traceEvents"]:  # what the format asks of every event, and no phase but two
        assert isinstance(event["name"], str) and isinstance(event["args"], dict)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event["ph"] == "X" or (event["ph"], event["name"]) == ("M", "thread_name")
    for box in boxes:
        assert box["ts"] >= 0 and box["dur"] > 0 and isinstance(box["cat"], str)
    for rank in rows:  # two boxes of a row that overlap would be drawn one inside the other
        mine = sorted((box["ts"], box["ts"] + box["dur"]) for box in boxes if box["tid"] == rank)
        assert all(one[1] <= two[0] for one, two in pairwise(mine))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    last = max(boxes, key=lambda box: box["ts"] + box["dur"])
    assert last["ts"] + last["dur"] == pytest.approx(10 * timeline.end)
    assert boxes[0]["name"] == "F0"


@pytest.mark.parametrize(
    "make, ranks, micro_batches",
    [
        (one_f_one_b, 0, 4),
        (one_f_one_b, 4, 0),
        (zb1p, 4, 3),
        (dualpipe, 3, 8),
        (dualpipe, 4, 6),
        (dualpipe, 4, 9),
        (dualpipe_v, 4, 7),
    ],
)
def test_what_no_schedule_can_do(make, ranks, micro_batches):
    with pytest.raises(DSV3Error, match="cannot run so many|cannot run on so many"):
        make(ranks, micro_batches)


@pytest.mark.parametrize("lengths", [(1, 2, 3), (-1, 2, 1), (1, 2, 1, 4), (1, 2, 1, 1.5)])
def test_durations_that_cannot_be(lengths):
    with pytest.raises(DSV3Error, match="cannot be"):
        Durations(*lengths)


def test_an_event_knows_its_rank():
    timeline = simulate(one_f_one_b(3, 3))
    assert all(event.rank == rank for rank in range(3) for event in timeline.events[rank])
    assert isinstance(timeline.events[0][0], Event)
