"""Writing a new folder of weight files from an old one: plan, stream, resume.

``convert`` and ``cast`` differ in which tensors a file holds and where their bytes come from. All
else is the same and is here. A file is written with its header first and its tensors at their
places, a band of rows at a time, so memory stays at a few bands whatever the checkpoint's size.

A job of 689 GB is likely to be interrupted. Each file appears under its name only when complete,
and a record in the output folder says which job is under way and from which input. When the same
job is started again, files whose headers and sizes are as planned are skipped, and the one that
was being written starts anew. config.json comes last, then the record goes: a folder without
config.json is unfinished, and nothing takes it for a checkpoint. While a job runs it claims its
folder (``dsv3.checkpoint.folder``), so that no second one touches what it writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from dsv3.checkpoint.companions import copy_companions, openable
from dsv3.checkpoint.folder import LOCK_FILE, claim
from dsv3.checkpoint.index import INDEX_FILE, index_text
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import (
    PARTIAL,
    Planned,
    SafetensorsFile,
    StreamWriter,
    build_header,
    remove,
    stored_bytes,
    write_text,
)
from dsv3.config import CONFIG_FILE
from dsv3.errors import DSV3Error, shown
from dsv3.files import read_text
from dsv3.unfinished import RECORD_FILE, Record, read_record

# A piece of one tensor on its way to a file: name, values, first row.
Band = tuple[str, torch.Tensor, int]


@dataclass(frozen=True)
class Output:
    """One file to write. tensors: its header; bands: makes its content, piece by piece."""

    name: str
    tensors: list[Planned]
    bands: Callable[[], Iterable[Band]]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, without the header."""
        return sum(map(stored_bytes, self.tensors))


def run_job(
    task: str,
    reader: CheckpointReader,
    out_dir: str | Path,
    outputs: list[Output],
    config_text: str,
    *,
    index: bool,
    dry_run: bool,
    progress: bool,
) -> dict:
    """Write ``outputs``, the companions of the input, an index if asked for, and config.json.

    task: the job in words, e.g. "convert --tp 2"; a resumed job must match it. Returns the plan:
    {"task", "out_dir", "files": [{"name", "tensors", "bytes", "done"}], "bytes", "bytes_to_write",
    "bytes_free", "largest_tensor" (of input and output)}. With dry_run nothing is written. Raises
    DSV3Error when the folder is in use for something else, or the disk too small or not writable.
    """
    out = Path(out_dir)
    with contextlib.nullcontext() if dry_run else claim(out, task):
        record = _record(task, reader)
        resumed = _check_folder(out, record)
        done = {o.name for o in outputs if resumed and _is_complete(out / o.name, o.tensors)}
        leftovers = [
            path
            for o in outputs
            if resumed and o.name not in done
            for path in (out / o.name, out / (o.name + PARTIAL))
            if path.is_file()
        ]
        plan = _plan(task, reader, out, outputs, done, leftovers)
        if progress:
            print(plan_text(plan), file=sys.stderr)
        if not dry_run:
            _check_space(plan)
            for path in leftovers:
                remove(path)
            _write(reader, out, outputs, done, plan, record, config_text, index, progress)
    return plan


def _write(
    reader: CheckpointReader,
    out: Path,
    outputs: list[Output],
    done: set[str],
    plan: dict,
    record: dict,
    config_text: str,
    index: bool,
    progress: bool,
) -> None:
    finished = len(done)
    try:
        write_text(out / RECORD_FILE, json.dumps(record) + "\n")
        with tqdm(
            total=plan["bytes"],
            initial=plan["bytes"] - plan["bytes_to_write"],
            unit="B",
            unit_scale=True,
            desc=plan["task"],
            file=sys.stderr,
            disable=None if progress else True,
        ) as bar:  # None: off where there is no tty
            for output in outputs:
                if output.name in done:
                    continue
                with StreamWriter(out / output.name, output.tensors) as file:
                    for name, values, first_row in output.bands():
                        file.write(name, values, first_row)
                        bar.update(values.nbytes)
                finished += 1
        copy_companions(reader.folder, out)
        if index:
            write_text(out / INDEX_FILE, index_text({o.name: o.tensors for o in outputs}))
        write_text(out / CONFIG_FILE, openable(config_text, reader.folder))
        (out / RECORD_FILE).unlink()
    except BaseException:
        if not finished:  # nothing worth resuming
            remove(out / RECORD_FILE)
        raise


