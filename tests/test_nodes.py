"""Several machines for real: torchrun on two of them, that can be cut off from each other.

The machines are network namespaces (``machines``); what runs in them is what a user would start.
"""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path

import machines
import pytest
from machines import Machine, left_over, told, two_machines
from ranks import run_ranks
from test_cli import alive, environment, wait_until
from test_training_kill import files
from training_cases import TINY, little_text, write_texts

from dsv3 import cli
from dsv3.training import Recipe, read_description, train

WHY = machines.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY is not None, reason=str(WHY))]

TESTS = Path(__file__).parent
MODEL = TESTS.parent / "assets" / "dsv3-mini"
ENDS = 60  # seconds within which a cut must have ended a job
# Enough steps to be cut in their midst.
RECIPE = """
[model]
path = "model"
[recipe]
precision = "fp32"
micro_batch = 32
init_by_width = false
log_every = 1
eval_every = 1000
eval_windows = 2
save_minutes = 0.0
[recipe.pretraining]
tokens = 3000
seq_len = 16
batch_first = 4
batch_last = 4
learning_rate = 5e-3
warmup = 2
[recipe.extension]
tokens = 0
"""


@pytest.fixture
def pair():
    with two_machines() as both:
        yield both


def torchrun(pair: list[Machine], *words, **options) -> list:
    """The same command on both; the first hosts the rendezvous."""
    env = environment(PYTHONPATH=f"{TESTS.parent}{os.pathsep}{TESTS}") | options.pop("env", {})
    return [one.torchrun(*words, env=env, head=pair[0].address, **options) for one in pair]


def wait(processes, seconds: float) -> list[str]:
    """What they have printed, once all have ended."""
    end = time.monotonic() + seconds
    for process in processes:
        left = max(end - time.monotonic(), 0.1)
        with contextlib.suppress(Exception):
            process.wait(left)
    texts = [told(process) for process in processes]
    assert all(process.poll() is not None for process in processes), texts
    return texts


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("dsv3: error")]


def test_two_machines_write_the_text_of_one_process(pair, capfd):
    """Two ranks on each."""
    words = ["generate", MODEL, "--precision", "fp32", "--prompt", "ROMEO:", "--json"]
    words = [*map(str, words), "--max-new-tokens", "24", "--device", "cpu"]
    assert cli.main(words) == 0
    alone = json.loads(capfd.readouterr().out)["results"]
    processes = torchrun(pair, "-m", "dsv3", *words, per_node=2)
    texts = wait(processes, 120)
    assert [process.returncode for process in processes] == [0, 0], texts
    (line,) = [line for text in texts for line in text.splitlines() if line.startswith("{")]
    answer = json.loads(line)
    assert answer["tp"] == 4 and answer["results"] == alone


def train_whole(group, words: list[str]) -> None:
    """A run that nobody disturbs, as a rank of another launcher."""
    args = cli.build_parser().parse_args(words)
    described = read_description(args.config)
    with pytest.MonkeyPatch.context() as patch:
        little_text(patch.setattr)
        recipe = Recipe(**described.choices)
        texts = dict(plays=args.plays, code=args.code)
        train(described.config, args.out, recipe, **texts, group=group, progress=False)


def test_a_cut_ends_both_sides_and_training_goes_on_from_its_checkpoint(pair, tmp_path):
    """Packets get lost and nobody says so; with the usual limit of silence."""
    texts = write_texts(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY.to_dict()))
    (tmp_path / "my.toml").write_text(RECIPE)
    words = ["train", "--config", tmp_path / "my.toml", "--device", "cpu"]
    words = [*words, "--plays", texts["plays"], "--code", texts["code"], "--out"]
    words = list(map(str, words))
    run = tmp_path / "run"
    first = torchrun(pair, TESTS / "node_training.py", *words, run)
    wait_until(lambda: len(list((run / "checkpoints").glob("step-*"))) > 1, 90)
    for machine in pair:
        machine.lose_packets()
    cut = time.monotonic()
    said = wait(first, ENDS)
    assert time.monotonic() - cut < ENDS
    assert all(process.returncode for process in first)
    (head,), (other,) = map(ours, said)
    silent = "not been heard of for 20 s"
    assert f"rank 1 of 2 (host node1) has {silent}; rank 0 (host node0) stops" in head
    assert re.search(rf"rank 0 of 2 \(host node0\).* has {silent}; rank 1 \(host node1\)", other)
    assert not (run / "model.safetensors").exists(), "it was cut too late"
    assert pair[0].processes() == pair[1].processes() == []

    for machine in pair:
        machine.bring_up()
    rest = torchrun(pair, TESTS / "node_training.py", *words, run)
    said = wait(rest, 120)
    assert [process.returncode for process in rest] == [0, 0], said
    run_ranks(train_whole, 2, [*words, str(tmp_path / "whole")])
    assert files(run) == files(tmp_path / "whole"), "bit for bit"


def test_a_pulled_cable_is_named_from_both_ends_with_all_ranks_behind_it(pair):
    job = json.dumps(dict(work="waiting", launcher="torch"))
    words = (TESTS / "rank_jobs.py", "--rank", job)
    processes = torchrun(pair, *words, per_node=2, env={"DSV3_SILENCE_SECONDS": "5"})
    wait_until(lambda: all(told(process).count("all have met") == 2 for process in processes), 90)
    pair[1].take_down()
    head, other = map(ours, wait(processes, ENDS))
    assert head and all("ranks 2, 3 of 4 (host node1) have not been heard of" in o for o in head)
    line = "ranks 0, 1 of 4 (host node0), where the ranks meet"
    assert other and all(line in o for o in other)
    assert pair[0].processes() == pair[1].processes() == []


def test_a_rank_killed_on_the_other_machine_is_named(pair):
    job = json.dumps(dict(work="waiting", launcher="torch"))
    processes = torchrun(pair, TESTS / "rank_jobs.py", "--rank", job)
    wait_until(lambda: all(told(process).count("all have met") == 1 for process in processes), 90)
    (rank,) = re.findall(r"all have met: (\d+)", told(processes[1]))
    os.kill(int(rank), signal.SIGKILL)
    began = time.monotonic()
    (line,) = ours(wait(processes, ENDS)[0])
    assert time.monotonic() - began < 30
    assert "rank 1 of 2 (host node1) has gone: a connection was closed" in line
    assert pair[0].processes() == pair[1].processes() == []


def test_nothing_is_left_of_machines_whatever_happens():
    env, seen = environment(), []
    with pytest.raises(ZeroDivisionError), two_machines() as (machine, _):
        program = "import os, time; os.fork(); os.fork() or os.setsid(); time.sleep(99)"
        machine.start("python3", "-c", program, env=env)
        seen = wait_until(lambda: len(machine.processes()) == 4 and machine.processes(), 30)
        _ = 1 / 0
    assert not any(map(alive, seen)) and not left_over()
