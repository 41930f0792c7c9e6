"""Small sums of ranks on one machine, through memory that they share.

A step of decoding sums ten small vectors over the ranks, a kilobyte or two each. Gloo sends each
through sockets, and on each side a thread has to be woken for it, which takes longer than the sum
and what lies between two of them. Ranks on one machine can read each other's numbers where they
are: everybody writes its own, says so, waits until the others have said so, and adds up.

    rank 0   numbers   numbers          turn     Two places for each rank, used in turn: a rank that
    rank 1   numbers   numbers          turn     is one sum ahead does not touch what the others
              even      odd                      still read. It cannot be two ahead.

Everybody adds in the order of the ranks, so all have the same bits.

A processor may show the writes of one core to another in another order than they were made. x86
does not, and the turn is written last; elsewhere, and for large tensors, Gloo does it.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import distributed as dist

from dsv3.parallel.join import PATIENCE
from dsv3.parallel.watch import state_of

if TYPE_CHECKING:
    from dsv3.parallel.tensor import TensorGroup

# Bytes of a rank's numbers at a time; a turn has a line of the cache to itself.
_ROOM, _LINE = 1 << 16, 64
# How long somebody who waits keeps its core: so many looks, then so many seconds lent to others.
_LOOKS, _LENDS = 200, 0.005
_NAP, _CHECKS = 1e-4, 0.2  # seconds


class SharedMemory:
    """My place among ranks that share memory.

    memory: of all ranks, ``size_of(ranks)`` bytes; processes: the numbers of their processes.
    """

    def __init__(self, rank: int, processes: list[int], memory: mmap.mmap):
        self.rank, self.size, self.processes = rank, len(processes), processes
        numbers = torch.frombuffer(memory, dtype=torch.uint8, count=2 * self.size * _ROOM)
        self._numbers = numbers.view(2, self.size, _ROOM)
        turns = np.frombuffer(memory, np.int64, offset=2 * self.size * _ROOM)
        self._turns = turns[:: _LINE // turns.itemsize]
        self._turn = 0

    @staticmethod
    def size_of(ranks: int) -> int:
        return ranks * (2 * _ROOM + _LINE)

    @classmethod
    def among(cls, group: TensorGroup) -> SharedMemory | None:
        """Of the ranks of a group, who are on one machine and call this together; None where they
        cannot share memory."""
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return None
        # A file without a name, which the others open where the first rank holds it: whatever
        # happens on the way, nothing is left behind.
        handle = _new_file(cls.size_of(group.size)) if group.rank == 0 else None
        place = None if handle is None else f"/proc/{os.getpid()}/fd/{handle}"
        path = group.broadcast_object(place)
        memory = None
        try:
            if path:
                with open(path, "r+b") as file:
                    memory = mmap.mmap(file.fileno(), cls.size_of(group.size))
        except OSError:
            pass
        mine = torch.tensor([os.getpid() if memory else 0], device=group.device)
        processes = group.all_gather(mine).tolist()  # now all have opened it, or not
        if handle is not None:
            os.close(handle)
        return cls(group.rank, processes, memory) if memory and all(processes) else None

    def fits(self, x: torch.Tensor) -> bool:
        return x.nbytes <= _ROOM

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's x, in place."""
        parts = self._exchanged(x)
        x.copy_(parts[0])
        for part in parts[1:]:
            x.add_(part)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's x, to be read before the next exchange."""
        return self._exchanged(x)

    def _exchanged(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._turn += 1
        here = self._numbers[self._turn % 2]
        parts = [here[rank, : x.nbytes].view(x.dtype).view(x.shape) for rank in range(self.size)]
        parts[self.rank].copy_(x)
        self._turns[self.rank] = self._turn
        for rank in range(self.size):
            self._wait_for(rank)
        return parts

    def _wait_for(self, rank: int) -> None:
        for _ in range(_LOOKS):
            if self._turns[rank] >= self._turn:
                return
        for _ in self._pauses(rank):
            if self._turns[rank] >= self._turn:
                return

    def _pauses(self, rank: int) -> Iterator[None]:
        """Waits ever longer; raises DistError when the rank has ended, or never comes."""
        start = checked = time.monotonic()
        while (now := time.monotonic()) - start < PATIENCE.total_seconds():
            if now - start < _LENDS:
                os.sched_yield()
            else:
                time.sleep(_NAP)
            if now - checked > _CHECKS:
                checked = now
                if state_of(self.processes[rank]) == "gone":
                    yield  # it may have said its last turn before it went
                    raise dist.DistError(f"rank {rank} has ended")
            yield
        raise dist.DistError(f"rank {rank} has not come to a sum in {PATIENCE}")


def _new_file(size: int) -> int | None:
    """The handle of a file of zeros in memory, or None where there is no room for it."""
    try:
        handle = os.memfd_create("dsv3")
    except OSError:
        return None
    try:
        os.posix_fallocate(handle, 0, size)  # no room is told now, and not by a signal later
    except OSError:
        os.close(handle)
        return None
    return handle
