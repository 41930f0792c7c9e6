"""The bench keeps its time, and says so where cells are left out. No speed is asserted here."""

import pytest
import torch

from dsv3.commands import speed
from dsv3.errors import DSV3Error

pytestmark = pytest.mark.slow


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
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(speed.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(speed.torch.cuda, "is_available", lambda: False)
    return clock


@pytest.mark.parametrize("allowed, rounds", [(0, 1), (29, 1), (30, 2), (59, 4), (1e9, 20)])
def test_rounds_follow_from_the_time(clock, allowed, rounds):
    assert speed.interleave(clock.takes(4), clock.takes(6), allowed) == (4, 6, rounds)


@pytest.fixture
def no_models(monkeypatch):
    """Cells of which those in bfloat16 take a hundred times as long."""

    def given(clock):
        monkeypatch.setattr(speed, "make_pair", lambda dtype, device: (dtype, dtype))
        monkeypatch.setattr(speed, "check_equal", lambda *_: None)
        monkeypatch.setattr(
            speed,
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
    rows = list(speed.measure(torch.device("cpu"), 30.0, said.append))
    assert [row["rounds"] for row in rows] == [20] * 5 + [1] * 4
    assert clock.now <= 60 * 30 + 400 and "left out" in said[-1] and "1 cell." in said[-1]


def test_time_enough_measures_all_cells(clock, no_models):
    no_models(clock)
    said = []
    rows = list(speed.measure(torch.device("cpu"), 1000.0, said.append))
    assert [row["rounds"] for row in rows] == [20] * 10 and "left out" not in said[-1]


def test_both_models_get_the_same_weights(monkeypatch):
    """Names come from the layout: experts, router, shared expert, dense layer and all."""
    pytest.importorskip("transformers")
    small = speed.CONFIG.but(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, intermediate_size=96,
        moe_intermediate_size=32, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=32,
        q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
        num_attention_heads=2, initializer_range=0.15,
    )  # fmt: skip
    monkeypatch.setattr(speed, "CONFIG", small)
    ours, theirs = speed.make_pair(torch.float32, torch.device("cpu"))
    text = torch.arange(40)[None] % 96
    with torch.inference_mode():
        speed.check_equal(ours, theirs, text)
        theirs.model.layers[1].mlp.experts.gate_up_proj[3, 5] *= 1.5
        with pytest.raises(DSV3Error, match="disagree"):
            speed.check_equal(ours, theirs, text)


def test_models_that_disagree_are_not_compared():
    class Theirs:
        def __call__(self, text):
            return type("Output", (), {"logits": torch.ones(1, 4, 8)})

    with pytest.raises(DSV3Error, match="the two models disagree"):
        speed.check_equal(lambda text: torch.full((1, 4, 8), 1.001), Theirs(), torch.zeros(1, 4))
