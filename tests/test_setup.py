"""The set-up says one thing everywhere: package, pins, conda, make, README, and the imports."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
SETUP_FILES = [
    "pyproject.toml",
    "constraints.txt",
    "environment.yml",
    "Makefile",
    ".ci/run",
    ".github/workflows/test.yml",
    ".pre-commit-config.yaml",
]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def make_targets() -> set[str]:
    found = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    return set(found[1].split()) - {"FORCE"}


def code_blocks(markdown: str) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


# --- versions ---------------------------------------------------------------------------------


def test_constraints_name_each_package_once_with_an_exact_version():
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("group", ["core", *EXTRAS])
def test_every_dependency_has_a_tested_version_inside_its_range(group):
    tested = pins()
    for text in PROJECT["dependencies"] if group == "core" else EXTRAS[group]:
        requirement = Requirement(text)
        version = tested[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text}, tested with {version}"


def test_torch_and_triton_belong_together():
    assert (pins()["torch"], pins()["triton"]) == ("2.13.0", "3.7.1")


def test_extras_are_those_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert set(EXTRAS) == set(re.search(r'-e "\.\[([a-z,]+)\]"', readme)[1].split(","))


def test_conda_environment_installs_the_same_package_extras_and_versions():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    python = next(entry.split("=")[1] for entry in conda if entry.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert "--constraint constraints.txt" in pip
    package = next(line for line in pip if line.startswith("--editable"))
    assert set(re.search(r"\[(.*)\]", package)[1].split(",")) == set(EXTRAS)
    pinned = dict(line.split("==") for line in pip if "==" in line)
    assert pinned and pinned.items() <= pins().items()


@pytest.mark.parametrize("name", SETUP_FILES)
def test_setup_files_name_no_download_address(name):
    assert "://" not in (ROOT / name).read_text()


# --- commands ---------------------------------------------------------------------------------


def test_readme_commands_exist():
    blocks = "\n".join(code_blocks((ROOT / "README.md").read_text()))
    used = set(re.findall(r"^make(?: +[A-Z_]+=\S+)* +([a-z]+)", blocks, re.MULTILINE))
    assert {"run", "test", "lab", "train"} <= used <= make_targets()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "assets/dsv3-mini/README.md"])
def test_links_lead_to_files_that_exist(name):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    local = [link for link in links if not re.match(r"\w+:", link)]
    assert [link for link in local if not (ROOT / name).parent.joinpath(link).exists()] == []


def test_readme_says_where_to_find_every_module():
    part = (ROOT / "README.md").read_text().split("## The package")[1].split("\n## ")[0]
    table = part[part.index("\n| | modules of `dsv3/` |\n") + 1 :].partition("\n")[2]
    named = set(re.findall(r"`([a-z0-9_]+(?:\.py|/))`", table))
    package = ROOT / "dsv3"
    opened = ("checkpoint", "generation", "commands", "parallel")
    there = {
        file.name
        for folder in (package, *map(package.joinpath, opened))
        for file in folder.glob("*.py")
        if not file.name.startswith("__")
    }
    there |= {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert named == there


def test_checks_elsewhere_call_the_same_command():
    commands = re.findall(r"^make .*$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert commands == ["make check", "make test"]  # what takes seconds fails first
    assert os.access(ROOT / ".ci/run", os.X_OK)
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    assert {"bash .ci/run"} == {
        step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step
    }


def test_a_commit_is_checked_by_the_same_command_and_fetches_nothing():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    for repository in config["repos"]:
        assert repository["repo"] == "local", "a tool from elsewhere has a version of its own"
        for hook in repository["hooks"]:
            assert (hook["entry"], hook["language"]) == ("make check", "system")
            assert hook["pass_filenames"] is False


def test_make_help_lists_every_command():
    done = subprocess.run(["make", "help"], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert set(re.findall(r"^make ([a-z]+)", done.stdout, re.MULTILINE)) == make_targets() - {
        "help"
    }


def test_console_script_points_at_a_function():
    module, function = PROJECT["scripts"]["dsv3"].split(":")
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# --- make: what a call would do, without doing it ---------------------------------------------

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PYTHON", "VENV", "TORCH_INDEX"}
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def clone(tmp_path):
    """A fresh clone as far as make can see, in a folder with a space in its name."""
    folder = tmp_path / "my book"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
        os.utime(folder / name, (1000, 1000))
    return folder


@pytest.fixture
def ready(clone):
    """The same, with everything set up."""
    (clone / ".venv").mkdir()
    for age, name in enumerate(["venv", "run", "lab", "train", "check", "test"]):
        stamp = clone / ".venv" / f".stamp-{name}"
        stamp.write_text(f"{clone}\n")
        os.utime(stamp, (2000 + age, 2000 + age))
    return clone


@needs_make
def test_a_fresh_clone_is_set_up_with_what_the_command_needs(clone):
    plan = make(clone, "-n", "run").stdout
    assert "-m venv" in plan and "--editable ." in plan and "dsv3 generate" in plan
    assert "[book" not in plan and "jupyter" not in plan.lower()
    assert "[book,train,test]" in make(clone, "-n", "test").stdout
    plan = make(clone, "-n", "check").stdout
    assert "'.[check]'" in plan and "[book" not in plan and "ruff check" in plan
    plan = make(clone, "-n", "train", "OUT=runs/other", "MINUTES=5").stdout
    assert "-m venv" in plan and "'.[train]'" in plan and "test]" not in plan
    assert 'dsv3 train --preset mini --out "runs/other" --max-minutes "5"' in plan
    assert "--max-minutes" not in make(clone, "-n", "train").stdout


@needs_make
def test_installing_says_how_much_and_shows_that_it_lives(clone):
    plan = make(clone, "-n", "test").stdout
    assert "200 MB" in plan and "360 MB" in plan
    slow = [line for line in plan.splitlines() if "-m pip " in line and "setuptools" not in line]
    assert len(slow) == 3 and not any("-q" in line for line in slow)


@needs_make
@pytest.mark.parametrize("command", ["run", "lab", "train", "check", "quick", "test"])
def test_a_second_call_installs_nothing(ready, command):
    plan = make(ready, "-n", command).stdout
    assert plan and "pip" not in plan and "-m venv" not in plan


@needs_make
@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed_into_the_same_environment(ready, name):
    os.utime(ready / name, (3000, 3000))
    plan = make(ready, "-n", "run").stdout
    assert "pip" in plan and "-m venv" not in plan


@needs_make
def test_a_moved_folder_is_set_up_again(ready):
    moved = ready.rename(ready.with_name("moved"))
    plan = make(moved, "-n", "run").stdout
    assert "pip" in plan and "-m venv" in plan


@needs_make
def test_the_torch_index_is_asked_for_torch_alone(clone):
    lines = make(clone, "-n", "test", "TORCH_INDEX=cpu-builds").stdout.splitlines()
    assert "--index-url" not in make(clone, "-n", "test").stdout
    assert [line.split()[-1] for line in lines if '--index-url "cpu-builds"' in line] == ["torch"]


@needs_make
@pytest.mark.parametrize(
    "refuses, message",
    [
        ("version_info", "3.11 or later is needed"),
        ("ensurepip", "cannot make virtual environments"),
    ],
)
def test_an_unfit_python_is_named_in_one_line(clone, refuses, message):
    python = clone / "old-python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *{refuses}*) exit 1;; esac\necho Python 3.9.2\n')
    python.chmod(0o755)
    done = make(clone, "run", "PYTHON=./old-python")
    assert done.returncode != 0 and not (clone / ".venv").exists()
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and message in said[0]


def test_make_asks_for_the_python_that_the_package_asks_for():
    asked = re.search(r"version_info < \((\d+), (\d+)\)", (ROOT / "Makefile").read_text())
    assert PROJECT["requires-python"] == f">={asked[1]}.{asked[2]}"


@needs_make
def test_clean_removes_only_an_environment(ready):
    (ready / ".venv" / "notes").write_text("kept: this folder is no environment")
    assert make(ready, "clean").returncode == 0 and (ready / ".venv" / "notes").exists()
    (ready / ".venv" / "pyvenv.cfg").touch()
    assert make(ready, "clean").returncode == 0 and not (ready / ".venv").exists()


# --- imports ----------------------------------------------------------------------------------


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OPTIONAL = "numba triton matplotlib ipywidgets anywidget IPython jupyterlab transformers".split()


def test_import_dsv3_loads_nothing_heavy():
    loaded = python("import sys, dsv3; print(*sys.modules)").split()
    assert set(loaded).isdisjoint({*OPTIONAL, "torch", "numpy"})


def test_the_public_face_needs_no_optional_package():
    """As on a Mac without Triton: importing any of these packages fails here."""
    print_names = "print(*[f'{name}:{type(globals()[name]).__name__}' for name in dsv3.__all__])"
    names = python(
        f"import sys, dsv3\nfor name in {OPTIONAL}: sys.modules[name] = None\n"
        f"from dsv3 import *\n{print_names}"
    ).split()
    assert names == [
        "ModelConfig:type",
        "Transformer:type",
        "load_model:function",
        "load_tokenizer:function",
        "generate:function",
    ]


def test_generate_is_the_function_whatever_was_imported_before():
    assert (
        python(
            "import dsv3.generation.loop\nfrom dsv3 import generate\nprint(type(generate).__name__)"
        )
        == "function"
    )


def test_unknown_names_of_the_package_are_attribute_errors():
    import dsv3

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dsv3.nonsense


# --- CONTRIBUTING -----------------------------------------------------------------------------

CONTRIBUTING = ROOT / "CONTRIBUTING.md"


def test_contributing_names_files_that_exist():
    named = re.findall(r"`((?:dsv3|tests|chapters|benchmarks)/[\w./]+)`", CONTRIBUTING.read_text())
    named = [name for name in named if "NN" not in name and "NAME" not in name]
    assert len(named) > 10 and [name for name in named if not (ROOT / name).exists()] == []


def test_contributing_names_what_its_files_have():
    """Names in capitals in brackets or after "in": `tests/test_chapters.py` (`SECOND`)."""
    text = CONTRIBUTING.read_text()
    for name, file in {
        "SECOND": "tests/test_chapters.py",
        "CHAPTERS": "tests/test_exercises.py",
        "FAMILIES": "dsv3/families.py",
        "FIXED": "dsv3/families.py",
        "OTHERS": "dsv3/families.py",
        "PRESETS": "dsv3/config.py",
        "SMALL": "tests/test_families.py",
    }.items():
        assert f"`{name}`" in text
        assert re.search(rf"^{name}\b.*= ", (ROOT / file).read_text(), re.MULTILINE), name


def test_contributing_commands_exist():
    block = code_blocks(CONTRIBUTING.read_text())[0]
    assert re.findall(r"^make ([a-z]+)", block, re.MULTILINE) == ["check", "quick", "test"]
    assert {"check", "quick", "test"} <= make_targets()
