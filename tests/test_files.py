"""Files that are not what they should be: refused by what they are, in one harmless line."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from safetensors.torch import save_file

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.index import read_index
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import SafetensorsFile
from dsv3.errors import DSV3Error, shown
from dsv3.files import no_duplicates, open_plain, parse_json, read_json, read_text
from dsv3.generation.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 4\n"


@pytest.fixture
def checkpoint(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config())
    return tmp_path / "in"


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


SPECIAL = {
    "pipe": (make_pipe, "a pipe"),
    "folder": (os.mkdir, "a folder"),
    "device": (lambda p: os.symlink("/dev/zero", p), "a device"),
    "socket": (make_socket, "a socket"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00002-of-00003.safetensors"])
def test_special_files(checkpoint, monkeypatch, kind, name):
    monkeypatch.chdir(checkpoint)
    if name == "config.json" and kind == "folder":
        pytest.skip("a folder in the place of config.json is met by test_config")
    make, word = SPECIAL[kind]
    (checkpoint / name).unlink()
    make(checkpoint / name)
    if name == "config.json":
        with pytest.raises(DSV3Error, match=f"not a plain file.*{word}"):
            read_text(checkpoint / name)
        return
    with pytest.raises(DSV3Error, match=f"{name}.*not a plain file.*{word}"):
        load_model(checkpoint)


def test_a_plain_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "plain").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    seen = os.stat(tmp_path / "plain")
    monkeypatch.setattr("dsv3.files.os.stat", lambda path: seen)
    with pytest.raises(DSV3Error, match="a pipe"):
        open_plain(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content, words",
    [
        (POINTER, "git-LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <HTML>", "a web page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"PK\x03\x04\0\0\0\0\0", "never opened"),
        (b"\x80\x02}q\0.\0\0\0\0", "a pickle"),
        (b"", "empty"),
        (b"\0" * 100, "zeros"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
)
@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00003.safetensors"])
def test_other_kinds_of_files_are_known_by_sight(checkpoint, content, words, name):
    (checkpoint / name).write_bytes(content)
    with pytest.raises(DSV3Error, match=f"{name}.*{words}"):
        load_model(checkpoint)


@pytest.mark.parametrize("dtype", ["F4", "F8_E5M2FNUZ", "I4", "C64"])
def test_an_unknown_dtype_is_not_damage(tmp_path, dtype):
    header = json.dumps({"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 8]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(DSV3Error, match=f"a: unknown dtype.*found {dtype}") as error:
        SafetensorsFile(path)
    assert "Download the file again" not in str(error.value)


def test_texts(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    with pytest.raises(DSV3Error, match="too large.*8 bytes|too large.*11 bytes"):
        read_json(path, most=10)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(DSV3Error, match="UTF-8.*0xff at 7"):
        read_json(path)
    for name in ("x" * 300, "a\0b", "none", "\ud800"):
        assert "\n" not in fuzz.survives(lambda name=name: read_json(tmp_path / name))


# What is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "\x1b]0;title\x07\x1b[2J",
        "a\nb\r\nc",
        "\ud800",
        "\u202eabc",
        "\x9b31m",
        10**5000,
        "x" * 10**6,
        b"\x1b",
        ["\x1b"] * 999,
    ],
    ids=range(9),
)
def test_nothing_shown_moves_a_terminal(value):
    error = DSV3Error(
        "what " + str(value)[:9] if isinstance(value, str) else "what",
        where=value,
        found=value,
        expected=value,
        fix=f"do {value}"[:20] if isinstance(value, str) else None,
    )
    line = str(error)
    assert line.isprintable() and len(line) < 2500
    line.encode("utf-8")
    assert error.found is value  # the value itself is kept for who catches it


def test_what_is_harmless_is_shown_as_it_is():
    assert shown("/data/模型/naïve file.json") == "/data/模型/naïve file.json"


def test_the_plan_of_a_job_shows_names_harmlessly(tmp_path, capsys):
    tensors = random_tensors(tiny_config())
    folder = tmp_path / "in"
    write_checkpoint(folder, tiny_config(), tensors, shards=1)
    evil = "\x1b[2Jmodel.safetensors"
    (folder / "model.safetensors").rename(folder / evil)
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, evil)}))
    cast(folder, tmp_path / "out", dry_run=True)
    assert "\x1b" not in capsys.readouterr().err


# Bounds -----------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
from dsv3.errors import DSV3Error
from dsv3.checkpoint.safetensors_io import SafetensorsFile
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    SafetensorsFile(sys.argv[1])
except DSV3Error as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error)
"""


