"""Ranks of one machine: what they open, what a stranger can do, and that nothing lives on.

What needs no model is tried on ranks that are small Python programs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from ranks import run_ranks
from test_cli import alive, environment, linux, members, one_line, wait_until

from dsv3 import cli
from dsv3.errors import DSV3Error
from dsv3.parallel import environment as launcher
from dsv3.parallel import launch as launching
from dsv3.parallel.environment import Place, check_device, check_interface, check_ranks, place
from dsv3.parallel.join import JoinFailed, shake_hands
from dsv3.parallel.launch import RankFailed, launch
from dsv3.parallel.rank import is_collective, is_lost_peer
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "CUDA_VISIBLE_DEVICES",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ended():
    """Start a command; whatever the test does, the command and all below it end with the test.

    The interface that its user has set is not the one that ranks of one machine listen on.
    """
    started = []

    def start(*words, **options) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", "dsv3", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(GLOO_SOCKET_IFNAME="nosuch0"),
            **options,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [*members(process.pid), process.pid]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=30)


# Ports ------------------------------------------------------------------------------------------


def sockets(pids) -> list[tuple[str, int, str]]:
    """(address, port, state) of the network sockets of processes."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found += [
                (*one.laddr, one.status)
                for one in psutil.Process(pid).net_connections()
                if one.laddr
            ]
    return found


@linux
def test_strangers_find_loopback_only_and_change_nothing(tiny_checkpoint, ended, capsys):
    """From the moment a port is open: connections that say nothing, that send noise, that hang up.
    The same tokens come out as in one process."""
    words = [
        "generate",
        tiny_checkpoint,
        "--precision",
        "fp32",
        "--prompt",
        "In byte",
        "--json",
        "--max-new-tokens",
        120,
    ]
    process = ended(*words, "--tp", 2)
    noise, held, seen = random.Random(0), [], set()
    while process.poll() is None:
        for address, port, state in sockets([process.pid, *members(process.pid)]):
            assert address in ("127.0.0.1", "::1"), f"a socket on {address}"
            if state == psutil.CONN_LISTEN and (port not in seen or len(held) < 200):
                seen.add(port)
                for way in range(6):
                    try:
                        stranger = socket.create_connection((address, port), timeout=1)
                    except OSError:
                        continue
                    held.append(stranger)
                    if way % 3 == 1:
                        stranger.sendall(noise.randbytes(noise.randrange(1, 300)))
                    if way % 3 == 2:
                        stranger.close()
        time.sleep(0.02)
    output, errors = process.communicate(timeout=30)
    for stranger in held:
        stranger.close()
    assert process.returncode == 0 and errors == "", errors
    assert len(seen) == 2, "each rank listens once"
    assert cli.main(list(map(str, words))) == 0
    alone = json.loads(capsys.readouterr().out)
    assert json.loads(output)["results"] == alone["results"]


def greet(group: TensorGroup, value) -> tuple[str, str]:
    """Send words, and something that is no word; shake hands where one does not know the secret."""
    assert group.broadcast_object(value if group.rank == 1 else None, src=1) == value
    refused = lost = ""
    if group.rank == 1:
        try:
            group.broadcast_object(print, src=1)
        except TypeError:
            refused = "refused"
    try:
        shake_hands(
            Place(group.rank, group.size, None),
            b"right" if group.rank else b"wrong",
            timedelta(seconds=20),
        )
    except JoinFailed as error:
        lost = str(error)
    return refused, lost


def test_words_travel_as_json_and_a_seat_in_strange_hands_is_noticed():
    (_, first), (refused, second) = run_ranks(
        greet, 2, {"text": "é😀\n", "numbers": [1, 2.5, None, True]}
    )
    assert refused == "refused", "a pickle could be sent, and so received"
    assert "rank 0 of 2: a stranger sits where" in first and "no proof from rank 1" in first
    assert "no proof from rank 0" in second


# Ranks that end, stop, or go on without their parent ----------------------------------------------


@pytest.fixture
def programs(monkeypatch):
    """Let ``launch`` start these Python programs as its ranks; all are ended with the test."""
    started = []

    def set_programs(*texts: str) -> list[subprocess.Popen]:
        def start(_, number, common):
            started.append(subprocess.Popen([sys.executable, "-c", texts[number]], env=common))
            return started[-1]

        monkeypatch.setattr(launching, "_start", start)
        return started

    yield set_programs
    assert all(process.returncode is not None for process in started), "a rank lives on"


