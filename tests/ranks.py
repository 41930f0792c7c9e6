"""Run a function on several ranks of a Gloo group, bounded in time, for tests.

The processes are those of a notebook (``dsv3.book.team``). A test session starts them once for
each number of ranks: importing torch takes longer than most tests.
"""

from __future__ import annotations

import atexit
from functools import cache

from dsv3.book.team import Team

TIMEOUT = 120.0  # seconds; a test that needs this long has hung


@cache
def team(size: int) -> Team:
    """The ranks of this session."""
    made = Team(size, limit=TIMEOUT)
    atexit.register(made.close)
    return made


def run_ranks(function, size: int, *arguments) -> list:
    """function(group, *arguments) on ``size`` ranks; what each returned, in order of ranks.

    function and arguments must be importable or picklable; results are plain Python values or
    numpy arrays. Raises DSV3Error with the line of the rank that failed, or with those in which
    ranks wait; then they are ended, and the next test has new ones.
    """
    return team(size).run(function, *arguments)
