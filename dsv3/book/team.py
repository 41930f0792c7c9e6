"""Several ranks for a notebook: processes that run the functions of its cells, in step.

A notebook is one process. ``Team(4)`` starts four more, which join in a Gloo group over the
loopback interface, and wait. ``team.run(function)`` sends them a function, as it stands in a cell;
each calls it with its own ``TensorGroup`` and answers with what it returned and what it printed.

Ranks that wait for each other for ever are the classic mistake of this trade. So each rank has a
second thread that can still answer when the first one is stuck, and after ``limit`` seconds
``run`` tells in which line each of them waits, and ends all. The next ``run`` starts new ones.

The processes end with the notebook's: each sees that the pipe it gets its work from is closed.
"""

from __future__ import annotations

import io
import linecache
import os
import queue
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import cloudpickle

from dsv3.errors import DSV3Error
from dsv3.parallel.environment import loopback

_START_SECONDS = 60.0  # a busy machine takes long to import torch
_PROGRAM = "from dsv3.book import team; team._main()"  # python -m would import the module twice
_CAUSE_SECONDS = 1.0  # after one rank has failed, others may tell what they know
_WHERE = b"where"

Place = tuple[str, int, str]
"""File, line and function of a frame."""


@dataclass(frozen=True)
class Answer:
    """What a rank says about its work: what it returned, what it printed; or the error, and the
    frames it came from, innermost last."""

    value: Any = None
    printed: str = ""
    error: str | None = None
    frames: tuple[Place, ...] = ()


class Team:
    """``size`` ranks on this machine. limit: seconds that a ``run`` may take."""

    def __init__(self, size: int, limit: float = 20.0):
        self.size, self.limit = size, limit
        self._workers: list[subprocess.Popen] = []
        self._lines: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def __repr__(self) -> str:
        return f"Team({self.size})"

    def run(self, function: Callable, *arguments: Any) -> list:
        """function(group, *arguments) on every rank; what each returned, in order of ranks.

        function: of a cell or a module; the names it uses go along. What ranks print is printed in
        order of ranks, with their numbers. Raises DSV3Error for a rank that failed, with the line,
        and for ranks that did not end in time, with the line in which each one waits.
        """
        cells = _cells(function, {})
        work = cloudpickle.dumps((function, arguments))
        try:
            if not self._workers:
                self._start()
            for line in self._lines:
                line.send_bytes(work)
            answers = self._hear(self.limit)
        except BaseException:  # interrupted: what comes later would be taken for the next answer
            self.close()
            raise
        for rank, answer in answers.items():
            for text in answer.printed.splitlines():
                print(f"rank {rank}: {text}")
        for rank, answer in answers.items():
            if answer.error is not None:
                self.close()
                raise DSV3Error(
                    "a rank failed",
                    where=f"rank {rank} of {self.size}{_line(answer.frames, cells)}",
                    found=answer.error,
                )
        if len(answers) < self.size:
            places = "; ".join(
                f"rank {rank} {self._place(rank, answers, cells)}" for rank in range(self.size)
            )
            self.close()
            raise DSV3Error(
                f"the ranks did not end within {self.limit:g} s",
                found=places,
                fix="Who waits for whom? Each message needs one who sends and one who receives, "
                "and a collective needs all ranks",
            )
        return [answers[rank].value for rank in range(self.size)]

    def _hear(self, seconds: float) -> dict[int, Answer]:
        """What ranks answer, by rank, until all have, or one has failed, or time is over."""
        answers: dict[int, Answer] = {}
        over = time.monotonic() + seconds
        while len(answers) < self.size and time.monotonic() < over:
            silent = [line for rank, line in enumerate(self._lines) if rank not in answers]
            for line in wait(silent, timeout=0.2):
                rank = self._lines.index(line)  # pyrefly: ignore[bad-argument-type]
                try:
                    answers[rank] = cloudpickle.loads(self._lines[rank].recv_bytes())
                except (EOFError, OSError):
                    answers[rank] = Answer(error="its process has ended")
                if answers[rank].error is not None:
                    over = min(over, time.monotonic() + _CAUSE_SECONDS)
        return dict(sorted(answers.items()))

    def _place(self, rank: int, answers: dict[int, Answer], cells: dict[str, str]) -> str:
        """Where a rank is: done, or in which line."""
        if rank in answers:
            return "has ended"
        with suppress(EOFError, OSError):
            self._lines[rank].send_bytes(_WHERE)
            if self._lines[rank].poll(5):
                return "waits" + _line(cloudpickle.loads(self._lines[rank].recv_bytes()), cells)
        return "does not answer"

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dsv3-team-")
        environment = dict(os.environ) | {
            "GLOO_SOCKET_IFNAME": loopback(),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),  # a function's module is there
        }
        for rank in range(self.size):
            mine, its = Pipe()
            words = [rank, self.size, its.fileno(), self._folder.name]
            self._workers.append(
                subprocess.Popen(
                    [sys.executable, "-c", _PROGRAM, *map(str, words)],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[its.fileno()],
                )
            )
            its.close()
            self._lines.append(mine)
        there = self._hear(_START_SECONDS)
        if len(there) < self.size or any(answer.error for answer in there.values()):
            self.close()
            raise DSV3Error("the ranks did not start", where=f"Team({self.size})")

    def close(self) -> None:
        """End the processes; the next ``run`` starts new ones."""
        for worker in self._workers:
            worker.kill()
        for worker, line in zip(self._workers, self._lines):
            worker.wait()
            line.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._workers, self._lines, self._folder = [], [], None


