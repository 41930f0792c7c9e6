"""One writer per folder: processes, threads, kills, races, and disks that keep no locks."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoints import tiny_config, write_checkpoint

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.folder import LOCK_FILE, claim
from dsv3.checkpoint.saving import save_model
from dsv3.errors import DSV3Error
from dsv3.model import Transformer

ROOT = Path(__file__).parent.parent
HOLDER = """
import sys, time
from dsv3.checkpoint.folder import claim
with claim(sys.argv[1], "holding still"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path/out``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "out"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_every_writer_is_refused_while_another_process_holds_the_folder(tmp_path, holder):
    write_checkpoint(tmp_path / "in", tiny_config())
    model, out = Transformer(tiny_config()).init_weights(0), tmp_path / "out"
    for write in (
        lambda: convert(tmp_path / "in", out, 2, progress=False),
        lambda: cast(tmp_path / "in", out, "bf16", progress=False),
        lambda: save_model(model, out),
    ):
        with pytest.raises(DSV3Error) as error:
            write()
        line = str(error.value)
        assert str(out) in line and f"process {holder.pid}" in line and "holding still" in line
        assert os.listdir(out) == [LOCK_FILE]


def test_a_killed_holder_leaves_no_obstacle(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    write_checkpoint(tmp_path / "in", tiny_config())
    convert(tmp_path / "in", tmp_path / "out", 1, progress=False)  # nor is the folder "not empty"
    assert LOCK_FILE not in os.listdir(tmp_path / "out")


def test_within_one_process(tmp_path):
    with claim(tmp_path / "out", "first"):
        with pytest.raises(DSV3Error, match=f"process {os.getpid()} on .*: first"):
            with claim(tmp_path / "out", "second"):
                pass
        with claim(tmp_path / "other", "second"):
            pass
    with claim(tmp_path / "out", "third"):
        pass
    assert os.listdir(tmp_path / "out") == []


def test_many_threads_never_meet(tmp_path):
    """Claims and releases race with the removal of the file; at most one holder at any time."""
    inside, most, taken, faults = 0, 0, 0, []

    def work():
        nonlocal inside, most, taken
        for _ in range(200):
            try:
                with claim(tmp_path / "out", "a thread"):
                    inside += 1
                    most = max(most, inside)
                    taken += 1
                    inside -= 1
            except DSV3Error as error:
                if "another job" not in str(error):
                    faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and taken >= 1 and not faults
    assert os.listdir(tmp_path / "out") == []


def test_the_file_may_go_between_opening_and_locking(tmp_path, monkeypatch):
    """Its last owner removes it just then: the lock would be one on a file without a name."""
    lock, seen = fcntl.flock, []

    def late(handle, how):
        if not seen:
            (tmp_path / LOCK_FILE).unlink()
        seen.append(handle)
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with claim(tmp_path, "a job"):
        assert len(seen) == 2
        with pytest.raises(DSV3Error, match="another job"):
            with claim(tmp_path, "another"):
                pass


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", none)
    with claim(tmp_path, "a job"):
        with pytest.raises(DSV3Error, match="a job.*If it has ended, remove .*no locks"):
            with claim(tmp_path, "another"):
                pass
    with claim(tmp_path, "a third"):
        pass
    assert os.listdir(tmp_path) == []


def test_what_failed_is_told_and_what_others_put_there_stays(tmp_path):
    out = tmp_path / "a" / "out"
    with pytest.raises(ZeroDivisionError), claim(out, "a job"):
        1 / 0
    assert not out.exists()
    with pytest.raises(ZeroDivisionError), claim(out, "a job"):
        (out / "note.txt").write_text("of another program")
        1 / 0
    assert os.listdir(out) == ["note.txt"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file", "file/below"])
def test_places_that_cannot_be(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(DSV3Error) as error:
        with claim(tmp_path / name, "a job"):
            pass
    assert "\n" not in str(error.value)
