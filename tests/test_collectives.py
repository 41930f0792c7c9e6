"""Collectives made of single messages, against torch.distributed's and against their formulae."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dsv3.errors import DSV3Error
from dsv3.parallel import collectives, traffic
from dsv3.parallel.collectives import Mail
from dsv3.parallel.traffic import BETWEEN, INSIDE, Topology, Traffic

pytestmark = pytest.mark.slow


def mine(rank: int, rows: int) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in any order."""
    return torch.randint(-9, 9, (rows, 3), generator=torch.Generator().manual_seed(rank)).float()


def everything(group, rows: int) -> dict:
    """Each collective, by hand and by the library, and what was sent."""
    found = {}
    for name in ("broadcast", "reduce_scatter", "all_gather", "all_reduce", "all_to_all"):
        mail, x = Mail(group, per_node=2), mine(group.rank, rows)
        parts = x.tensor_split(group.size)
        if name == "broadcast":
            ours, theirs = collectives.broadcast(mail, x, source=1), x.clone()
            dist.broadcast(theirs, 1)
        elif name == "reduce_scatter":
            ours, theirs = collectives.reduce_scatter(mail, x), x.clone()
            dist.all_reduce(theirs)
            theirs = theirs.tensor_split(group.size)[group.rank]
        elif name == "all_gather":
            part = parts[group.rank]
            ours = collectives.all_gather(mail, part, like=x)
            theirs = torch.cat(
                [mine(rank, rows).tensor_split(group.size)[rank] for rank in range(group.size)]
            )
        elif name == "all_reduce":
            ours, theirs = collectives.all_reduce(mail, x), x.clone()
            dist.all_reduce(theirs)
        else:
            if rows % group.size:
                continue
            ours, theirs = collectives.all_to_all(mail, x), torch.empty_like(x)
            dist.all_to_all_single(theirs, x)
        found[name] = (
            ours.numpy(),
            theirs.numpy(),
            mail.traffic.bytes,
            mail.traffic.messages,
            x.nbytes,
        )
    return found


@pytest.mark.parametrize("ranks, rows", [(2, 8), (4, 8), (4, 6), (4, 3)])
def test_by_hand_equals_the_library_and_sends_what_the_formula_says(ranks, rows):
    by_rank = run_ranks(everything, ranks, rows)
    for name in by_rank[0]:
        sent = 0
        for found in by_rank:
            ours, theirs, bytes_, _, nbytes = found[name]
            assert np.array_equal(ours, theirs), name
            sent += sum(bytes_.values())
        formula = getattr(traffic, f"{name}_bytes")(nbytes, ranks)
        assert sent / ranks == pytest.approx(formula), name


def test_kinds_of_links_are_counted_apart():
    """Of a ring over two nodes of two, each rank sends to its right: two inside, two between."""
    by_rank = run_ranks(everything, 4, 8)
    for rank, found in enumerate(by_rank):
        _, _, bytes_, messages, nbytes = found["all_reduce"]
        across = rank % 2 == 1
        assert messages == {INSIDE: 0 if across else 6, BETWEEN: 6 if across else 0}
        assert bytes_[BETWEEN if across else INSIDE] == 2 * 3 * nbytes // 4
        _, _, bytes_, messages, _ = found["all_to_all"]
        assert messages == {INSIDE: 1, BETWEEN: 2} and bytes_[BETWEEN] == 2 * bytes_[INSIDE]


def test_where_ranks_are():
    topology = Topology(ranks=8, per_node=4)
    assert topology.nodes == 2 and [topology.node(rank) for rank in (0, 3, 4, 7)] == [0, 0, 1, 1]
    assert topology.local(6) == 2 and topology.rank(1, 2) == 6
    assert [topology.link(5, other) for other in (5, 4, 3)] == [None, INSIDE, BETWEEN]
    with pytest.raises(DSV3Error, match="per_node"):
        Topology(ranks=6, per_node=4)


def test_what_stays_at_home_costs_nothing():
    count = Traffic(Topology(4, 2))
    count.count(1, 1, 100)
    count.count(1, 2, 0)
    assert sum(count.messages.values()) == sum(count.bytes.values()) == 0
    count.count(1, 2, 7)
    assert count.bytes == {INSIDE: 0, BETWEEN: 7}
    count.reset()
    assert count.bytes == {INSIDE: 0, BETWEEN: 0}


@pytest.mark.parametrize(
    "name, share",
    [
        ("all_reduce", 2 * 7 / 8),
        ("reduce_scatter", 7 / 8),
        ("all_gather", 7 / 8),
        ("broadcast", 7 / 8),
        ("all_to_all", 7 / 8),
    ],
)
def test_formulae(name, share):
    assert getattr(traffic, f"{name}_bytes")(1000.0, 8) == pytest.approx(share * 1000)
    assert getattr(traffic, f"{name}_bytes")(1000.0, 1) == 0
