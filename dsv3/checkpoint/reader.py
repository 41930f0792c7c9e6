"""A folder of safetensors shards, read as one set of tensors.

Everything that the headers say is a plain value here (``entries``), so that whoever checks or plans
asks nothing twice; tensors are read when they are wanted, whole or in part.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from dsv3.checkpoint.index import INDEX_FILE, Listing, list_files
from dsv3.checkpoint.safetensors_io import Entry, SafetensorsFile
from dsv3.errors import DSV3Error


class CheckpointReader:
    """A folder of shards as one set of tensors.

    The shards are those of ``model.safetensors.index.json``, or the single
    ``model.safetensors``, or ``files`` by name. folder; files: file name -> SafetensorsFile;
    home: tensor name -> its file; entries: tensor name -> dtype, shape and place; indexed: whether
    there is an index; astray: tensor name -> file name where the index leads nowhere, which matters
    only to who needs that tensor.

    Raises DSV3Error when the index or a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path, files: Iterable[str] | None = None):
        self.folder = Path(folder)
        self.files: dict[str, SafetensorsFile] = {}
        self.home: dict[str, SafetensorsFile] = {}
        self.astray: dict[str, str] = {}
        listing = list_files(self.folder) if files is None else Listing(tuple(files))
        self.indexed = listing.places is not None
        try:
            for name in listing.files:
                self.files[name] = SafetensorsFile(self.folder / name)
            if listing.places is None:
                self._take_all()
            else:
                self._take(listing.places)
        except BaseException:
            self.close()
            raise
        self.entries: dict[str, Entry] = {
            name: file.entries[name] for name, file in self.home.items()
        }

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; entries stay readable."""
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
        if name not in self.entries:
            raise self.absent(name)
        return self.entries[name]

    def read(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """A tensor or a part of it, see ``SafetensorsFile.read``."""
        if name not in self.home:
            raise self.absent(name)
        return self.home[name].read(name, rows, columns)

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

    def _take_all(self) -> None:
        """Every tensor of every file."""
        for file_name, file in self.files.items():
            for name in file.entries:
                if name in self.home:
                    raise DSV3Error(
                        "the same tensor lies in two files",
                        where=name,
                        found=f"{self.home[name].path.name} and {file_name}",
                    )
                self.home[name] = file

    def _take(self, places: dict[str, str]) -> None:
        """The tensors of an index, where it says that they lie."""
        for name, file_name in places.items():
            file = self.files.get(file_name)
            if file is None or name not in file.entries:
                self.astray[name] = file_name
            else:
                self.home[name] = file
