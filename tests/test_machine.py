"""Threads that survive company, and a warning where bfloat16 is slow."""

import os
import subprocess
import sys

import pytest
import torch
from test_cli import ROOT

from dsv3 import bfloat16, cli, machine
from dsv3.errors import DSV3Error


@pytest.mark.parametrize(
    "code, setting, policy",
    [
        ("import dsv3", {}, "PASSIVE"),
        ("import dsv3", {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"),
        ("import dsv3", {"GOMP_SPINCOUNT": "5"}, None),
        (
            "import sys; sys.modules['torch'] = sys; import dsv3",
            {},
            None,
        ),  # it has read its settings
    ],
)
def test_import_lets_threads_sleep(code, setting, policy):
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import os; print(os.environ.get('OMP_WAIT_POLICY'))"],
        env=env | {"PYTHONPATH": str(ROOT)} | setting,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(policy), done.stderr


@pytest.mark.parametrize(
    "cores, ranks, spare, expected",
    [
        (1, 1, 1, 1),
        (2, 1, 1, 1),
        (2, 2, 1, 1),
        (2, 2, 0, 1),
        (8, 1, 1, 7),
        (8, 2, 1, 3),
        (8, 2, 0, 4),
        (4, 16, 1, 1),
    ],
)
def test_threads_leave_a_core(monkeypatch, cores, ranks, spare, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    assert machine.threads(ranks, spare=spare) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert machine.threads(ranks, spare=spare) == 5


@pytest.mark.parametrize("value", ["abc", "0", "-1", "", "2.5", "1,", "9" * 20, "٣"])
def test_numbers_of_threads_that_are_none(monkeypatch, capsys, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(DSV3Error, match="OMP_NUM_THREADS: not a number of threads"):
        machine.check_threads()
    assert cli.main(["inspect", "--preset", "mini"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("value", [" 4 ", "04", "4,2", None])
def test_numbers_of_threads_that_are_some(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    machine.check_threads()


def test_a_slow_bfloat16_is_said(tiny_checkpoint, monkeypatch, capsys):
    words = [
        "generate",
        str(tiny_checkpoint),
        "--prompt",
        "x",
        "--max-new-tokens",
        "2",
        "--device",
        "cpu",
        "--precision",
    ]
    for precision, slower, said in (("bf16", 7.0, True), ("bf16", 0.5, False), ("fp8", 7.0, False)):
        monkeypatch.setattr(bfloat16, "slowdown", lambda slower=slower: slower)
        assert cli.main([*words, precision]) == 0
        errors = capsys.readouterr().err
        assert ("takes 7 times as long as in float32; --precision fp32" in errors) == said
        assert f"cpu with {torch.get_num_threads()} thread" in errors
