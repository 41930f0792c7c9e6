"""Every example that README, the model's card and ``--help`` show is run and shows what it says.

A line of a fenced block that begins with ``dsv3``, ``make`` or ``python`` is an example. Those that
are not run stand in EXEMPT with the reason. An example that is neither is a failure, so a new one
gets a promise here.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.cli import build_parser, main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

# Beginning of an example -> why it is not run here.
EXEMPT = {
    "make test": "it runs this very test",
    "make lab": "a server that ends with Ctrl-C; tests/lab.py starts it for the widgets",
    "make train": "minutes to hours; its plan is in test_setup, training in test_training_*",
    "make run TORCH_INDEX": "the address is to be filled in; see test_setup",
    "dsv3 train": "the whole recipe, hours on two cores; see test_training_run",
    "dsv3 experiment": "a quarter of an hour on two cores; see test_experiments",
    "dsv3 bench": "an hour of quiet cores; see test_bench",
    "torchrun": "16 GPUs and the released 671B checkpoint",
    "dsv3 inspect DeepSeek-V3": "the released checkpoint; its sizes are in test_inspect",
    "dsv3 convert DeepSeek-V3": "likewise; see test_convert",
    "dsv3 cast DeepSeek-V3": "likewise; see test_cast",
}


def examples(text: str) -> list[str]:
    """Commands of all fenced blocks without a language, each on one line."""
    blocks = "\n".join(
        block
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        if not language
    )
    lines = blocks.replace("\\\n", " ").splitlines()
    return [
        " ".join(line.split("   #")[0].split())
        for line in lines
        if re.match(r"(\w+=\S+ )*(dsv3|make|python|torchrun) ", line)
    ]


def of_help() -> list[str]:
    """The example at the end of a command's --help, where there is one."""
    commands = next(action.choices for action in build_parser()._actions if action.choices)
    return [
        parser.epilog.removeprefix("Example: ") for parser in commands.values() if parser.epilog
    ]


FOUND = [
    *examples((ROOT / "README.md").read_text(encoding="utf-8")),
    *examples((ROOT / "assets/dsv3-mini/README.md").read_text(encoding="utf-8")),
    *of_help(),
]
RUN = sorted({line for line in FOUND if not line.startswith(tuple(EXEMPT))})


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> dict[str, str]:
    """An environment as far as make can see, whose ``dsv3`` is this one."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    command = folder / "bin" / "dsv3"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsv3 "$@"\n')
    command.chmod(0o755)
    for name in ("venv", "run"):
        (folder / f".stamp-{name}").write_text(f"{ROOT}\n")
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "VENV": str(folder),
        "MAKEFLAGS": "",
        "MAKELEVEL": "0",
    }  # under `make test` too, a line of make comes first


def shown(line: str, place: dict[str, str], capfd) -> str:
    """What an example prints, as bash reads it, in the root; 60 tokens will do."""
    line = re.sub(r"(TOKENS=|--max-new-tokens )\d{3}\b", r"\g<1>60", line)
    if line.startswith("dsv3 ") and "--tp" not in line and "--interactive" not in line:
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {line}"], check=True, text=True, capture_output=True
        ).stdout.split("\0")[1:-1]
        assert main(words) == 0  # here: torch is loaded already
        return capfd.readouterr().out
    if line.startswith("make "):
        line += f" VENV={shlex.quote(place['VENV'])}" + " TOKENS=60" * ("TOKENS" not in line)
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=ROOT,
        env=place,
        input="To be, or not?\n",
        text=True,
        capture_output=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_examples_are_found():
    assert len(RUN) >= 8 and {line.split()[0] for line in RUN} == {"dsv3", "make"}
    assert len(of_help()) >= 3
    assert all(any(line.startswith(exempt) for line in FOUND) for exempt in EXEMPT)


@pytest.mark.parametrize("line", RUN, ids=lambda line: line[:70])
def test_example_shows_what_it_promises(line, place, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = shown(line, place, capfd)
    if "inspect" in line:
        assert re.search(r"\d", said) and ("671" in said or "15.1" in said or "15,1" in said)
    elif "37 + 45" in line:
        assert re.search(r"37 \+ 45 = \[7\+5=12, 3\+4\+1=8\] 82$", said.strip(), re.MULTILINE)
    elif "def " in line:
        begin = said.index("def ")
        code = said[begin:]
        assert any(_parses(code[:end]) for end in range(len(code), 30, -1)), said
    elif "get q =" in line:
        assert said.strip().endswith("get q = 58")
    elif "--interactive" in line:
        assert len(said.split()) > 5
    else:
        play = said.split("==> the book")[0]
        assert len(play.split()) > 30, said
        assert sum(c.isdigit() for c in play.split("\n", 1)[1]) == 0 and play.count("\n") > 4


def _parses(code: str) -> bool:
    try:
        return bool(ast.parse(code).body)
    except SyntaxError:
        return False


def test_the_python_of_the_readme_prints_what_it_says():
    [code] = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.strip() == "[7+5=12, 3+4+1=8] 82" and second.split()[-1] == "87"
