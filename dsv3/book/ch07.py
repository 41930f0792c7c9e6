"""Checks of chapter 7's exercises. Ranks are threads here (``dsv3.book.threads``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dsv3.book.disagreement import FAULTS, run
from dsv3.book.exercise import Verdict, judge, judge_numbers, judge_statements
from dsv3.book.threads import Given, in_threads

__all__ = ["run"]  # the programs of the exercise that looks for a fault


def _on_ranks(answer):
    """The reader's function as one of what is given to ranks; what all of them return, or None as
    long as none returns anything."""

    def together(given: Given):
        found = in_threads(answer, given.ranks, *given.arguments)
        return None if all(value is None or value is ... for value in found) else found

    return together if callable(answer) else answer


# --- counting -----------------------------------------------------------------------------------


def collective_bytes(answer: dict[str, int | None]) -> Verdict:
    """What one of four ranks sends for lists of 12,000 bytes."""
    right = {
        "all-reduce": 18_000,
        "all-reduce over 1,000 ranks": 23_976,
        "reduce-scatter": 9_000,
        "all-to-all": 9_000,
    }

    def why(key: str, value: int) -> str:
        if value in (12_000, 24_000):
            return "nobody sends its own part to itself: one part in N stays at home"
        if value in (72_000, 36_000, 23_976_000):
            return "that is what all ranks send together; one is asked for"
        if key == "all-reduce" and value == 9_000:
            return "that is the first half, the reduce-scatter; then the sums go round"
        if key.startswith("all-reduce") and value in (3_000, 11_988):
            return "go through the ring once more: N - 1 rounds, twice, a part in each"
        if value == 3_000:
            return "that is one part; N - 1 of them leave a rank"
        return "n (N-1)/N, and twice that for an all-reduce"

    return judge_numbers(
        "collective_bytes",
        answer,
        right,
        why,
        "and a thousand ranks send hardly more each than four: 2 n is the limit",
    )


# --- tensor parallelism ---------------------------------------------------------------------------


def _row_parallel(group, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group.all_reduce(x @ weight.T) + bias


def _row_case(size: int) -> tuple[Given]:
    random = torch.Generator().manual_seed(size)
    x = torch.randint(-4, 5, (3, 2 * size), generator=random).float()
    weight = torch.randint(-4, 5, (5, 2 * size), generator=random).float()
    bias = torch.randint(1, 9, (5,), generator=random).float()
    return (Given(size, list(x.chunk(size, 1)), list(weight.chunk(size, 1)), [bias] * size),)


def row_parallel(answer: Callable) -> Verdict:
    """A rank's inputs x (t, mine), weight (out, mine), bias (out,) -> W x + b (t, out), whole."""
    mistakes = {
        "the bias is added on every rank before the sum, so it counts once per rank; add it "
        "after the sum": lambda g, x, w, b: g.all_reduce(x @ w.T + b),
        "that is one rank's part of the sum; all_reduce is missing": lambda g, x, w, b: x @ w.T + b,
        "the bias is missing": lambda g, x, w, b: g.all_reduce(x @ w.T),
        "parts of a sum are added, not averaged": lambda g, x, w, b: (
            g.all_reduce(x @ w.T) / g.size + b
        ),
        "all_reduce returns the sum; your function returns something else, perhaps the part "
        "that went in": lambda g, x, w, b: (g.all_reduce(x @ w.T), x @ w.T + b)[1],
        "only rank 0 has the bias in its result; after the sum every rank adds it": (
            lambda g, x, w, b: g.all_reduce(x @ w.T) + (b if g.rank == 0 else 0)
        ),
    }
    return judge(
        "row_parallel",
        _on_ranks(answer),
        _on_ranks(_row_parallel),
        [_row_case(2), _row_case(3)],
        {said: _on_ranks(mistake) for said, mistake in mistakes.items()},
        praise="whole on every rank, with one all-reduce",
    )


# --- the pipeline ---------------------------------------------------------------------------------


