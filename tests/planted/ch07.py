"""Wrong answers to chapter 7's exercises, each with what the check must say to it."""

from __future__ import annotations

from dsv3.book.ch07 import _order
from dsv3.book.disagreement import FAULTS
from dsv3.book.dispatching import MISTAKES, right

BYTES = {
    "all-reduce": 18_000,
    "all-reduce over 1,000 ranks": 23_976,
    "reduce-scatter": 9_000,
    "all-to-all": 9_000,
}
CLAIMS = {
    "a rank of a ring all-reduce sends ten times as much among 1,000 ranks as among 100": False,
    "with data parallelism alone, a model twice as large needs twice the memory per GPU for "
    "weights, gradients and optimizer": True,
    "a SwiGLU can be cut by its inner channels without a sum inside it": True,
    "with ZeRO-1 each rank keeps only a part of the weights that it computes with": False,
    "in V3's training, a token whose 8 experts are on 4 nodes crosses InfiniBand 8 times in a "
    "dispatch": False,
    "twice as many micro-batches of the same size halve the time that 1F1B's ranks wait": False,
    "the gradient of the weights can be postponed without making another rank wait": True,
    "a replica of an expert changes what the model says": False,
}
ENOUGH = {"1F1B": 285, "DualPipe": 90}


def all_send_first(group, x):
    group.send(x, (group.rank + 1) % group.size)
    return group.receive((group.rank - 1) % group.size)


def all_receive_first(group, x):
    got = group.receive((group.rank - 1) % group.size)
    group.send(x, (group.rank + 1) % group.size)
    return got


def in_pairs(group, x):
    other = group.rank ^ 1
    if group.rank % 2:
        got = group.receive(other)
        group.send(x, other)
        return got
    group.send(x, other)
    return group.receive(other)


def to_the_left(group, x):
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.rank % 2:
        got = group.receive(right)
        group.send(x, left)
        return got
    group.send(x, left)
    return group.receive(right)


def its_own(group, x):
    if group.rank:
        group.receive((group.rank - 1) % group.size)
        group.send(x, (group.rank + 1) % group.size)
    else:
        group.send(x, (group.rank + 1) % group.size)
        group.receive((group.rank - 1) % group.size)
    return x


def kept_at_home(group, x, chosen, weights, held, expert):
    return right(group, x, chosen, weights, held, expert, sent=lambda group, back: back)


def no_call_without_rows(group, x, chosen, weights, held, expert):
    if not any(int(e) // held == group.rank for e in chosen.flatten()):
        return x * 0
    return right(group, x, chosen, weights, held, expert)


def others_experts(group, x, chosen, weights, held, expert):
    y = x * 0
    for t in range(len(x)):
        for k in range(chosen.shape[1]):
            y[t] += weights[t, k] * expert(chosen[t, k], x[t])
    return y


PLANTED = {
    "collective_bytes": [
        (BYTES | {"all-reduce": 24_000}, "one part in N stays at home"),
        (BYTES | {"all-reduce": 72_000}, "all ranks send together"),
        (BYTES | {"all-reduce": 9_000}, "the first half, the reduce-scatter"),
        (BYTES | {"all-to-all": 3_000}, "N - 1 of them leave a rank"),
        (BYTES | {"all-to-all": 9_000.5}, "a whole number"),
        (BYTES | {"all-reduce over 1,000 ranks": 11_988}, "go through the ring once more"),
    ],
    "row_parallel": [
        (lambda g, x, w, b: g.all_reduce(x @ w.T + b), "counts once per rank"),
        (lambda g, x, w, b: x @ w.T + b, "all_reduce is missing"),
        (lambda g, x, w, b: g.all_reduce(x @ w.T), "the bias is missing"),
        (lambda g, x, w, b: g.all_reduce(x @ w.T) / g.size + b, "not averaged"),
        (
            lambda g, x, w, b: g.all_reduce(x @ w.T) + (b if g.rank == 0 else 0),
            "only rank 0 has the bias",
        ),
        (
            lambda g, x, w, b: g.all_reduce(x @ w.T) + b if g.rank else x @ w.T,
            "rank 0 is done; rank 1 waits in",
        ),
        (lambda g, x, w, b: g.all_reduce(x @ w) + b, "RuntimeError"),
    ],
    "order_1f1b": [
        (lambda r, p, m: _order(r, p, m, m), "all forwards come first"),
        (lambda r, p, m: _order(r, p, m, p - r), "one forward too many"),
        (lambda r, p, m: _order(r, p, m, r), "count the ranks behind you"),
        (lambda r, p, m: _order(r, p, m, 0), "nobody runs ahead"),
        (lambda r, p, m: _order(r, p, m)[: 2 * m - min(p - 1 - r, m)], "last backwards"),
        (lambda r, p, m: tuple("F0 B0".split()), "parts"),
    ],
    "parallel_claims": [
        (
            CLAIMS
            | {
                "with ZeRO-1 each rank keeps only a part of the weights that it computes with": True
            },
            "weights are whole",
        ),
        (
            CLAIMS
            | {
                "twice as many micro-batches of the same size halve the time that 1F1B's ranks "
                "wait": True
            },
            "only the share",
        ),
        (CLAIMS | {"a replica of an expert changes what the model says": True}, "a copy"),
    ],
    "pass_right": [
        (all_send_first, "rank 0 waits in group.send(x, (group.rank + 1) % group.size)"),
        (all_receive_first, "waits in got = group.receive("),
        (in_pairs, "rank 2 waits in"),
        (to_the_left, "everything goes to the left"),
        (its_own, "you return what you had"),
    ],
    "place_replicas": [
        ([[0, 1], [2, 3], [2, 4], [5, 0]], "as with the greedy planner"),
        ([[2, 2], [0, 4], [1, 3], [4, 5]], "the second copy takes no load off"),
        ([[2, 0], [2, 0], [1, 4], [4, 5]], "expert 3 is nowhere"),
        ([[2, 0], [2, 0], [1, 3], [4, 6]], "no expert 6"),
        ([[2, 0], [2, 0], [1, 3, 4], [5]], "two places each"),
        ([[2, 0], [0, 1], [1, 3], [4, 5]], "it needs a second copy"),
        ([[2, 1], [2, 0], [0, 3], [4, 5]], "80 on each is possible"),
        (80, "a list of four lists"),
    ],
    "enough_micro_batches": [
        (ENOUGH | {"DualPipe": 89}, "an even number"),
        (ENOUGH | {"1F1B": 300}, "as a share of the work"),
        (ENOUGH | {"1F1B": 284}, "a little more than a twentieth"),
        (ENOUGH | {"1F1B": 100}, "0.130 is lost"),
        (ENOUGH | {"1F1B": 0}, "count from 1"),
    ],
    "disagreement": [
        (FAULTS | {"A": "fine"}, "by a step of BF16"),
        (FAULTS | {"B": "stale"}, "agree in every logit and every token"),
        (FAULTS | {"C": "draws"}, "another text than one rank alone"),
        (FAULTS | {"D": "rounds"}, "equal to the last bit"),
        (FAULTS | {"D": "random"}, "one of draws, fine, rounds, stale"),
    ],
    "expert_parallel": [
        *(
            (mistake, phrase)
            for mistake, phrase in zip(
                MISTAKES.values(),
                ("without their weights", "overwrites", "needs both", "rank by rank"),
                strict=True,
            )
        ),
        (kept_at_home, "RuntimeError"),
        (no_call_without_rows, "is done"),
        (others_experts, "is on rank 1, not here"),
    ],
}
