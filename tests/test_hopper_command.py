"""The command for whoever gets a Hopper chip for ten minutes: what fails costs only itself."""

import json

import pytest

from benchmarks import hopper

BAD = 'import sys, json; open(sys.argv[2], "w").write(json.dumps([{"us": 1}])); sys.exit("no room")'


def test_a_process_that_fails_or_hangs_is_told_with_what_it_had():
    failed = hopper.in_a_process(["-c", BAD], 60)
    assert failed["found"] == [{"us": 1}] and failed["failure"] == "exit code 1: no room"
    hung = hopper.in_a_process(["-c", "import time; time.sleep(60)"], 0.5)
    assert hung["found"] is None and "stopped after" in hung["failure"]
    assert not hopper.passed(failed) and not hopper.passed(hung)


def test_everything_is_checked_before_anything_is_timed(tmp_path, monkeypatch, capsys):
    """One part fails, one finds a mistake; all are tried, and the file has them after each."""
    pytest.importorskip("triton")
    file, called = tmp_path / "figures.json", []

    def process(command, limit):
        called.append(command)
        if called[1:]:
            assert len(json.loads(file.read_text())["checks"]) == min(len(called) - 1, 7)
        if "experts" in command:
            return dict(found=None, seconds=1, failure="exit code 1: out of memory")
        return dict(found=[dict(passed="routing" not in command)], seconds=1)

    monkeypatch.setattr(hopper, "in_a_process", process)
    assert hopper.everything(9, False, False, file) == 1
    assert [("--timed" in command, "bench" in command) for command in called] == (
        [(False, False)] * 7 + [(True, False)] * 7 + [(False, True)]
    )
    told = json.loads(file.read_text())
    assert told["times"]["experts"]["failure"] and len(told["times"]) == 8 and "torch" in told
    assert "failed: experts (checks), routing (checks), experts (times)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_part_runs_in_the_interpreter():
    pytest.importorskip("triton")
    answer = hopper.in_a_process(["-m", "benchmarks.hopper", "--part", "codes", "--small"], 120)
    assert hopper.passed(answer) and len(answer["found"]) == 5, answer
