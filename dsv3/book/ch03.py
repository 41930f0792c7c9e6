"""Checks of chapter 3's exercises."""

from __future__ import annotations

from collections.abc import Callable
from math import comb

import torch
from torch import Tensor

from dsv3.book.exercise import Verdict, judge, judge_statements, judge_value


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activated(answer: float | None) -> Verdict:
    """Expert parameters at work for a token: 26 layers, 6 of 64 routed and 2 shared experts."""
    one = 3 * 2048 * 1408
    return judge_value(
        "activated",
        answer,
        26 * 8 * one,
        {
            26 * 6 * one: "the two shared experts are missing; every token visits them",
            26 * 8 * one * 2 / 3: "that is two matrices an expert; a SwiGLU has three",
            26 * 6 * one * 2 / 3: "a SwiGLU has three matrices, and the shared experts work too",
            8 * one: "that is one layer; there are 26 with experts",
            26 * 66 * one: "that is what has to be stored; a token uses 6 of the 64",
            26 * 64 * one: "that is what has to be stored of the routed experts; a token uses 6 of "
            "them, and the 2 shared ones",
            26 * 7 * one: "there are two shared experts, not one",
        },
        unit="parameters",
    )


def _spread(scores: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(scores).scatter(-1, chosen, weights)


def _gate(
    scores: Tensor,
    bias: Tensor,
    k: int,
    factor: float,
    *,
    choose_by: str = "both",
    weigh_by: str = "scores",
    divide_by: str = "chosen",
) -> Tensor:
    biased = scores + bias
    chosen = (biased if choose_by == "both" else scores).topk(k).indices
    weights = (scores if weigh_by == "scores" else biased).gather(-1, chosen)
    if divide_by == "chosen":
        weights = weights / weights.sum(-1, keepdim=True)
    elif divide_by == "all":
        weights = weights / scores.sum(-1, keepdim=True)
    elif divide_by == "softmax":
        weights = weights.softmax(-1)
    return _spread(scores, chosen, weights * factor)


def gate_weights(answer: Callable) -> Verdict:
    """scores (n, E), bias (E,), k, factor -> weights (n, E), 0 where an expert is not chosen."""
    cases = [
        (_random(6, 8).sigmoid(), _random(8, seed=1), 3, 2.5),
        (_random(5, 12, seed=2).sigmoid(), _random(12, seed=3) - 6, 4, 2.5),
        (_random(4, 6, seed=4).sigmoid(), torch.zeros(6), 2, 1.0),
    ]

    def wrong(**how) -> Callable:
        return lambda *given: _gate(*given, **how)

    return judge(
        "gate_weights",
        answer,
        _gate,
        cases,
        {
            "the weights are made of s + b. The bias is for the choice; weigh by s alone": wrong(
                weigh_by="both"
            ),
            "the bias is not used. The choice goes by s + b": wrong(choose_by="scores"),
            "the weights of the chosen do not add up to the factor: divide by the sum of the chosen "
            "s": wrong(divide_by="nothing"),
            "you divide by the sum over all experts; only the chosen count": wrong(divide_by="all"),
            "a softmax over the chosen scores is another gate: divide by their sum": wrong(
                divide_by="softmax"
            ),
            "the factor is missing": lambda s, b, k, factor: _gate(s, b, k, 1.0),
            "the factor is missing, and the weights are made of s + b": lambda s, b, k, factor: (
                _gate(s, b, k, 1.0, weigh_by="both")
            ),
        },
        praise="equal on all inputs, strongly negative biases among them",
    )


def balance_claims(answer: dict[str, bool | None]) -> Verdict:
    """Seven statements about the bias, the balance loss and the limit."""
    return judge_statements(
        "balance_claims",
        answer,
        {
            "rarely chosen experts get a larger say through their bias": False,
            "subtracting 3 from all biases of a layer changes nothing": True,
            "gamma = 0 at the end of training leaves the biases at 0": False,
            "the bias rule can make MaxVio of every batch 0": False,
            "a batch can be balanced while no sequence in it is": True,
            "V3 is trained without any auxiliary loss": False,
            "a token that nobody has room for is dropped": False,
        },
        {
            "rarely chosen experts get a larger say through their bias": "the bias gets them chosen; how much they say is s over the sum of the chosen s",
            "subtracting 3 from all biases of a layer changes nothing": "the order of s + b stays, group sums all fall by 6, closed groups are at minus "
            "infinity, and the weights do not know b",
            "gamma = 0 at the end of training leaves the biases at 0": "gamma is the step; the biases stay where they are and go on steering",
            "the bias rule can make MaxVio of every batch 0": "tokens of a batch are a sample, each chooses for itself, and chance alone leaves about "
            "0.26 at the report's sizes",
            "a batch can be balanced while no sequence in it is": "think of four texts of four domains, each with its own experts",
            "V3 is trained without any auxiliary loss": "the sequence-wise loss of eq. 17 remains, with weight 0.0001",
            "a token that nobody has room for is dropped": "experts have no fixed room; the report drops no token in training or inference",
        },
    )


def free_nodes(answer: float | None) -> Verdict:
    """Nodes that 6 of 160 experts on 8 nodes visit on average, without a limit."""
    right = 8 * (1 - comb(140, 6) / comb(160, 6))
    return judge_value(
        "free_nodes",
        answer,
        right,
        {
            8
            * (
                1 - (7 / 8) ** 6
            ): "close: you let a token choose the same expert twice. The six are different",
            6: "six experts can share a node; count the nodes that are missed",
            8 * comb(140, 6) / comb(160, 6): "that is the number of nodes missed",
            comb(140, 6) / comb(160, 6): "that is the chance that one node is missed",
            1
            - comb(140, 6) / comb(160, 6): "that is the chance that one node is visited; there are "
            "eight",
            8 * (1 - comb(224, 8) / comb(256, 8)): "that is V3's number, 8 of 256; here it is 6 of "
            "160",
        },
        tolerance=2e-3,
        unit="nodes",
    )


def chance_floor(answer: float | None) -> Verdict:
    """MaxVio that chance leaves of equal experts, 8 of 256, with 512 tokens."""
    return judge_value(
        "chance_floor",
        answer,
        0.77,
        {
            0.26: "that is the floor for 4,096 tokens; with fewer tokens chance weighs more",
            0.09: "the wrong way: fewer tokens scatter more, not less",
            2.0: "eight times fewer tokens scatter by the root of eight, not by eight",
        },
        tolerance=0.08,
        praise="about 0.77: as long as tokens choose independently, a single "
        "sequence cannot be balanced better than this",
    )


def _open(biased: Tensor, groups: int, keep: int, rank: Callable) -> Tensor:
    grouped = biased.unflatten(-1, (groups, -1))
    best = rank(grouped).topk(keep).indices
    is_open = torch.zeros(grouped.shape[:-1], dtype=torch.bool).scatter(-1, best, True)
    return is_open[..., None].expand_as(grouped).flatten(-2)


def open_experts(answer: Callable) -> Verdict:
    """biased scores (n, E), groups, keep -> which experts stand in an open group, (n, E) bool."""

    def right(biased, groups, keep):
        return _open(biased, groups, keep, lambda x: x.topk(2).values.sum(-1))

    def interleaved(biased, groups, keep):
        _n, experts = biased.shape
        order = torch.arange(experts).view(-1, groups).T.flatten()
        return right(biased[:, order], groups, keep)[:, order.argsort()]

    cases = [
        (_random(40, 16), 4, 2),
        (_random(30, 12, seed=1) - 6, 3, 1),
        (_random(30, 32, seed=2).sigmoid() - 2, 8, 4),
    ]
    return judge(
        "open_experts",
        answer,
        right,
        cases,
        {
            "a group is ranked by its best expert here; it is the sum of the two best": lambda b, g, m: (
                _open(b, g, m, lambda x: x.amax(-1))
            ),
            "a group is ranked by all of its experts here; it is the sum of the two best": lambda b, g, m: (
                _open(b, g, m, lambda x: x.sum(-1))
            ),
            "the groups are cut the wrong way: neighbours stand in one group, experts 0 to E/G - 1 in "
            "the first": interleaved,
            "this marks the closed ones": lambda b, g, m: ~right(b, g, m),
            "one group too many is open": lambda b, g, m: right(b, g, m + 1),
            "the wrong groups are open: those with the smallest sums": lambda b, g, m: _open(
                b, g, m, lambda x: -x.topk(2).values.sum(-1)
            ),
        },
    )


def rows_to_nodes(answer: Callable) -> Verdict:
    """chosen (T, k), experts, nodes -> tokens sent to each node, (nodes,): each token once."""

    def visits(chosen, nodes, of):
        hit = torch.zeros(len(chosen), nodes, dtype=torch.int64)
        return hit.scatter(-1, of(chosen), 1).sum(0)

    def right(chosen, experts, nodes):
        return visits(chosen, nodes, lambda c: c // (experts // nodes))

    def every_choice(chosen, experts, nodes):
        return torch.bincount(chosen.flatten() // (experts // nodes), minlength=nodes)

    def round_robin(chosen, experts, nodes):
        return visits(chosen, nodes, lambda c: c % nodes)

    def short(chosen, experts, nodes):
        counts = right(chosen, experts, nodes)
        return counts[: int(counts.nonzero().max()) + 1]

    cases = [
        (_random(50, 16).topk(4).indices, 16, 4),
        (_random(9, 6, seed=1).topk(3).indices, 12, 4),
        (_random(64, 256, seed=2).topk(8).indices, 256, 8),
    ]
    return judge(
        "rows_to_nodes",
        answer,
        right,
        cases,
        {
            "a token with two experts on a node is sent there once, and shared out inside; you count "
            "every choice": every_choice,
            "experts lie on nodes in blocks: 0 to E/N - 1 on the first; you deal them out in turn": round_robin,
            "nodes that nobody visits are missing from the end; give every node its number": short,
        },
        praise="equal on all inputs. At 671B the third one is 5.3 rows a token instead of 8; with "
        "the limit it is 4",
    )


def mixtral_gate(answer: Callable) -> Verdict:
    """logits (n, E), k -> weights (n, E): softmax over all, the k largest, renormalised."""

    def right(logits, k):
        p, chosen = logits.softmax(-1).topk(k)
        return _spread(logits, chosen, p / p.sum(-1, keepdim=True))

    def not_renormalised(logits, k):
        p, chosen = logits.softmax(-1).topk(k)
        return _spread(logits, chosen, p)

    def sigmoid(logits, k):
        s, chosen = logits.sigmoid().topk(k)
        return _spread(logits, chosen, s / s.sum(-1, keepdim=True))

    def zeros_for_the_rest(logits, k):
        value, chosen = logits.topk(k)
        return _spread(logits, chosen, value).softmax(-1)

    def of_logits(logits, k):
        value, chosen = logits.topk(k)
        return _spread(logits, chosen, value / value.sum(-1, keepdim=True))

    cases = [(_random(6, 8), 2), (3 * _random(5, 16, seed=1) - 4, 4), (_random(3, 4, seed=2), 4)]
    return judge(
        "mixtral_gate",
        answer,
        right,
        cases,
        {
            "the weights of a token do not sum to 1: divide by the sum of the chosen": not_renormalised,
            "this is V3's gate without bias, a sigmoid; Mixtral's is a softmax": sigmoid,
            "a softmax over zeros gives the experts that are not chosen a weight; put minus infinity "
            "there, or take the softmax first": zeros_for_the_rest,
            "the logits themselves are no weights, some are negative: exponentiate first": of_logits,
        },
        praise="equal on all inputs. Look how little differs: the squeeze, and what is added before "
        "the choice",
    )