SLEEP = "import time; time.sleep(60)"
LOST = "import time, sys; time.sleep(.2); sys.exit(70)"
REPORT = (
    "import json, os, pathlib, time; time.sleep(.6); (pathlib.Path(os.environ["
    "'DSV3_LAUNCH_FOLDER']) / 'rank1.json').write_text(json.dumps({'message': 'no disk',"
    "'exit_code': 5})); time.sleep(60)"
)
KILLED = "import os, time; time.sleep(.6); os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    "texts, code, line",
    [
        (("", ""), 0, None),
        ((SLEEP, "import sys; sys.exit(3)"), 1, "rank 1 of 2 ended with exit code 3; the other"),
        (
            (SLEEP, "import os; os.kill(os.getpid(), 9)"),
            1,
            "rank 1 of 2 was killed by SIGKILL; the",
        ),
        ((LOST, KILLED), 1, "rank 1 of 2 was killed by SIGKILL"),
        ((LOST, REPORT), 5, "^no disk$"),
        ((LOST, SLEEP), 1, "rank 0 of 2 lost the connection to another rank"),
        (("import sys; sys.exit(130)", SLEEP), 130, None),
    ],
)
def test_the_cause_is_told_and_all_ranks_end(programs, texts, code, line):
    """The one that lost a peer ends first here, and is still not the cause."""
    programs(*texts)
    if line is None:
        assert launch([], 2, threads=1) == code
        return
    with pytest.raises(RankFailed, match=line) as failure:
        launch([], 2, threads=1)
    assert failure.value.exit_code == code


def test_a_stopped_rank_is_told_and_awaited_for_a_bounded_time(programs, monkeypatch, capsys):
    monkeypatch.setattr(launching, "_NOTE_SECONDS", 0.2)
    monkeypatch.setattr(launching, "_STOPPED_SECONDS", 1)
    stop = "import os; os.kill(os.getpid(), 19)"
    programs(SLEEP, stop)
    with pytest.raises(RankFailed, match="rank 1 of 2 was stopped .SIGSTOP. and did not go on"):
        launch([], 2, threads=1)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 1 and "rank 1 of 2 is stopped" in notes[0] and "kill -CONT" in notes[0]


def test_a_rank_that_is_continued_goes_on(programs, monkeypatch, capsys):
    monkeypatch.setattr(launching, "_NOTE_SECONDS", 0.1)
    started = programs("", "import os; os.kill(os.getpid(), 19)")
    awake = threading.Timer(1.5, lambda: os.kill(started[1].pid, signal.SIGCONT))
    awake.start()
    assert launch([], 2, threads=1) == 0
    assert capsys.readouterr().err.count("is stopped") == 1


@pytest.mark.parametrize(
    "number, interactive, code",
    [(signal.SIGINT, False, 130), (signal.SIGTERM, False, 143), (signal.SIGHUP, True, 129)],
)
def test_signals_end_launcher_and_ranks(programs, number, interactive, code):
    """Also ranks that are stopped, and ranks that do not listen to SIGTERM."""
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    programs(deaf if number == signal.SIGINT else SLEEP, "import os; os.kill(os.getpid(), 19)")
    before = signal.getsignal(number)
    timer = threading.Timer(0.7, lambda: os.kill(os.getpid(), number))
    timer.start()
    assert launch([], 2, threads=1, interactive=interactive) == code
    assert signal.getsignal(number) == before


