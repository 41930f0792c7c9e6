"""A pipeline on real processes against one process: losses, gradients, whole steps, order, ends."""

from __future__ import annotations

import os
import signal
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from ranks import run_ranks
from training_cases import TINY, window

from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.parallel import schedules
from dsv3.parallel.pipeline import durations_of, measured, planned, rank_of, stages_of
from dsv3.parallel.rank import is_lost_peer
from dsv3.parallel.schedules import Work
from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.timeline import Durations, simulate
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.objective import losses
from dsv3.training.optimizer import make_optimizer
from dsv3.training.stages import StagedModel, layers_of, pipeline_step
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
        "1F1B in FP8": ("1F1B", TINY, 2, VALUES),
        "DualPipeV, no MTP": ("DualPipeV", FOUR.but(num_nextn_predict_layers=0), 4, VALUES),
    },
    4: {
        "1F1B": ("1F1B", FOUR, 12, VALUES),
        "ZB1P": ("ZB1P", FOUR, 8, VALUES),
        "DualPipeV": ("DualPipeV", EIGHT, 16, VALUES),
    },
}
# ranks -> name -> schedule, precision, bound of the gradient's norm
STEPS = {
    2: {
        "steps of 1F1B": ("1F1B", "fp32", 0.5),
        "steps of DualPipeV": ("DualPipeV", "fp32", 1e9),
        "steps of ZB1P in bfloat16": ("ZB1P", "bf16", 0.5),
    },
    4: {},
}
NAMES = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


def made(config, precision: str = "fp32") -> Transformer:
    return Transformer(config, Precision.training(precision)).init_weights(0)


def text(config, rows: int, seed: int = 0) -> torch.Tensor:
    return window(rows, 17 + config.num_nextn_predict_layers, seed)


def precision_of(name: str) -> str:
    return "fp8" if "FP8" in name else "fp32"


def numbers(weights: dict) -> dict[str, np.ndarray]:
    return {n: w.grad.numpy() for n, w in weights.items() if w.grad is not None}


def biases(watch: RouterWatch) -> dict[str, np.ndarray]:
    return {f"{name}.bias": router.bias.numpy() for name, router in watch.routers.items()}


# On a rank ----------------------------------------------------------------------------------------


def all_cases(group: TensorGroup) -> dict:
    """Of each case: my gradients, losses, loads, and what I did when."""
    found = {name: three_steps(group, *given) for name, given in STEPS[group.size].items()}
    for name, (schedule, config, rows, values) in CASES[group.size].items():
        model = StagedModel(made(config, precision_of(name)), schedule, group)
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
        "weights": {n: w.detach().numpy() for n, w in model.weights().items()}
        | {n: b for stage in model.stages.values() for n, b in biases(stage.watch).items()},
    }


# One process --------------------------------------------------------------------------------------


@cache
def alone(ranks: int, name: str) -> dict:
    """A case's gradients by autograd of the three losses written out, one micro-batch after the
    other."""
    _, config, rows, values = CASES[ranks][name]
    model = made(config, precision_of(name))
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
    return results, {n: w.detach().numpy() for n, w in model.named_parameters()} | biases(watch)


@pytest.fixture(scope="module")
def ran() -> dict:
    return {ranks: run_ranks(all_cases, ranks) for ranks in CASES}


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, name", NAMES, ids=str)
def test_gradients_are_those_of_one_process(ran, ranks, name, as_in_use):  # fact 51
    """Of every weight, within 1e-6 of its norm; also both copies of a shared one."""
    serial, seen = alone(ranks, name), []
    for rank in ran[ranks]:
        for weight, gradient in rank[name]["gradients"].items():
            expected = serial["gradients"][weight]
            error = np.linalg.norm(gradient - expected)
            assert error <= 1e-6 * np.linalg.norm(expected), weight
            seen.append(weight)
    assert set(seen) == set(serial["gradients"])


@pytest.mark.parametrize("ranks, name", NAMES, ids=str)
def test_losses_and_loads_are_those_of_one_process(ran, ranks, name, as_in_use):
    """The last stage's, of every micro-batch; each router's tokens are counted once."""
    schedule, serial = CASES[ranks][name][0], alone(ranks, name)
    found = [rank[name] for rank in ran[ranks]]
    last = rank_of(schedule, planned(schedule, ranks, 16).stages - 1, ranks)
    assert last == (0 if schedule in ("ZBV", "DualPipeV") else ranks - 1)
    for rank, mine in enumerate(found):
        if rank == last:
            np.testing.assert_allclose(mine["losses"], serial["losses"], rtol=1e-6)
        else:
            assert mine["losses"] is None
    loads = [item for mine in found for item in mine["load"].items()]
    assert dict(loads) == serial["load"] and len(loads) == len(serial["load"])


# Steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS[2])
def test_steps_are_those_of_one_process(ran, name, as_in_use):
    """Clipped by the norm over all stages; weights, biases, and what is returned. The second step
    meets a gradient that is not finite, on one rank, and no rank takes it."""
    ranks = [rank[name] for rank in ran[2]]
    results, weights = three_steps_alone(*STEPS[2][name][1:])
    for rank in ranks:
        assert rank["kept"] == [False, True, False]
        assert not np.isfinite(rank["results"][1]["grad_norm"])
        for mine, theirs in zip(rank["results"][::2], results[::2], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)
        assert rank["results"][::2] == ranks[0]["results"][::2]
        for weight, value in rank["weights"].items():
            expected = weights[weight]
            assert np.linalg.norm(value - expected) <= 1e-5 * np.linalg.norm(expected), weight
    held = {weight for rank in ranks for weight in rank["weights"]}
    assert held == set(weights)
    assert len([name for name in held if "gate.bias" in name]) == 3
    assert all(weights[name].any() for name in held if "gate.bias" in name)


def test_two_copies_of_a_weight_stay_one(ran):
    """1F1B has the embedding at both ends, and V on one rank only."""
    first, last = (rank["steps of 1F1B"]["weights"] for rank in ran[2])
    assert np.array_equal(first["embed.weight"], last["embed.weight"])
    folded = [rank["steps of DualPipeV"]["weights"] for rank in ran[2]]
    assert ["embed.weight" in weights for weights in folded] == [True, False]
    assert {"head.weight", "mtp.0.eh_proj.weight"} <= set(folded[0])


# Order --------------------------------------------------------------------------------------------


def flat(order) -> list:
    """Pieces of work one by one; on a CPU a pair that overlaps is one after the other."""
    return [work for step in order for work in step]


@pytest.mark.parametrize("ranks, name", NAMES, ids=str)
def test_ranks_worked_in_the_order_of_the_schedule(ran, ranks, name):
    """That of ``dsv3.parallel.schedules`` where it has one, and torch's own."""
    schedule, _, rows, values = CASES[ranks][name]
    micro_batches = rows * 16 // values.micro_batch
    timeline = measured(schedule, micro_batches, [rank[name]["pieces"] for rank in ran[ranks]])
    plan = schedules.SCHEDULES.get(schedule, lambda *size: planned(schedule, *size))
    for rank, order in enumerate(plan(ranks, micro_batches).orders):
        assert flat(timeline.schedule.orders[rank]) == flat(order)


@pytest.mark.parametrize("name", ["ZB1P", "DualPipeV"])
@pytest.mark.parametrize(
    "size", [(2, 4), (2, 10), (3, 6), (3, 9), (4, 8), (4, 20), (5, 10), (8, 16), (8, 40), (16, 64)]
)
def test_torchs_order_is_ours(name, size):
    """Two programs by others, written after the same papers; overlapping pairs included."""
    theirs, ours = planned(name, *size), schedules.SCHEDULES[name](*size)
    assert theirs.orders == ours.orders and theirs.stages == ours.stages


@pytest.mark.parametrize("size", [(2, 5), (4, 9), (8, 20)])
def test_a_schedule_that_only_torch_has_can_be_simulated(size):
    """ZBV: with F = I = W the stages of a rank never wait but for the first and last step."""
    timeline = simulate(planned("ZBV", *size), Durations(1, 2, 1))
    assert timeline.bubble == size[0] - 1 and timeline.peak_activations == 2 * size[0]


