"""Which files of a folder make a checkpoint, and which tensor lies in which of them.

A large checkpoint is cut into files of a few gigabytes, at no particular place: a weight and its
scales may lie in different shards. ``model.safetensors.index.json`` says which tensor lies where.
It is a file from the net like any other, so it is checked before it is followed: it may name only
safetensors files beside it. Only names are looked at here; ``dsv3.checkpoint.reader`` opens them.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from dsv3.checkpoint.safetensors_io import Planned, stored_bytes
from dsv3.errors import DSV3Error
from dsv3.files import PICKLES, parse_json, read_text, refuse_pickle

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_CONVERTED = re.compile(r"(model|mtp)(\d+)-mp(\d+)\.safetensors")


class Listing(NamedTuple):
    """files: names of those to open; places: tensor -> file, as an index has it, or None."""

    files: tuple[str, ...]
    places: dict[str, str] | None = None


def list_files(folder: Path) -> Listing:
    """The checkpoint in ``folder``: what its index names and is there, or its only file.

    Raises DSV3Error for a folder without a checkpoint, with what it is instead.
    """
    if not folder.is_dir():
        raise DSV3Error("no such folder", where=folder)
    index = folder / INDEX_FILE
    if not os.path.lexists(index):
        return Listing((_only_file(folder),))
    places = read_index(index)
    names = dict.fromkeys(places.values())
    return Listing(tuple(name for name in names if os.path.exists(folder / name)), places)


def _only_file(folder: Path) -> str:
    """The one file of a checkpoint without an index; else DSV3Error says what the folder is."""
    if os.path.lexists(folder / SINGLE_FILE):
        return SINGLE_FILE  # whatever it is: who opens it says so
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    shards = [n for n in names if n.endswith(".safetensors")]
    found = (
        shards or [n for n in names if n.endswith((*PICKLES, ".gguf"))] or ["no safetensors file"]
    )
    fix = None
    if ranks := converted_ranks(folder):
        fix = f"This folder was converted for {ranks} ranks; name the folder that it was made from"
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
        where=folder,
        found=", ".join(found[:3]) + (", ..." if found[3:] else ""),
        expected=f"{INDEX_FILE} or {SINGLE_FILE}",
        fix=fix,
    )


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
