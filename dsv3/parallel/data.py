"""Data parallelism: every rank learns from other windows, and all make the same step.

Each rank has the whole model and sums gradients over its own windows. Before the step the ranks'
gradients are added up. The sum of every rank's vector on every rank, an all-reduce, is two halves:

    reduce-scatter   rank r receives part r of every rank's gradients and adds them up
    all-gather       rank r sends part r of the sums to everyone

and each half sends (N-1)/N of the vector. Between the halves lies an idea that costs nothing
(ZeRO-1, Rajbhandari et al. 2020; TR 3.2). Adam's rule speaks of one number at a time, so rank r,
which has part r of the sums, can update part r of the weights by itself. It then needs moments for
that part only, and what travels in the second half is new weights instead of sums. As many bytes
are sent as before, and the two moments, 8 bytes a weight in float32, are shared out over N ranks.

``Shards`` is that cut. The weights are written one behind the other, in buckets; each bucket is
cut into N parts of the same length, wherever that falls, so that a rank's share is even however
uneven the weights are. *Why buckets?* One collective over everything would be quickest where
gradients are small, but needs a second copy of all of them; with buckets the copy is as large as
one bucket. *Why not after each layer, while the backward pass still runs?* That hides the network
behind the computation, and is what DDP and FSDP do. Here a step takes several micro-batches, and
the ranks' sums are needed once, after the last.

*Why not* ``torch.distributed.optim.ZeroRedundancyOptimizer``? It gives every weight to one rank
whole, and the largest decides who waits. It leaves the gradients to an all-reduce and broadcasts
weights after it, which is half as much traffic again. And it makes a checkpoint by sending pickles
from rank to rank, which are not opened here (``dsv3.parallel.join``). What is needed are two
collectives of torch.distributed and any optimizer, which is given my parts as its weights.

Which equality can be promised? *With and without ZeRO*, bit for bit: both add the same numbers in
the same order, and update them by the same rule. *Many ranks and one process*, bit for bit only
where they add in the same order too. Sums are made in the order of ranks, so N ranks with one
micro-batch each do as one process with N micro-batches; otherwise sums are rounded elsewhere, and
the gradients agree to about 1e-7 of their length. The norm that gradients are clipped by is added
up in float64 here and in float32 on one process: where clipping bites, that is 1e-7 again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Float, Float64, Shaped
from torch import Tensor, nn

from dsv3.parallel.tensor import TensorGroup

# Weights begin, and are cut, at multiples of so many numbers. A vectorised kernel takes what is
# left behind its last full vector by another instruction, which may round the other way; cut like
# this, each number is where it was among full vectors, and comes out the same.
ALIGNED = 64
BUCKET = 1 << 22  # numbers in a bucket: 16 MiB of float32


class Shards:
    """Weights in one long line, cut evenly over the ranks of a group: part r is rank r's.

    weights: float32 parameters, of the same shapes in the same order on every rank. pieces: my
    part of them, as flat parameters that lie in the weights' own memory: what an optimizer does to
    the pieces it does to the weights. spans: of each piece, the number of its weight and its place
    in it, flat. bucket: numbers that travel at once. numel: numbers in my part, the zeros included
    that make all parts equal; reduce-scatter and all-gather each send N - 1 times as many.
    """

    def __init__(
        self, weights: Sequence[nn.Parameter], group: TensorGroup, *, bucket: int = BUCKET
    ):
        self.weights, self.group = list(weights), group
        self._buckets = list(_fill(self.weights, bucket, group.size))
        self.spans = [
            (index, place) for b in self._buckets for index, place, _ in b.mine(group.rank)
        ]
        self.pieces = [
            nn.Parameter(self.weights[index].detach().view(-1)[place])
            for index, place in self.spans
        ]
        self.numel = sum(bucket.part for bucket in self._buckets)

    def reduce_gradients(self) -> None:
        """Reduce-scatter: the gradient of each piece becomes the sum over the ranks.

        The weights' own gradients are given up; where there is none, no window of this rank has
        reached that weight, and it counts as zeros.
        """
        pieces = iter(self.pieces)
        for bucket in self._buckets:
            line = torch.zeros(bucket.part * self.group.size, device=self.group.device)
            for index, start in bucket.starts.items():
                weight = self.weights[index]
                if weight.grad is not None:
                    line[start : start + weight.numel()] = weight.grad.flatten()
                    weight.grad = None
            total = sum_part(self.group, line)
            for _, _, place in bucket.mine(self.group.rank):
                next(pieces).grad = total[place]

    def gather_gradients(self) -> None:
        """All-gather: every rank's sums become the gradients of the whole weights."""
        whole_gradients = self.gather(self._sums(), torch.float32)
        for weight, whole in zip(self.weights, whole_gradients, strict=True):
            weight.grad = whole

    @torch.no_grad()
    def gather_weights(self) -> None:
        """All-gather: what each rank made of its pieces becomes part of everyone's weights."""
        parts = [piece.detach() for piece in self.pieces]
        for weight, whole in zip(self.weights, self.gather(parts, torch.float32), strict=True):
            weight.copy_(whole)

    def gather(
        self, parts: Sequence[Shaped[Tensor, " _"]], dtype: torch.dtype
    ) -> Iterator[Shaped[Tensor, "..."]]:
        """What each rank has of its pieces, one flat tensor of ``dtype`` for each, made whole: one
        tensor for each weight, in its shape."""
        rest = iter(parts)
        for bucket in self._buckets:
            mine = torch.zeros(bucket.part, dtype=dtype, device=self.group.device)
            for _, _, place in bucket.mine(self.group.rank):
                mine[place] = next(rest)
            line = self.group.all_gather(mine)
            for index, start in bucket.starts.items():
                weight = self.weights[index]
                yield line[start : start + weight.numel()].view_as(weight)

    def square(self) -> Float64[Tensor, ""]:
        """Sum of the squares of my pieces' gradients. Over the ranks these add up to the square of
        the norm of all."""
        total = torch.zeros((), dtype=torch.float64, device=self.group.device)
        for gradient in self._sums():
            total += gradient.double().square().sum()
        return total

    def _sums(self) -> list[Tensor]:
        """The pieces' gradients; reduce_gradients made them."""
        return [piece.grad for piece in self.pieces if piece.grad is not None]


