"""One update: what it computes, in every precision, on one process and on two."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training_cases import ROUTERS, TINY, window

from dsv3.model import Transformer
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.objective import losses
from dsv3.training.optimizer import make_optimizer
from dsv3.training.step import StepValues, train_step

pytestmark = pytest.mark.slow

VALUES = StepValues(learning_rate=1e-2, micro_batch=32)
UNCLIPPED = StepValues(learning_rate=1e-3, clip=1e9, micro_batch=32)


class Trainee:
    """A tiny model with optimizer and watch; ``gradients``: those of the last step."""

    def __init__(self, precision: str = "fp32", moments: str = "fp32", **fields):
        self.model = Transformer(TINY.but(**fields), Precision.training(precision)).init_weights(0)
        self.optimizer = make_optimizer(self.model, moments=moments)
        self.watch, self.gradients = RouterWatch(self.model), {}
        self.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.update(
                {n: v.grad.clone() for n, v in self.model.named_parameters() if v.grad is not None}
            )
        )

    def step(self, batch: torch.Tensor, values: StepValues = VALUES, group=None):
        return train_step(self.model, self.optimizer, batch, values, self.watch, group)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights, biases and moments."""
        result = {name: value.detach().clone() for name, value in self.model.named_parameters()}
        for name, value in self.model.named_parameters():
            for key, moment in self.optimizer.state.get(value, {}).items():
                result[f"{name} {key}"] = moment.clone()
        return result


def norm(gradients: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.double().norm() for g in gradients.values()]).norm())


def test_gradient_is_that_of_the_three_losses():
    trainee, text = Trainee(), window()
    values = StepValues(learning_rate=1e-3, mtp_weight=0.7, sequence_weight=0.05, clip=1e9)
    found = trainee.step(text, values)

    model = Transformer(TINY, Precision.training("fp32")).init_weights(0)
    watch = RouterWatch(model)
    main, [ahead] = losses(model, text)
    balance = watch.sequence_loss()
    (main + 0.7 * ahead + 0.05 * balance).backward()
    assert found["loss"] == pytest.approx(float(main.detach()))
    assert found["mtp_loss"] == pytest.approx(float(ahead.detach()))
    assert found["sequence_loss"] == pytest.approx(float(balance.detach()))
    assert set(found) == {"loss", "mtp_loss", "sequence_loss", "grad_norm"}
    for name, value in model.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(trainee.gradients[name], value.grad)
    assert found["grad_norm"] == pytest.approx(norm(trainee.gradients), rel=1e-5)


@pytest.mark.parametrize("rows", [4, 5])
def test_micro_batches_give_the_gradient_of_the_whole(rows):
    """The last of five windows goes through alone, and weighs a fifth."""
    results = []
    for micro_batch in (1, 32, 48, 1000):
        trainee = Trainee()
        values = StepValues(learning_rate=1e-3, clip=1e9, micro_batch=micro_batch)
        results.append((trainee.step(window(rows), values), trainee.gradients))
    for found, gradients in results[1:]:
        assert found == pytest.approx(results[0][0], rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], rtol=1e-3, atol=1e-6)


def test_micro_batches_are_at_most_as_long_as_asked(monkeypatch):
    trainee, seen = Trainee(), []
    forward = trainee.model.forward
    monkeypatch.setattr(
        trainee.model,
        "forward",
        lambda tokens, **options: (seen.append(tuple(tokens.shape)), forward(tokens, **options))[1],
    )
    trainee.step(window(5), StepValues(learning_rate=1e-3, micro_batch=40))
    assert seen == [(2, 16), (2, 16), (1, 16)]


def test_large_gradients_are_clipped_and_small_ones_are_not():
    found = Trainee().step(window(), UNCLIPPED)
    for clip, expected in (
        (found["grad_norm"] / 4, found["grad_norm"] / 4),
        (found["grad_norm"] * 2, found["grad_norm"]),
    ):
        trainee = Trainee()
        clipped = trainee.step(window(), StepValues(learning_rate=1e-3, clip=clip))
        assert norm(trainee.gradients) == pytest.approx(expected, rel=1e-4)
        assert clipped["grad_norm"] == pytest.approx(found["grad_norm"], rel=1e-4)  # before


