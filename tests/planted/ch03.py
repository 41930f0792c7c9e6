"""Wrong answers to chapter 3's exercises, each with what the check must say to it."""

from __future__ import annotations

import torch


def leaky_bias(scores, bias, k, factor):
    biased, chosen = (scores + bias).topk(k)
    out = torch.zeros_like(scores)
    return out.scatter_(1, chosen, factor * biased / biased.sum(1, keepdim=True))


def no_bias(scores, bias, k, factor):
    top, chosen = torch.topk(scores, k, dim=1)
    return torch.zeros_like(scores).scatter_(1, chosen, factor * top / top.sum(1, keepdim=True))


def unnormalised(scores, bias, k, factor):
    keep = torch.zeros_like(scores).scatter_(1, (scores + bias).topk(k, 1).indices, 1)
    return keep * scores * factor


def over_all(scores, bias, k, factor):
    keep = torch.zeros_like(scores).scatter_(1, (scores + bias).topk(k, 1).indices, 1)
    return factor * keep * (scores / scores.sum(1, keepdim=True))


def unscaled(scores, bias, k, factor):
    keep = torch.zeros_like(scores).scatter_(1, (scores + bias).topk(k, 1).indices, 1)
    return keep * scores / (keep * scores).sum(1, keepdim=True)


def by_rank(rank):
    def mask(biased, groups, keep):
        n, experts = biased.shape
        value = rank(biased.view(n, groups, experts // groups))
        best = value.sort(dim=1, descending=True).indices[:, :keep]
        result = torch.zeros(n, groups, dtype=torch.bool)
        for row in range(n):
            result[row, best[row]] = True
        return result.repeat_interleave(experts // groups, 1)

    return mask


def dealt(biased, groups, keep):
    n, experts = biased.shape
    value = biased.view(n, experts // groups, groups).topk(2, 1).values.sum(1)
    result = torch.zeros(n, groups, dtype=torch.bool).scatter_(1, value.topk(keep).indices, True)
    return result.repeat(1, experts // groups)


def closed(biased, groups, keep):
    return ~by_rank(lambda x: x.topk(2).values.sum(-1))(biased, groups, keep)


def all_choices(chosen, experts, nodes):
    return torch.stack([(chosen // (experts // nodes) == node).sum() for node in range(nodes)])


def in_turn(chosen, experts, nodes):
    return torch.stack([(chosen % nodes == node).any(1).sum() for node in range(nodes)])


def without_the_last(chosen, experts, nodes):
    size = experts // nodes
    last = int(chosen.max()) // size
    return torch.stack([(chosen // size == node).any(1).sum() for node in range(last + 1)])


def plain_softmax(logits, k):
    p = torch.softmax(logits, 1)
    smallest = p.topk(k).values[:, -1:]
    return p * (p >= smallest)


def sigmoids(logits, k):
    s = torch.sigmoid(logits)
    s = s * (s >= s.topk(k).values[:, -1:])
    return s / s.sum(1, keepdim=True)


def masked_with_zero(logits, k):
    return torch.softmax(logits * (logits >= logits.topk(k).values[:, -1:]), 1)


CLAIMS = {
    "rarely chosen experts get a larger say through their bias": False,
    "subtracting 3 from all biases of a layer changes nothing": True,
    "gamma = 0 at the end of training leaves the biases at 0": False,
    "the bias rule can make MaxVio of every batch 0": False,
    "a batch can be balanced while no sequence in it is": True,
    "V3 is trained without any auxiliary loss": False,
    "a token that nobody has room for is dropped": False,
}

PLANTED = {
    "activated": [
        (26 * 6 * 3 * 2048 * 1408, "shared experts are missing"),
        (26 * 8 * 2 * 2048 * 1408, "a SwiGLU has three"),
        (8 * 3 * 2048 * 1408, "one layer"),
        (26 * 66 * 3 * 2048 * 1408, "has to be stored"),
    ],
    "gate_weights": [
        (leaky_bias, "the weights are made of s + b"),
        (no_bias, "the bias is not used"),
        (unnormalised, "divide by the sum of the chosen"),
        (over_all, "only the chosen count"),
        (unscaled, "the factor is missing"),
    ],
    "balance_claims": [
        (CLAIMS | {"V3 is trained without any auxiliary loss": True}, "0.0001"),
        (
            CLAIMS | {"subtracting 3 from all biases of a layer changes nothing": False},
            "the order of s + b stays",
        ),
        (CLAIMS | {"the bias rule can make MaxVio of every batch 0": True}, "0.26"),
    ],
    "free_nodes": [
        (8 * (1 - 0.875**6), "the same expert twice"),
        (6, "can share a node"),
        (5.2947, "V3's number"),
    ],
    "chance_floor": [
        (0.26, "4,096 tokens"),
        (0.0884, "fewer tokens scatter more"),
        (2.0, "root of eight"),
    ],
    "open_experts": [
        (by_rank(lambda x: x.max(-1).values), "its best expert"),
        (by_rank(lambda x: x.mean(-1)), "all of its experts"),
        (dealt, "cut the wrong way"),
        (closed, "marks the closed ones"),
    ],
    "rows_to_nodes": [
        (all_choices, "you count every choice"),
        (in_turn, "you deal them out"),
        (without_the_last, "missing from the end"),
    ],
    "mixtral_gate": [
        (plain_softmax, "do not sum to 1"),
        (sigmoids, "V3's gate"),
        (masked_with_zero, "minus infinity"),
    ],
}