def sum_part(group: TensorGroup, line: Float[Tensor, " n"]) -> Float[Tensor, " part"]:
    """Reduce-scatter: part ``rank`` of the sum of every rank's line, whose n is a multiple of the
    number of ranks. Each part goes straight to its owner, who adds in the order of ranks: torch's
    own reduce-scatter adds in the order of its algorithm, another one for each library.
    """
    if group.size == 1:
        return line
    group.bytes_sent += (group.size - 1) * line.nbytes // group.size
    parts = torch.empty_like(line)
    dist.all_to_all_single(parts, line, group=group.process_group)
    first, *others = parts.chunk(group.size)
    total = first.clone()
    for part in others:
        total += part
    return total


@dataclass(frozen=True)
class _Bucket:
    """Weights that travel together. starts: of each, by its number, where it begins in the bucket's
    line; ends: where; part: numbers of each rank's part of the line."""

    starts: dict[int, int]
    ends: dict[int, int]
    part: int

    def mine(self, rank: int) -> Iterator[tuple[int, slice, slice]]:
        """Of each weight that rank's part has something of: its number, the place of that in the
        weight, and the place in the part."""
        low = rank * self.part
        high = low + self.part
        for index, start in self.starts.items():
            first, last = max(start, low), min(self.ends[index], high)
            if first < last:
                yield index, slice(first - start, last - start), slice(first - low, last - low)


def _fill(weights: Sequence[Tensor], most: int, ranks: int) -> Iterator[_Bucket]:
    """Weights in order in as few buckets as hold ``most`` numbers; a larger one has its own."""
    starts, ends, length = {}, {}, 0
    for index, weight in enumerate(weights):
        if starts and length + weight.numel() > most:
            yield _Bucket(starts, ends, _round_up(length, ALIGNED * ranks) // ranks)
            starts, ends, length = {}, {}, 0
        starts[index], ends[index] = length, length + weight.numel()
        length = _round_up(ends[index], ALIGNED)
    if starts:
        yield _Bucket(starts, ends, _round_up(length, ALIGNED * ranks) // ranks)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
