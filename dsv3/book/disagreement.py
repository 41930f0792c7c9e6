"""Four programs that write a text on two ranks, three of them with a fault: to be told apart.

Each rank holds half of the channels of a tiny model, so that both need each other for every token.
The faults are those that real systems had: ranks that draw their own random numbers, partial sums
that are rounded on the way but not at home, and a rank that goes on from an older token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.book.threads import Rank, in_threads

FAULTS = {"A": "rounds", "B": "fine", "C": "stale", "D": "draws"}
WORDS, WIDTH, STEPS = 12, 8, 12


def run(name: str, ranks: int = 2) -> list[tuple[list[int], Tensor]]:
    """Program ``name``, A to D, on one or two ranks. Of each rank: the numbers of the tokens that
    it wrote, and its logits (steps, words) for each of them."""
    return in_threads(_write, ranks, [FAULTS[name]] * ranks)


def _weights() -> tuple[Tensor, Tensor]:
    """Embedding and output matrix of whole numbers; the halves' shares of a logit are large and of
    opposite sign, as partial sums often are."""
    random = torch.Generator().manual_seed(31)
    embedding = torch.randint(1, 9, (WORDS, WIDTH), generator=random)
    output = torch.randint(-4, 5, (WORDS, WIDTH), generator=random)
    output[:, : WIDTH // 2] += 40
    output[:, WIDTH // 2 :] -= 40
    return embedding.double(), output.double()


def _write(group: Rank, fault: str) -> tuple[list[int], Tensor]:
    embedding, output = _weights()
    mine = torch.arange(WIDTH).chunk(group.size)[group.rank]
    random = torch.Generator().manual_seed(7 + (group.rank if fault == "draws" else 0))
    text, logits = [0, 1], []
    for step in range(STEPS):
        last = text[-2] if fault == "stale" and group.rank == 1 and step >= 3 else text[-1]
        part = embedding[last, mine] @ output[:, mine].T
        if fault == "rounds":
            sent = part.bfloat16().double()
            total = part + (group.all_reduce(sent) - sent)  # mine as it is, the other's rounded
        else:
            total = group.all_reduce(part)
        p = (total / 16).softmax(-1)
        u = torch.rand(1, generator=random, dtype=torch.float64)
        text.append(int((p.cumsum(-1) < u).sum().clamp(max=WORDS - 1)))
        logits.append(total)
    return text[2:], torch.stack(logits)
