"""Copies of busy experts, and which GPU holds which: load balance in deployment (TR 3.4).

In expert parallelism the busiest GPU decides when a layer is done. Loads differ, so an expert that
many tokens visit gets a second copy, a *replica*, and its tokens are shared out between them; and
the copies are spread so that every GPU has about the same to do. The loads are measured now and
then, on the live traffic, and the plan is made anew. The model computes the same whatever the
plan is.

Two policies, as published with DeepSeek's EPLB:

* *hierarchical*, where groups of experts can be shared out evenly over nodes: groups are packed
  into nodes first, so that a token's chosen groups stay on few nodes; then experts are copied
  inside each node; then the copies are packed onto the node's GPUs.
* *global*: copies are made and packed regardless of groups.

Packing is greedy: heaviest first, each onto the lightest GPU that has room. Two copies of one
expert on one GPU would share nothing, so a GPU that holds one already is passed over; where only
such GPUs have room, two copies change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.errors import DSV3Error


@dataclass(frozen=True)
class Plan:
    """Where the replicas of one layer's experts are.

    experts: the expert of each replica, in the order of the GPUs, equally many on each; gpus: how
    many there are.
    """

    experts: tuple[int, ...]
    gpus: int

    def on(self, gpu: int) -> tuple[int, ...]:
        """The experts of one GPU."""
        each = len(self.experts) // self.gpus
        return self.experts[gpu * each : (gpu + 1) * each]

    def loads(self, loads: Sequence[float]) -> list[float]:
        """What each GPU has to do, if an expert's load is shared evenly by its replicas."""
        return [
            sum(loads[expert] / self.experts.count(expert) for expert in self.on(gpu))
            for gpu in range(self.gpus)
        ]

    def imbalance(self, loads: Sequence[float]) -> float:
        """Load of the busiest GPU, relative to the mean: 1 is perfect."""
        by_gpu = self.loads(loads)
        return max(by_gpu) * self.gpus / sum(by_gpu)


def plan(loads: Sequence[float], replicas: int, groups: int, nodes: int, gpus: int) -> Plan:
    """A plan for one layer.

    loads: of each expert, any unit; replicas: in all, at least one an expert; groups: of
    neighbouring experts; nodes, gpus: machines, and GPUs in all. Hierarchical where the groups can
    be shared out evenly over the nodes, else global. Raises DSV3Error for numbers that do not fit.
    """
    experts = len(loads)
    _check(experts, replicas, groups, nodes, gpus)
    if groups % nodes:
        groups = nodes = 1
    size = experts // groups
    by_group = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    order: list[int] = []
    for held in _pack(by_group, list(range(groups)), nodes):
        own = [group * size + number for group in held for number in range(size)]
        copies = _copies([loads[expert] for expert in own], replicas // nodes, gpus // nodes)
        share = [loads[own[copy]] / copies.count(copy) for copy in copies]
        for gpu in _pack(share, copies, gpus // nodes):
            order += [own[copies[replica]] for replica in gpu]
    return Plan(tuple(order), gpus)


def _copies(loads: list[float], replicas: int, gpus: int) -> list[int]:
    """The expert of each replica: every expert once, then again and again the one whose replicas
    have most to do. More replicas than GPUs help nobody, so an expert with that many is passed
    over as long as there is another."""
    counts = [1] * len(loads)
    copies = list(range(len(loads)))
    while len(copies) < replicas:
        open_ = [expert for expert, count in enumerate(counts) if count < gpus]
        busiest = max(open_ or range(len(loads)), key=lambda expert: loads[expert] / counts[expert])
        counts[busiest] += 1
        copies.append(busiest)
    return copies


def _pack(weights: list[float], kinds: list[int], packs: int) -> list[list[int]]:
    """Items shared out evenly over packs, in number and about in weight: item numbers by pack.

    kinds: two of one kind are kept apart where there are enough packs.
    """
    room = len(weights) // packs
    held: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs

    def has(pack: int, item: int) -> bool:
        return any(kinds[other] == kinds[item] for other in held[pack])

    def put(item: int, pack: int) -> None:
        held[pack].append(item)
        total[pack] += weights[item]

    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        open_ = [pack for pack in range(packs) if len(held[pack]) < room]
        best = min(open_, key=lambda pack: (has(pack, item), total[pack]))
        without = [pack for pack in range(packs) if not has(pack, item)]
        if has(best, item) and without:
            # Every pack with room has this kind. One without it is full of other kinds, and at
            # least one of those is not in ``best`` yet: that one moves over.
            other = min(without, key=lambda pack: total[pack])
            moved = next(old for old in reversed(held[other]) if not has(best, old))
            held[other].remove(moved)
            total[other] -= weights[moved]
            put(moved, best)
            best = other
        put(item, best)
    return held


def _check(experts: int, replicas: int, groups: int, nodes: int, gpus: int) -> None:
    for name, value, whole, of in (
        ("groups", groups, experts, "experts"),
        ("nodes", nodes, gpus, "gpus"),
        ("gpus", gpus, replicas, "replicas"),
    ):
        if value < 1 or whole % value:
            raise DSV3Error(
                "a plan that cannot be",
                where=name,
                found=value,
                expected=f"a divisor of {whole} {of}",
            )
    if replicas < experts:
        raise DSV3Error(
            "too few replicas", where="replicas", found=replicas, expected=f"{experts} or more"
        )
