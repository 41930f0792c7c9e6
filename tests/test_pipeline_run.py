"""A pipeline on real processes against one process: losses, gradients, whole steps, order, ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training_cases import TINY, window

from dsv3.model import Transformer
from dsv3.parallel.pipeline import planned, rank_of
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.objective import losses
from dsv3.training.optimizer import make_optimizer
from dsv3.training.stages import StagedModel, pipeline_step
from dsv3.training.step import StepValues, train_step

pytestmark = pytest.mark.slow

# As the shipped model: two dense layers and two with experts, an MTP module behind them.
FOUR = TINY.but(num_hidden_layers=4, first_k_dense_replace=2)
EIGHT = TINY.but(num_hidden_layers=8, first_k_dense_replace=3)
# All three losses count; a micro-batch is one window of 16 tokens, or two.
VALUES = StepValues(learning_rate=1e-2, mtp_weight=0.7, sequence_weight=0.05, micro_batch=16)
PAIRS = StepValues(learning_rate=1e-2, mtp_weight=0.7, sequence_weight=0.05, micro_batch=32)

# ranks -> name of a case -> schedule, config, windows, values
CASES = {
    2: {
        "1F1B": ("1F1B", FOUR, 4, VALUES),
        "1F1B, as few as ranks": ("1F1B", FOUR, 4, PAIRS),
        "1F1B, tied": ("1F1B", FOUR.but(tie_word_embeddings=True), 4, VALUES),
        "1F1B, no MTP": ("1F1B", FOUR.but(num_nextn_predict_layers=0), 4, VALUES),
        "1F1B, tied, no MTP": (
            "1F1B",
            FOUR.but(num_nextn_predict_layers=0, tie_word_embeddings=True),
            4,
            VALUES,
        ),
        "ZB1P": ("ZB1P", FOUR, 8, VALUES),
        "ZBV": ("ZBV", FOUR, 6, VALUES),
        "DualPipeV": ("DualPipeV", FOUR, 8, PAIRS),
        "DualPipeV, tied": ("DualPipeV", FOUR.but(tie_word_embeddings=True), 7, VALUES),
        "DualPipeV, two MTP": ("DualPipeV", FOUR.but(num_nextn_predict_layers=2), 4, VALUES),
        "ZB1P, tied": ("ZB1P", FOUR.but(tie_word_embeddings=True), 4, VALUES),
        "DualPipeV, no MTP": ("DualPipeV", FOUR.but(num_nextn_predict_layers=0), 4, VALUES),
    },
    4: {
        "1F1B": ("1F1B", FOUR, 12, VALUES),
        "ZB1P": ("ZB1P", FOUR, 8, VALUES),
        "DualPipeV": ("DualPipeV", EIGHT, 16, VALUES),
    },
}
NAMES = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


def made(config, precision: str = "fp32") -> Transformer:
    return Transformer(config, Precision.training(precision)).init_weights(0)


def text(config, rows: int, seed: int = 0) -> torch.Tensor:
    return window(rows, 17 + config.num_nextn_predict_layers, seed)


def numbers(weights: dict) -> dict[str, np.ndarray]:
    return {n: w.grad.numpy() for n, w in weights.items() if w.grad is not None}


# On a rank ----------------------------------------------------------------------------------------


def all_cases(group: TensorGroup) -> dict:
    """Of each case: my gradients, losses, loads, and what I did when."""
    found = {}
    for name, (schedule, config, rows, values) in CASES[group.size].items():
        model = StagedModel(made(config), schedule, group)
        passed = model.backward(text(config, rows), values)
        found[name] = {
            "gradients": numbers(model.weights()),
            "losses": None if passed.outputs is None else passed.outputs.numpy(),
            "load": {router: load.tolist() for router, load in model.load.items()},
            "pieces": passed.pieces,
        }
    return found


def three_steps(group: TensorGroup, schedule: str, precision: str, clip: float) -> dict:
    """Weights, biases and results after three steps, the second with a value that is not finite."""
    model = StagedModel(made(FOUR, precision), schedule, group)
    optimizer = make_optimizer(model)
    results, kept = [], []
    for number in range(3):
        values = StepValues(learning_rate=1e-2, clip=clip, micro_batch=16)
        head = model.weights().get("head.weight")
        if number == 1 and head is not None:  # on one rank only
            handle = head.register_hook(lambda gradient: gradient * float("inf"))
        before = {n: w.detach().clone() for n, w in model.weights().items()}
        results.append(pipeline_step(model, optimizer, text(FOUR, 8, number), values))
        kept.append(all(torch.equal(before[n], w) for n, w in model.weights().items()))
        if number == 1 and head is not None:
            handle.remove()
    assert all(weight.grad is None for weight in model.parameters())
    return {
        "results": results,
        "kept": kept,
        "weights": {n: w.detach().numpy() for n, w in model.weights().items()},
        "watched": [sorted(stage.watch.routers) for stage in model.stages.values()],
    }


# One process --------------------------------------------------------------------------------------


def alone(config, rows: int, values: StepValues) -> dict:
    """Gradients by autograd of the three losses written out, micro-batch by micro-batch."""
    model = made(config)
    watch, parts = RouterWatch(model), []
    for part in text(config, rows).split(values.micro_batch // 16):
        main, ahead = losses(model, part)
        balance = watch.sequence_loss()
        mtp = sum(ahead, torch.zeros(())) / max(len(ahead), 1)
        total = main + 0.05 * balance + 0.7 * mtp
        (total * len(part) / rows).backward()
        parts.append([float(torch.as_tensor(x).detach()) for x in (main, mtp, balance)])
    return {
        "gradients": numbers(dict(model.named_parameters())),
        "losses": np.array(parts),
        "load": {router: load.tolist() for router, load in watch.load.items()},
    }


def three_steps_alone(precision: str, clip: float) -> tuple[list, dict]:
    model = made(FOUR, precision)
    optimizer, watch, results = make_optimizer(model), RouterWatch(model), []
    for number in range(3):
        values = StepValues(learning_rate=1e-2, clip=clip, micro_batch=16)
        if number == 1:
            handle = model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
        results.append(train_step(model, optimizer, text(FOUR, 8, number), values, watch))
        if number == 1:
            handle.remove()
    return results, {n: w.detach().numpy() for n, w in model.named_parameters()}


@pytest.fixture(scope="module")
def ran() -> dict:
    return {ranks: run_ranks(all_cases, ranks) for ranks in CASES}


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, name", NAMES, ids=str)
def test_gradients_are_those_of_one_process(ran, ranks, name):  # fact 51
    """Of every weight, within 1e-6 of its norm; also both copies of a shared one."""
    _, config, rows, values = CASES[ranks][name]
    serial, seen = alone(config, rows, values), []
    for rank in ran[ranks]:
        for weight, gradient in rank[name]["gradients"].items():
            expected = serial["gradients"][weight]
            error = np.linalg.norm(gradient - expected)
            assert error <= 1e-6 * np.linalg.norm(expected), weight
            seen.append(weight)
    assert set(seen) == set(serial["gradients"])


@pytest.mark.parametrize("ranks, name", NAMES, ids=str)
def test_losses_and_loads_are_those_of_one_process(ran, ranks, name):
    """The last stage's, of every micro-batch; each router's tokens are counted once."""
    schedule, config, rows, values = CASES[ranks][name]
    serial, found = alone(config, rows, values), [rank[name] for rank in ran[ranks]]
    last = rank_of(schedule, planned(schedule, ranks, 16).stages - 1, ranks)
    assert last == (0 if schedule in ("ZBV", "DualPipeV") else ranks - 1)
    for rank, mine in enumerate(found):
        if rank == last:
            np.testing.assert_allclose(mine["losses"], serial["losses"], rtol=1e-6)
        else:
            assert mine["losses"] is None
    loads = [item for mine in found for item in mine["load"].items()]
    assert dict(loads) == serial["load"] and len(loads) == len(serial["load"])
