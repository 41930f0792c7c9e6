"""Two machines made of one: network namespaces that a pair of virtual cables joins (Linux, root).

Each has an address, interfaces and a host name of its own, and reaches nothing but the other.
Processes started in them end with the block, and so do the namespaces, whatever happens in it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PORT = 29500  # free: a namespace is new, and nobody else is in it
# Leaves the name of the real host behind, then becomes the command. 0x04000000: CLONE_NEWUTS.
_NAMED = """
import ctypes, os, socket, sys
if ctypes.CDLL(None, use_errno=True).unshare(0x04000000):
    sys.exit(os.strerror(ctypes.get_errno()))
socket.sethostname(sys.argv[1])
os.execvp(sys.argv[2], sys.argv[2:])
"""


def missing() -> str | None:
    """Why such machines cannot be made here; None where they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "no ip (Debian: iproute2)"
    name = f"dsv3-try-{os.getpid()}"
    tried = _run("ip", "netns", "add", name, check=False)
    _run("ip", "netns", "del", name, check=False)
    return None if tried.returncode == 0 else f"no network namespaces: {tried.stderr.strip()}"


@dataclass
class Machine:
    """name: of the host; space: of its namespace; cable: its interface; others: the address of
    the other machine."""

    name: str
    space: str
    cable: str
    address: str
    other: str
    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, *words, env: dict[str, str], **options) -> subprocess.Popen:
        """A process in a session of its own; what it prints goes to a file (``told``)."""
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the machine
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.space, sys.executable, "-c", _NAMED, self.name]
            + list(map(str, words)),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            **options,
        )
        process.output = output
        self.started.append(process)
        return process

    def torchrun(self, *words, per_node: int = 1, env: dict[str, str], head: str, conf: str = ""):
        """One of two nodes under torch's launcher, with its c10d rendezvous at ``head``."""
        is_host = int(head == self.address)
        return self.start(
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", 2),
            *("--nproc-per-node", per_node, "--rdzv-backend", "c10d", "--rdzv-id", "dsv3"),
            *("--rdzv-endpoint", f"{head}:{_PORT}", "--local-addr", self.address),
            *("--rdzv-conf", f"is_host={is_host},read_timeout=15{conf}"),
            *words,
            env=env | {"GLOO_SOCKET_IFNAME": self.cable},
        )

    def take_down(self) -> None:
        """The cable is pulled: no carrier on either end."""
        self.ip("link", "set", self.cable, "down")

    def bring_up(self) -> None:
        """Both cuts are undone."""
        self.ip("link", "set", self.cable, "up")
        self.ip("neigh", "del", self.other, "dev", self.cable, check=False)

    def lose_packets(self) -> None:
        """What is sent goes to nobody, and nobody says so."""
        nobody = ("lladdr", "02:00:00:00:00:99", "nud", "permanent")
        self.ip("neigh", "replace", self.other, "dev", self.cable, *nobody)

    def ip(self, *words, check: bool = True) -> None:
        _run("ip", "-n", self.space, *words, check=check)

    def processes(self) -> list[int]:
        """All that run in it."""
        return _processes(self.space)


def told(process: subprocess.Popen) -> str:
    """What a process has printed so far."""
    process.output.seek(0)
    return process.output.read()


@contextlib.contextmanager
def two_machines() -> Iterator[list[Machine]]:
    """node0 and node1. Nothing of them is left at the end."""
    mark = f"dsv3-{os.getpid()}-"
    net = f"10.{random.randrange(64, 128)}.{random.randrange(256)}"
    machines = [
        Machine(f"node{n}", f"{mark}{n}", f"v{os.getpid()}n{n}", f"{net}.{n + 1}", f"{net}.{2 - n}")
        for n in range(2)
    ]
    _sweep()
    try:
        for one in machines:
            _run("ip", "netns", "add", one.space)
        a, b = machines
        ends = (a.cable, "netns", a.space, "type", "veth", "peer", "name", b.cable)
        _run("ip", "link", "add", *ends, "netns", b.space)
        for one in machines:
            one.ip("addr", "add", f"{one.address}/24", "dev", one.cable)
            one.ip("link", "set", "lo", "up")
            one.ip("link", "set", one.cable, "up")
        yield machines
    finally:
        for one in machines:
            _remove(one.space, one.started)
            for process in one.started:
                process.wait(20)
                process.output.close()


def _remove(space: str, started: Sequence[subprocess.Popen] = ()) -> None:
    """End what runs in a namespace, and the namespace; its end of the cable goes with it."""
    end = time.monotonic() + 20
    while (left := _processes(space)) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in started:
            process.poll()
        time.sleep(0.05)
    _run("ip", "netns", "del", space, check=False)


def _processes(space: str) -> list[int]:
    return list(map(int, _run("ip", "netns", "pids", space, check=False).stdout.split()))


def _sweep() -> None:
    """Remove what a test run has left that was itself killed."""
    for line in _run("ip", "netns", "list").stdout.splitlines():
        found = re.match(r"dsv3-(\d+)-\d\b", line)
        if found and not Path(f"/proc/{found[1]}").exists():
            _remove(found[0])


def left_over() -> list[str]:
    """Namespaces of this process that are still there."""
    there = _run("ip", "netns", "list").stdout.split("\n")
    return [line for line in there if line.startswith(f"dsv3-{os.getpid()}-")]


def _run(*words, check: bool = True) -> subprocess.CompletedProcess:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=20)
    if check and done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done
