"""How ranks find each other, and what may be trusted.

*One machine* (``launch``). The ranks meet in a file in a folder that only this user can open, and
talk over the loopback interface. No port is reachable from outside, and nothing that is received
is ever unpickled: what travels is numbers, and text as JSON. Another user of the same machine can
connect to the loopback ports too. A connection made after the ranks have met is left unread. One
made while they meet can take a rank's seat, for Gloo seats whoever gives the right small number;
so the ranks then show each other that they know a secret from the folder (``shake_hands``), and a
seat in strange hands ends the run with a line that says so.

*Several machines* (``torchrun``). torch's meeting point, a TCPStore, listens on MASTER_PORT on
*every* interface of the head machine, whatever its address says, and asks for no password; Gloo
and NCCL listen on the chosen interface, and nothing is encrypted. torchrun's own state in that
store is a pickle: whoever reaches the port can run code as you. So everyone who can reach these
machines over the network must be trusted: use a private network, or a firewall that lets only the
machines of the run reach each other, and name the private interface in GLOO_SOCKET_IFNAME or
NCCL_SOCKET_IFNAME. No option of torchrun replaces that. (What we put into that store ourselves, the
heartbeat of ``watch``, is JSON.) On a machine with several interfaces Gloo takes the address that
the host's name stands for, which others may not reach; then the ranks find the store and not each
other, and GLOO_SOCKET_IFNAME is what helps. torchrun's ``--local-addr`` is the same for its own
store. With ``--rdzv-backend c10d`` rank 0, and the text, may be on any of the machines.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dsv3.errors import DSV3Error
from dsv3.parallel.environment import FOLDER, SECRET, Place, check_interface, silence
from dsv3.parallel.rank import brief
from dsv3.parallel.watch import Watch

# A rank that is alive may compute this long before its peers give up on it.
PATIENCE = timedelta(minutes=30)
_HANDSHAKE = timedelta(seconds=30)  # each rank has connected to all others by then
_NOTE_SECONDS = 20


class JoinFailed(DSV3Error):
    """The ranks did not come together; nothing is wrong with an input."""

    exit_code = 1


def join(place: Place, backend: str) -> Watch | None:
    """Make this process a rank of torch's default group. backend: "gloo" or "nccl".

    Returns the heartbeat of ranks that were not started by our launcher, which sees its own end.
    Raises JoinFailed when the ranks do not come together, RankLost when one is lost meanwhile.
    """
    folder = os.environ.get(FOLDER)
    check_interface(backend)
    watch, seconds = None, silence()
    try:
        with _said_when_slow(place, folder):
            if folder:
                store = dist.FileStore(str(Path(folder) / "store"), place.size)
            else:
                store = _meeting_point(place)
                # pyrefly: ignore[missing-attribute] - the stub of Store leaves it out
                watch = Watch(store.clone(), place, where=_where(), silence=seconds).start()
            dist.init_process_group(
                backend, store=store, rank=place.rank, world_size=place.size, timeout=PATIENCE
            )
            if watch:
                watch.meet()
    except (RuntimeError, ValueError) as error:  # torch wraps a name that is not found, a used port
        if watch and (lost := watch.blame()):
            raise lost from None
        raise JoinFailed(
            "the ranks cannot meet",
            where=f"rank {place.rank} of {place.size}",
            found=brief(error),
            fix=None
            if folder
            else f"See whether {_where()} (MASTER_ADDR, MASTER_PORT) is right and free",
        ) from None
    if folder and backend == "gloo":  # NCCL's own greeting carries a secret out of the store
        shake_hands(place, (Path(folder) / SECRET).read_bytes())
    return watch


def _where() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _meeting_point(place: Place) -> dist.Store:
    """torch's store at MASTER_ADDR and MASTER_PORT; entries of an earlier attempt are not seen."""
    store, _, _ = next(rendezvous("env://", place.rank, place.size, timeout=PATIENCE))
    store.set_timeout(PATIENCE)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"dsv3/{attempt}", store)


def neighbours(place: Place, size: int) -> dist.ProcessGroup:
    """The group of ``size`` ranks that I am one of: 0 to size - 1, or those after, and so on.

    Every rank calls it. A new group's ranks connect anew, so they prove themselves anew.
    """
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=PATIENCE)
        for first in range(0, place.size, size)
    ]
    mine = groups[place.rank // size]
    assert isinstance(mine, dist.ProcessGroup)
    folder = os.environ.get(FOLDER)
    if folder and dist.get_backend() == "gloo":
        shake_hands(place, (Path(folder) / SECRET).read_bytes(), group=mine)
    return mine


def shake_hands(
    place: Place,
    secret: bytes,
    limit: timedelta = _HANDSHAKE,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Every two ranks, of all or of ``group``, prove to each other that they know ``secret``.

    The proof is a hash of the secret and of the direction, so that what a rank sends is of no use
    for standing in for it. Raises JoinFailed for a connection that proves nothing within ``limit``.
    """

    def proof(sender: int, receiver: int) -> torch.Tensor:
        text = f"dsv3 rank {sender} to rank {receiver}".encode()
        return torch.tensor(
            list(hashlib.blake2b(text, key=secret, digest_size=32).digest()),
            dtype=torch.uint8,
            device="cpu",
        )

    members = range(place.size) if group is None else dist.get_process_group_ranks(group)
    others = [rank for rank in members if rank != place.rank]
    got = {rank: torch.zeros(32, dtype=torch.uint8, device="cpu") for rank in others}
    sending = [dist.isend(proof(place.rank, rank), rank, group) for rank in others]
    receiving = [dist.irecv(got[rank], rank, group) for rank in others]
    for work in (*sending, *receiving):
        with suppress(RuntimeError):  # nothing came, or the connection was closed: no proof
            # pyrefly: ignore[missing-attribute] - None is for who is not of the group
            work.wait(limit)
    for rank in others:
        if not torch.equal(got[rank], proof(rank, place.rank)):
            raise JoinFailed(
                "a stranger sits where another rank should",
                where=f"rank {place.rank} of {place.size}",
                found=f"no proof from rank {rank}",
                fix="Start again; if it comes back, ask who else uses this machine",
            )


@contextmanager
def _said_when_slow(place: Place, folder: str | None):
    """Ranks that were never started would be awaited in silence: say what is awaited."""
    if folder:  # our launcher has started them all
        yield
        return
    text = (
        f"dsv3: rank {place.rank} of {place.size} waits for the others at {_where()} "
        "(MASTER_ADDR, MASTER_PORT)"
    )
    note = threading.Timer(_NOTE_SECONDS, lambda: print(text, file=sys.stderr, flush=True))
    note.daemon = True
    note.start()
    try:
        yield
    finally:
        note.cancel()
