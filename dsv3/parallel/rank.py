"""What a rank of ``launch`` owes its launcher: to end with it, and to say why it ended.

``launch`` starts ranks, ``begin_rank`` and ``end_rank`` frame their work. A rank that fails with
a message leaves it in a file, so that N ranks with one trouble print one line. All of this does
nothing in a process that is no rank of ``launch``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from dsv3.parallel.environment import FOLDER

# Exit code of a rank that ended because another one did. It is never the reason.
PEER_LOST = 70
LAUNCHER = "DSV3_LAUNCHER_PID"
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux

# How Gloo, NCCL and torch's store say that the process at the other end has gone.
_GONE = re.compile(
    r"connection (was )?(closed|reset) by|closed by (remote )?peer|broken pipe"
    r"|ncclRemoteError|remote process exited",
    re.IGNORECASE,
)


def started_by_launch() -> bool:
    """Whether this process is a rank of ``launch``."""
    return bool(os.environ.get(FOLDER))


def begin_rank() -> None:
    """Called before anything is loaded: watch my parent, and take Ctrl-C as a rank does.

    Ctrl-C in a terminal reaches all ranks and the launcher, which ends them. Rank 0 goes at once;
    in interactive use it takes Ctrl-C over later. ``launch`` starts ranks with SIGINT blocked, so
    that one which comes while Python starts is kept until here and ends in no traceback.
    """
    if (
        "RANK" in os.environ
    ):  # torch remarks on each connection that ends, with its own stack in C++
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    folder = os.environ.get(FOLDER)
    if not folder:
        return
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # ignored since before the launcher
        first = os.environ["RANK"] == "0"
        signal.signal(signal.SIGINT, signal.SIG_DFL if first else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if sys.platform.startswith("linux"):  # a stopped rank too has to notice
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGCONT)
    threading.Thread(
        target=_end_with, args=(int(os.environ[LAUNCHER]), folder), daemon=True
    ).start()


def _end_with(launcher: int, folder: str) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(PEER_LOST)


def end_rank(exit_code: int) -> None:
    """Called last by the same process: a rank of ``launch`` ends here, at once.

    An ordinary exit takes down connections and threads one after the other. In a rank that failed,
    others still hold those connections, and torch would complain on the terminal; in one that is
    done, it now and then ended in an abort on a busy machine, after all work was finished.
    """
    if started_by_launch():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(exit_code)


def report_to_launcher(message: str, exit_code: int) -> bool:
    """Leave this rank's message for ``launch`` to print; False when nobody will read it.

    The code goes with it: a rank that lost this one as a peer may end first, and then the
    launcher stops this one before it has exited.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return False
    file = report_file(folder, int(os.environ["RANK"]))
    beside = file.with_suffix(".partial")
    beside.write_text(json.dumps({"message": message, "exit_code": exit_code}))
    beside.replace(file)
    return True


def report_file(folder: str | Path, rank: int) -> Path:
    """Where a rank leaves its message."""
    return Path(folder) / f"rank{rank}.json"


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because the process of another rank has gone.

    Anything else that torch.distributed says (a time limit, a name that is not found, no memory)
    is another trouble and keeps its own words.
    """
    return is_collective(error) and bool(_GONE.search(str(error)))


def is_collective(error: BaseException) -> bool:
    """Whether an error comes from the connections between ranks."""
    from torch import distributed

    return isinstance(error, RuntimeError) and (
        isinstance(error, distributed.DistError)
        or re.match(r"\[/\S*/gloo/\S+\]", str(error)) is not None
    )


def brief(error: BaseException) -> str:
    """The first line of an error of torch, without the place in torch's sources."""
    line = str(error).strip().partition("\n")[0]
    return line.partition("] ")[2] if line.startswith("[/") else line
