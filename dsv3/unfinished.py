"""A folder that a job has not finished, and the record in it that says so.

``convert`` and ``cast`` leave the record where they write until config.json is there. It names the
job and its input, so that the same command goes on where it stopped; whoever takes the folder for
a checkpoint meanwhile is told what it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from dsv3.errors import DSV3Error
from dsv3.files import read_json

RECORD_FILE = ".dsv3-unfinished.json"


class Record(NamedTuple):
    """task: the job in words, "convert --tp 2"; files: a digest of each file of its input."""

    task: str
    files: dict[str, str]


def read_record(folder: Path) -> Record | None:
    """The record in ``folder``; None where it cannot be understood."""
    try:
        found = read_json(folder / RECORD_FILE)
        return Record(str(found["task"]), dict(found["input"]))
    except (DSV3Error, KeyError, TypeError, ValueError):
        return None


def how_to_finish(folder: Path) -> str | None:
    """What to do with a folder that has no config.json yet; None where no job is unfinished."""
    if not os.path.exists(folder / RECORD_FILE):  # False too for names that no file can have
        return None
    record = read_record(folder)
    if record is None:
        return "A job is unfinished here and its record is damaged: remove the folder, start anew"
    return (
        f"A job is unfinished here, {record.task}: wait for it, or if it was stopped start it "
        "again with the same input and this folder, and it goes on"
    )
