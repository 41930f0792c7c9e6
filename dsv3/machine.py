"""What this machine is good at: how many threads, and how they wait.

*Waiting.* torch cuts each product over threads, and between two products the threads have nothing
to do. By default they spin, so that the next start costs nothing. On a machine with other work
beside, a spinning thread holds the core that the thread it waits for would need: two threads on
two cores then take many times as long as one. A thread that sleeps gives its core away and costs a
few microseconds to wake. OpenMP reads its policy once, when torch is loaded; ``import dsv3`` sets
it before that (``wait_passively``).

*Threads.* ``dsv3 generate`` leaves one core to the rest of the machine and cuts the others evenly
over its ranks. Writing one token at a time multiplies small matrices, for which a second thread
gains little and costs much as soon as its core is wanted elsewhere.

OMP_NUM_THREADS and OMP_WAIT_POLICY, where the user has set them, win over all of this.
"""

from __future__ import annotations

import os
import re
import sys

from dsv3.errors import DSV3Error

# Where OpenMP's libraries read how threads wait: the standard, GNU's, and LLVM's (macOS).
_WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively() -> None:
    """Let torch's threads sleep while they wait. Does nothing where the user has set how they
    wait, and nothing once torch is loaded: it has read its settings then."""
    if "torch" not in sys.modules and not any(name in os.environ for name in _WAIT_SETTINGS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads(ranks: int = 1, *, spare: int = 1) -> int:
    """Threads for each of ``ranks`` processes on this machine; ``spare`` cores are left free."""
    if asked := os.environ.get("OMP_NUM_THREADS"):
        return int(asked.split(",")[0])
    return max(1, (cores() - spare) // ranks)


def threads_in_words(count: int) -> str:
    """``count`` threads and how they wait: "1 thread, waiting passively"."""
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    return f"{count} thread{'s' * (count != 1)}{', waiting passively' * passive}"


def check_threads() -> None:
    """Raises DSV3Error where OMP_NUM_THREADS is no number of threads: OpenMP would warn and go on
    with another one."""
    asked = os.environ.get("OMP_NUM_THREADS")
    one = r"\s*0*[1-9][0-9]{0,5}\s*"  # one number for each level of nesting, in practice one
    if asked is not None and not re.fullmatch(f"{one}(,{one})*", asked):
        raise DSV3Error(
            "not a number of threads",
            where="OMP_NUM_THREADS",
            found=repr(asked),
            expected="a whole number of at least 1",
            fix="Set it so, or unset it",
        )
