"""Companions: what goes along with cast and convert, and what must not."""

import json
import os
from contextlib import nullcontext

import pytest
from checkpoints import tiny_config, write_checkpoint

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.saving import save_model
from dsv3.errors import Notice
from dsv3.model import Transformer

JOBS = {
    "cast": lambda a, b: cast(a, b, progress=False),
    "convert": lambda a, b: convert(a, b, 1, progress=False),
}


@pytest.fixture
def source(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config(), shards=1)
    return tmp_path / "in"


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def auto_map(path):
    return json.loads(path.read_text()).get("auto_map")


@pytest.mark.parametrize("job", JOBS)
def test_code_that_is_pointed_at_goes_along(source, tmp_path, job):
    config = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "owner/other--modeling_x.X"}
    tokens = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    edit(source / "config.json", auto_map=config)
    edit(source / "tokenizer_config.json", auto_map=tokens)
    for name in ("configuration_x.py", "tokenization_x.py", "helper_x.py"):
        (source / name).write_text(f"raise SystemExit('{name} was run')\n")
    for name in ("generation_config.json", "tiktoken.model"):
        (source / name).write_text("{}")
    JOBS[job](source, tmp_path / "out")
    for name in (
        "configuration_x.py",
        "tokenization_x.py",
        "helper_x.py",
        "tiktoken.model",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_text() == (source / name).read_text()
    assert auto_map(tmp_path / "out" / "config.json") == config
    assert auto_map(tmp_path / "out" / "tokenizer_config.json") == tokens


@pytest.mark.parametrize("job", JOBS)
def test_a_pointer_to_nothing_is_dropped(source, tmp_path, job):
    there = {"AutoConfig": "configuration_x.XConfig"}
    edit(source / "config.json", auto_map={**there, "AutoModel": "modeling_x.X"})
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["gone.X", None]})
    (source / "configuration_x.py").write_text("")
    (tmp_path / "elsewhere.py").write_text("secret")
    (source / "modeling_x.py").symlink_to(tmp_path / "elsewhere.py")
    with pytest.warns(Notice, match="modeling_x.py: left out"):
        JOBS[job](source, tmp_path / "out")
    assert auto_map(tmp_path / "out" / "config.json") == there
    assert auto_map(tmp_path / "out" / "tokenizer_config.json") is None
    assert not (tmp_path / "out" / "modeling_x.py").exists()


def test_code_that_nothing_points_at_stays(source, tmp_path):
    (source / "stray.py").write_text("")
    JOBS["cast"](source, tmp_path / "out")
    assert not (tmp_path / "out" / "stray.py").exists()


@pytest.mark.parametrize("job", JOBS)
def test_a_link_out_of_the_folder_is_not_copied(source, tmp_path, job):
    (tmp_path / "private").write_text("a key")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "x").write_text("a key")
    (source / "LICENSE").symlink_to(tmp_path / "private")
    (source / "LICENSE-2").symlink_to("../blobs/x")  # not the cache: no "snapshots" above
    (source / "chat_template.jinja").write_text("plain")
    (source / "LICENSE-3").symlink_to("chat_template.jinja")  # within the folder
    os.mkfifo(source / "tokenizer.pipe")
    with pytest.warns(Notice, match="left out") as told:
        JOBS[job](source, tmp_path / "out")
    out = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert [str(one.message).partition(": ")[0] for one in told] == [
        str(source / name) for name in ("LICENSE", "LICENSE-2", "tokenizer.pipe")
    ]
    assert "LICENSE" not in out and "LICENSE-2" not in out and "tokenizer.pipe" not in out
    assert out["LICENSE-3"].read_text() == "plain" and not out["LICENSE-3"].is_symlink()
    assert not any(b"a key" in path.read_bytes() for path in out.values())


def test_links_of_the_hubs_cache(source, tmp_path):
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (source / "LICENSE").write_text("MIT")
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (tmp_path / "private").write_text("a key")
    (snapshot / "LICENSE-2").symlink_to(tmp_path / "private")  # in the cache, and no blob of it
    JOBS["cast"](snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    assert not (tmp_path / "out" / "LICENSE-2").exists()
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    load_model(tmp_path / "out")


def test_save_model_takes_the_tokenizers_code_along(source, tmp_path):
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.X", None]})
    (source / "tok.py").write_text("")
    save_model(Transformer(tiny_config()).init_weights(0), tmp_path / "out", tokenizer_dir=source)
    assert (tmp_path / "out" / "tok.py").exists()


@pytest.mark.parametrize("job", JOBS)
def test_what_cannot_come_along_is_named_and_no_pointer_leads_to_it(source, tmp_path, job):
    edit(source / "config.json", auto_map={"AutoConfig": "sub.configuration_x.XConfig"})
    edit(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["../../etc.X", None]})
    (source / "tokenizer.json").symlink_to("gone")
    with pytest.warns(Notice, match="tokenizer.json: left out, since it is a link that leads now"):
        JOBS[job](source, tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        assert auto_map(tmp_path / "out" / name) is None


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_further_templates_go_along_if_they_are_of_the_folder(source, tmp_path, job, where):
    folder = (source if where == "inside" else tmp_path) / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("t")
    if where == "outside":
        (source / folder.name).symlink_to(folder)
    with nullcontext() if where == "inside" else pytest.warns(Notice, match="leads out of the"):
        JOBS[job](source, tmp_path / "out")
    copied = tmp_path / "out" / folder.name / "tool_use.jinja"
    assert copied.read_text() == "t" if where == "inside" else not copied.exists()
