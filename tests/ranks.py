"""Run a function on several ranks of a Gloo group, bounded in time, for tests."""

from __future__ import annotations

import queue
import tempfile
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dsv3.parallel.tensor import TensorGroup

TIMEOUT = 120.0  # seconds; a test that needs this long has hung


def run_ranks(function, size: int, *arguments) -> list:
    """function(group, *arguments) on ``size`` ranks; what each returned, in order of ranks.

    function and arguments must be importable or picklable; results are plain Python values or
    numpy arrays. Raises with the first rank's traceback when one fails, and never leaves a process.
    """
    context = mp.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            context.Process(
                target=_work, daemon=True, args=(function, rank, size, folder, results, arguments)
            )
            for rank in range(size)
        ]
        try:
            for worker in workers:
                worker.start()
            found = dict(_take(results, workers) for _ in workers)
        finally:
            for worker in workers:
                worker.join(5)
                if worker.is_alive():
                    worker.kill()
                    worker.join()
    return [found[rank] for rank in range(size)]


def _take(results, workers):
    try:
        rank, value, error = results.get(timeout=TIMEOUT)
    except queue.Empty:
        raise TimeoutError(f"no answer from {len(workers)} ranks in {TIMEOUT} s") from None
    if error:
        raise AssertionError(f"rank {rank} failed:\n{error}")
    return rank, value


def _work(function, rank, size, folder, results, arguments) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", size)  # no port to pick
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        group = TensorGroup(rank, size, dist.group.WORLD)
        results.put((rank, function(group, *arguments), None))
        dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
