"""What the ranks of one job must have alike, compared before it is relied on.

Every rank runs the same program and must come to the same collectives, in the same order, with the
same shapes. A rank that was started with another option, reads an older copy of a file or resumes
from another checkpoint breaks that, and nothing says so: it computes other numbers, which the sums
mix in; or its text ends one token earlier. In systems where every rank decides for itself what
comes next, that is how a job hangs: one rank has seen the end of the text and leaves the loop, the
others go into the next layer's sum and wait there for it, as long as their time limit says. Here
rank 0 chooses every token and tells it (``generation.sampling``), and what else decides about the
end is compared once, at the start: one small message a rank.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Mapping

import torch

from dsv3.errors import DSV3Error, shown
from dsv3.parallel.tensor import TensorGroup

_MOST = 60  # characters of a value in the line


def digest(value) -> str:
    """Of a tensor's bytes, or of text, numbers, lists and dicts."""
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    else:
        content = json.dumps(value, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=7).hexdigest()


def agree_on(group: TensorGroup, facts: Mapping[str, object]) -> None:
    """Compare ``facts`` over all ranks: values of any kind that ``digest`` takes.

    Raises DSV3Error on every rank for the first that is not alike everywhere; it names the fact,
    and what rank 0 and the first rank that differs have.
    """
    if group.size == 1:
        return
    mine = {name: digest(value) for name, value in facts.items()}
    number = int(digest(mine), 16)  # of 56 bits
    numbers = group.all_gather(torch.tensor([number], device=group.device)).tolist()
    if len(set(numbers)) == 1:
        return
    values = {name: _in_words(value) for name, value in facts.items()}
    said = [
        group.broadcast_object([socket.gethostname(), mine, values], src=rank)
        for rank in range(group.size)
    ]
    other = next(rank for rank in range(group.size) if said[rank][1] != said[0][1])
    (host, first, words), (there, second, others) = said[0], said[other]
    names = [*first, *(name for name in second if name not in first)]
    name = next(name for name in names if first.get(name) != second.get(name))
    raise DSV3Error(
        "not the same on all ranks",
        where=name,
        found=f"{words.get(name, 'nothing')} on rank 0 (host {host}), "
        f"{others.get(name, 'nothing')} on rank {other} (host {there})",
        fix="Start all ranks with the same words, and give all machines the same files",
    )


def _in_words(value) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, torch.Tensor) else ""
    return shown(text) if 0 < len(text) <= _MOST else f"digest {digest(value)}"
