"""Small jobs on a few ranks, under our launcher and under torch's; each may lose a rank.

    python rank_jobs.py ANSWERS JOBS     run all jobs, a few at a time; write what became of them
    python rank_jobs.py --rank JOB       be one rank of a job, for torchrun

JOBS, JOB: JSON. Importing torch costs seconds, so one process does it and forks for every rank.
torch's launcher is the one behind ``torchrun``, called as a function.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dsv3 import cli
from dsv3.errors import DSV3Error
from dsv3.parallel import launch as launching
from dsv3.parallel.rank import begin_rank
from dsv3.parallel.tensor import TensorGroup

LIMIT = 60  # seconds a job; what is left of it then is killed, and reported
AT_ONCE = 8
RANKS = 3
COLLECTIVES = {
    "broadcast": lambda x, r, n: dist.broadcast(x, 0),
    "all_reduce": lambda x, r, n: dist.all_reduce(x),
    "all_gather": lambda x, r, n: dist.all_gather([torch.empty_like(x) for _ in range(n)], x),
    "reduce_scatter": lambda x, r, n: dist.reduce_scatter_tensor(torch.empty(len(x) // n), x),
    "all_to_all": lambda x, r, n: dist.all_to_all_single(torch.empty_like(x), x),
    "send_recv": lambda x, r, n: [
        work.wait()
        for work in (dist.isend(x, (r + 1) % n), dist.irecv(torch.empty_like(x), (r - 1) % n))
    ],
    "barrier": lambda x, r, n: dist.barrier(),
}


def later(seconds: float, number: int, pid: int | None = None) -> None:
    """A signal, from a thread, whatever the main thread is in."""
    timer = threading.Timer(seconds, lambda: os.kill(pid or os.getpid(), number))
    timer.daemon = True
    timer.start()


def killed(group: TensorGroup, job: dict) -> None:
    """One collective after the other, until rank ``victim`` is killed in the midst of them."""
    x = torch.ones(RANKS * 20_000)
    if group.rank == job["victim"]:
        later(job["seconds"], signal.SIGKILL)
    while True:
        COLLECTIVES[job["collective"]](x, group.rank, group.size)


def waiting(group: TensorGroup, job: dict) -> None:
    print(f"all have met: {os.getpid()}", flush=True)
    while True:
        dist.barrier()
        time.sleep(0.05)


def busy(group: TensorGroup, job: dict) -> None:
    """Each rank computes alone for longer than silence may last: one in C that holds Python's
    lock (of its machine another rank sees it run), one in Python, one in torch."""
    end = time.monotonic() + 5
    if group.rank == 0:
        ctypes.PyDLL(None).sleep(5)
    while group.rank == 1 and time.monotonic() < end:
        sum(range(1000))
    while group.rank == 2 and time.monotonic() < end:
        torch.ones(600, 600) @ torch.ones(600, 600)
    dist.barrier()


def failing(group: TensorGroup, job: dict) -> None:
    if group.rank == 1:
        time.sleep(0.5)
        raise DSV3Error("no room on the disk")
    waiting(group, job)


def stopped(group: TensorGroup, job: dict) -> None:
    """Rank 1 is stopped, and goes on when the others have ended."""
    if group.rank == 1:
        subprocess.Popen(["sh", "-c", f"sleep 8; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    waiting(group, job)


def ended(group: TensorGroup, job: dict) -> None:
    """Their launcher is told to end."""
    if group.rank == 0:
        later(0.5, signal.SIGTERM, os.getppid())
    waiting(group, job)


WORK = {work.__name__: work for work in (killed, busy, failing, stopped, ended, waiting)}


def be_rank(job: dict) -> None:
    """As ``dsv3`` is, with other work."""

    def run(_) -> int:
        if job.get("apart"):  # ranks that see no process of each other
            os.environ["GROUP_RANK"] = os.environ["RANK"]
        with TensorGroup.from_environment("cpu") as group:
            dist.barrier()
            WORK[job["work"]](group, job)
        return 0

    torch.set_num_threads(1)
    begin_rank()
    cli._run = run
    code = cli._guarded([])
    sys.stderr.flush()
    if code or job["launcher"] == "ours":
        os._exit(code)


def run_job(job: dict) -> int:
    """The launcher's process."""
    os.environ.update(job.get("env", {}))
    if job["launcher"] == "torch":
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=RANKS,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="fork",
            monitor_interval=0.1,
            max_restarts=0,
        )
        elastic_launch(config, be_rank)(job)
        return 0

    def start(_, number, common):
        pid = os.fork()
        if not pid:
            for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(one, signal.SIG_DFL)
            os.environ.update(common | {"RANK": str(number), "LOCAL_RANK": str(number)})
            be_rank(job)
        return SimpleNamespace(pid=pid, returncode=None)

    launching._start = start
    try:
        return launching.launch([], RANKS)
    except DSV3Error as error:
        print(f"dsv3: error: {error}", file=sys.stderr)
        return 1


def start_job(job: dict, output: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        code = run_job(job)
    except BaseException as error:  # torch's launcher raises for ranks that fail
        print(f"{type(error).__name__}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(code)


def of_session(leader: int) -> list[int]:
    """Processes that still run in a job's session (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def main(answers: Path, jobs: list[dict]) -> None:
    left, going, found = list(enumerate(jobs)), {}, {}
    while left or going:
        while left and len(going) < AT_ONCE:
            number, job = left.pop(0)
            output = answers.with_suffix(f".{number}")
            going[start_job(job, output)] = (number, output, time.monotonic())
        for pid, (number, output, began) in list(going.items()):
            seconds = time.monotonic() - began
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done and seconds < LIMIT:
                continue
            alive = of_session(pid)
            for one in alive:
                os.kill(one, signal.SIGKILL)
            if not done:
                status = os.waitpid(pid, 0)[1]
            found[number] = dict(
                code=os.waitstatus_to_exitcode(status),
                seconds=seconds,
                left=len(alive),
                text=output.read_text(),
            )
            del going[pid]
        time.sleep(0.05)
    answers.write_text(json.dumps([found[number] for number in range(len(jobs))]))


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        be_rank(json.loads(sys.argv[2]))
    torch.set_num_threads(1)
    dist.TCPStore(
        "127.0.0.1", 0, 1, True, wait_for_workers=False
    )  # torch imports more at first use
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
