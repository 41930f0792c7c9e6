"""A folder of safetensors shards, read as one set of tensors.

A large checkpoint is cut into files of a few gigabytes, at no particular place: a weight and its
scales may lie in different shards. ``model.safetensors.index.json`` says which tensor lies where.
It is a file from the net like any other, so it is checked before it is followed: it may name
only files beside it, those files must exist, and each must hold what the index says.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.files import parse_json, read_text, unwritable
from dsv3.layout import TensorSpec, layout
from dsv3.safetensors_io import (PARTIAL, PICKLES, Entry, Planned, SafetensorsFile, refuse_pickle,
                                 remove, stored_bytes)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_CONVERTED = re.compile(r"(model|mtp)(\d+)-mp(\d+)\.safetensors")
# Small files that belong to a checkpoint and are carried along; none of them is run.
COMPANIONS = ("*token*", "vocab.json", "merges.txt", "chat_template*", "generation_config.json",
              "LICENSE*")


class CheckpointReader:
    """A folder of shards as one set of tensors.

    The shards are those of ``model.safetensors.index.json``, or the single
    ``model.safetensors``, or ``files`` by name. folder; files: file name -> SafetensorsFile;
    home: tensor name -> its file; indexed: whether there is an index.

    Raises DSV3Error when the index or a shard is missing, damaged or at odds with the other.
    """

    def __init__(self, folder: str | Path, files: Iterable[str] | None = None):
        self.folder = Path(folder)
        self.files: dict[str, SafetensorsFile] = {}
        self.home: dict[str, SafetensorsFile] = {}
        self.indexed = False
        if not self.folder.is_dir():
            raise DSV3Error("no such folder", where=self.folder)
        try:
            if files is not None:
                self._open_all(files)
            elif (self.folder / INDEX_FILE).exists():
                self.indexed = True
                self._open_indexed(self.folder / INDEX_FILE)
            else:
                self._open_all([self._only_file()])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        for file in self.files.values():
            file.close()

    @property
    def bytes_read(self) -> int:
        """Tensor bytes read so far, over all files."""
        return sum(file.bytes_read for file in self.files.values())

    def __contains__(self, name: str) -> bool:
        return name in self.home

    def entry(self, name: str) -> Entry:
        """dtype, shape and place of a tensor; DSV3Error when the checkpoint has none such."""
        return self._file(name).entry(name)

    def read(self, name: str, rows: range | None = None,
             columns: range | None = None) -> torch.Tensor:
        """A tensor or a part of it, see ``SafetensorsFile.read``."""
        return self._file(name).read(name, rows, columns)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self.home:
            raise DSV3Error("missing tensor", where=self.folder, expected=name)
        return self.home[name]

    def _only_file(self) -> str:
        names = sorted(p.name for p in self.folder.iterdir() if p.is_file())
        if SINGLE_FILE in names:
            return SINGLE_FILE
        shards = [n for n in names if n.endswith(".safetensors")]
        found = shards or [n for n in names if n.endswith(PICKLES)] or ["no safetensors file"]
        fix = None
        if ranks := converted_ranks(self.folder):
            fix = (f"This folder was converted for {ranks} ranks; name the folder that it was "
                   "made from")
        elif shards:
            fix = "Download the index that belongs to the shards"
        elif found[0].endswith(PICKLES):
            fix = "These are pickle files, which can run code and are never opened here"
        raise DSV3Error("no checkpoint in this folder", where=self.folder,
                        found=", ".join(found[:3]) + (", ..." if found[3:] else ""),
                        expected=f"{INDEX_FILE} or {SINGLE_FILE}", fix=fix)

    def _open_all(self, names: Iterable[str]) -> None:
        for file_name in names:
            file = self.files[file_name] = SafetensorsFile(self.folder / file_name)
            for name in file.entries:
                if name in self.home:
                    raise DSV3Error("the same tensor lies in two files", where=name,
                                    found=f"{self.home[name].path.name} and {file_name}")
                self.home[name] = file

    def _open_indexed(self, index: Path) -> None:
        for name, file_name in read_index(index).items():
            file = self.files.get(file_name)
            if file is None:
                if not (self.folder / file_name).exists():
                    raise DSV3Error("the index names a file that is missing", where=index,
                                    found=file_name, expected="the file in the same folder",
                                    fix="Download it, or the whole checkpoint again")
                file = self.files[file_name] = SafetensorsFile(self.folder / file_name)
            if name not in file.entries:
                raise DSV3Error("the index names a tensor that its file does not have",
                                where=self.folder / file_name, expected=name)
            self.home[name] = file


def read_index(path: Path) -> dict[str, str]:
    """weight_map of an index: tensor name -> name of a file beside it. Checked."""
    try:
        data = parse_json(read_text(path), unique=True)
        weight_map = data["weight_map"]
        if not (isinstance(weight_map, dict) and weight_map
                and all(isinstance(f, str) for f in weight_map.values())):
            raise ValueError("weight_map is not an object of file names")
    except (ValueError, TypeError, KeyError) as error:
        raise DSV3Error("damaged index", where=path, found=error,
                        expected='{"metadata": {...}, "weight_map": {tensor: file}}') from None
    for file_name in set(weight_map.values()):
        if file_name != os.path.basename(file_name) or "\\" in file_name or file_name in ("", ".."):
            raise DSV3Error("the index names a file outside its folder", where=path,
                            found=repr(file_name), expected="a plain file name")
        refuse_pickle(path.parent / file_name)
        if not file_name.endswith(".safetensors"):
            raise DSV3Error("the index names a file of another kind", where=path,
                            found=file_name, expected="a .safetensors file")
    return weight_map


def converted_ranks(folder: str | Path) -> int | None:
    """For how many ranks a folder was converted; None for a folder of another kind."""
    folder = Path(folder)
    found = {int(match[3]) for path in (folder.iterdir() if folder.is_dir() else ())
             if (match := _CONVERTED.fullmatch(path.name))}
    if len(found) > 1:
        raise DSV3Error("files for different numbers of ranks in one folder", where=folder,
                        found=sorted(found), fix="Keep each conversion in a folder of its own")
    return found.pop() if found else None


def index_text(files: dict[str, list[Planned]]) -> str:
    """The index of files to come: file name -> its tensors."""
    total = sum(stored_bytes(tensor) for tensors in files.values() for tensor in tensors)
    weight_map = {name: file for file, tensors in files.items() for name, _, _ in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map},
                      indent=2) + "\n"


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, template and licence files, each complete or not at all."""
    for path in sorted({p for pattern in COMPANIONS for p in source.glob(pattern)}):
        if not path.is_file() or path.suffix in (*PICKLES, ".safetensors", PARTIAL):
            continue
        partial = target / (path.name + PARTIAL)
        try:
            shutil.copyfile(path, partial)
            partial.replace(target / path.name)
        except OSError as error:
            remove(partial)
            raise unwritable(target / path.name, error) from None