def test_who_holds_what():
    assert [stages_of("1F1B", rank, 4) for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [stages_of("ZBV", rank, 4) for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]
    assert [rank_of("DualPipeV", stage, 2) for stage in range(4)] == [0, 1, 1, 0]
    assert layers_of(4, 2) == [range(2), range(2, 4)]
    assert [len(stretch) for stretch in layers_of(61, 16)] == [4] * 13 + [3] * 3


# The measured timeline ----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, name", [(2, "1F1B"), (2, "ZB1P"), (4, "DualPipeV")])
def test_the_measured_timeline_is_one(ran, ranks, name):
    """One clock for all: no rank does two things at a time, and nothing begins before what it
    needs has ended on another rank. It can be simulated, drawn and exported as any other."""
    schedule, _, rows, _ = CASES[ranks][name]
    timeline = measured(schedule, rows, [rank[name]["pieces"] for rank in ran[ranks]])
    ends = {work: event.end for mine in timeline.events for event in mine for work in event.step}
    for rank, mine in enumerate(timeline.events):
        assert all(one.end <= two.start for one, two in pairwise(mine))
        for event in mine:
            [work] = event.step
            assert event.rank == rank and event.start < event.end
            if work.kind == "F" and work.stage:
                assert ends[Work("F", work.stage - 1, work.micro)] <= event.start
            if work.kind in "BI" and work.stage + 1 < timeline.schedule.stages:
                after = [ends.get(Work(kind, work.stage + 1, work.micro)) for kind in "BI"]
                assert next(end for end in after if end is not None) <= event.start
    assert min(mine[0].start for mine in timeline.events) == 0
    assert 0 < timeline.bubble < timeline.end
    assert timeline.peak_activations == simulate(planned(schedule, ranks, rows)).peak_activations
    again = simulate(planned(schedule, ranks, rows), durations_of(timeline))
    assert 0.1 * timeline.end < again.end  # the same unit
    boxes = [box for box in timeline.chrome_trace()["traceEvents"] if box["ph"] == "X"]
    assert len(boxes) == sum(map(len, timeline.events))
    assert all(box["ts"] >= 0 and box["dur"] > 0 for box in boxes)
    assert max(box["ts"] + box["dur"] for box in boxes) == pytest.approx(1e3 * timeline.end)


# Where it cannot go on ----------------------------------------------------------------------------


def breaks_off(group: TensorGroup, how: str) -> None:
    """The second stage fails in its third forward, with the pipeline full."""
    model, seen = StagedModel(made(FOUR), "DualPipeV", group), []

    def fail(*_):
        seen.append(1)
        if len(seen) == 3:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise DSV3Error("broken on purpose", where="layer 1")

    if 1 in model.stages:
        model.stages[1].layers["1"].register_forward_pre_hook(fail)
    try:
        model.backward(text(FOUR, 8), VALUES)
    except RuntimeError as error:
        raise AssertionError("a peer was lost") if is_lost_peer(error) else error from None


def process(group: TensorGroup) -> int:
    return os.getpid()


@pytest.mark.parametrize(
    "how, words",
    [
        ("raises", "rank 1 of 2 .*DSV3Error: layer 1: broken on purpose"),
        ("killed", "rank 0 of 2 .*a peer was lost|rank 1 of 2.*its process has ended"),
    ],
)
def test_a_rank_that_fails_in_the_middle_ends_all(how, words, capfd):
    """The other rank waits for it in torch's schedule; it ends, and nobody is left. An error of
    a stage comes out as it was, and torch's plan does not go to the terminal."""
    ranks = run_ranks(process, 2)
    with pytest.raises(DSV3Error, match=words):
        run_ranks(breaks_off, 2, how)
    for pid in ranks:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert "Step 00" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "schedule, config, rows, values, words",
    [
        ("GPipe", FOUR, 4, VALUES, "name: no such schedule .found GPipe, expected 1F1B or"),
        ("DualPipeV", TINY, 8, VALUES, "num_hidden_layers: cannot be cut into so many stages"),
        ("DualPipeV", FOUR, 3, VALUES, "DualPipeV cannot run .*found 3, expected 4 or more"),
        ("ZB1P", FOUR, 5, VALUES, "ZB1P cannot run .*found 5, expected a multiple of 2"),
        ("1F1B", FOUR, 5, PAIRS, "micro_batches: a batch that is not cut evenly .found 3 of 5"),
    ],
)
def test_what_cannot_run_says_so(schedule, config, rows, values, words):
    """Before anything is sent: there is no other rank here."""
    group = TensorGroup(0, 2)
    with pytest.raises(DSV3Error, match=words):
        StagedModel(made(config), schedule, group).backward(text(config, rows), values)
