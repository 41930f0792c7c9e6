"""Start N ranks on this machine, and end them together.

A tensor-parallel model is N processes that run the same command in step. ``launch`` starts them
with torch.distributed's own launcher, the one behind ``torchrun``, on a free port of the loopback
interface. Each rank runs the very command that was typed; from RANK and WORLD_SIZE in its
environment it knows that it is one of many. So ``dsv3 generate --tp 2`` and
``torchrun --nproc-per-node 2 -m dsv3 generate`` run the same code, and only the second knows about
several machines.

What can go wrong is that one rank dies: out of memory, killed, a damaged file that only it reads.
The others then wait for it in their next collective. The launcher sees the death within a second,
ends the others, and tells in one line which rank it was and how it ended. A rank that fails with a
message leaves it in the launcher's error file, so that N ranks with one trouble print one line.
A launcher that is itself killed takes its ranks along: each watches for its parent.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from collections.abc import Mapping, Sequence

from dsv3.errors import DSV3Error

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

# Exit code of a rank that ended because another one did. It is never the reason.
PEER_LOST = 70
_FOLDER = "DSV3_LAUNCH_FOLDER"
_LAUNCHER = "DSV3_LAUNCHER_PID"
_GRACE_SECONDS = 5


class RankFailed(DSV3Error):
    """A rank has ended before its time. exit_code: what the command should end with."""

    def __init__(self, what: str, fix: str | None = None, exit_code: int = 1):
        super().__init__(what, fix=fix)
        self.exit_code = exit_code


def world_size() -> int | None:
    """Ranks that a launcher has started, this one included; None when there was no launcher."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else None


def check_ranks(asked: int | None) -> None:
    """Under a launcher, ``--tp`` may only repeat the number of ranks that are there."""
    there = world_size()
    if there is not None and asked is not None and asked != there:
        raise DSV3Error("disagrees with the ranks that torchrun started", where="--tp",
                        found=asked, expected=f"{there} (WORLD_SIZE)",
                        fix="Leave --tp out under torchrun")


def launch(arguments: Sequence[str], ranks: int, interactive: bool = False) -> int:
    """Run ``python -m dsv3 ARGUMENTS`` as ``ranks`` local ranks; return an exit code.

    interactive: Ctrl-C is passed on to rank 0 (which stops its answer) and ends nobody.
    Raises RankFailed for the rank that failed first.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    signals = ["SIGTERM", "SIGHUP", "SIGQUIT", *([] if interactive else ["SIGINT"])]
    with tempfile.TemporaryDirectory(prefix="dsv3-", ignore_cleanup_errors=True) as folder:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=Path(folder).name,
            rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", local_addr="127.0.0.1",
            max_restarts=0, monitor_interval=0.1, shutdown_timeout=_GRACE_SECONDS,
            signals_to_handle=",".join(signals), logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        if interactive:
            signal.signal(signal.SIGINT, lambda *_: _interrupt_first_rank(Path(folder)))
        # The launcher fills in $-templates; a dollar in a prompt has to survive that.
        command = ["-P", "-m", "dsv3", *(word.replace("$", "$$") for word in arguments)]
        try:
            with _environment(_rank_environment(ranks, folder)), _quiet():
                elastic_launch(config, sys.executable)(*command)
        except ChildFailedError as error:
            raise _failure(error.failures, ranks) from None
        except SignalException as stop:
            return 128 + stop.sigval
    return 0


def begin_rank() -> None:
    """Called once by a process that may be a rank of ``launch``: say who I am, watch my parent."""
    folder = os.environ.get(_FOLDER)
    if not folder or "RANK" not in os.environ:
        return
    (Path(folder) / f"rank{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    launcher = int(os.environ[_LAUNCHER])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(PEER_LOST)

    threading.Thread(target=watch, daemon=True).start()


def end_rank(exit_code: int) -> None:
    """Called last by the same process: a rank of ``launch`` ends here, at once.

    An ordinary exit takes down connections and threads one after the other. In a rank that failed,
    others still hold those connections, and torch would complain on the terminal; in one that is
    done, it now and then ended in an abort on a busy machine, after all work was finished.
    """
    if os.environ.get(_FOLDER):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(exit_code)


def report_to_launcher(message: str, exit_code: int) -> bool:
    """Leave this rank's message for ``launch`` to print; False when nobody will read it.

    The code goes with it: a rank that lost this one as a peer may end first, and then the
    launcher stops this one before it has exited.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file or not os.environ.get(_FOLDER):
        return False
    beside = Path(f"{file}.{os.getpid()}")
    report = {"message": message, "exit_code": exit_code, "timestamp": int(time.time())}
    beside.write_text(json.dumps(report))
    beside.replace(file)
    return True


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone."""
    from torch import distributed

    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def _failure(failures: Mapping[int, ProcessFailure], ranks: int) -> RankFailed:
    """The line for the rank that failed first.

    One that left a message comes first, then one that ended by itself, then those that were
    stopped, then those that lost a peer. Among equals the launcher's order, the one it saw.
    """

    def distance_from_cause(rank: int) -> int:
        if _report(failures[rank]):
            return 0
        code = failures[rank].exitcode
        return 3 if code == PEER_LOST else 2 if -code in (signal.SIGTERM, signal.SIGABRT) else 1

    rank = min(failures, key=distance_from_cause)
    failure = failures[rank]
    if report := _report(failure):
        return RankFailed(report["message"], exit_code=report["exit_code"])
    fix = None
    if failure.exitcode == PEER_LOST:
        how = "lost the connection to another rank"
    elif failure.exitcode < 0:
        how = f"was killed by {failure.signal_name()}"
        fix = "Look whether memory ran out" if -failure.exitcode == signal.SIGKILL else None
    else:
        how = f"ended with exit code {failure.exitcode}"
    return RankFailed(f"rank {rank} of {ranks} {how}; the other ranks were stopped", fix=fix)


def _report(failure: ProcessFailure) -> dict | None:
    """What a rank left with ``report_to_launcher``, if it did."""
    return failure.error_file_data if os.path.isfile(failure.error_file) else None


def _rank_environment(ranks: int, folder: str) -> dict[str, str]:
    """What the ranks find beyond the launcher's own variables; settings of the user win."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    package_root = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {
        _FOLDER: folder,
        _LAUNCHER: str(os.getpid()),
        # The ranks import the package that is running now, and nothing from the current folder.
        "PYTHONPATH": os.pathsep.join([package_root, *([path] if path else [])]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (cores or 1) // ranks))),
        "GLOO_SOCKET_IFNAME": os.environ.get(
            "GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo"),
    }


def _interrupt_first_rank(folder: Path) -> None:
    """Pass Ctrl-C on: the ranks live in sessions of their own and do not hear the terminal."""
    try:
        os.kill(int((folder / "rank0.pid").read_text()), signal.SIGINT)
    except (OSError, ValueError):
        pass  # rank 0 has not begun, or has ended


@contextmanager
def _environment(values: dict[str, str]):
    """Set environment variables for the processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _quiet():
    """The launcher logs a failure over many lines; ours says it in one."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
