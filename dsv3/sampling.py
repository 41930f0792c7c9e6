"""From logits to a token: temperature, top-p, the draw, and one choice for all ranks.

Choosing a token from logits z at temperature T:

    p_i = exp(z_i / T) / sum_j exp(z_j / T)

T = 0 is the limit, the largest logit (greedy). Top-p keeps the most probable tokens until their
sum reaches p, and drops the tail. Both are computed in float64. The draw inverts the cumulative
sum with a single uniform number, from a generator that belongs to the row: what a row says depends
on the seed and on its number, never on its neighbours in the batch.

With several ranks, all hold the same logits up to rounding. Were each to choose for itself, one
near-tie would send them apart for good, so rank 0 chooses and tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup


def probabilities(logits: Float[Tensor, "*lead v"], temperature: float,
                  top_p: float = 1.0) -> Float64[Tensor, "*lead v"]:
    """The distribution a token is drawn from, over v tokens: float64, sums to 1.

    Temperature 0 puts all of it on the largest logit. Top-p keeps the smallest set of most
    probable tokens whose sum reaches top_p.
    """
    best = logits.max(dim=-1, keepdim=True)
    if not torch.isfinite(best.values).all():
        raise DSV3Error("the logits are not finite numbers", where="sampling",
                        fix="The weights are damaged or overflow in this precision")
    if temperature == 0:
        greedy = torch.zeros_like(logits, dtype=torch.float64)
        return greedy.scatter_(-1, best.indices, 1.0)
    # The largest exponent is 0, so neither a large logit nor a tiny temperature overflows.
    p = ((logits.double() - best.values.double()) / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # mass ahead of each token
        p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter_(
            -1, order, before >= top_p), 0.0)
        p = p / p.sum(dim=-1, keepdim=True)
    return p


def draw(p: Float[Tensor, "v"], generator: torch.Generator) -> int:
    """One index from weights p >= 0 (any sum), by inverting their cumulative sum."""
    cumulative = p.double().cumsum(dim=0)
    u = torch.rand((), dtype=torch.float64, generator=generator).to(p.device)
    # The first index whose cumulative sum exceeds the mark: an index of weight 0 never is.
    index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    return min(int(index), int(p.nonzero()[-1]))


def sample(logits: Float[Tensor, "b v"], temperature: float, top_p: float,
           generators: Sequence[torch.Generator]) -> list[int]:
    """A token for each row of logits, each drawn with its row's own generator."""
    if temperature == 0:
        return probabilities(logits, 0.0).argmax(dim=-1).tolist()
    p = probabilities(logits, temperature, top_p)
    return [draw(row, generator) for row, generator in zip(p, generators, strict=True)]


def row_generators(seed: int, rows: int) -> list[torch.Generator]:
    """One random generator a row. They live on the CPU, so a seed means the same everywhere."""
    return [torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(rows)]


class Chooser:
    """Picks tokens on rank 0 and tells every rank.

    interrupted: whether ``should_stop``, asked on rank 0 at every choice, has said yes.
    """

    def __init__(self, group: TensorGroup, rows: int, temperature: float, top_p: float, seed: int,
                 valid_vocab_size: int, should_stop: Callable[[], bool] | None = None):
        self.group, self.temperature, self.top_p = group, temperature, top_p
        self.generators = row_generators(seed, rows)
        self.valid, self.should_stop = valid_vocab_size, should_stop
        self.interrupted = False

    def __call__(self, logits: Float[Tensor, "b v"]) -> list[int]:
        """A token for each row of logits."""
        return self.agree(len(self.generators), lambda: sample(
            logits[:, : self.valid], self.temperature, self.top_p, self.generators))

    def distribution(self, logits: Float[Tensor, "*lead v"]) -> Float64[Tensor, "*lead valid"]:
        """What a token is drawn from: the probabilities of the valid_vocab_size first tokens."""
        return probabilities(logits[..., : self.valid], self.temperature, self.top_p)

    def agree(self, count: int, decide: Callable[[], list[int]]) -> list[int]:
        """The ``count`` whole numbers that ``decide`` gives on rank 0, on every rank."""
        message = [0] * (count + 1)
        if self.group.rank == 0:
            stop = self.interrupted or bool(self.should_stop and self.should_stop())
            message = [*decide(), int(stop)]
        if self.group.size > 1:
            message = self.group.broadcast(
                torch.tensor(message, device=self.group.device)).tolist()
        self.interrupted = bool(message[-1])
        return message[:-1]
