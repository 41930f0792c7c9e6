"""What a launcher has said about ranks, checked before anything is loaded.

A rank learns from its environment who it is: RANK and WORLD_SIZE, LOCAL_RANK for its GPU, and, when
the ranks are on several machines, MASTER_ADDR and MASTER_PORT, where they meet. ``torchrun`` and
our own launcher set them all; a shell may hold some of them left over from other work, and then a
command would wait for ranks that nobody started. So they are taken whole or refused by name.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from dsv3.errors import DSV3Error

# The folder in which ranks of our own launcher meet; set by it alone.
FOLDER = "DSV3_LAUNCH_FOLDER"
SECRET = "secret"  # name of a file in it: bytes that only these ranks know
SILENCE = "DSV3_SILENCE_SECONDS"
_SILENCE_SECONDS = 20
_UNSET = "unset RANK WORLD_SIZE LOCAL_RANK to run without other ranks"


@dataclass(frozen=True)
class Place:
    """Who I am: rank of size over all machines, local_rank of local_size on this one (None: nobody
    said)."""

    rank: int
    size: int
    local_rank: int | None
    local_size: int | None = None


def place() -> Place | None:
    """My place among the ranks that a launcher started; None when there was no launcher.

    Raises DSV3Error for variables that are missing beside others, or say what cannot be.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return None
    size = _number("WORLD_SIZE", beside="RANK", least=1)
    rank = _number("RANK", beside="WORLD_SIZE", least=0)
    if rank >= size:
        raise DSV3Error(
            "no such rank",
            where="RANK",
            found=rank,
            expected=f"less than WORLD_SIZE, {size}",
            fix=f"Set both anew, or {_UNSET}",
        )
    local = _number("LOCAL_RANK", beside="RANK", least=0) if "LOCAL_RANK" in os.environ else None
    if FOLDER in os.environ:
        return Place(rank, size, local, size)
    if size > 1:
        if not os.environ.get("MASTER_ADDR"):
            raise DSV3Error(
                "missing, and so the ranks cannot meet",
                where="MASTER_ADDR",
                found=f"WORLD_SIZE={size}",
                fix=f"Start ranks with torchrun, or {_UNSET}",
            )
        if _number("MASTER_PORT", beside="MASTER_ADDR", least=0) > 65535:
            raise DSV3Error(
                "no such port",
                where="MASTER_PORT",
                found=os.environ["MASTER_PORT"],
                expected="at most 65535",
                fix="Start ranks with torchrun",
            )
    there = "LOCAL_WORLD_SIZE"
    return Place(
        rank, size, local, _number(there, beside="RANK", least=1) if there in os.environ else None
    )


def silence() -> int:
    """After how many seconds without a sign of life a rank of several machines is lost."""
    return _number(SILENCE, beside="", least=3) if os.environ.get(SILENCE) else _SILENCE_SECONDS


def _number(name: str, *, beside: str, least: int) -> int:
    text = os.environ.get(name)
    if text is None:
        raise DSV3Error(
            f"missing, though {beside} is set",
            where=name,
            found=f"{beside}={os.environ[beside]}",
            fix=f"Start ranks with torchrun, which sets both, or {_UNSET}",
        )
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise DSV3Error(
            "not a number of the kind that a launcher sets" if beside else "not such a number",
            where=name,
            found=repr(text),
            expected=f"a whole number of at least {least}",
            fix=f"Start ranks with torchrun, or {_UNSET}" if beside else f"Unset {name}",
        )
    return int(text)


def check_ranks(asked: int | None, option: str, device: str | None) -> tuple[int, bool]:
    """How many ranks will work, and whether this process has to start them all.

    asked: the value of ``option``, which under a launcher may only repeat the number of ranks that
    are there. Raises DSV3Error, also when ``device`` is not there for each rank.
    """
    here = place()
    if here is None:
        size = asked or 1
        check_device(device, Place(size - 1, size, size - 1))
        return size, size > 1
    if asked is not None and asked != here.size:
        started = (
            "torchrun started"
            if "TORCHELASTIC_RUN_ID" in os.environ
            else "RANK and WORLD_SIZE speak of"
        )
        raise DSV3Error(
            f"disagrees with the ranks that {started}",
            where=option,
            found=asked,
            expected=f"{here.size} (WORLD_SIZE)",
            fix=f"Leave {option} out, or {_UNSET}",
        )
    check_device(device, here)
    return here.size, False


def check_device(device: str | None, here: Place, *, where: str = "--device") -> None:
    """Raises DSV3Error where ``device`` is not there, or not for each rank of this machine.

    device: "cpu", "cuda", or None for cuda where there is a GPU.
    """
    import torch

    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        return
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.version.cuda is None and torch.version.hip is None:
            raise DSV3Error(
                "this torch is built without CUDA",
                where=f"{where} {device}",
                found=f"torch {torch.__version__}",
                fix="Use cpu, or install a torch with CUDA",
            )
        raise DSV3Error(
            "torch finds no GPU",
            where=f"{where} {device}",
            found=None if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r}",
            fix="Use cpu, or see whether nvidia-smi lists a GPU",
        )
    there = torch.cuda.device_count()
    if here.local_rank is None:
        raise DSV3Error(
            "missing, and so the ranks cannot share the GPUs out",
            where="LOCAL_RANK",
            found=f"WORLD_SIZE={here.size}",
            fix=f"Start ranks with torchrun, use --device cpu, or {_UNSET}",
        )
    if here.local_rank >= there:
        raise DSV3Error(
            "not enough GPUs for the ranks of this machine, which need one each",
            found=there,
            expected=f"at least {here.local_rank + 1}",
            fix="Use fewer ranks, or --device cpu",
        )


def check_interface(backend: str) -> None:
    """Raises DSV3Error where the user chose a network interface that this machine has not."""
    name = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}[backend]
    chosen = os.environ.get(name)
    if not chosen:
        return
    there = [interface for _, interface in socket.if_nameindex()]
    if backend == "gloo":
        missing = [one for one in chosen.split(",") if one not in there]
    else:  # NCCL: prefixes; "=" asks for a whole name, and "^" leaves names out
        exact, names = chosen.startswith("="), chosen.lstrip("=").split(",")
        found = [i for i in there if any(i == n if exact else i.startswith(n) for n in names)]
        missing = [] if found or chosen.startswith("^") else names
    if missing:
        raise DSV3Error(
            "no such network interface",
            where=name,
            found=",".join(missing),
            expected="one of " + ", ".join(there),
            fix="Name the one that the other machines can reach, or unset it",
        )


def loopback() -> str:
    """Name of this machine's loopback interface."""
    there = [interface for _, interface in socket.if_nameindex()]
    for interface in there:
        if interface in ("lo", "lo0"):
            return interface
    raise DSV3Error(
        "no loopback interface, over which the ranks of one machine talk",
        found=", ".join(there) or "no interface",
        expected="lo or lo0",
    )
