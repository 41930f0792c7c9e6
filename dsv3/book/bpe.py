"""Byte-pair encoding, done rightly and in four ways that look right: for the check of chapter 1.

ranks: pair of parts -> rank of their merge, in the order in which merges were learned.
"""

from __future__ import annotations

import math
from itertools import pairwise

Ranks = dict[tuple[str, str], int]


def right(piece: str, ranks: Ranks) -> list[str]:
    """The merge of the lowest rank, wherever it is, until none is left that is known."""
    parts = list(piece)
    while len(parts) > 1:
        rank, i = min((ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(parts)))
        if rank == math.inf:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def longest(piece: str, ranks: Ranks) -> list[str]:
    """The longest token that is known, from the left."""
    known, parts = {a + b for a, b in ranks} | set(piece), []
    while piece:
        size = next(n for n in range(len(piece), 0, -1) if piece[:n] in known)
        parts.append(piece[:size])
        piece = piece[size:]
    return parts


def first_found(piece: str, ranks: Ranks) -> list[str]:
    """The first pair from the left that is known at all."""
    parts, i = list(piece), 0
    while i < len(parts) - 1:
        if (parts[i], parts[i + 1]) in ranks:
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
            i = 0
        else:
            i += 1
    return parts


def once(piece: str, ranks: Ranks) -> list[str]:
    """The lowest rank, but only once."""
    parts = list(piece)
    pairs = [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]
    if pairs:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def last(piece: str, ranks: Ranks) -> list[str]:
    """The highest rank first."""
    parts = list(piece)
    while pairs := [(-ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        i = min(pairs)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