def test_learning_rate_is_that_of_the_step():
    trainee = Trainee()
    before = trainee.state()
    trainee.step(window(), StepValues(learning_rate=0.0))
    after = trainee.state()
    assert all(torch.equal(after[name], before[name]) for name in before if "bias" not in name)
    trainee.step(window(), StepValues(learning_rate=0.25))
    assert [group["lr"] for group in trainee.optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    "precision, moments", [("fp32", "fp32"), ("bf16", "bf16"), ("fp8", "bf16")]
)
def test_every_precision_learns(precision, moments, as_in_use):
    trainee, values = Trainee(precision, moments), StepValues(learning_rate=1e-2)
    values = [trainee.step(window(), values) for _ in range(12)]
    assert values[-1]["loss"] < 0.6 * values[0]["loss"]
    assert values[-1]["mtp_loss"] < 0.7 * values[0]["mtp_loss"]
    assert all(value.dtype == torch.float32 for value in trainee.model.parameters())
    assert all(gradient.dtype == torch.float32 for gradient in trainee.gradients.values())
    # Masters hold what bfloat16 cannot.
    weight = trainee.model.layers[0].attn.wo.weight
    assert (weight != weight.bfloat16()).float().mean() > 0.9


@pytest.mark.parametrize("precision, bound", [("bf16", 0.02), ("fp8", 0.1)])
def test_gradients_are_near_those_of_float32(precision, bound, as_in_use):
    """All of them together; a router that decides one near-tie otherwise is within the bound."""
    exact, rough = Trainee(), Trainee(precision)
    for trainee in (exact, rough):
        trainee.found = trainee.step(window(8, 34), UNCLIPPED)
    error = norm({n: rough.gradients[n] - g for n, g in exact.gradients.items()})
    assert 1e-4 < error / norm(exact.gradients) < bound
    assert rough.found["loss"] == pytest.approx(exact.found["loss"], rel=1e-3)


@pytest.mark.parametrize("where", ["layers.1.ffn.experts.w2", "mtp.0.eh_proj.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_changes_nothing(where, value):
    trainee = Trainee()
    trainee.step(window())
    with torch.no_grad():
        trainee.model.get_parameter(where)[..., 0, 0] = value
    before = trainee.state()
    found = trainee.step(window(seed=1))
    assert not all(np.isfinite(list(found.values())))
    after = trainee.state()
    assert set(after) == set(before)
    for name in before:
        assert torch.equal(after[name].nan_to_num(-1.0), before[name].nan_to_num(-1.0)), name
    assert all(weight.grad is None for weight in trainee.model.parameters())


def test_an_infinite_gradient_of_a_finite_loss_changes_nothing():
    trainee = Trainee()
    trainee.step(window())
    before = trainee.state()
    trainee.model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    found = trainee.step(window(seed=1))
    assert np.isfinite(found["loss"]) and not np.isfinite(found["grad_norm"])
    after = trainee.state()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_without_mtp_or_experts_trains():
    trainee = Trainee(num_nextn_predict_layers=0, first_k_dense_replace=2)
    found = trainee.step(window(length=17))
    assert found["mtp_loss"] == found["sequence_loss"] == 0 and found["loss"] > 0


# Two ranks --------------------------------------------------------------------------------------


def three_steps(group, rows: int) -> dict:
    """What one rank has after three steps, as numpy arrays."""
    trainee, results = Trainee(), []
    for step in range(3):
        found = trainee.step(window(rows, seed=step), UNCLIPPED, group)
        results.append(
            {**found, **{name: load.tolist() for name, load in trainee.watch.load.items()}}
        )
    return {
        "steps": results,
        "gradients": {n: g.numpy() for n, g in trainee.gradients.items()},
        "weights": {n: v.detach().numpy() for n, v in trainee.model.named_parameters()},
    }


@pytest.mark.parametrize("rows", [4, 3])
def test_two_ranks_make_the_step_of_one(rows):
    """Also when one has two windows and the other has one."""
    alone = three_steps(None, rows)
    ranks = run_ranks(three_steps, 2, rows)
    for name in ROUTERS:
        assert sum(alone["steps"][0][name]) == rows * 16 * 2
    for rank in ranks:
        for mine, theirs in zip(rank["steps"], alone["steps"], strict=True):
            for name, value in theirs.items():
                assert mine[name] == pytest.approx(value, rel=1e-5), name
        for name, value in alone["gradients"].items():
            difference = np.linalg.norm(rank["gradients"][name] - value)
            assert difference <= 1e-5 * np.linalg.norm(value), name
        for name, value in alone["weights"].items():
            difference = np.linalg.norm(rank["weights"][name] - value)
            assert difference <= 1e-5 * np.linalg.norm(value), name
    for name, value in ranks[0]["weights"].items():
        assert np.array_equal(value, ranks[1]["weights"][name]), name  # they never drift apart