def _order(rank: int, ranks: int, micro: int, ahead: int | None = None) -> list[str]:
    ahead = min(ranks - 1 - rank if ahead is None else ahead, micro)
    order = [f"F{m}" for m in range(ahead)]
    for m in range(micro - ahead):
        order += [f"F{m + ahead}", f"B{m}"]
    return order + [f"B{m}" for m in range(micro - ahead, micro)]


def order_1f1b(answer: Callable) -> Verdict:
    """rank, ranks, micro-batches -> the order of work of that rank under 1F1B."""
    cases = [(0, 2, 3), (1, 2, 3), (0, 4, 8), (2, 4, 8), (0, 4, 2), (0, 1, 2)]

    def turned(rank, ranks, micro):  # the backward first
        order = _order(rank, ranks, micro)
        ahead = min(ranks - 1 - rank, micro)
        for at in range(ahead, ahead + 2 * (micro - ahead), 2):
            order[at], order[at + 1] = order[at + 1], order[at]
        return order

    return judge(
        "order_1f1b",
        answer,
        _order,
        cases,
        {
            "all forwards come first; a rank would have to keep all micro-batches. After the "
            "first few, forward and backward take turns": lambda rank, ranks, micro: _order(
                rank, ranks, micro, micro
            ),
            "you run one forward too many ahead: rank r needs ranks - 1 - r": (
                lambda rank, ranks, micro: _order(rank, ranks, micro, ranks - rank)
            ),
            "the last rank is the one that waits for nobody; count the ranks behind you, not "
            "those before you": lambda rank, ranks, micro: _order(rank, ranks, micro, rank),
            "the last backwards are missing: those of the forwards that ran ahead": (
                lambda rank, ranks, micro: _order(rank, ranks, micro)[
                    : 2 * micro - min(ranks - 1 - rank, micro)
                ]
            ),
            "in a turn the forward comes first: the backward of this turn waits for the ranks "
            "behind, and they for your forward": turned,
            "nobody runs ahead; the ranks behind would wait for a whole round": (
                lambda rank, ranks, micro: _order(rank, ranks, micro, 0)
            ),
        },
        praise="and the rank furthest from the end keeps the most micro-batches",
    )


# --- what is true ---------------------------------------------------------------------------------


def parallel_claims(answer: dict[str, bool | None]) -> Verdict:
    """Eight statements about cuts, traffic and waiting."""
    right = {
        "a rank of a ring all-reduce sends ten times as much among 1,000 ranks as among 100": False,
        "with data parallelism alone, a model twice as large needs twice the memory per GPU for weights, gradients and optimizer": True,
        "a SwiGLU can be cut by its inner channels without a sum inside it": True,
        "with ZeRO-1 each rank keeps only a part of the weights that it computes with": False,
        "in V3's training, a token whose 8 experts are on 4 nodes crosses InfiniBand 8 times in a dispatch": False,
        "twice as many micro-batches of the same size halve the time that 1F1B's ranks wait": False,
        "the gradient of the weights can be postponed without making another rank wait": True,
        "a replica of an expert changes what the model says": False,
    }
    why = {
        "a rank of a ring all-reduce sends ten times as much among 1,000 ranks as among 100": "2 n "
        "(N-1)/N hardly depends on N; the number of rounds does",
        "with data parallelism alone, a model twice as large needs twice the memory per GPU for weights, gradients and optimizer": "each "
        "rank holds the whole model; that is why it isn't enough",
        "a SwiGLU can be cut by its inner channels without a sum inside it": "an inner channel "
        "needs its row of w1 and of w3 and the whole input; all of that is on one rank",
        "with ZeRO-1 each rank keeps only a part of the weights that it computes with": "the weights are whole "
        "everywhere; what's shared out is the optimizer's: FP32 copy and moments",
        "in V3's training, a token whose 8 experts are on 4 nodes crosses InfiniBand 8 times in a dispatch": "one "
        "copy per node; inside, NVLink passes it on",
        "twice as many micro-batches of the same size halve the time that 1F1B's ranks wait": "filling and draining "
        "take (p-1)(F+B), however many flow in between; only the share is halved",
        "the gradient of the weights can be postponed without making another rank wait": "the "
        "stage before needs the gradient of the input alone; ZB1P lives on that",
        "a replica of an expert changes what the model says": "it is a copy of the same weights; "
        "only the place of the work changes",
    }
    return judge_statements("parallel_claims", answer, right, why)


