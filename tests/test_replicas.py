"""Plans for replicas of experts: the published example, invariants on random loads."""

from __future__ import annotations

import random

import pytest

from dsv3.errors import DSV3Error
from dsv3.parallel.replicas import Plan, plan

# The example of EPLB's README: two layers of 12 experts, 16 replicas, 4 groups, 2 nodes, 8 GPUs.
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
]
BY_GPU = [
    [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
    [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5],
]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_published_plan(layer):
    made = plan(LOADS[layer], replicas=16, groups=4, nodes=2, gpus=8)
    assert made.experts == PUBLISHED[layer]
    assert made.loads(LOADS[layer]) == BY_GPU[layer]


def test_the_global_policy():
    """The published code reaches 1.073 on the first layer with both copies of expert 1 on one GPU;
    kept apart they cost 1.0765. On the second layer both give 1.190."""
    first, second = (plan(loads, replicas=16, groups=1, nodes=1, gpus=8) for loads in LOADS)
    assert first.imbalance(LOADS[0]) == pytest.approx(1.0765, abs=5e-5)
    assert second.imbalance(LOADS[1]) == pytest.approx(1.190, abs=5e-4)


def random_case(random_: random.Random) -> tuple[list[float], dict]:
    nodes = random_.choice([1, 2, 4])
    gpus = nodes * random_.choice([1, 2, 3, 4, 8])
    groups = nodes * random_.choice([1, 2, 3]) if random_.random() < 0.8 else 1
    experts = groups * random_.choice([1, 2, 5, 8])
    replicas = gpus * (-(-experts // gpus) + random_.randrange(4))
    sharp = random_.choice([0.0, 0.5, 1.5, 3.0])
    loads = [random_.lognormvariate(0, sharp) for _ in range(experts)]
    if random_.random() < 0.1:
        loads = [0.0] * (experts - 1) + [1.0]
    return loads, dict(replicas=replicas, groups=groups, nodes=nodes, gpus=gpus)


def test_invariants_on_1000_random_loads():
    random_ = random.Random(0)
    for _ in range(1000):
        loads, sizes = random_case(random_)
        made = plan(loads, **sizes)
        assert len(made.experts) == sizes["replicas"]
        assert set(made.experts) == set(range(len(loads))), "each expert is somewhere"
        assert sum(made.loads(loads)) == pytest.approx(sum(loads)), "no load is lost"
        hierarchical = sizes["groups"] % sizes["nodes"] == 0
        nodes = sizes["nodes"] if hierarchical else 1
        gpus = sizes["gpus"] // nodes
        for node in range(nodes):
            held = [made.on(node * gpus + gpu) for gpu in range(gpus)]
            copies = [expert for one in held for expert in one]
            if hierarchical:  # a group is whole, and on one node
                size = len(loads) // sizes["groups"]
                groups = {expert // size for expert in copies}
                assert len(groups) == sizes["groups"] // nodes
                assert len(set(copies)) == size * len(groups)
            if len(copies) <= gpus * len(set(copies)):  # there is a way to keep copies apart
                assert all(len(set(one)) == len(one) for one in held)


def test_more_replicas_help_and_equal_loads_are_perfect():
    loads = [2.0**-number for number in range(32)]
    few = plan(loads, replicas=32, groups=1, nodes=1, gpus=8)
    more = plan(loads, replicas=48, groups=1, nodes=1, gpus=8)
    assert more.imbalance(loads) < few.imbalance(loads)
    assert plan([1.0] * 32, replicas=32, groups=4, nodes=2, gpus=8).imbalance([1.0] * 32) == 1.0


def test_copies_of_one_expert_change_places_where_greed_would_put_them_together():
    """Expert 0 has a copy for each GPU; the greedy order leaves room only beside one of them."""
    loads = [12.0, 5.0, 5.0, 1.0, 1.0]
    made = plan(loads, replicas=6, groups=1, nodes=1, gpus=2)
    assert made.experts.count(0) == 2
    assert all(len(set(made.on(gpu))) == 3 for gpu in range(2))


@pytest.mark.parametrize(
    "sizes, named",
    [
        (dict(replicas=16, groups=5, nodes=1, gpus=8), "groups"),
        (dict(replicas=16, groups=4, nodes=3, gpus=8), "nodes"),
        (dict(replicas=18, groups=4, nodes=2, gpus=8), "gpus"),
        (dict(replicas=8, groups=4, nodes=2, gpus=8), "replicas"),
        (dict(replicas=16, groups=4, nodes=0, gpus=8), "nodes"),
    ],
)
def test_numbers_that_do_not_fit(sizes, named):
    with pytest.raises(DSV3Error, match=named):
        plan(LOADS[0], **sizes)


def test_where_groups_cannot_be_shared_out_the_policy_is_global():
    made = plan(LOADS[0], replicas=16, groups=3, nodes=2, gpus=8)
    assert made == plan(LOADS[0], replicas=16, groups=1, nodes=1, gpus=8)
    assert isinstance(made, Plan) and made.gpus == 8
