"""What a build carries: the package and its small model, which runs with nothing else there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dsv3.commands import doctor
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.shipped import model_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
MODEL = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def run(folder: Path, *command: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(path) if path else ""}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        text=True,
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def builds(tmp_path_factory) -> Path:
    """A wheel and an sdist, from a copy of what the repository holds; nothing is fetched."""
    source, out = tmp_path_factory.mktemp("source") / "dsv3", tmp_path_factory.mktemp("builds")
    source.mkdir()
    for name in ("dsv3", "assets", "tests", "chapters"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "Makefile",
        "constraints.txt",
        "MANIFEST.in",
    ):
        shutil.copy(ROOT / name, source)
    run(source, "-c", f"from setuptools.build_meta import build_sdist; build_sdist(r'{out}')")
    run(
        source,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(out),
        ".",
    )
    return out


def test_the_wheel_holds_the_package_its_model_and_nothing_else(builds):
    names = zipfile.ZipFile(next(builds.glob("*.whl"))).namelist()
    inside = {
        name.removeprefix("dsv3/assets/dsv3-mini/")
        for name in names
        if name.startswith("dsv3/assets/")
    }
    assert inside == MODEL
    tops = {name.split("/")[0] for name in names}
    assert {"dsv3"} == {top for top in tops if not top.endswith(".dist-info")}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "dsv3").rglob("*.py")}
    assert code == {name for name in names if name.endswith(".py")}
    kinds = {Path(name).suffix for name in names if ".dist-info" not in name}
    assert kinds <= {
        ".py",
        ".json",
        ".md",
        ".safetensors",
        ".js",
        ".css",
        ".mplstyle",
        ".toml",
        ".typed",
        "",
    }
    assert "dsv3/training/mini.toml" in names  # --preset mini reads it


def test_the_source_archive_builds_the_same(builds):
    with tarfile.open(next(builds.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    below = {name.partition("/")[2] for name in names}
    assert {f"dsv3/assets/dsv3-mini/{name}" for name in MODEL} <= below
    assert {name.split("/")[0] for name in below} <= {
        "",
        "PKG-INFO",
        "LICENSE",
        "README.md",
        "MANIFEST.in",
        "pyproject.toml",
        "setup.cfg",
        "dsv3",
        "dsv3.egg-info",
    }


def test_an_installed_wheel_generates_from_anywhere(builds, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run(
        elsewhere,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(next(builds.glob("*.whl"))),
    )
    done = run(
        elsewhere,
        "-c",
        f"""
import dsv3
assert dsv3.__file__.startswith({str(target)!r}), dsv3.__file__
model, tokenizer = dsv3.load_model("dsv3-mini", precision="fp32"), dsv3.load_tokenizer("dsv3-mini")
assert dsv3.ModelConfig.from_pretrained("assets/dsv3-mini") == model.config
ids = dsv3.generate(model, [tokenizer.encode("37 + 45 =")], max_new_tokens=30, temperature=0.0)
print(tokenizer.decode(ids[0]))""",
        path=target,
    )
    assert done.stdout.startswith(" [7+5=12, 3+4+1=8] 82")
    done = run(elsewhere, "-m", "dsv3", "inspect", "dsv3-mini", path=target)
    assert "15.1" in done.stdout or "15,1" in done.stdout


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelConfig.from_pretrained("dsv3-mini") == ModelConfig.mini()
    assert model_folder("dsv3-mini").samefile(ROOT / "assets" / "dsv3-mini")
    assert model_folder("other/dsv3-mini") == Path("other/dsv3-mini")
    (tmp_path / "dsv3-mini").mkdir()
    assert model_folder("dsv3-mini") == Path("dsv3-mini")


def test_an_installation_without_the_model_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dsv3.shipped.__file__", str(tmp_path / "shipped.py"))
    with pytest.raises(DSV3Error, match="this installation has none.*assets/dsv3-mini of the"):
        model_folder("dsv3-mini")


# Advice -----------------------------------------------------------------------------------------

# A requirement by our name, as pip would look it up on an index: install dsv3, "dsv3[book]".
ON_AN_INDEX = re.compile(r"""pip3? install\b[^\n`]*?[\s"'](?<!-e )dsv3(?![\w/.-])""")


def test_the_pattern_sees_what_it_should():
    for advice in ("pip install dsv3", 'pip install "dsv3[book]"', "pip install -U 'dsv3[train]'"):
        assert ON_AN_INDEX.search(advice)
    for advice in ('pip install -e ".[book]"', "pip install 'transformers>=5.23'"):
        assert not ON_AN_INDEX.search(advice)


def test_no_advice_names_the_package_on_an_index():
    """The name may belong to a stranger there, tomorrow if not today."""
    files = [
        *(ROOT / "dsv3").rglob("*.py"),
        *(ROOT / "chapters").rglob("*.ipynb"),
        *ROOT.glob("*.md"),
        ROOT / "assets/dsv3-mini/README.md",
        ROOT / "Makefile",
    ]
    assert len(files) > 60
    assert [str(file) for file in files if ON_AN_INDEX.search(file.read_text())] == []


def test_doctor_never_names_it_either(monkeypatch):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", absent)
    remarks = [doctor._package(*row)[2] for row in doctor.PACKAGES]
    assert not any(ON_AN_INDEX.search(remark) or "dsv3[" in remark for remark in remarks)
    assert all('-e ".[' in remark for remark, row in zip(remarks, doctor.PACKAGES) if row[2])