# --- a deadlock -----------------------------------------------------------------------------------


def _pass_right(group, x):
    right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    if group.rank:
        got = group.receive(left)
        group.send(x, right)
        return got
    group.send(x, right)
    return group.receive(left)


def pass_right(answer: Callable) -> Verdict:
    """Every rank's x to its right neighbour; returns the left one's. 2 to 5 ranks."""

    def neighbours(group, x):
        """Works for pairs alone: 0 with 1, 2 with 3."""
        other = group.rank ^ 1
        if group.rank % 2:
            got = group.receive(other)
            group.send(x, other)
            return got
        group.send(x, other)
        return group.receive(other)

    def leftwards(group, x):
        right, left = (group.rank + 1) % group.size, (group.rank - 1) % group.size
        if group.rank:
            got = group.receive(right)
            group.send(x, left)
            return got
        group.send(x, left)
        return group.receive(right)

    return judge(
        "pass_right",
        _on_ranks(answer),
        _on_ranks(_pass_right),
        [(Given(size, [10 * rank + size for rank in range(size)]),) for size in (2, 3, 4, 5)],
        {
            "everything goes to the left; rank r sends to r + 1": _on_ranks(leftwards),
            "you return what you had. The left neighbour's is asked for": _on_ranks(
                lambda group, x: (_pass_right(group, x), x)[1]
            ),
            "that swaps within pairs; for more than two ranks it has to go round": _on_ranks(
                neighbours
            ),
        },
        praise="as long as one rank receives first, the ring gets going, whatever its size",
    )


# --- replicas -------------------------------------------------------------------------------------

LOADS = (40, 60, 120, 20, 30, 50)  # of six experts; four GPUs with two places each
BEST, GREEDY = 80, 90


def place_replicas(answer: Sequence[Sequence[int]] | None) -> Verdict:
    """Four GPUs with two experts each, all six among them: the busiest as idle as possible."""

    def wrong(said: str) -> Verdict:
        return Verdict("place_replicas", "wrong", said)

    if answer is None or answer is ... or (isinstance(answer, list) and None in answer):
        return Verdict(
            "place_replicas", "open", "nothing written yet; fill in the gap and run the cell again"
        )
    try:
        gpus = [[int(expert) for expert in gpu] for gpu in answer]
    except (TypeError, ValueError):
        return wrong("a list of four lists is asked for, each with the numbers of two experts")
    if [len(gpu) for gpu in gpus] != [2, 2, 2, 2]:
        return wrong(
            "there are four GPUs with two places each, and all eight places are to be used"
        )
    placed = [expert for gpu in gpus for expert in gpu]
    if odd := sorted(set(placed) - set(range(6))):
        return wrong(f"there is no expert {odd[0]}; they are numbered from 0 to 5")
    if gone := sorted(set(range(6)) - set(placed)):
        return wrong(f"expert {gone[0]} is nowhere; its tokens would be lost")
    if double := [gpu[0] for gpu in gpus if gpu[0] == gpu[1]]:
        return wrong(
            f"both places of one GPU have expert {double[0]}: the second copy takes no load off "
            "that GPU"
        )
    loads = [sum(LOADS[expert] / placed.count(expert) for expert in gpu) for gpu in gpus]
    if max(loads) > BEST:
        at = loads.index(max(loads))
        if placed.count(2) == 1:
            return wrong(
                f"GPU {at} has {max(loads):g} to do. Expert 2 alone has 120, more than a GPU's "
                "fair share of 80: it needs a second copy"
            )
        if max(loads) == GREEDY:
            return wrong(
                f"GPU {at} has 90 to do, as with the greedy planner. Somebody has 20 of load that "
                "fits beside a 60"
            )
        return wrong(
            f"GPU {at} has {max(loads):g} to do and GPU {loads.index(min(loads))} only "
            f"{min(loads):g}; 80 on each is possible"
        )
    return Verdict("place_replicas", "right", "80 on each GPU; the greedy planner gets 90")