def test_ctrl_c_does_not_end_a_talk(programs):
    programs("import time; time.sleep(1)", "import time; time.sleep(1)")
    threading.Timer(0.4, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    assert launch([], 2, threads=1, interactive=True) == 0


@linux
@pytest.mark.parametrize("moment", ["first", "both", "torch"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_parent_that_ends_while_ranks_start_leaves_nothing(tmp_path, ended, moment, number):
    """At the first rank, at both, and when they load torch. Ctrl-C reaches the whole group."""
    process = ended(
        "train",
        "--preset",
        "mini",
        "--out",
        tmp_path / "run",
        "--ranks",
        2,
        "--device",
        "cpu",
        start_new_session=True,
    )

    def come() -> list[int]:
        below = members(process.pid)
        if moment == "torch":
            return [pid for pid in below if "libtorch" in Path(f"/proc/{pid}/maps").read_text()]
        return below if len(below) >= (1 if moment == "first" else 2) else []

    wait_until(come)
    below = members(process.pid)
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=30)
    assert (output, errors) == ("", "")
    assert process.returncode == (130 if number == signal.SIGINT else -9)
    wait_until(lambda: not any(map(alive, below)), 30)
    assert not members(process.pid)


@linux
def test_a_stopped_rank_ends_with_a_killed_parent(tmp_path, ended):
    process = ended(
        "train", "--preset", "mini", "--out", tmp_path / "run", "--ranks", 2, "--device", "cpu"
    )
    below = wait_until(lambda: len(members(process.pid)) == 2 and members(process.pid))
    # Both have begun once they watch their parent, which takes a thread of its own.
    wait_until(lambda: all(len(os.listdir(f"/proc/{pid}/task")) > 1 for pid in below))
    os.kill(below[1], signal.SIGSTOP)
    process.kill()
    try:
        wait_until(lambda: not any(map(alive, below)), 30)
    finally:
        for pid in filter(alive, below):
            os.kill(pid, signal.SIGKILL)


# What a launcher has said ------------------------------------------------------------------------

HEAD = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "variables, line",
    [
        ({"RANK": "0"}, "WORLD_SIZE: missing, though RANK is set .found RANK=0"),
        ({"WORLD_SIZE": "2"}, "RANK: missing, though WORLD_SIZE is set"),
        ({"RANK": "0", "WORLD_SIZE": "abc"}, "WORLD_SIZE: not a number.*found 'abc'"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE: not a number.*at least 1"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK: not a number.*found ''"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: not a number.*found '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: no such rank .found 2, expected less than"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR: missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h"}, "MASTER_PORT: missing"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "99999"},
            "no such port",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "x", **HEAD}, "LOCAL_RANK: not a number"),
        (
            {"RANK": "0", "WORLD_SIZE": "1"},
            "--tp: disagrees with the ranks that RANK and WORLD_SIZE "
            "speak of .found 4, expected 1.*unset RANK",
        ),
        ({"GLOO_SOCKET_IFNAME": "nosuch0", "RANK": "0", "WORLD_SIZE": "2", **HEAD}, None),
    ],
)
def test_launcher_variables_are_taken_whole_or_refused(
    tiny_checkpoint, monkeypatch, capsys, variables, line
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = ["generate", str(tiny_checkpoint), "--prompt", "x", "--device", "cpu"]
    words += ["--tp", "4"] if line and "disagrees" in line else []
    assert cli.main(words) == 2
    error = one_line(capsys.readouterr().err)
    if line is None:
        assert "GLOO_SOCKET_IFNAME: no such network interface (found nosuch0" in error
        assert launcher.loopback() in error
    else:
        assert re.search(line, error), error


def test_one_left_over_rank_works_alone(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert place() == Place(0, 1, None)
    assert check_ranks(1, "--tp", "cpu") == (1, False)
    assert TensorGroup.from_environment("cpu").size == 1


@pytest.mark.parametrize(
    "chosen, refused",
    [("l", False), ("=l", True), ("=LO", False), ("^docker", False), ("nosuch", True), ("", False)],
)
def test_interfaces_as_nccl_reads_them(monkeypatch, chosen, refused):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", chosen.replace("LO", launcher.loopback()))
    if refused:
        with pytest.raises(DSV3Error, match="NCCL_SOCKET_IFNAME: no such network interface"):
            check_interface("nccl")
    else:
        check_interface("nccl")


@pytest.mark.parametrize(
    "device, local, gpus, line",
    [
        ("cuda", 0, 0, "--device cuda: torch finds no GPU .found CUDA_VISIBLE_DEVICES=''"),
        ("cuda", 1, 1, "not enough GPUs.*found 1, expected at least 2"),
        (None, 2, 2, "not enough GPUs"),
        ("cuda", None, 2, "LOCAL_RANK: missing"),
        ("cuda", 1, 2, None),
        ("cpu", 7, 0, None),
        (None, 7, 0, None),
    ],
)
def test_devices_that_are_not_there(monkeypatch, device, local, gpus, line):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpus > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    here = Place(local or 0, 8, local)
    if line is None:
        check_device(device, here)
    else:
        with pytest.raises(DSV3Error, match=line):
            check_device(device, here)


def test_device_of_a_torch_without_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    monkeypatch.setattr("torch.version.hip", None)
    with pytest.raises(DSV3Error, match="built without CUDA"):
        TensorGroup.from_environment("cuda")


@pytest.mark.parametrize(
    "error, collective, lost",
    [
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:5"),
            1,
            1,
        ),
        (
            RuntimeError("[/x/gloo/transport/tcp/pair.cc:98] Read error: Connection reset by peer"),
            1,
            1,
        ),
        (
            RuntimeError("[/x/gloo/transport/tcp/buffer.cc:78] Timed out waiting 1000ms for recv"),
            1,
            0,
        ),
        (
            RuntimeError("[/x/gloo/transport/tcp/device.cc:83] Unable to find address for: eth9"),
            1,
            0,
        ),
        (RuntimeError("a tensor named gloo has a wrong shape"), 0, 0),
        (RuntimeError("connection closed by peer"), 0, 0),
        (ValueError("gloo"), 0, 0),
        (dist.DistNetworkError("recv: Connection reset by peer"), 1, 1),
        (dist.DistStoreError("wait timeout after 300000ms"), 1, 0),
        (
            dist.DistBackendError("ncclRemoteError: A call failed possibly due to a network error"),
            1,
            1,
        ),
    ],
)
def test_a_lost_peer_is_told_from_other_troubles(error, collective, lost):
    assert (is_collective(error), is_lost_peer(error)) == (bool(collective), bool(lost))
