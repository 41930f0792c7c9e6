"""A heartbeat among the ranks of several machines: who is lost, by name, and soon.

A collective waits for every rank. When one is killed, the system closes its connections, and those
who talk to it learn *that* somebody has gone, though not who. When its machine is cut off (a cable,
a switch, no power) nothing arrives at all, and TCP is in no hurry: without a watch the others wait
for half an hour. On one machine the launcher sees its ranks end (``launch``); between machines
nobody sees them all, so they tell each other.

Every rank keeps one entry in torch's store (TCPStore, where the ranks have met): its host, a
counter that goes up once a second, which ranks of its own machine it sees running, whether it has
left and why, and whom it has found lost. Once a second it writes its own entry and reads all of
them, in one request. What follows from them:

* A rank that nobody has heard of for ``DSV3_SILENCE_SECONDS`` (20) is lost. Heard of means: its
  counter went up, or a rank of its machine saw its process run.
* A rank of one's own machine whose process is not there any more, and that did not say that it
  leaves, is lost at once.
* When the store itself says nothing for so long, its machine is cut off, that of rank 0: then
  those ranks are named which live there. (They will say the same of us.)
* Whoever finds a rank lost writes it down before it ends, and the others repeat it: one name goes
  round, also where the end of one rank closes connections to a third.
* After a collective has failed, silence of 5 s is enough.

The rank that found it out prints one line and ends with code 70, whatever its main thread waits
for: a collective in C++ hears no exception.

*Computing is not silence.* The heartbeat has threads of its own and the store a connection of its
own, so a rank may compute for hours, in Python or in torch, which lets other threads run. Code in C
that holds Python's lock for 20 s would silence the threads; then the ranks of its machine still see
its process run. Only where it is alone on its machine would it be taken for lost.
*A stopped process* (SIGSTOP, Ctrl-Z, a debugger, a suspended machine) is silent and is lost after
20 s like one that is cut off; the others end. When it goes on it reads that, and ends as well. One
that was stopped for less goes on as if nothing had been: a watch that notices that it slept itself
counts from anew. Raise DSV3_SILENCE_SECONDS where networks pause for longer.

Each rank reads N entries a second: made for tens of ranks, not for thousands.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace

import torch.distributed as dist

from dsv3.errors import DSV3Error, shown
from dsv3.parallel.environment import Place
from dsv3.parallel.rank import PEER_LOST
from dsv3.parallel.roll import DONE, HURRY_SECONDS, Entry, Roll

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.2  # between two looks at what was heard
_BLAME_SECONDS = 12  # a failed collective waits so long for a name
_LINGER_SECONDS = 2.5  # two beats: the others read what this one found before it ends
_LAUNCHER_SECONDS = 5  # for torchrun to hear SIGTERM


class RankLost(DSV3Error):
    """Another rank has gone; the line names it and its host."""

    exit_code = PEER_LOST


class Watch:
    """This rank's heartbeat and its look-out for the others.

    store: a client that nobody else uses (``store.clone()``); where: host and port of the store,
    for messages; silence: seconds after which a rank is lost.
    """

    def __init__(self, store: dist.Store, here: Place, *, where: str, silence: float):
        self._store, self._where, self._silence = store, where, silence
        host = socket.gethostname()
        node = f"{host} {os.environ.get('GROUP_RANK', '')} {os.getppid()}"
        self._mine = Entry(host, node, os.getpid())
        self._roll = Roll(here.rank, here.size)
        self._keys = [f"watch/rank{rank}" for rank in range(here.size)]
        self._parent = os.getppid()
        self._lock = threading.Lock()  # of _mine, _roll, _answered
        self._answered, self._refused = time.monotonic(), False  # the store: when last, and not
        self._hurry, self._stopped = threading.Event(), threading.Event()
        self._exchanged = threading.Condition()
        self._begun = self._ended = 0
        self._leaving = False  # all work is done: nobody is missed any more, nor the store
        self._wake = threading.Event()
        self._terminated = threading.Event()  # by SIGTERM
        self._judged = threading.Event()
        self._judgement: str | None = None
        self._cut = False  # it speaks of a machine that is silent
        self._ending = threading.Lock()  # whoever holds it tells the line and ends the process
        self._signals: tuple[int, int] | None = None
        self._threads = [
            threading.Thread(target=work, daemon=True, name=f"dsv3 {name}")
            for name, work in (("heartbeat", self._beat), ("look-out", self._look))
        ]

    def start(self) -> Watch:
        """Begin; in the main thread, SIGTERM becomes the watch's, which says why before it ends
        the process."""
        if threading.current_thread() is threading.main_thread():
            self._signals = os.pipe()
            for end in self._signals:
                os.set_blocking(end, False)
            signal.set_wakeup_fd(self._signals[1], warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, lambda *_: None)
        atexit.register(self.stop)
        for thread in self._threads:
            thread.start()
        return self

    def meet(self) -> None:
        """Wait until all are known, which have all begun."""
        end = time.monotonic() + self._silence
        while not self._roll.entries and time.monotonic() < end:
            self._renewed(_BEAT_SECONDS)

    def stop(self) -> None:
        """All work is done: the others may go on without this rank. Does nothing twice."""
        if self._stopped.is_set():
            return
        self._leaving = True
        self._publish(left=self._mine.left or DONE)
        self._stopped.set()
        self._wake.set()
        atexit.unregister(self.stop)
        for thread in self._threads:
            thread.join(2 * _BEAT_SECONDS)
        if self._signals:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for end in self._signals:
                os.close(end)

    def leave(self, why: str) -> None:
        """This rank ends, for a reason of its own: let the others say so."""
        self._publish(left=shown(why))

    def blame(self) -> RankLost | None:
        """A collective has failed: who is lost? Waits for a name for some seconds at most; None
        when all ranks seem well."""
        self._hurry.set()
        found = self._judged.wait(_BLAME_SECONDS)
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # the look-out is ending this process
        if not found:
            self._hurry.clear()
            self._ending.release()
            return None
        time.sleep(_LINGER_SECONDS)
        self._end_launcher()
        return RankLost(self._line)

    # The heartbeat's thread -----------------------------------------------------------------------

    def _beat(self) -> None:
        try:
            while not self._stopped.is_set():
                self._wake.clear()
                with self._exchanged:
                    self._begun += 1
                self._exchange()
                with self._exchanged:
                    self._ended = self._begun
                    self._exchanged.notify_all()
                self._wake.wait(_BEAT_SECONDS if self._roll.entries else _LOOK_SECONDS)
        except RuntimeError:  # the connection to the store is closed
            with self._exchanged:
                self._refused = True
                self._exchanged.notify_all()

    def _exchange(self) -> None:
        """Write my entry, read all."""
        with self._lock:
            states = {rank: state_of(self._roll.entries[rank].pid) for rank in self._roll.mates()}
            runs = tuple(rank for rank, state in states.items() if state == "runs")
            self._mine = replace(self._mine, beat=self._mine.beat + 1, runs=runs)
            mine = json.dumps(asdict(self._mine))
        self._store.set(self._keys[self._roll.rank], mine)
        if self._roll.entries or self._store.check(self._keys):
            texts = self._store.multi_get(self._keys)
            entries = [Entry(**json.loads(text)) for text in texts]
            gone = [rank for rank, state in states.items() if state == "gone"]
            with self._lock:
                self._roll.take(entries, gone, time.monotonic())
        with self._lock:
            self._answered = time.monotonic()

    def _publish(self, seconds: float = 1.5, **changes) -> None:
        """Change my entry, and wait until it is written, or the store does not answer."""
        with self._lock:
            self._mine = replace(self._mine, **changes)
        self._renewed(seconds)

    def _renewed(self, seconds: float) -> None:
        """Wait for the end of an exchange that begins after now."""
        with self._exchanged:
            aim = self._begun + 1
            self._wake.set()
            self._exchanged.wait_for(lambda: self._ended >= aim or self._refused, seconds)

    # The look-out's thread ------------------------------------------------------------------------

    def _look(self) -> None:
        before = time.monotonic()
        while not self._stopped.is_set():
            if self._signalled() and self._ending.acquire(blocking=False):
                self._end_terminated()
            now = time.monotonic()
            with self._lock:
                if now - before > 2 * _BEAT_SECONDS:
                    self._roll.forgive(now)
                    self._answered = max(self._answered, now)
                words = self._verdict(now)
            before = now
            if words and not self._judged.is_set() and not self._leaving:
                self._judge(words)
            if os.getppid() != self._parent:
                self._judge("the launcher of this rank has gone")

    def _signalled(self) -> bool:
        """Wait a little, and say whether SIGTERM has come."""
        if not self._signals:
            self._stopped.wait(_LOOK_SECONDS)
            return False
        ready, _, _ = select.select([self._signals[0]], [], [], _LOOK_SECONDS)
        if ready and signal.SIGTERM in os.read(self._signals[0], 100):
            self._terminated.set()
        return self._terminated.is_set()

    def _verdict(self, now: float) -> str | None:
        """What is known now; of others nothing new is, while the store does not answer."""
        hurry, since = self._hurry.is_set(), now - self._answered
        limit = min(self._silence, HURRY_SECONDS) if hurry else self._silence
        if since < 2 * _BEAT_SECONDS and (words := self._roll.verdict(now, limit, hurry)):
            self._cut = not hurry and bool(self._roll.silent(now, limit))
            return words
        if self._refused:
            return self._roll.verdict_on_store("has closed the connection", self._where)
        if since > limit:
            self._cut = not hurry
            how = f"has not been heard of for {limit:g} s"
            return self._roll.verdict_on_store(how, self._where)
        return None

    def _judge(self, words: str) -> None:
        """Write it down for the others; end the process, unless its main thread waits for it."""
        self._judgement = words
        self._publish(lost=words)
        self._judged.set()
        if not self._hurry.is_set() and self._ending.acquire(blocking=False):
            self._tell()
            time.sleep(_LINGER_SECONDS)
            self._end_launcher()
            os._exit(PEER_LOST)

    def _end_launcher(self) -> None:
        """Where a machine was cut off, end torchrun's process, unless it would start ranks again.

        It reads a store of its own (c10d), and torch waits for that with no limit: where the cut
        machine keeps it, torchrun would hear neither the end of its ranks nor SIGTERM for a quarter
        of an hour, until TCP gives up.
        """
        first, restarts = (
            os.environ.get(f"{n}") for n in ("LOCAL_RANK", "TORCHELASTIC_MAX_RESTARTS")
        )
        if not self._cut or first != "0" or restarts != "0" or not _is_torchrun(self._parent):
            return
        with suppress(ProcessLookupError):
            os.kill(self._parent, signal.SIGTERM)
            end = time.monotonic() + _LAUNCHER_SECONDS
            while os.getppid() == self._parent and time.monotonic() < end:
                if self._terminated.is_set():
                    return  # by torchrun, which has heard
                if threading.current_thread() is self._threads[1]:
                    self._signalled()
                else:
                    time.sleep(_LOOK_SECONDS)
            if os.getppid() == self._parent:
                os.kill(self._parent, signal.SIGKILL)

    def _end_terminated(self) -> None:
        """torchrun ends the ranks of a machine when one of them has ended: say which."""
        self._renewed(2.0)
        with self._lock:
            words = self._verdict(time.monotonic())
        if words:
            self._judgement = words
            self._publish(lost=words)
            self._tell()
            time.sleep(_LINGER_SECONDS)
        else:
            self._publish(left="stopped by SIGTERM")
        os._exit(128 + signal.SIGTERM)

    @property
    def _line(self) -> str:
        return f"{self._judgement}; rank {self._roll.rank} (host {self._mine.host}) stops"

    def _tell(self) -> None:
        # On a line of its own: a text or a bar may be half written.
        print(f"\ndsv3: error: {shown(self._line)}", file=sys.stderr, flush=True)


def state_of(pid: int) -> str:
    """Of a process of this machine: "runs", "stopped" or "gone"."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            letter = file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        try:
            os.kill(pid, 0)  # a system without /proc, or a process that is not there
        except ProcessLookupError:
            return "gone"
        except PermissionError:
            pass
        return "runs"
    except (OSError, IndexError):  # it ends just now
        return "gone"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "runs")


def _is_torchrun(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read()
    except OSError:
        return False
    return any(
        name in words
        for name in (b"torchrun", b"torch.distributed.run", b"torch/distributed/run.py")
    )
