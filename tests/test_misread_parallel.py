"""What is often read about V3's parallelism, recounted; and mistakes that a test must notice.

The counts are taken from the definition, with sets and loops, and compared with what the package
says or sends. Ranks are processes where something is sent.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from dsv3 import ModelConfig, costs, load_model
from dsv3.book import mutated
from dsv3.book.disagreement import FAULTS, run
from dsv3.book.threads import Stuck, in_threads
from dsv3.moe import MoE
from dsv3.parallel import replicas
from dsv3.parallel.experts import ExpertGroup
from dsv3.parallel.schedules import SCHEDULES
from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.timeline import Durations, simulate
from dsv3.viz.cut_schematics import FIRST, SECOND, X

pytestmark = pytest.mark.slow

LARGE = ModelConfig.deepseek_v3()
MINI = Path(__file__).parents[1] / "assets" / "dsv3-mini"
TEXT = torch.arange(3, 15)[None]
# Of four tokens, two of 16 experts, four on a rank; each rank has others of the same pattern.
CHOSEN = torch.tensor([[0, 1], [9, 15], [2, 14], [8, 9]])


# On a rank ----------------------------------------------------------------------------------------


def logits(group: TensorGroup) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(MINI, "fp32", group=group)(TEXT)


def with_residual_before_the_sum(group: TensorGroup):
    """The model as it is; with what every rank has whole added on each of them; and added once."""
    summed = "self.group.all_reduce(self.experts(flat, weights, chosen) + shared)"
    found = [logits(group)]
    for other in (summed[:-1] + " + flat)", f"({summed} + flat)"):
        with mutated(MoE.forward, summed, other):
            found.append(logits(group))
    return [x.numpy() for x in found]


def bytes_sent(group: TensorGroup) -> list[int]:
    """What this rank sends between nodes, when two ranks are a node and when each is one."""
    sent = []
    for per_node in (2, 1):
        experts = ExpertGroup(group, per_node=per_node, own_tokens=True)
        x, chosen = torch.ones(4, 8), (CHOSEN + 4 * group.rank) % 16
        experts.dispatch((x,), torch.ones(4, 2), chosen, experts.holding(16))
        sent.append(experts.dispatched.bytes["between"])
    return sent


# Misreadings --------------------------------------------------------------------------------------


def test_misread_trained_with_tp():
    """Two sums of d BF16 values for each token and layer, and the layer's products meanwhile."""
    assert costs.V3_LAYOUT.tp == 1 and costs.V3_LAYOUT.ranks == 2048
    flops = 2 * costs.activated_parameters(LARGE, embedding=False) / 61
    waiting = {}
    for ranks, link in ((8, 160e9), (16, 50e9)):
        parts = [7168 * 2 / ranks] * ranks  # of one vector
        by_ring = 2 * (sum(parts[1:]) + sum(parts[:-1]))  # attention's sum and the feed-forward's
        assert costs.tensor_bytes(LARGE, ranks) == pytest.approx(by_ring)
        waiting[ranks] = (by_ring / link) / (flops / ranks / 385e12)
    assert 0.7 < waiting[8] < 0.9 and 5 < waiting[16] < 6


