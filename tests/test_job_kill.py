"""cast and convert, killed before every single file operation: the same command then ends as if
nothing had happened. Also a disk with just enough room, and input that was replaced meanwhile."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import random_tensors, tiny_config, write_checkpoint

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.folder import LOCK_FILE
from dsv3.checkpoint.jobs import RECORD_FILE
from dsv3.checkpoint.safetensors_io import PARTIAL, StreamWriter
from dsv3.errors import DSV3Error

pytestmark = pytest.mark.slow

# A process that forks for every life, so that torch is imported once. Prints the number of lives.
KILLER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
source, out, task, fresh = sys.argv[1:]
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

def finished(folder):  # killed when only the sign of the writer was left to remove
    return "config.json" in os.listdir(folder) and not any(
        name.startswith(".dsv3-unfinished") for name in os.listdir(folder))

def life(folder, number):
    child = os.fork()
    if not child:
        left = number
        def count(event, arguments):
            nonlocal left
            if event in EVENTS and arguments and str(arguments[0]).startswith(folder):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        status = 1
        try:
            if task == "cast":
                cast(source, folder, "bf16", progress=False)
            else:
                convert(source, folder, 2, progress=False)
            status = 0
        except Exception as error:
            print(number, error, file=sys.stderr)
            if "not empty" in str(error) and finished(folder):
                status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

number, status = 0, None
while status != 0:
    number += 1
    folder = f"{out}{number}" if fresh == "fresh" else out
    status = life(folder, number)
    if status == 0:
        break
    assert status == -signal.SIGKILL, (number, status)
    if fresh == "fresh":  # and once more, undisturbed
        status = life(folder, 0)
        assert status == 0, (number, status)
        status = None
print(number)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != LOCK_FILE}


@pytest.mark.parametrize("task, fresh", [("cast", "fresh"), ("convert", "on")])
def test_killed_before_any_file_operation(tmp_path, task, fresh):
    """fresh: each kill in a folder of its own, then undisturbed; on: one folder, the first life
    ends at the first operation, the next at its second, and so on."""
    config = tiny_config(
        num_hidden_layers=1,
        num_nextn_predict_layers=0,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=256,
    )
    write_checkpoint(tmp_path / "in", config, shards=2)
    done = subprocess.run(
        [sys.executable, "-c", KILLER, tmp_path / "in", tmp_path / "out", task, fresh],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    lives = int(done.stdout)
    assert 15 < lives < 100  # the later lives of one folder have less to do
    folders = sorted(tmp_path.glob("out*"))
    assert len(folders) == (lives if fresh == "fresh" else 1)
    whole = files(tmp_path / f"out{lives}") if fresh == "fresh" else None
    if whole is None:
        convert(tmp_path / "in", tmp_path / "whole", 2, progress=False)
        whole = files(tmp_path / "whole")
    for folder in folders:
        assert files(folder) == whole, folder


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    """A conversion for two ranks, killed in the third of its four files."""
    write_checkpoint(tmp_path / "in", tiny_config(), shards=1)
    write = StreamWriter.write

    def killed(self, name, value, first_row=0):
        if self.path.name.startswith("model1") and self._left[name] and "experts" in name:
            raise KeyboardInterrupt
        write(self, name, value, first_row)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StreamWriter, "write", killed)
        patch.setattr(
            "dsv3.checkpoint.safetensors_io.remove", lambda path: None
        )  # a kill cleans nothing up
        convert(tmp_path / "in", tmp_path / "out", 2, progress=False)
    assert (tmp_path / "out" / ("model1-mp2.safetensors" + PARTIAL)).stat().st_blocks > 0
    return tmp_path


def test_just_enough_room(stopped, monkeypatch):
    """What the unfinished file takes is free again when it is begun anew."""
    plan = convert(stopped / "in", stopped / "out", 2, dry_run=True, progress=False)
    partial = (stopped / "out" / ("model1-mp2.safetensors" + PARTIAL)).stat().st_blocks * 512
    for short in (1, 0):
        free = plan["bytes_to_write"] - partial - short
        monkeypatch.setattr(
            "shutil.disk_usage", lambda p, free=free: type("Usage", (), {"free": free})
        )
        if short:
            with pytest.raises(DSV3Error, match="not enough space"):
                convert(stopped / "in", stopped / "out", 2, progress=False)
        else:
            convert(stopped / "in", stopped / "out", 2, progress=False)
    assert RECORD_FILE not in os.listdir(stopped / "out")


@pytest.mark.parametrize(
    "how",
    [
        "copied over with its times",
        "other content, its times set back",
        "one value that no sample meets, its times set back",
    ],
)
def test_input_that_was_replaced_is_noticed(stopped, how):
    path = stopped / "in" / "model.safetensors"
    old = path.stat()
    write_checkpoint(
        stopped / "other", tiny_config(), random_tensors(tiny_config(), seed=1), shards=1
    )
    new = stopped / "other" / "model.safetensors"
    assert new.stat().st_size == old.st_size
    os.utime(new, ns=(old.st_atime_ns, old.st_mtime_ns))
    if how.startswith("copied"):
        shutil.copy2(new, path)
    elif how.startswith("one value"):
        with open(path, "r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(b"\x01")
        os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))
    else:
        new.replace(path)
    assert path.stat().st_mtime_ns == old.st_mtime_ns
    before = files(stopped / "out")
    with pytest.raises(
        DSV3Error,
        match="from other input.*model.safetensors has been replaced.*Remove the output folder",
    ):
        convert(stopped / "in", stopped / "out", 2, progress=False)
    assert files(stopped / "out") == before


def test_replaced_input_is_noticed_by_its_content_where_no_time_tells(stopped, monkeypatch):
    """As on file systems without a time of change: only size, header and samples are left."""
    stat = os.fstat

    class Timeless:
        def __init__(self, handle):
            self.real = stat(handle)

        def __getattr__(self, name):
            return 0 if name.endswith("time_ns") else getattr(self.real, name)

    monkeypatch.setattr("dsv3.checkpoint.safetensors_io.os.fstat", Timeless)
    from dsv3.checkpoint.safetensors_io import SafetensorsFile

    with SafetensorsFile(stopped / "in" / "model.safetensors") as file:
        first = file.fingerprint()
    write_checkpoint(
        stopped / "other", tiny_config(), random_tensors(tiny_config(), seed=1), shards=1
    )
    with SafetensorsFile(stopped / "other" / "model.safetensors") as file:
        assert file.fingerprint() != first
