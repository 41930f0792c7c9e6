"""What is often read about training, tried out: a number must show the difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dsv3.book import nursery
from dsv3.training.optimizer import AdamW
from dsv3.training.phases import step_values
from dsv3.training.position import Position
from dsv3.training.state import load_state, save_state, whole_state
from dsv3.training.step import train_step

pytestmark = pytest.mark.slow


def test_misread_adamw_in_bf16():
    """A hundred of the last steps of V3's size: FP32 weights move, BF16 weights stay."""
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.full((4, 4), 0.02, dtype=dtype))
        before = weight.detach().clone()
        optimizer = AdamW([{"params": [weight]}], lr=7.3e-6, betas=(0.9, 0.95))
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[dtype] = float((weight.detach() - before).abs().max())
    assert moved[torch.bfloat16] == 0
    assert moved[torch.float32] == pytest.approx(7.3e-4, rel=0.02)


@pytest.mark.parametrize("clip, reach", [(1.0, 2.0), (None, 4.0)])
def test_misread_adam_needs_no_clipping(clip, reach):
    """Gradients of norm 1 that change sign, and one that is 80 times as long: how far the weights
    get in twenty steps after it, in full steps of Adam."""
    weight = nn.Parameter(torch.zeros(1, 1))
    optimizer = AdamW([{"params": [weight]}], lr=1.0, betas=(0.9, 0.95), weight_decay=0.0)
    away = []
    for step in range(60):
        weight.grad = torch.full((1, 1), 80.0 if step == 39 else (-1.0) ** step)
        if clip:
            nn.utils.clip_grad_norm_([weight], clip)
        if step == 39:
            start = float(weight.detach())
        optimizer.step()
        away.append(float(weight.detach()))
    farthest = max(abs(place - start) for place in away[39:])
    assert farthest < reach if clip else farthest > reach


def test_misread_weights_are_a_checkpoint(tmp_path: Path):
    """A run goes on bit-equal from all that is kept, and elsewhere without one thing of it."""
    phase, recipe = nursery.phase_of(), nursery.RECIPE

    def go(learner, stream, position, steps):
        for _ in range(steps):
            values, windows = step_values(phase, recipe, position)
            batch = stream.draw(windows)
            train_step(learner.model, learner.optimizer, batch, values, learner.watch)
            position = position.after_step(windows * nursery.LENGTH, 0, 0)
        return position

    def all_of(learner):
        return torch.cat([value.flatten() for value in learner.model.state_dict().values()])

    whole, stream = nursery.new_learner(), nursery.new_stream()
    position, place = go(whole, stream, Position(), 3), stream.position
    path = save_state(tmp_path, 3, {}, whole_state(whole.model, whole.optimizer, 3))
    go(whole, stream, position, 2)
    for missing in ("nothing", "moments", "biases", "place in the text", "place in the schedules"):
        again = nursery.new_learner()
        load_state(path, again.model, again.optimizer)
        if missing == "moments":
            again.optimizer.state.clear()
        if missing == "biases":
            for router in again.watch.routers.values():
                router.bias.zero_()
        stream.position = 0 if missing == "place in the text" else place
        go(again, stream, Position() if missing == "place in the schedules" else position, 2)
        assert torch.equal(all_of(again), all_of(whole)) == (missing == "nothing"), missing
