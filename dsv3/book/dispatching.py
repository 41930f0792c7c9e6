"""Dispatch and combine in fifteen lines, and the usual ways to get them wrong.

What chapter 7 asks for at its end. A rank has n tokens x (n, d), the numbers of the experts that
each of them chose (n, k), and their weights (n, k). Rank r has the experts r * held to
(r + 1) * held - 1, and ``expert(number, rows)`` computes one of them; it refuses those of others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.book.threads import Given


class Own:
    """The experts of one rank: expert e multiplies by e + 2 and adds e."""

    def __init__(self, rank: int, held: int):
        self.rank, self.held = rank, held

    def __call__(self, number, rows: Tensor) -> Tensor:
        if int(number) // self.held != self.rank:
            raise ValueError(
                f"expert {int(number)} is on rank {int(number) // self.held}, not here"
            )
        return rows * (int(number) + 2) + int(number)


def _place(chosen: Tensor, held: int, size: int) -> list[tuple[Tensor, Tensor]]:
    """For each rank, which token's which choice goes there."""
    return [torch.where(chosen // held == rank) for rank in range(size)]


def _work(expert: Callable, rows: list[Tensor], numbers: list[Tensor]) -> list[Tensor]:
    done = [part.clone() for part in rows]
    for part, which in zip(done, numbers):
        for i, number in enumerate(which.tolist()):
            part[i] = expert(number, part[i])
    return done


def right(group, x, chosen, weights, held, expert, *, weigh=True, add=True, sent=None) -> Tensor:
    """The answer; the options leave out what a mistake would."""
    places = _place(chosen, held, group.size)
    rows = group.all_to_all([x[token] for token, _ in places])
    numbers = group.all_to_all([chosen[place] for place in places])
    back = _work(expert, rows, numbers)
    back = group.all_to_all(back) if sent is None else sent(group, back)
    y = torch.zeros_like(x)
    for place, part in zip(places, back):
        part = part * weights[place][:, None] if weigh else part
        if add:
            y.index_add_(0, place[0], part)
        else:
            y[place[0]] = part
    return y


def _once_a_rank(group, x, chosen, weights, held, expert) -> Tensor:
    """A token with two experts on a rank is worked on by one of them only."""
    y = torch.zeros_like(x)
    places = []
    for token, slot in _place(chosen, held, group.size):
        first = [i for i, t in enumerate(token.tolist()) if t not in token[:i].tolist()]
        places.append((token[first], slot[first]))
    rows = group.all_to_all([x[token] for token, _ in places])
    numbers = group.all_to_all([chosen[place] for place in places])
    back = group.all_to_all(_work(expert, rows, numbers))
    for place, part in zip(places, back):
        y.index_add_(0, place[0], part * weights[place][:, None])
    return y


def _unsorted(group, x, chosen, weights, held, expert) -> Tensor:
    """What comes back is taken in the order of the tokens and not in that in which it was sent."""
    places = _place(chosen, held, group.size)
    rows = group.all_to_all([x[token] for token, _ in places])
    numbers = group.all_to_all([chosen[place] for place in places])
    back = torch.cat(group.all_to_all(_work(expert, rows, numbers)))
    return (back.view(*chosen.shape, -1) * weights[..., None]).sum(1)


MISTAKES: dict[str, Callable] = {
    "the answers are added up without their weights": (lambda *given: right(*given, weigh=False)),
    "a token with several answers from one rank keeps the last only: y[token] = ... overwrites. "
    "Add them, with index_add_": lambda *given: right(*given, add=False),
    "a token with two experts on one rank gets one of them; it needs both": _once_a_rank,
    "answers come back in the order in which you sent the tokens, rank by rank; you take them in "
    "the order of the tokens": _unsorted,
}


def _case(
    size: int, seed: int, tokens: int = 3, held: int = 2, k: int = 2, busy: list[int] | None = None
) -> tuple[Given]:
    random = torch.Generator().manual_seed(seed)
    experts = size * held

    def numbers(*shape):
        return torch.randint(1, 9, shape, generator=random).float()

    chosen = [
        torch.rand(tokens, experts, generator=random).topk(k).indices
        if busy is None
        else torch.tensor(busy).expand(tokens, -1).clone()
        for _ in range(size)
    ]
    return (
        Given(
            size,
            [numbers(tokens, 2) for _ in range(size)],
            chosen,
            [numbers(tokens, k) / 8 for _ in range(size)],
            [held] * size,
            [Own(rank, held) for rank in range(size)],
        ),
    )


# Two ranks, three ranks with more choices, and a crowd on one rank while the others have no rows.
CASES = [_case(2, 0), _case(3, 1, tokens=4, k=3), _case(3, 2, busy=[3, 2])]