# --- a share of the time --------------------------------------------------------------------------


def enough_micro_batches(answer: dict[str, int | None]) -> Verdict:
    """Fewest micro-batches with which 16 ranks wait at most a twentieth of the time."""
    right = {"1F1B": 285, "DualPipe": 90}

    def why(key: str, value: int) -> str:
        if key == "DualPipe" and value == 89:
            return "right by the formula, and DualPipe needs an even number"
        if value == {"1F1B": 300, "DualPipe": 94}.get(key):
            return (
                "that is the bubble as a share of the work; of the time, work and bubble together"
            )
        if value in (284, 88):
            return "a little more than a twentieth is still lost"
        if value in (286, 92):
            return "one step fewer is enough: at most a twentieth may be lost, also just that"
        return (
            f"with {value} a share of {_waiting(key, value):.3f} is lost"
            if value > 0
            else "count from 1"
        )

    return judge_numbers(
        "enough_micro_batches", answer, right, why, "DualPipe gets by with a third of them"
    )


def _waiting(name: str, micro: int) -> float:
    bubble = 15 * 3 if name == "1F1B" else 7 * (3 + 2 - 3)
    return bubble / (bubble + 3 * micro)


# --- two ranks that disagree ----------------------------------------------------------------------


def disagreement(answer: Mapping[str, str | None] | None) -> Verdict:
    """Which fault each program has: "fine", "draws", "rounds" or "stale"."""
    name, kinds = "disagreement", sorted(set(FAULTS.values()))
    opened = Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
    if answer is None:
        return opened
    if not isinstance(answer, Mapping) or set(answer) != set(FAULTS):
        return Verdict(name, "wrong", "keep the table and its keys: A, B, C, D")
    if all(value is None for value in answer.values()):
        return opened
    evidence = {
        "rounds": "the logits of its ranks differ from the first token on, by a step of BF16: "
        "what a rank keeps for itself was not rounded as what it sends",
        "fine": "its ranks agree in every logit and every token, with each other and with one rank "
        "alone",
        "stale": "its ranks agree in every logit, and yet write another text than one rank alone",
        "draws": "the logits of its ranks are equal to the last bit, and the tokens are not",
    }
    wrong = []
    for key, value in answer.items():
        if value is None or value == FAULTS[key]:
            continue
        wrong.append(
            f"{key}: {evidence[FAULTS[key]]}"
            if value in kinds
            else f"{key}: one of {', '.join(kinds)} is asked for"
        )
    if wrong:
        return Verdict(name, "wrong", "; ".join(wrong))
    if missing := [key for key, value in answer.items() if value is None]:
        return Verdict(name, "open", f"right so far; {missing[0]} has no answer yet")
    return Verdict(
        name, "right", "ranks that agree may still be wrong: compare with one rank alone, too"
    )


# --- dispatch and combine -------------------------------------------------------------------------


def expert_parallel(answer: Callable) -> Verdict:
    """x (n, d), chosen (n, k), weights (n, k), held, expert -> (n, d), on every rank."""
    from dsv3.book.dispatching import CASES, MISTAKES, right

    return judge(
        "expert_parallel",
        _on_ranks(answer),
        _on_ranks(right),
        CASES,
        {said: _on_ranks(mistake) for said, mistake in MISTAKES.items()},
        praise="no token lost, none counted twice, on two and on three ranks",
    )
