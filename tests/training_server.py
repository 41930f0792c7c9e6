"""Starts tiny trainings that a test may kill: ``python training_server.py PLAYS CODE``.

Reads lines ``SECONDS N OUT_DIR``; forks for each a process that trains there, and answers with its
exit status. It is killed (SIGKILL) after so many seconds, or kills itself just before its N-th
operation on a file below OUT_DIR; 0 stands for never.

Forked processes share what was imported once, so one is there in milliseconds. This process has
one thread: nothing is left behind in a fork.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback

import torch
from training_cases import RECIPE, TINY, little_text, window

from dsv3.model import Transformer
from dsv3.training import train
from dsv3.training.balance import RouterWatch
from dsv3.training.optimizer import make_optimizer
from dsv3.training.step import StepValues, train_step

FILE_EVENTS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}


def die_at(number: int, folder: str) -> None:
    """Kill this process at its ``number``-th operation on a file in ``folder``."""
    left = number

    def count(event, arguments):
        nonlocal left
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def main(plays: str, code: str) -> None:
    torch.set_num_threads(1)
    little_text()
    model = Transformer(TINY).init_weights(0)  # torch imports much when it is first used
    train_step(
        model, make_optimizer(model), window(), StepValues(learning_rate=0.1), RouterWatch(model)
    )
    print("ready", flush=True)
    for line in sys.stdin:
        seconds, number, folder = line.rstrip("\n").split(" ", 2)
        child = os.fork()
        if not child:
            status = 1
            try:
                if int(number):
                    die_at(int(number), folder)
                train(TINY, folder, RECIPE, plays=plays, code=code, progress=False)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        if float(seconds):
            time.sleep(float(seconds))
            os.kill(child, signal.SIGKILL)  # it may have ended, but its number is still its own
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
