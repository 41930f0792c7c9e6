"""Ranks as threads of one process, for exercises: messages, collectives, and deadlocks that show.

A check runs the reader's function on two or three ranks, in milliseconds and always with the same
outcome. ``in_threads(function, 2, ...)`` gives each thread a ``Rank`` to talk through, where

* ``send`` waits until the other one receives, as a large message does on a real network;
* ``receive`` waits until somebody sends;
* a collective waits until all ranks have called it.

When every rank that is not done waits, and nothing can move, they would wait for ever. Nobody has
to wait to find that out: ``Stuck`` says at once in which line each one is. What is sent arrives as
a copy, so that ranks share nothing.
"""

from __future__ import annotations

import linecache
import sys
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Seconds that a rank may wait while others compute; one that talks through threads of its own can
# be stuck without our seeing it.
_PATIENCE = 10.0


class Stuck(Exception):
    """The ranks wait for each other. waiting: of each rank, what it waits in; "" if it is done."""

    def __init__(self, waiting: Sequence[str]):
        self.waiting = tuple(waiting)
        super().__init__(
            "; ".join(
                f"rank {rank} {f'waits in {call}' if call else 'is done'}"
                for rank, call in enumerate(waiting)
            )
        )


@dataclass
class _Call:
    """What a rank waits in: its kind, the other rank of a message, what it gives, its line."""

    kind: str
    peer: int
    given: Any
    line: str


class _Exchange:
    """Where the threads meet. Everything below happens under one lock."""

    def __init__(self, size: int):
        self.size = size
        self.changed = threading.Condition()
        self.waiting: dict[int, _Call] = {}
        self.answers: dict[int, Any] = {}
        self.done = 0
        self.stuck: Stuck | None = None

    def call(self, rank: int, kind: str, peer: int, given: Any) -> Any:
        with self.changed:
            self.waiting[rank] = _Call(kind, peer, deepcopy(given), _line())
            self.move()
            self.changed.wait_for(lambda: rank in self.answers or self.stuck, _PATIENCE)
            if rank in self.answers:
                return self.answers.pop(rank)
            raise self.stuck or self.found_stuck()

    def end(self) -> None:
        """A rank has returned, or failed."""
        with self.changed:
            self.done += 1
            self.move()

    def move(self) -> None:
        """Let every message pass that can; find out when none can and all wait."""
        for rank, call in list(self.waiting.items()):
            other = self.waiting.get(call.peer)
            if call.kind == "send" and other and (other.kind, other.peer) == ("receive", rank):
                self.answers[rank], self.answers[call.peer] = None, call.given
                del self.waiting[rank], self.waiting[call.peer]
        calls = [self.waiting.get(rank) for rank in range(self.size)]
        together = {call.kind for call in calls if call} if all(calls) else set()
        if len(together) == 1 and not together & {"send", "receive"}:
            given = [call.given for call in calls if call]
            self.answers.update(_COLLECTIVES[together.pop()](given))
            self.waiting.clear()
        if self.waiting and len(self.waiting) + self.done == self.size:
            self.stuck = self.found_stuck()
        self.changed.notify_all()

    def found_stuck(self) -> Stuck:
        lines = {rank: call.line for rank, call in self.waiting.items()}
        return Stuck([lines.get(rank, "") for rank in range(self.size)])


class Rank:
    """One rank's view. rank: my number; size: how many we are."""

    def __init__(self, rank: int, exchange: _Exchange):
        self.rank, self.size, self._exchange = rank, exchange.size, exchange

    def send(self, x: Any, to: int) -> None:
        """Give x to another rank; returns when it has been received."""
        self._exchange.call(self.rank, "send", to, x)

    def receive(self, source: int) -> Any:
        """What another rank sends to me."""
        return self._exchange.call(self.rank, "receive", source, None)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x."""
        return self._exchange.call(self.rank, "all_reduce", self.rank, x)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One part for each rank; returns what each rank had for me."""
        if len(parts) != self.size:
            raise ValueError(f"{len(parts)} parts for {self.size} ranks")
        return self._exchange.call(self.rank, "all_to_all", self.rank, list(parts))


class Given:
    """A case of an exercise: what each rank is given. arguments: as in ``in_threads``."""

    def __init__(self, ranks: int, *arguments: Sequence):
        self.ranks, self.arguments = ranks, arguments

    def __repr__(self) -> str:
        return f"{self.ranks} ranks"


def in_threads(function: Callable, size: int, *arguments: Any) -> list:
    """function(rank, *arguments of that rank) on ``size`` threads; what each returned.

    arguments: each a list with one entry a rank. Raises Stuck for a deadlock, and what a rank
    raised where one failed.
    """
    exchange = _Exchange(size)
    results: list[Any] = [None] * size
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            with torch.no_grad():  # which is each thread's own
                results[rank] = function(
                    Rank(rank, exchange), *(deepcopy(argument[rank]) for argument in arguments)
                )
        except BaseException as error:
            errors[rank] = error
        finally:
            exchange.end()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = [errors[rank] for rank in sorted(errors)]
    if first:  # where one failed, others got stuck because of it
        raise next((error for error in first if not isinstance(error, Stuck)), first[0])
    return results


def _sums(given: list[Tensor]) -> dict[int, Tensor]:
    total = sum(given[1:], given[0])
    return {rank: total.clone() for rank in range(len(given))}


def _swapped(given: list[list[Tensor]]) -> dict[int, list[Tensor]]:
    return {rank: [parts[rank] for parts in given] for rank in range(len(given))}


_COLLECTIVES: dict[str, Callable] = {"all_reduce": _sums, "all_to_all": _swapped}


def _line() -> str:
    """The caller's line: the first one up the stack that is not of this module."""
    frame = sys._getframe()
    while frame.f_back and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    return text or f"line {frame.f_lineno}"