def row_bands(
    reader: CheckpointReader, name: str, part: tuple[range, ...] | None = None, *, multiple: int = 1
) -> Iterator[tuple[torch.Tensor, int]]:
    """A tensor, or the part of it given as one range per dimension, in bands of rows.

    Yields (values, first row counted from the part's own first row). multiple: bands start at
    multiples of so many rows.
    """
    entry = reader.entry(name)
    if part is None:
        part = tuple(range(n) for n in entry.shape)
    rows = part[0] if part else range(1)
    columns = part[1] if len(part) > 1 else None
    for band in entry.bands(len(rows), multiple):
        wanted = range(rows.start + band.start, rows.start + band.stop) if part else None
        yield reader.read(name, wanted, columns), band.start


def plan_text(plan: dict) -> str:
    """The plan as a few lines for people."""
    files = plan["files"]
    lines = [f"{plan['task']} -> {shown(plan['out_dir'])}"]
    listed = files if len(files) <= 8 else files[:4] + files[-3:]
    for file in listed:
        lines.append(
            f"  {shown(file['name'])}: {file['tensors']} tensors, {file['bytes'] / 1e9:.3f} GB"
            + (", done" if file["done"] else "")
        )
    if len(listed) < len(files):
        lines.insert(5, f"  ... {len(files) - len(listed)} more files ...")
    lines.append(
        f"  to write: {plan['bytes_to_write'] / 1e9:.3f} GB of {plan['bytes'] / 1e9:.3f}; "
        f"free on the disk: {plan['bytes_free'] / 1e9:.3f} GB; "
        f"largest tensor: {plan['largest_tensor'] / 1e9:.3f} GB"
    )
    return "\n".join(lines)


def _plan(
    task: str,
    reader: CheckpointReader,
    out: Path,
    outputs: list[Output],
    done: set[str],
    leftovers: list[Path],
) -> dict:
    files = [
        {"name": o.name, "tensors": len(o.tensors), "bytes": o.nbytes, "done": o.name in done}
        for o in outputs
    ]
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    return {
        "task": task,
        "out_dir": str(out),
        "files": files,
        "bytes": sum(f["bytes"] for f in files),
        "bytes_to_write": sum(f["bytes"] for f in files if not f["done"]),
        # What a killed job left of its unfinished file takes room that is about to be free.
        "bytes_free": shutil.disk_usage(place).free
        + sum(path.stat().st_blocks * 512 for path in leftovers),
        "largest_tensor": max(
            *(stored_bytes(t) for o in outputs for t in o.tensors),
            *(reader.entry(name).nbytes for name in reader.home),
        ),
    }


def _check_space(plan: dict) -> None:
    if plan["bytes_to_write"] > plan["bytes_free"]:
        raise DSV3Error(
            "not enough space on the disk",
            where=plan["out_dir"],
            found=f"{plan['bytes_free'] / 1e9:.1f} GB free",
            expected=f"{plan['bytes_to_write'] / 1e9:.1f} GB",
            fix="Free some disk space, or name another folder",
        )


def _check_folder(out: Path, record: dict) -> bool:
    """True when the folder holds this very job, unfinished; DSV3Error when it holds another."""
    if not out.exists():
        return False
    if not out.is_dir():
        raise DSV3Error("not a folder", where=out, fix="Name an empty or new folder")
    if not (out / RECORD_FILE).exists():
        # A kill within the very first write leaves only the record's unfinished copy.
        if {path.name for path in out.iterdir()} - {LOCK_FILE, RECORD_FILE + PARTIAL}:
            raise DSV3Error(
                "the output folder is not empty", where=out, fix="Name an empty or new folder"
            )
        return False
    task, files = read_record(out) or Record("of an unknown kind", {})
    if task != record["task"]:
        raise DSV3Error(
            "the output folder holds an unfinished job of another kind",
            where=out,
            found=task,
            expected=record["task"],
            fix="Remove it, or name another folder",
        )
    for name in sorted({*files, *record["input"]}):
        if files.get(name) != record["input"].get(name):
            raise DSV3Error(
                "the output folder holds an unfinished job from other input",
                where=out,
                found=f"{name} has been replaced, copied or given other permissions since",
                fix="Remove the output folder and start again: its files and new ones could be "
                "of two models",
            )
    return True


def _is_complete(path: Path, tensors: list[Planned]) -> bool:
    try:
        with SafetensorsFile(path) as file:
            return file.entries == build_header(tensors)[1]
    except DSV3Error:
        return False


def _record(task: str, reader: CheckpointReader) -> dict:
    """What a resumed job must find again: the task, and a digest of each file of its input."""
    config = read_text(reader.folder / CONFIG_FILE)
    return {
        "task": task,
        "input": {
            CONFIG_FILE: hashlib.sha256(config.encode()).hexdigest()[:32],
            **{name: file.fingerprint() for name, file in sorted(reader.files.items())},
        },
    }
