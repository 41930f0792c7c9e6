"""Who was heard of when, and what follows from it: the rules of ``watch``, without threads.

Each rank writes one ``Entry`` of its own into the store and reads those of all; ``Roll`` keeps the
newest and judges. It has no clock and no network, so every case can be tried in no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from dsv3.errors import shown

DONE = "done"
HURRY_SECONDS = 5  # of silence, once a collective has failed
_APART_SECONDS = 2  # by which the beats of one machine may come apart


@dataclass(frozen=True)
class Entry:
    """What a rank says of itself in the store.

    host, node: its machine's name, and a key that only ranks of one launcher share; pid: of its
    process; beat: goes up; runs: ranks of its machine whose processes it sees run; left: why it has
    left, or "done"; lost: the words in which it has found another one lost.
    """

    host: str
    node: str
    pid: int
    beat: int = 0
    runs: tuple[int, ...] = ()
    left: str | None = None
    lost: str | None = None


@dataclass
class Roll:
    """What one rank knows of all, and what follows from it.

    entries: the newest of each rank, in order, none before all have come; heard: when each was
    last heard of; gone: ranks of this machine whose processes have ended; left_at: when a rank was
    first seen to have left for a reason other than being done.
    """

    rank: int
    size: int
    entries: Sequence[Entry] = ()
    heard: dict[int, float] = field(default_factory=dict)
    gone: tuple[int, ...] = ()
    left_at: dict[int, float] = field(default_factory=dict)

    def take(self, entries: Sequence[Entry], gone: Sequence[int], now: float) -> None:
        """Entries that were read after ``gone`` was seen."""
        before = self.entries or [replace(entry, beat=-1) for entry in entries]
        self.entries, self.gone = entries, tuple(gone)
        for rank, (old, new) in enumerate(zip(before, entries, strict=True)):
            if new.beat != old.beat:
                for other in (rank, *new.runs):
                    self.heard[other] = now
            if new.left not in (None, DONE):
                self.left_at.setdefault(rank, now)

    def forgive(self, now: float) -> None:
        """Count from anew: it was this process that heard nothing."""
        self.heard = dict.fromkeys(self.heard, now)

    def mates(self) -> list[int]:
        """The ranks of my machine, without me."""
        return [rank for rank in self._of_node(self.rank) if rank != self.rank]

    def verdict(self, now: float, limit: float, hurry: bool) -> str | None:
        """Who is lost and how it is known, as a clause; None while all is well.

        limit: seconds of silence; hurry: a collective has failed, so that who has left is missed.
        """
        if not self.entries:
            return None
        for entry in self.entries:
            if entry.lost:
                return entry.lost
        gone = [rank for rank in self.gone if self.entries[rank].left is None]
        if gone:
            return f"{self.named(gone)} {_has(gone)} ended without a word (killed?)"
        for rank, since in self.left_at.items():
            if rank != self.rank and (hurry or now - since > HURRY_SECONDS):
                return f"{self.named([rank])} has ended: {self.entries[rank].left}"
        if silent := self.silent(now, limit):
            # What silenced a machine silenced all of it, though their last beats were not together.
            nodes = {self.entries[rank].node for rank in silent}
            quiet = self.silent(now, limit - _APART_SECONDS)
            silent = [rank for rank in quiet if self.entries[rank].node in nodes]
            closed = "gone: a connection was closed, and there has been no word"
            how = closed if hurry else "not been heard of"
            return f"{self.named(silent)} {_has(silent)} {how} for {limit:g} s"
        return None

    def silent(self, now: float, limit: float) -> list[int]:
        """Who has not been heard of for ``limit`` seconds, and has not left."""
        return [
            rank
            for rank, heard in sorted(self.heard.items())
            if now - heard > limit and self.entries[rank].left is None and rank != self.rank
        ]

    def verdict_on_store(self, how: str, where: str) -> str:
        """The same when the store does not answer. how: "has not been heard of ..."; where: it
        listens."""
        if not self.entries:
            return f"the place where the ranks meet ({where}) {how}"
        there = self._of_node(0)
        if self.rank in there:
            return f"the store of the ranks ({where}), on this machine, {how}"
        how = how if len(there) == 1 else how.replace("has ", "have ", 1)
        return f"{self.named(there)}, where the ranks meet ({where}), {how}"

    def named(self, ranks: Sequence[int]) -> str:
        """ "ranks 2, 3 of 4 (host node1)"."""
        hosts = sorted({shown(self.entries[rank].host, 80) for rank in ranks})
        return (
            f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {self.size} "
            f"(host{'s' * (len(hosts) > 1)} {', '.join(hosts)})"
        )

    def _of_node(self, rank: int) -> list[int]:
        """The ranks on the machine of ``rank``."""
        node = self.entries[rank].node if self.entries else None
        return [other for other, entry in enumerate(self.entries) if entry.node == node]


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
