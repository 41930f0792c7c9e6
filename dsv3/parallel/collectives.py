"""The five collectives, made of single messages: what a library does, in the open.

A collective is a pattern of messages that all ranks take part in. torch.distributed has them all,
and the rest of this package calls it. Here each is built from ``send`` and ``recv``, so that the
pattern can be read and its bytes counted (``dsv3.parallel.traffic``).

* *broadcast*: one rank's tensor to all, passed along a chain.
* *reduce-scatter*: the sum of all ranks' tensors, of which each keeps one part. In a ring: in
  each of N - 1 rounds a rank passes on one part, to which it has added its own.
* *all-gather*: each rank has a part, and all want the whole. In a ring again: in each of N - 1
  rounds a rank passes on the part that reached it last.
* *all-reduce*: the sum, whole on every rank: a reduce-scatter, then an all-gather. 2 (N-1)/N of
  the tensor leaves each rank, hardly more for a thousand ranks than for ten.
* *all-to-all*: rank i's part j goes to rank j. Nothing is added: everyone has other news for
  everyone.

In a round a rank both sends and receives. If all first sent and then received, and a send waited
for its receiver, all would wait for ever; so ``Mail.swap`` starts both before it waits for either.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.traffic import Topology, Traffic


class Mail:
    """Messages between the ranks of a group, counted.

    traffic: what this rank has sent. per_node: ranks on one node (default: all).
    """

    def __init__(self, group: TensorGroup, per_node: int | None = None):
        self.rank, self.size, self.device = group.rank, group.size, group.device
        self._group = group.process_group
        self.traffic = Traffic(Topology(group.size, per_node or group.size))

    def send(self, x: Shaped[Tensor, "..."], to: int) -> None:
        """Send x; returns when it may be overwritten."""
        self._count(x, to)
        dist.send(x.contiguous(), group=self._group, group_dst=to)

    def receive(self, like: Shaped[Tensor, "..."], source: int) -> Shaped[Tensor, "..."]:
        """What ``source`` sends, of the shape and dtype of ``like``."""
        x = torch.empty_like(like, memory_format=torch.contiguous_format)
        dist.recv(x, group=self._group, group_src=source)
        return x

    def swap(
        self, x: Shaped[Tensor, "..."], to: int, like: Shaped[Tensor, "..."], source: int
    ) -> Shaped[Tensor, "..."]:
        """Send x and receive at the same time; to and from myself, x comes back."""
        if to == source == self.rank:
            return x.clone()
        self._count(x, to)
        y = torch.empty_like(like, memory_format=torch.contiguous_format)
        for work in dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, x.contiguous(), group=self._group, group_peer=to),
                dist.P2POp(dist.irecv, y, group=self._group, group_peer=source),
            ]
        ):
            work.wait()
        return y

    def _count(self, x: Tensor, to: int) -> None:
        self.traffic.count(self.rank, to, x.nbytes)


def broadcast(mail: Mail, x: Shaped[Tensor, "..."], source: int = 0) -> Shaped[Tensor, "..."]:
    """Rank ``source``'s x on every rank; the others give one of the same shape."""
    place = (mail.rank - source) % mail.size  # along the chain
    if place > 0:
        x = mail.receive(x, (mail.rank - 1) % mail.size)
    if place < mail.size - 1:
        mail.send(x, (mail.rank + 1) % mail.size)
    return x


def reduce_scatter(mail: Mail, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "part ..."]:
    """Part ``rank`` of the sum over all ranks. x is cut along its first dimension, as evenly as
    ``torch.tensor_split`` does."""
    parts = [part.clone() for part in x.tensor_split(mail.size)]
    right, left = (mail.rank + 1) % mail.size, (mail.rank - 1) % mail.size
    for round_ in range(mail.size - 1):
        out, into = (mail.rank - 1 - round_) % mail.size, (mail.rank - 2 - round_) % mail.size
        parts[into] += mail.swap(parts[out], right, parts[into], left)
    return parts[mail.rank]


def all_gather(
    mail: Mail, part: Shaped[Tensor, "part ..."], like: Shaped[Tensor, "n ..."]
) -> Shaped[Tensor, "n ..."]:
    """Every rank's part, one below the other. like: of the shape of the whole, cut as in
    ``reduce_scatter``."""
    parts = [torch.empty_like(share) for share in like.tensor_split(mail.size)]
    parts[mail.rank] = part
    right, left = (mail.rank + 1) % mail.size, (mail.rank - 1) % mail.size
    for round_ in range(mail.size - 1):
        out, into = (mail.rank - round_) % mail.size, (mail.rank - 1 - round_) % mail.size
        parts[into] = mail.swap(parts[out], right, parts[into], left)
    return torch.cat(parts)


def all_reduce(mail: Mail, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
    """The sum over all ranks, on every rank, bit for bit the same on each."""
    return all_gather(mail, reduce_scatter(mail, x), x)


def all_to_all(mail: Mail, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "n ..."]:
    """Part j of x goes to rank j; what comes from rank i stands as part i. The first dimension is
    a multiple of the number of ranks."""
    parts = x.chunk(mail.size)
    got = list(parts)
    for away in range(mail.size):  # everyone sends to a different rank in each round
        to, source = (mail.rank + away) % mail.size, (mail.rank - away) % mail.size
        got[source] = mail.swap(parts[to], to, parts[source], source)
    return torch.cat(got)