@pytest.mark.parametrize("size", [99_000_000, 33_000_000])
def test_a_header_of_brackets_takes_no_memory(tmp_path, size):
    header = b"[" + b"[]," * (size // 3) + b"[]]"
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "a.safetensors"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    kilobytes = int(done.stdout.split()[0])
    assert kilobytes < 150_000, done.stdout


def test_many_names_and_one_duplicate():
    """Quadratic, this took minutes."""
    pairs = [(f"name {n}", n) for n in range(200_000)] + [("name 199999", 0)]
    with pytest.raises(ValueError, match="'name 199999' appears twice"):
        no_duplicates(pairs)


def test_json_fails_as_one_kind():
    for text in fuzz.RAW + ("[" * 10**6, "{", "[]," * 10**6, ""):
        with pytest.raises(ValueError):
            parse_json(text)


# Fuzz -------------------------------------------------------------------------------------------


def test_fuzzed_headers(tmp_path):
    save_file(
        {"a": torch.ones(3, 4), "b": torch.ones(5).bfloat16()},
        tmp_path / "good.safetensors",
        metadata={"format": "pt"},
    )
    good = (tmp_path / "good.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    path, refused = tmp_path / "a.safetensors", 0

    def read():
        with SafetensorsFile(path) as file:
            for name in file.entries:
                file.read(name)

    damaged = [*fuzz.bytes_of(good, 500, seed=1)]
    for text in fuzz.json_of(header, 500, seed=2):
        raw = text.encode()
        damaged.append(len(raw).to_bytes(8, "little") + raw + data)
    for content in damaged:
        path.write_bytes(content)
        refused += fuzz.survives(read) is not None
    assert refused > 700


def test_fuzzed_indexes(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    index = {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "one.safetensors", "b": "two.safetensors"},
    }
    path, refused = tmp_path / INDEX, 0

    def read():
        read_index(path)
        with CheckpointReader(tmp_path) as reader:
            reader.read("a"), reader.read("b")

    damaged = [
        *(text.encode() for text in fuzz.json_of(index, 500, seed=3)),
        *fuzz.bytes_of(json.dumps(index).encode(), 500, seed=4),
    ]
    for content in damaged:
        path.write_bytes(content)
        refused += fuzz.survives(read) is not None
    assert refused > 600


@pytest.mark.parametrize(
    "name",
    [
        INDEX,
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "tokenizer_config.json",
        "model.safetensors",
    ],
)
def test_a_link_that_leads_nowhere_is_said_to_be_one(tiny_checkpoint, tmp_path, name):
    """As a hub's cache has them after a download that was broken off; nothing else is read."""
    folder = tmp_path / "in"
    shutil.copytree(tiny_checkpoint, folder)
    if name == "model.safetensors":
        (folder / INDEX).unlink(missing_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/gone")
    with pytest.raises(DSV3Error, match=f"{name}: a link that leads nowhere .found ../blobs/gone"):
        load_model(folder)
        load_tokenizer(folder)


def test_a_single_file_of_weights_that_is_a_pipe_is_named(tmp_path):
    write_checkpoint(tmp_path, tiny_config(), shards=1)
    (tmp_path / "model.safetensors").unlink()
    make_pipe(tmp_path / "model.safetensors")
    with pytest.raises(DSV3Error, match="model.safetensors: not a plain file .found a pipe"):
        load_model(tmp_path)


def test_numbers_of_thousands_of_digits_are_no_advice_to_programmers():
    with pytest.raises(ValueError, match="^a number in it has thousands of digits$"):
        parse_json("9" * 5000)


@pytest.mark.parametrize(
    "name, words",
    [
        ("adapter_model.safetensors", "adapter is no model by itself"),
        (
            "consolidated.safetensors",
            "If that file holds the whole model, call it model.safetensors",
        ),
        ("model-00001-of-00002.safetensors", "Download the index"),
        ("model-Q4_K.gguf", "found model-Q4_K.gguf.*format of llama.cpp"),
    ],
)
def test_what_lies_there_instead_of_a_checkpoint(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DSV3Error, match=f"no checkpoint in this folder.*{words}"):
        CheckpointReader(tmp_path)