def open_checkpoint(folder: str | Path) -> tuple[ModelConfig, CheckpointReader, list[TensorSpec]]:
    """Open a checkpoint in the released layout and hold it to its config.json.

    Returns the config, the reader, and the tensors that are there (scales and copies included).
    Raises DSV3Error for whatever is missing, unexpected, or of the wrong shape or dtype; only
    headers are read.
    """
    config = ModelConfig.from_pretrained(folder)
    reader = CheckpointReader(folder)
    try:
        specs = layout(config)
        check_tensors(reader, {spec.hf_name: (spec, spec.shape) for spec in specs})
    except BaseException:
        reader.close()
        raise
    return config, reader, [spec for spec in specs if spec.hf_name in reader]


def check_tensors(reader: CheckpointReader,
                  expected: dict[str, tuple[TensorSpec, tuple[int, ...]]]) -> None:
    """Raise DSV3Error unless the reader has the expected tensors (name -> spec and shape).

    The MTP modules' copies of embedding and head may be there or not.
    """
    for name, (spec, shape) in expected.items():
        if name not in reader:
            continue
        entry = reader.entry(name)
        if entry.dtype not in _accepted(spec):
            raise DSV3Error("wrong dtype", where=name, found=entry.dtype,
                            expected=" or ".join(_accepted(spec)), fix=_dtype_hint(entry.dtype))
        if entry.shape != shape:
            raise DSV3Error("wrong shape", where=name, found=list(entry.shape),
                            expected=list(shape), fix="config.json describes another model")
    missing = [(name, spec) for name, (spec, _) in expected.items()
               if name not in reader and not spec.copy_of]
    if missing:
        name, spec = missing[0]
        fix = None
        if spec.part == "mtp" and not any(spec.part == "mtp" for name, (spec, _) in expected.items()
                                          if name in reader):
            fix = ("No MTP tensor is there: for a checkpoint without MTP, set "
                   "num_nextn_predict_layers to 0 in config.json")
        raise DSV3Error(
            f"missing {'scale' if spec.scale_of else 'tensor'}"
            + (f", one of {len(missing)} missing tensors" if len(missing) > 1 else ""),
            where=f"{reader.folder}: {name}", fix=fix)
    unexpected = [name for name in reader.home if name not in expected]
    if unexpected:
        raise DSV3Error("unexpected tensor"
                        + (f", one of {len(unexpected)}" if len(unexpected) > 1 else ""),
                        where=f"{reader.folder}: {unexpected[0]}",
                        expected="only tensors that config.json calls for")


def _accepted(spec: TensorSpec) -> tuple[str, ...]:
    if spec.dtype == "F8_E4M3":
        return ("F8_E4M3",)
    if spec.scale_of:
        return ("F32", "F8_E8M0", "U8")
    return ("BF16", "F32", "F16")  # plain numbers; another tool may have kept more bits


def _dtype_hint(found: str) -> str | None:
    if found == "F8_E4M3":
        return "An FP8 checkpoint needs quantization_config in its config.json"
    if found in ("BF16", "F16", "F32"):
        return "For a checkpoint that is not quantised, remove quantization_config from config.json"
    return None
