"""kill -9 at any moment of a run: resumed, it ends as if nothing had happened, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_cases import write_texts

from dsv3.training import LOG_FILE

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent
CLOCKS = ("seconds", "cpu_seconds", "tokens_per_second")
KILLED = -signal.SIGKILL


class Server:
    """The process of ``training_server.py``, and the runs it starts."""

    def __init__(self, texts: dict[str, Path]):
        path = os.pathsep.join([str(TESTS.parent), *filter(None, [os.getenv("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, TESTS / "training_server.py", texts["plays"], texts["code"]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": path,
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        assert self.process.stdout.readline() == "ready\n"

    def train(self, folder: Path, seconds: float = 0, operations: int = 0) -> int:
        """Exit status of a run that is killed after so long, or before a file operation."""
        print(seconds, operations, folder, file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(write_texts(tmp_path_factory.mktemp("texts")))
    yield found
    found.process.kill()
    found.process.wait()


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The folder of a run that nobody disturbs, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    start = time.monotonic()
    assert server.train(folder) == 0
    return folder, time.monotonic() - start


def files(folder: Path) -> dict[str, bytes]:
    """All files: weights, moments, random state, tokenizer, exported model; clocks left out."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for name, content in found.items():
        if name.endswith("SHA256SUMS"):  # that of state.json goes with its clocks
            found[name] = [line for line in content.splitlines() if b"state.json" not in line]
        if name == LOG_FILE or name.endswith("state.json"):
            lines = content.splitlines() if name == LOG_FILE else [content]
            found[name] = [
                {
                    key: value
                    for key, value in json.loads(line).items()
                    if key not in (*CLOCKS, "log_bytes")
                }
                for line in lines
            ]
    return found


def test_killed_at_ten_random_moments(server, whole, tmp_path):
    """Nothing is left to do sometimes before the tenth: then the next run begins."""
    (expected, seconds), choose, killed, runs = whole, random.Random(1), 0, 0
    while killed < 10:
        folder, status = tmp_path / f"run{runs}", KILLED
        while status == KILLED and killed < 10:
            status = server.train(folder, seconds=choose.uniform(0, 0.7) * seconds)
            killed += status == KILLED
        if status == KILLED:
            status = server.train(folder)
        assert status == 0
        assert files(folder) == files(expected)
        runs += 1


def test_killed_between_any_two_file_operations(server, whole, tmp_path):
    """The first run dies before its first operation, the next before its second, and so on: in
    the middle of a checkpoint and of the log; then the same for the export alone."""
    folder, lives = tmp_path / "out", []
    for _ in ("everything", "the export"):
        for number in range(1, 100):
            if server.train(folder, operations=number) == 0:
                break
        assert files(folder) == files(whole[0])
        lives.append(number)
        for name in ("model.safetensors", "config.json"):
            (folder / name).unlink()
    assert 20 < lives[0] < 100 and 6 < lives[1] < 100