def _cells(function: Callable, found: dict[str, str]) -> dict[str, str]:
    """Where a function and those that it calls were written, by their names: what is pickled by
    value forgets its file."""
    code = getattr(function, "__code__", None)
    if code is not None and code.co_name not in found:
        found[code.co_name] = code.co_filename
        for name in code.co_names:
            _cells(function.__globals__.get(name), found)
    return found


def _line(frames: tuple[Place, ...], cells: dict[str, str]) -> str:
    """The innermost line that is neither the package's nor a library's: the reader's own."""
    others = (str(Path(__file__).parents[1]), *sysconfig.get_paths().values())
    for file, number, function in reversed(frames):
        if not file.startswith(others) and not file.startswith("<frozen"):
            text = linecache.getline(cells.get(function, file), number).strip()
            return f" in {function}: {text}" if text else f" in {function}, line {number}"
    return ""


# In a rank ----------------------------------------------------------------------------------------


def _serve(rank: int, size: int, line: Connection, folder: str) -> None:
    """Do what comes through the pipe, one piece of work after the other, until it is closed."""
    import torch
    import torch.distributed as dist

    from dsv3.parallel.tensor import TensorGroup

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    inbox: queue.Queue[bytes] = queue.Queue()
    threading.Thread(
        target=_read, args=(line, inbox, threading.main_thread().ident), daemon=True
    ).start()
    line.send_bytes(cloudpickle.dumps(Answer()))
    while True:
        work = inbox.get()
        answer = _work(TensorGroup(rank, size, dist.group.WORLD), work)
        line.send_bytes(cloudpickle.dumps(answer))


def _read(line: Connection, inbox: queue.Queue[bytes], main: int) -> None:
    """Pass work on, and say where the main thread is when asked; end when the notebook has."""
    while True:
        try:
            message = line.recv_bytes()
        except (EOFError, OSError):
            os._exit(0)
        if message != _WHERE:
            inbox.put(message)
            continue
        frames = traceback.extract_stack(sys._current_frames()[main])
        line.send_bytes(cloudpickle.dumps(_places(frames)))


def _work(group, work: bytes) -> Answer:
    printed = io.StringIO()
    try:
        function, arguments = cloudpickle.loads(work)
        with redirect_stdout(printed):
            value = function(group, *arguments)
        return Answer(value, printed.getvalue())
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        return Answer(
            printed=printed.getvalue(),
            error=f"{type(error).__name__}: {text}" if text else type(error).__name__,
            frames=_places(traceback.extract_tb(error.__traceback__)),
        )


def _places(frames: traceback.StackSummary) -> tuple[Place, ...]:
    return tuple((frame.filename, frame.lineno or 0, frame.name) for frame in frames)


def _main() -> None:
    """What a worker process runs."""
    rank, size, number, folder = sys.argv[1:]
    _serve(int(rank), int(size), Connection(int(number)), folder)
