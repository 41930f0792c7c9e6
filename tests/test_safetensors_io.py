"""Own reader and writer against the safetensors library, and files that lie."""

import json
import os
import resource

import numpy as np
import pytest
import torch
from checkpoints import same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv3.checkpoint import safetensors_io
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import (
    DTYPE_NAMES,
    DTYPES,
    SafetensorsFile,
    StreamWriter,
    write_text,
)
from dsv3.errors import DSV3Error


def of_every_dtype() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    out = {}
    for i, (name, dtype) in enumerate(DTYPES.items()):
        shape = (7 + i, 5)
        raw = torch.randint(
            0,
            2 if dtype == torch.bool else 256,
            (shape[0], shape[1] * dtype.itemsize),
            generator=random,
            dtype=torch.uint8,
        )
        out[name] = raw.view(dtype)
    out |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "line": torch.arange(9),
        "cube": torch.arange(60.0).view(3, 4, 5),
    }
    return out


def test_reads_what_the_library_writes(tmp_path):
    tensors = of_every_dtype()
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "x": "y"})
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert file.metadata == {"format": "pt", "x": "y"}
        assert set(file.entries) == set(tensors)
        for name, tensor in tensors.items():
            assert same_bits(file.read(name), tensor), name
        assert file.bytes_read == sum(t.nbytes for t in tensors.values())


