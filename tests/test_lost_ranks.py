"""A rank that is lost in a collective is named by those who are left, and nothing lives on."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rank_jobs import COLLECTIVES, RANKS
from test_cli import environment, linux

pytestmark = [pytest.mark.slow, linux]

DRAW = random.Random(13)
KILLS = {
    (collective, launcher): dict(
        work="killed",
        collective=collective,
        launcher=launcher,
        victim=DRAW.randrange(RANKS),
        seconds=DRAW.uniform(0.05, 0.5),
    )
    for collective in COLLECTIVES
    for launcher in ("ours", "torch")
}
SHORT = {"DSV3_SILENCE_SECONDS": "3"}
OTHERS = {
    "busy": dict(work="busy", env=SHORT),
    "busy apart": dict(work="busy", env=SHORT | {"DSV3_SILENCE_SECONDS": "8"}, apart=True),
    "failing": dict(work="failing"),
    "stopped": dict(work="stopped", env=SHORT),
    "ended": dict(work="ended"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict:
    """What became of each job, all run by one process."""
    jobs = KILLS | {name: dict(launcher="torch", **job) for name, job in OTHERS.items()}
    file = tmp_path_factory.mktemp("jobs") / "answers"
    program = Path(__file__).with_name("rank_jobs.py")
    words = [sys.executable, program, file, json.dumps(list(jobs.values()))]
    subprocess.run(words, check=True, timeout=300, env=environment())
    return dict(zip(jobs, json.loads(file.read_text()), strict=True))


def lines(answer: dict) -> list[str]:
    """Our lines; whatever else, no stack of ours is shown."""
    assert "/dsv3/" not in answer["text"], answer["text"]
    return [line for line in answer["text"].splitlines() if line.startswith("dsv3: ")]


@pytest.mark.parametrize("job", KILLS, ids=" ".join)
def test_a_rank_killed_in_a_collective_is_named(answers, job):
    victim, answer = KILLS[job]["victim"], answers[job]
    assert answer["code"] != 0 and answer["left"] == 0 and answer["seconds"] < 30, answer
    found = lines(answer)
    if job[1] == "ours":
        (line,) = found
        assert f"rank {victim} of {RANKS} was killed by SIGKILL" in line
    else:
        assert 1 <= len(found) < RANKS
        assert all(f"error: rank {victim} of {RANKS} (host " in line for line in found), found


@pytest.mark.parametrize("job", ["busy", "busy apart"])
def test_a_rank_that_computes_for_long_is_never_lost(answers, job):
    assert answers[job]["code"] == 0 and not lines(answers[job]), answers[job]["text"]


def test_why_a_rank_failed_is_told_by_the_others(answers):
    found = lines(answers["failing"])
    assert "dsv3: error: no room on the disk" in found
    others = [line for line in found if "rank 1 of 3 (host " in line]
    assert len(others) == len(found) - 1 and all("no room on the disk" in o for o in others), found


def test_a_stopped_rank_is_lost_and_ends_when_it_goes_on(answers):
    answer = answers["stopped"]
    assert answer["code"] != 0 and answer["left"] == 0
    found = lines(answer)
    assert found and all("rank 1 of 3 (host" in line for line in found), answer["text"]
    assert any("has not been heard of for 3 s; rank" in line for line in found), found


def test_nobody_is_accused_when_the_launcher_is_told_to_end(answers):
    answer = answers["ended"]
    assert answer["code"] != 0 and answer["left"] == 0 and not lines(answer), answer["text"]
