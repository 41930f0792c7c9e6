"""Start N ranks on this machine, and end them together.

A tensor-parallel model is N processes that run the same program in step. Each rank runs the very
command that was typed; from RANK and WORLD_SIZE in its environment it knows that it is one of
many. So ``dsv3 generate --tp 2`` and ``torchrun --nproc-per-node 2 -m dsv3 generate`` run the same
code, and only the second knows about several machines.

torch has a launcher of its own, the one behind ``torchrun``. It is made for many machines, and
opens a port on all interfaces, without a password, behind which lies a pickle: whoever reaches
that port can run code as you. On one machine nothing of this is needed. Here the ranks meet in a
file in a folder that only this user can open, and talk over the loopback interface (``join``).

What can go wrong is that one rank dies: out of memory, killed, a damaged file that only it reads.
The others then wait for it in their next collective. The launcher sees the death at once, ends the
others, and tells in one line which rank it was and how it ended. A rank that is stopped (SIGSTOP)
is seen as well: the launcher says so, waits a minute for it to go on, and then ends them all. One
that merely computes for long is never disturbed. A launcher that is itself killed takes its ranks
along: each watches for its parent (``rank``). All are in the terminal's foreground together, so
that Ctrl-Z stops all and ``fg`` continues all. Ranks of torchrun, which may be on other machines,
watch each other instead (``watch``).
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.parallel.environment import FOLDER, SECRET, loopback
from dsv3.parallel.rank import LAUNCHER, PEER_LOST, report_file

_LOOK_SECONDS = 0.1  # between two looks at the ranks
_CAUSE_SECONDS = 2  # a rank that lost a peer may end before the one that it lost
_GRACE_SECONDS = 5  # for a rank to end before it is killed
_NOTE_SECONDS = 2  # a rank is stopped so long before the launcher says so
_STOPPED_SECONDS = 60  # and so long before all are ended


class RankFailed(DSV3Error):
    """A rank has ended before its time. exit_code: what the command should end with."""

    def __init__(self, what: str, fix: str | None = None, exit_code: int = 1):
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


class _Rank:
    """One process. exit_code: None while it lives, -n when signal n ended it; stopped: since when
    (time.monotonic) it has been stopped, or None."""

    def __init__(self, number: int, process: subprocess.Popen):
        self.number, self.process = number, process
        self.exit_code: int | None = None
        self.stopped: float | None = None
        self.noted = False

    def look(self) -> None:
        """Take what the system says about the process since the last look."""
        while self.exit_code is None:
            pid, status = os.waitpid(self.process.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            if not pid:
                return
            if os.WIFSTOPPED(status):
                self.stopped = time.monotonic()
            elif os.WIFCONTINUED(status):
                self.stopped, self.noted = None, False
            else:
                self.exit_code = self.process.returncode = os.waitstatus_to_exitcode(status)

    def send(self, *signals: int) -> None:
        for number in signals if self.exit_code is None else ():
            os.kill(self.process.pid, number)  # not yet reaped, so the id is still its own


def launch(
    command: Sequence[str | Path], ranks: int, *, threads: int = 1, interactive: bool = False
) -> int:
    """Run ``python COMMAND`` as ``ranks`` ranks on this machine; return an exit code.

    command: ``("-m", "dsv3", ...)``, or a program and its arguments; it calls ``begin_rank`` first
    and joins the others with ``TensorGroup.from_environment``. threads: of each rank. interactive:
    Ctrl-C is rank 0's to handle, and does not end the launcher.
    Raises RankFailed for the rank that failed first.
    """
    team: list[_Rank] = []
    with (
        _signals(interactive) as received,
        tempfile.TemporaryDirectory(prefix="dsv3-", ignore_cleanup_errors=True) as folder,
    ):
        (Path(folder) / SECRET).write_bytes(secrets.token_bytes(32))
        common = _environment(ranks, folder, threads)
        try:
            for number in range(ranks):
                if not received:
                    team.append(_Rank(number, _start(command, number, common)))
            return _watch(team, folder, received)
        finally:
            _end(team)


def _watch(team: list[_Rank], folder: str, received: list[int]) -> int:
    """Wait for the end of all ranks; the exit code of the whole."""
    failed: list[_Rank] = []  # in the order of their ends
    deadline = None
    while True:
        if received:
            return 128 + received[0]
        for rank in team:
            rank.look()
            if rank.exit_code and rank not in failed:
                failed.append(rank)
            _check_stopped(rank, len(team))
        if any(rank.exit_code in (-signal.SIGINT, 128 + signal.SIGINT) for rank in failed):
            return 128 + signal.SIGINT
        if failed:
            deadline = deadline or time.monotonic() + _CAUSE_SECONDS
            for rank in team:  # one may have left its message and be on its way to its end
                if rank not in failed and report_file(folder, rank.number).exists():
                    failed.append(rank)
            known = any(_distance_from_cause(rank, folder) < 2 for rank in failed)
            if known or time.monotonic() > deadline or all(rank.exit_code for rank in team):
                raise _failure(failed, folder, len(team))
        elif all(rank.exit_code == 0 for rank in team):
            return 0
        time.sleep(_LOOK_SECONDS)


def _check_stopped(rank: _Rank, ranks: int) -> None:
    """Say that a rank is stopped; raise RankFailed when it stays so."""
    if rank.stopped is None or rank.exit_code is not None:
        return
    seconds = time.monotonic() - rank.stopped
    if seconds > _STOPPED_SECONDS:
        raise RankFailed(
            f"rank {rank.number} of {ranks} was stopped (SIGSTOP) and did not go on "
            f"within {_STOPPED_SECONDS} s; all ranks were ended"
        )
    if seconds > _NOTE_SECONDS and not rank.noted:
        rank.noted = True
        print(
            f"dsv3: rank {rank.number} of {ranks} is stopped (SIGSTOP), and the others wait for "
            f"it. kill -CONT {rank.process.pid} continues it; in {_STOPPED_SECONDS} s all are "
            "ended",
            file=sys.stderr,
            flush=True,
        )


def _end(team: Sequence[_Rank]) -> None:
    """End all ranks that still live: ask, then kill. A stopped one hears only when continued."""
    for rank in team:
        rank.send(signal.SIGTERM, signal.SIGCONT)
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(rank.exit_code is None for rank in team):
        if time.monotonic() > deadline:
            for rank in team:
                rank.send(signal.SIGKILL)
        time.sleep(_LOOK_SECONDS / 10)
        for rank in team:
            rank.look()


def _start(command: Sequence[str | Path], number: int, common: dict[str, str]) -> subprocess.Popen:
    """One rank. Ctrl-C is held back until it can be heard, here and there (``begin_rank``)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        return subprocess.Popen(
            [sys.executable, "-P", *map(str, command)],
            env=common | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdin=None if number == 0 else subprocess.DEVNULL,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment(ranks: int, folder: str, threads: int) -> dict[str, str]:
    """What all ranks find: a user's settings, except that ranks of one machine never listen on an
    interface that others can reach."""
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return dict(os.environ) | {
        FOLDER: folder,
        LAUNCHER: str(os.getpid()),
        "WORLD_SIZE": str(ranks),
        # The ranks import the package that is running now, and nothing from the current folder.
        "PYTHONPATH": os.pathsep.join([package_root, *([path] if path else [])]),
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": loopback(),
        "NCCL_SOCKET_IFNAME": "=" + loopback(),
    }


@contextmanager
def _signals(interactive: bool) -> Iterator[list[int]]:
    """Collect signals that should end everything; those that were ignored before stay ignored."""
    received: list[int] = []

    def collect(number: int, _) -> None:
        received.append(number)

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if (previous := signal.getsignal(number)) != signal.SIG_IGN:
            ours = number == signal.SIGINT and interactive
            before[number] = previous
            signal.signal(number, (lambda *_: None) if ours else collect)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _distance_from_cause(rank: _Rank, folder: str) -> int:
    """0 for a rank that left a message, 1 for one that ended by itself, then those that were
    stopped, then those that lost a peer."""
    if report_file(folder, rank.number).exists():
        return 0
    if rank.exit_code == PEER_LOST:
        return 3
    return 2 if rank.exit_code in (-signal.SIGTERM, -signal.SIGABRT) else 1


def _failure(failed: Sequence[_Rank], folder: str, ranks: int) -> RankFailed:
    """The line for the rank that failed first: of those nearest to the cause the first seen."""
    rank = min(failed, key=lambda rank: _distance_from_cause(rank, folder))
    file = report_file(folder, rank.number)
    if file.exists():
        report = json.loads(file.read_text())
        return RankFailed(report["message"], exit_code=report["exit_code"])
    code, fix = rank.exit_code, None
    assert code is not None  # it has ended
    if code == PEER_LOST:
        how = "lost the connection to another rank"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        fix = "Look whether memory ran out" if -code == signal.SIGKILL else None
    else:
        how = f"ended with exit code {code}"
    return RankFailed(f"rank {rank.number} of {ranks} {how}; the other ranks were stopped", fix=fix)
