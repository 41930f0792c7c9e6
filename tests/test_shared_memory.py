"""Sums of ranks on one machine: threads in the place of ranks, and ranks."""

import mmap
import os
import platform
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
from ranks import run_ranks
from torch import distributed as dist

from dsv3.parallel import shared_memory
from dsv3.parallel.shared_memory import SharedMemory
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="memory is shared on Linux and x86-64 alone",
)


def together(size: int, job, processes: list[int] | None = None) -> list:
    """job(place) of each of ``size`` ranks, in threads."""
    memory = mmap.mmap(-1, SharedMemory.size_of(size))
    places = [SharedMemory(r, processes or [os.getpid()] * size, memory) for r in range(size)]
    found: list = [None] * size

    def run(rank):
        found[rank] = job(places[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_sums_and_parts_of_many_turns(size):
    """Each turn has other numbers, so that an old one would be seen; every rank has the same bits,
    which are those of adding in order."""
    random = torch.Generator().manual_seed(0)
    turns = [torch.randn(size, 3, 5, generator=random) for _ in range(300)]

    def job(place):
        results = []
        for turn, parts in enumerate(turns):
            x = parts[place.rank].clone()
            if turn % 3 == 2:
                results.append(torch.cat(place.gather(x)))
            else:
                results.append(place.sum(x))
                assert results[-1] is x
        return results

    found = together(size, job)
    for turn, parts in enumerate(turns):
        wanted = torch.cat(list(parts)) if turn % 3 == 2 else sum(parts[1:], parts[0].clone())
        assert all(torch.equal(results[turn], wanted) for results in found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_any_dtype_and_nothing_at_all(dtype):
    def job(place):
        return place.sum(torch.tensor([1, 2], dtype=dtype)), place.sum(
            torch.empty(0, 3, dtype=dtype)
        )

    for total, nothing in together(3, job):
        assert total.tolist() == [3, 6] and total.dtype == dtype and nothing.shape == (0, 3)


def test_what_does_not_fit_is_told():
    place = SharedMemory(0, [1, 2], mmap.mmap(-1, SharedMemory.size_of(2)))
    assert place.fits(torch.empty(1 << 13, dtype=torch.float64))
    assert not place.fits(torch.empty((1 << 13) + 1, dtype=torch.float64))


def test_a_rank_that_has_ended_is_no_wait_for_ever(monkeypatch):
    monkeypatch.setattr(shared_memory, "_CHECKS", 0.01)
    gone = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert gone.stdout.read() == b""  # it has ended, and nobody has asked for its end
    place = SharedMemory(0, [os.getpid(), gone.pid], mmap.mmap(-1, SharedMemory.size_of(2)))
    with pytest.raises(dist.DistError, match="rank 1 has ended"):
        place.sum(torch.ones(3))
    gone.wait(60)


def test_a_rank_that_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(shared_memory, "PATIENCE", timedelta(seconds=0.05))
    place = SharedMemory(0, [os.getpid()] * 2, mmap.mmap(-1, SharedMemory.size_of(2)))
    with pytest.raises(dist.DistError, match="rank 1 has not come"):
        place.sum(torch.ones(3))


def small_and_large(group: TensorGroup) -> tuple:
    """What a rank finds of two sums and two gatherings, which of them went by memory, and bytes."""
    used = []
    own = TensorGroup(group.rank, group.size, group.process_group)
    own.shared = SharedMemory.among(group)
    exchange = own.shared._exchanged
    own.shared._exchanged = lambda x: (used.append(x.numel()), exchange(x))[1]
    sums = [
        own.all_reduce(torch.full((n,), group.rank + 1.0)).unique().tolist() for n in (5, 1 << 15)
    ]
    parts = [own.all_gather(torch.full((1, n), float(group.rank))) for n in (2, 1 << 15)]
    return sums, parts[0].tolist(), list(parts[1].shape), used, own.bytes_sent


def test_ranks_sum_small_tensors_in_memory_and_large_ones_by_gloo():
    for rank, (sums, small, large, used, sent) in enumerate(run_ranks(small_and_large, 3)):
        assert sums == [[6.0], [6.0]] and large == [1, 3 << 15], rank
        assert small == [[0.0, 0.0, 1.0, 1.0, 2.0, 2.0]] and used == [5, 2]
        assert sent == sum(4 * 4 * n // 3 for n in (5, 1 << 15)) + 2 * 4 * (2 + (1 << 15))


def test_where_memory_cannot_be_had_gloo_does_it(monkeypatch):
    assert all(run_ranks(refused, 2))


def refused(group: TensorGroup) -> bool:
    """Rank 0 finds no room for the file; all ranks are told."""
    make = shared_memory._new_file
    shared_memory._new_file = lambda size: None
    try:
        return SharedMemory.among(group) is None
    finally:
        shared_memory._new_file = make