def test_misread_eight_copies():
    """A token goes to a node once, however many of its experts are there."""
    for rank, sent in enumerate(run_ranks(bytes_sent, 4)):
        tokens = ((CHOSEN + 4 * rank) % 16).tolist()
        nodes = sum(len({e // 8 for e in token} - {rank // 2}) for token in tokens)
        owners = sum(len({e // 4 for e in token} - {rank}) for token in tokens)
        choices = sum(e // 4 != rank for token in tokens for e in token)
        assert sent == [32 * nodes, 32 * owners] and nodes < owners < choices


@pytest.mark.parametrize("name", ["1F1B", "ZB1P", "DualPipe"])
def test_misread_bubble_shrinks(name):
    # fact 50
    few, many = (simulate(SCHEDULES[name](8, micro), Durations()) for micro in (16, 64))
    assert few.bubble == many.bubble > 0
    assert many.bubble / many.end < few.bubble / few.end / 2


def test_misread_zero_shards_weights():
    plain, shared = (
        costs.worst(costs.training_memory(LARGE, replace(costs.V3_LAYOUT, zero=zero)))
        for zero in (0, 1)
    )
    assert (plain.weights, plain.gradients) == (shared.weights, shared.gradients)
    assert shared.master < plain.master / 10 and shared.moments < plain.moments / 10


def test_misread_cost_of_v3():
    # fact 19
    hours = 2664e3 + 119e3 + 5e3
    assert sum(costs.V3_BUDGET.hours.values()) == hours == 2.788e6
    assert sum(costs.V3_BUDGET.dollars.values()) == 2 * hours == 5.576e6


# Break-it cells -----------------------------------------------------------------------------------


def test_what_every_rank_has_is_added_after_the_sum():
    """Added before it, it is there once per rank: the logits depart. One process cannot tell."""
    found = run_ranks(with_residual_before_the_sum, 2)
    alone, before, after = with_residual_before_the_sum(TensorGroup.single())
    assert abs(before - after).max() < 1e-5 < abs(before - alone).max()
    for right, wrong, once in found:
        assert abs(right - alone).max() < 1e-4 and abs(once - after).max() < 1e-4
        assert abs(wrong - after).max() > 1e-2


def test_a_non_linearity_needs_whole_sums():
    """The chapter's numbers, by loops: cut by columns it is right, by rows wrong."""
    inner = [sum(X[i] * FIRST[i][j] for i in range(2)) for j in range(4)]
    bent = [max(0, value) for value in inner]
    y = [sum(bent[j] * SECOND[j][k] for j in range(4)) for k in range(2)]
    by_columns = [
        [sum(bent[j] * SECOND[j][k] for j in mine) for k in range(2)] for mine in ((0, 1), (2, 3))
    ]
    by_rows = [sum(max(0, X[i] * FIRST[i][j]) for i in range(2)) for j in range(4)]
    assert [a + b for a, b in zip(*by_columns, strict=True)] == y == [4, 7]
    assert bent == [3, 1, 0, 2] and by_rows == [4, 3, 1, 2]


# Replicas -----------------------------------------------------------------------------------------


def test_replicas_even_out_skewed_loads():
    # fact 56
    random = torch.Generator().manual_seed(0)
    loads = torch.randn(256, generator=random, dtype=torch.float64).exp().tolist()
    before = [sum(loads[8 * gpu : 8 * gpu + 8]) for gpu in range(32)]
    plan = replicas.plan(loads, replicas=288, groups=8, nodes=4, gpus=32)
    assert max(before) * 32 / sum(before) == pytest.approx(2.41, abs=0.05)
    assert plan.imbalance(loads) == pytest.approx(1.08, abs=0.06)


# Ranks as threads ---------------------------------------------------------------------------------


def test_a_deadlock_is_found_at_once_and_each_rank_says_where():
    def all_send(group, x):
        group.send(x, (group.rank + 1) % group.size)

    with pytest.raises(Stuck, match="rank 2 waits in group.send"):
        in_threads(all_send, 3, [1, 2, 3])

    def one_leaves(group, x):
        return group.all_reduce(x) if group.rank else x

    with pytest.raises(Stuck, match="rank 0 is done; rank 1 waits in"):
        in_threads(one_leaves, 2, [torch.ones(1)] * 2)


def test_what_is_sent_is_a_copy_and_a_failure_is_the_first_ranks():
    def change_after(group, x):
        if group.rank == 0:
            group.send(x, 1)
            x += 1
            return x
        return group.receive(0)

    assert [int(x) for x in in_threads(change_after, 2, [torch.zeros(1)] * 2)] == [1, 0]

    def fail(group, x):
        if group.rank < 2:
            raise ValueError(f"rank {group.rank}")
        return group.all_reduce(x)

    for _ in range(20):
        with pytest.raises(ValueError, match="rank 0"):
            in_threads(fail, 3, [torch.ones(1)] * 3)


def test_the_faults_show_as_the_exercise_says():
    """Where each program's ranks differ from each other, and from one rank alone."""
    shown = {}
    for name, fault in FAULTS.items():
        (alone, _), *_ = run(name, 1)
        (a, logits_a), (b, logits_b) = run(name)
        shown[fault] = (bool((logits_a != logits_b).any()), a != b, a != alone)
    assert shown["fine"] == (False, False, False)
    assert shown["stale"] == (False, False, True)
    assert shown["draws"][:2] == (False, True)
    assert shown["rounds"][:2] == (True, True)