def test_the_library_reads_what_we_write(tmp_path):
    tensors = of_every_dtype()
    path = tmp_path / "a.safetensors"
    with StreamWriter(
        path, [(n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items()]
    ) as out:
        for name, tensor in reversed(tensors.items()):  # any order
            out.write(name, tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_tensors_are_aligned_in_what_we_write():
    text, entries = safetensors_io.build_header(
        [("a", "U8", (3,)), ("b", "F32", (5,)), ("c", "BF16", (3,))]
    )
    assert len(text) % 8 == 0
    assert all(e.start % DTYPES[e.dtype].itemsize == 0 for e in entries.values())


def test_bands_of_rows_make_the_same_file(tmp_path):
    tensor = torch.arange(50 * 6, dtype=torch.float32).view(50, 6)
    with StreamWriter(tmp_path / "a.safetensors", [("t", "F32", (50, 6))]) as out:
        for first in range(0, 50, 16):
            out.write("t", tensor[first : first + 16], first)
    assert torch.equal(load_file(tmp_path / "a.safetensors")["t"], tensor)


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_slices(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(safetensors_io, "PIECE", piece)
    tensor = torch.arange(40 * 24, dtype=torch.float32).view(40, 24)
    save_file({"t": tensor, "v": torch.arange(7)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert torch.equal(file.read("t", range(10, 20)), tensor[10:20])
        assert file.bytes_read == 10 * 24 * 4  # rows lie together: nothing else is read
        assert torch.equal(file.read("t", columns=range(6, 12)), tensor[:, 6:12])
        assert torch.equal(file.read("t", range(3, 39), range(1)), tensor[3:39, :1])
        assert torch.equal(file.read("v", range(2, 5)), torch.tensor([2, 3, 4]))


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "empty file": (b"", None, "the file is empty"),
    "header longer than the file": ({"a": entry()}, dict(length=1 << 20), "truncated"),
    "absurd header length": ({"a": entry()}, dict(length=(1 << 64) - 1), "truncated"),
    "not JSON": (b"{abc}", dict(data=b""), "damaged header"),
    "not UTF-8": (b"\xff\xfe{}", dict(data=b""), "damaged header"),
    "deep nesting": (b"[" * 100_000, dict(data=b""), "damaged header"),
    "a list": (b"[]", dict(data=b""), "not an object"),
    "data cut off": ({"a": entry()}, dict(data=b"1234"), "truncated or too long"),
    "data too long": ({"a": entry()}, dict(data=b"1" * 12), "truncated or too long"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, dict(data=b"1" * 20), "gap"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, dict(data=b"1" * 12), "overlap"),
    "same bytes twice": ({"a": entry(), "b": entry()}, dict(data=b"1" * 8), "overlap"),
    "does not start at 0": ({"a": entry(offsets=(8, 16))}, dict(data=b"1" * 16), "gap"),
    "bytes against shape": ({"a": entry(shape=(3,))}, dict(data=b"1" * 8), "takes 12 bytes"),
    "backwards": ({"a": entry(offsets=(8, 0))}, dict(data=b"1" * 8), "takes 8 bytes"),
    "huge shape": ({"a": entry(shape=(1 << 62, 1 << 62))}, dict(data=b"1" * 8), "takes"),
    "negative": ({"a": entry(shape=(-2,))}, dict(data=b"1" * 8), "whole numbers"),
    "boolean size": ({"a": entry(shape=(True,))}, dict(data=b"1" * 4), "whole numbers"),
    "fractional": ({"a": entry(shape=(2.0,))}, dict(data=b"1" * 8), "whole numbers"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, dict(data=b"1" * 8), "whole numbers"),
    "unknown dtype": ({"a": entry(dtype="F7")}, dict(data=b"1" * 8), "unknown dtype"),
    "dtype of another kind": ({"a": entry(dtype=3)}, dict(data=b"1" * 8), "unknown dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, dict(data=b"1" * 8), "described"),
    "entry is a number": ({"a": 3}, dict(data=b""), "described"),
    "odd metadata": ({"__metadata__": {"a": 1}}, dict(data=b""), "__metadata__"),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        dict(data=b"12"),
        "appears twice",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_lying_file_is_refused_in_one_line(tmp_path, case):
    header, options, message = LIES[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"") if options is None else raw_file(path, header, **options)
    with pytest.raises(DSV3Error, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl"])
def test_a_pickle_is_never_opened(tmp_path, suffix, monkeypatch):
    path = tmp_path / ("pytorch_model" + suffix)
    path.write_bytes(b"\x80\x04")
    monkeypatch.setattr("builtins.open", lambda *a, **k: pytest.fail("opened"))
    with pytest.raises(DSV3Error, match="never opened"):
        SafetensorsFile(path)
    with pytest.raises(DSV3Error, match=path.name):
        CheckpointReader(tmp_path)


def test_a_pickle_under_another_name_is_no_safetensors_file(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(DSV3Error, match="another kind of file.*never opened"):
        CheckpointReader(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"t": torch.zeros(4096)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        os.truncate(tmp_path / "a.safetensors", 5000)
        with pytest.raises(DSV3Error, match="shorter"):
            file.read("t")


def test_a_failure_leaves_no_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        with StreamWriter(path, [("t", "F32", (3,))]) as out:
            out.write("t", torch.zeros(3))
            1 / 0
    assert os.listdir(tmp_path) == ["a.safetensors"] and path.read_bytes() == b"old"


def test_a_forgotten_tensor_is_an_error_and_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="never written"):
        planned = [("t", "F32", (3,)), ("u", "U8", (1,))]
        with StreamWriter(tmp_path / "a.safetensors", planned) as out:
            out.write("t", torch.zeros(3))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "value, row",
    [(torch.zeros(3).half(), 0), (torch.zeros(4), 0), (torch.zeros(2), 2), (torch.zeros(3, 1), 0)],
)
def test_what_does_not_fit_the_header_is_not_written(tmp_path, value, row):
    with pytest.raises(ValueError):
        with StreamWriter(tmp_path / "a.safetensors", [("t", "F32", (3,))]) as out:
            out.write("t", value, row)


@pytest.fixture
def full_disk():
    """Files cannot grow beyond 64 KB: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(tmp_path, full_disk):
    with pytest.raises(DSV3Error, match="cannot be written"):
        with StreamWriter(tmp_path / "a.safetensors", [("t", "F32", (100_000,))]) as out:
            out.write("t", torch.zeros(100_000))
    with pytest.raises(DSV3Error, match="cannot be written"):
        write_text(tmp_path / "b.json", "x" * 100_000)
    assert os.listdir(tmp_path) == []


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DSV3Error, match="cannot be written"):
        StreamWriter(tmp_path / "file" / "a.safetensors", [("t", "F32", (3,))])


def test_memory_is_read_into_the_tensor_itself(tmp_path):
    """Not mapped: changing a tensor must not need a private copy, nor change the file."""
    save_file({"t": torch.ones(8)}, tmp_path / "a.safetensors")
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        file.read("t").zero_()
        assert torch.equal(file.read("t"), torch.ones(8))


# Folders of shards ------------------------------------------------------------------------------


def folder_with_index(tmp_path, weight_map):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    return tmp_path


def test_index(tmp_path):
    folder = folder_with_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with CheckpointReader(folder) as reader:
        assert set(reader.home) == {"a", "b"} and "c" not in reader
        np.testing.assert_array_equal(reader.read("b"), [1, 1, 1])
        assert reader.bytes_read == 12
        with pytest.raises(DSV3Error, match="missing tensor.*c"):
            reader.read("c")


@pytest.mark.parametrize(
    "weight_map, message",
    [
        ({"a": "gone.safetensors"}, "missing.*gone.safetensors"),
        ({"a": "../one.safetensors"}, "outside its folder"),
        ({"a": "/etc/passwd"}, "outside its folder"),
        ({"a": "sub/one.safetensors"}, "outside its folder"),
        ({"a": "..\\one.safetensors"}, "outside its folder"),
        ({"a": ".."}, "outside its folder"),
        ({"a": ""}, "outside its folder"),
        ({"a": "pytorch_model.bin"}, "never opened"),
        ({"a": "one.txt"}, "another kind"),
        ({"a": "two.safetensors"}, "does not have.*a"),
        ({"a": 3}, "damaged index"),
        ({}, "damaged index"),
        ("[]", "damaged index"),
        ("{", "damaged index"),
        ("[" * 100_000, "damaged index"),
        ('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}', "appears twice"),
    ],
)
def test_a_bad_index(tmp_path, weight_map, message):
    with pytest.raises(DSV3Error, match=message) as error:
        CheckpointReader(folder_with_index(tmp_path, weight_map)).read("a")
    assert "\n" not in str(error.value)


def test_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(DSV3Error, match="no such folder"):
        CheckpointReader(tmp_path / "none")
    with pytest.raises(DSV3Error, match="no safetensors file"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(DSV3Error, match="model-00001-of-00002"):
        CheckpointReader(tmp_path)


def test_the_same_tensor_in_two_files(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(DSV3Error, match="two files"):
        CheckpointReader(tmp_path, ["one.safetensors", "two.safetensors"])
