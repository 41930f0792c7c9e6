"""The bench keeps its time, and says so where cells are left out. No speed is asserted here."""

import pytest
import torch

from dsv3.commands import bench
from dsv3.errors import DSV3Error


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls advance."""

    class Clock:
        now = 0.0

        def takes(self, duration):
            def call(*_):
                self.now += duration

            return call

    clock = Clock()
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(bench.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    return clock


@pytest.mark.parametrize("allowed, rounds", [(0, 1), (29, 1), (30, 2), (59, 4), (1e9, 20)])
def test_rounds_follow_from_the_time(clock, allowed, rounds):
    assert bench.interleave(clock.takes(4), clock.takes(6), allowed) == (4, 6, rounds)


@pytest.fixture
def no_models(monkeypatch):
    """Cells of which those in bfloat16 take a hundred times as long."""

    def given(clock):
        monkeypatch.setattr(bench, "make_pair", lambda dtype, device: (dtype, dtype))
        monkeypatch.setattr(bench, "check_equal", lambda *_: None)
        monkeypatch.setattr(
            bench,
            "cells",
            lambda ours, *_: (
                ("decode", n, 16, *[clock.takes(1 if ours == torch.float32 else 100)] * 2)
                for n in range(5)
            ),
        )

    return given


def test_a_slow_dtype_gets_fewer_rounds_and_no_more_time(clock, no_models):
    no_models(clock)
    said = []
    rows = list(bench.measure(torch.device("cpu"), 30.0, said.append))
    assert [row["rounds"] for row in rows] == [20] * 5 + [1] * 4
    assert clock.now <= 60 * 30 + 400 and "left out" in said[-1] and "1 cell." in said[-1]


def test_time_enough_measures_all_cells(clock, no_models):
    no_models(clock)
    said = []
    rows = list(bench.measure(torch.device("cpu"), 1000.0, said.append))
    assert [row["rounds"] for row in rows] == [20] * 10 and "left out" not in said[-1]


def test_models_that_disagree_are_not_compared():
    class Theirs:
        def __call__(self, text):
            return type("Output", (), {"logits": torch.ones(1, 4, 8)})

    with pytest.raises(DSV3Error, match="the two models disagree"):
        bench.check_equal(lambda text: torch.full((1, 4, 8), 1.001), Theirs(), torch.zeros(1, 4))
