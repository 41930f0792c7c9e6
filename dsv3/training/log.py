"""``log.jsonl``: one JSON object a line, written as it happens.

A run that is killed and goes on repeats the steps since its last checkpoint, and their lines with
them. A checkpoint therefore knows how long the log was, and whatever comes after is cut off. The
log is for people and plots; no step depends on it, so a run goes on when its log was removed or
cut.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.files import open_plain, unwritable

LOG_FILE = "log.jsonl"


class Log:
    """The log in a folder."""

    def __init__(self, folder: Path):
        self.path = folder / LOG_FILE

    @property
    def bytes(self) -> int:
        """How long it is now."""
        return self.path.stat().st_size if self.path.exists() else 0

    def begin(self) -> None:
        """Begin an empty one, whatever was there."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def go_on(self, size: int) -> None:
        """Cut off what came after the first ``size`` bytes, and a line that has no end."""
        if not self.path.exists():
            return
        with open_plain(self.path) as file:
            kept = file.read(size)
        try:
            os.truncate(self.path, kept.rfind(b"\n") + 1)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def add(self, **values) -> None:
        """One line more."""
        if self.path.exists() and not self.path.is_file():
            raise DSV3Error(
                "cannot be written",
                where=self.path,
                found="not a plain file",
                fix="Move it out of the way",
            )
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise unwritable(self.path, error) from None
