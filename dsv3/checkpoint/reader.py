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
from collections.abc import Iterable
from pathlib import Path

import torch

from dsv3.checkpoint.safetensors_io import (
    PICKLES,
    Entry,
    Planned,
    SafetensorsFile,
    refuse_pickle,
    stored_bytes,
)
from dsv3.errors import DSV3Error
from dsv3.files import parse_json, read_text

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_CONVERTED = re.compile(r"(model|mtp)(\d+)-mp(\d+)\.safetensors")


class CheckpointReader:
    """A folder of shards as one set of tensors.

    The shards are those of ``model.safetensors.index.json``, or the single
    ``model.safetensors``, or ``files`` by name. folder; files: file name -> SafetensorsFile;
    home: tensor name -> its file; indexed: whether there is an index; astray: tensor name -> file
    name where the index leads nowhere, which matters only to who needs that tensor.

    Raises DSV3Error when the index or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path, files: Iterable[str] | None = None):
        self.folder = Path(folder)
        self.files: dict[str, SafetensorsFile] = {}
        self.home: dict[str, SafetensorsFile] = {}
        self.astray: dict[str, str] = {}
        self.indexed = False
        if not self.folder.is_dir():
            raise DSV3Error("no such folder", where=self.folder)
        try:
            if files is not None:
                self._open_all(files)
            elif os.path.lexists(self.folder / INDEX_FILE):
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

    def read(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """A tensor or a part of it, see ``SafetensorsFile.read``."""
        return self._file(name).read(name, rows, columns)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self.home:
            raise self.absent(name)
        return self.home[name]

    def absent(self, name: str) -> DSV3Error:
        """Why a tensor is not there, as an error for people."""
        if name not in self.astray:
            return DSV3Error("missing tensor", where=self.folder, expected=name)
        file_name = self.astray[name]
        if file_name in self.files:
            return DSV3Error(
                "the index names a tensor that its file does not have",
                where=self.folder / file_name,
                expected=name,
            )
        return DSV3Error(
            "the index names a file that is missing",
            where=self.folder / INDEX_FILE,
            found=file_name,
            expected="the file in the same folder",
            fix="Download it, or the whole checkpoint again",
        )

    def _only_file(self) -> str:
        if os.path.lexists(self.folder / SINGLE_FILE):
            return SINGLE_FILE  # whatever it is: who opens it says so
        names = sorted(p.name for p in self.folder.iterdir() if p.is_file())
        shards = [n for n in names if n.endswith(".safetensors")]
        found = (
            shards
            or [n for n in names if n.endswith((*PICKLES, ".gguf"))]
            or ["no safetensors file"]
        )
        fix = None
        if ranks := converted_ranks(self.folder):
            fix = (
                f"This folder was converted for {ranks} ranks; name the folder that it was "
                "made from"
            )
        elif any("adapter" in name for name in shards):
            fix = "An adapter is no model by itself: merge it into the model that it was made for"
        elif len(shards) == 1 and "-of-" not in shards[0]:
            fix = f"If that file holds the whole model, call it {SINGLE_FILE}"
        elif shards:
            fix = "Download the index that belongs to the shards"
        elif found[0].endswith(".gguf"):
            fix = (
                "GGUF is a format of llama.cpp: download the safetensors files of the original "
                "checkpoint"
            )
        elif found[0].endswith(PICKLES):
            fix = "These are pickle files, which can run code and are never opened here"
        raise DSV3Error(
            "no checkpoint in this folder",
            where=self.folder,
            found=", ".join(found[:3]) + (", ..." if found[3:] else ""),
            expected=f"{INDEX_FILE} or {SINGLE_FILE}",
            fix=fix,
        )

    def _open_all(self, names: Iterable[str]) -> None:
        for file_name in names:
            file = self.files[file_name] = SafetensorsFile(self.folder / file_name)
            for name in file.entries:
                if name in self.home:
                    raise DSV3Error(
                        "the same tensor lies in two files",
                        where=name,
                        found=f"{self.home[name].path.name} and {file_name}",
                    )
                self.home[name] = file

    def _open_indexed(self, index: Path) -> None:
        for name, file_name in read_index(index).items():
            if file_name not in self.files and os.path.exists(self.folder / file_name):
                self.files[file_name] = SafetensorsFile(self.folder / file_name)
            file = self.files.get(file_name)
            if file is None or name not in file.entries:
                self.astray[name] = file_name
            else:
                self.home[name] = file


def read_index(path: Path) -> dict[str, str]:
    """weight_map of an index: tensor name -> name of a file beside it. Checked."""
    try:
        data = parse_json(read_text(path), unique=True)
        weight_map = data["weight_map"]
        if not (
            isinstance(weight_map, dict)
            and weight_map
            and all(isinstance(f, str) for f in weight_map.values())
        ):
            raise ValueError("weight_map is not an object of file names")
    except (ValueError, TypeError, KeyError) as error:
        raise DSV3Error(
            "damaged index",
            where=path,
            found=error,
            expected='{"metadata": {...}, "weight_map": {tensor: file}}',
        ) from None
    for file_name in set(weight_map.values()):
        if file_name != os.path.basename(file_name) or "\\" in file_name or file_name in ("", ".."):
            raise DSV3Error(
                "the index names a file outside its folder",
                where=path,
                found=repr(file_name),
                expected="a plain file name",
            )
        refuse_pickle(path.parent / file_name)
        if not file_name.endswith(".safetensors"):
            raise DSV3Error(
                "the index names a file of another kind",
                where=path,
                found=file_name,
                expected="a .safetensors file",
            )
    return weight_map


def converted_ranks(folder: str | Path) -> int | None:
    """For how many ranks a folder was converted; None for a folder of another kind."""
    folder = Path(folder)
    found = {
        int(match[3])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CONVERTED.fullmatch(path.name))
    }
    if len(found) > 1:
        raise DSV3Error(
            "files for different numbers of ranks in one folder",
            where=folder,
            found=sorted(found),
            fix="Keep each conversion in a folder of its own",
        )
    return found.pop() if found else None


def index_text(files: dict[str, list[Planned]]) -> str:
    """The index of files to come: file name -> its tensors."""
    total = sum(stored_bytes(tensor) for tensors in files.values() for tensor in tensors)
    weight_map = {name: file for file, tensors in files.items() for name, _, _ in tensors}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
    )
