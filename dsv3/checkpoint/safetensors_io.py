"""Safetensors files, read and written piece by piece.

The format is small enough to read here: 8 bytes with the length of a JSON header, the header
(for each tensor its dtype, shape, and first and last byte), then the tensors' bytes, without gaps.
Nothing in it can run code, unlike in a pickle (``.bin``, ``.pt``, ``.pth``), which is therefore
never opened here.

Why not the ``safetensors`` library? It maps a file into memory and writes a file from a dict of
complete tensors. Converting 689 GB needs the opposite: a reader that fetches a rank's rows and
nothing else, and a writer that writes the header first and then each tensor, in any order, at its
place. The library is the oracle in the tests, both ways.

A header is believed only after it has been checked against itself and against the file: a
truncated download or a wrong offset otherwise shows up as noise in some layer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from dsv3.errors import DSV3Error
from dsv3.files import open_plain, parse_json, refuse_foreign, refuse_pickle, unreadable, unwritable

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Bytes moved at a time. It bounds the memory of everything that streams.
PIECE = 16 << 20
# Twice the header that all 91,991 tensors of the 671B model would need in one file.
_MAX_HEADER = 32 << 20
# Pieces of a file's content that its fingerprint takes in, and their bytes.
_SAMPLES, _SAMPLE = 16, 4096
# What a file is called while it is written.
PARTIAL = ".partial"

# A tensor to be written: name, dtype as in DTYPES, shape.
Planned = tuple[str, str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file. start, end: its bytes, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def row_bytes(self) -> int:
        """Bytes of one index of the first dimension (of the whole, for a scalar)."""
        return prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    def bands(self, rows: int, multiple: int = 1) -> Iterator[range]:
        """``rows`` rows in ranges of about PIECE bytes, cut at multiples of ``multiple``."""
        step = max(1, PIECE // max(1, self.row_bytes) // multiple) * multiple
        for first in range(0, rows, step):
            yield range(first, min(first + step, rows))


class SafetensorsFile:
    """One file, its header checked; tensors are read on demand.

    path; entries: name -> Entry in file order; metadata: the header's strings; size: bytes of
    the file; bytes_read: tensor bytes read so far.

    Raises DSV3Error when the file cannot be read, or when its header contradicts itself or the
    file's size.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.bytes_read = 0
        refuse_pickle(self.path)
        self._file = open_plain(self.path)
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; entries stay readable."""
        self._file.close()

    def read(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """A tensor as it is stored, or some of its rows (dimension 0) and columns (dimension 1).

        Rows lie together and are read alone. Columns do not: whole rows pass through a buffer of
        bounded size, and the wanted part is kept. A disk delivers whole pages anyway, and what
        one rank passes over, another rank of the same machine wants.
        """
        entry = self.entry(name)
        rows = range(entry.shape[0] if entry.shape else 1) if rows is None else rows
        if columns is None or len(columns) == entry.shape[1]:
            out = torch.empty(
                (len(rows), *entry.shape[1:]), dtype=DTYPES[entry.dtype], device="cpu"
            )
            self._fill(out, entry, rows.start, name)
            return out if entry.shape else out.reshape(())
        out = torch.empty(
            (len(rows), len(columns), *entry.shape[2:]), dtype=DTYPES[entry.dtype], device="cpu"
        )
        for band in entry.bands(len(rows)):
            whole = torch.empty((len(band), *entry.shape[1:]), dtype=out.dtype, device="cpu")
            self._fill(whole, entry, rows.start + band.start, name)
            out[band.start : band.stop] = whole[:, columns.start : columns.stop]
        return out

    def entry(self, name: str) -> Entry:
        """Where a tensor lies; raises DSV3Error when the file has none of this name."""
        try:
            return self.entries[name]
        except KeyError:
            raise DSV3Error("no such tensor in this file", where=self.path, found=name) from None

    def _fill(self, out: torch.Tensor, entry: Entry, first_row: int, name: str) -> None:
        view, at = _bytes_of(out), self._data + entry.start + first_row * entry.row_bytes
        self.bytes_read += len(view)
        while view:
            try:
                got = os.preadv(self._file.fileno(), [view[: 1 << 30]], at)
            except OSError as error:
                raise unreadable(self.path, error) from None
            if not got:
                raise DSV3Error(
                    "the file became shorter while it was read", where=f"{self.path}: {name}"
                )
            view, at = view[got:], at + got

    def _read_at(self, at: int, count: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), count, at)
        except OSError as error:
            raise unreadable(self.path, error) from None

    def fingerprint(self) -> str:
        """Digest that changes when the file is replaced, however well its times were kept.

        ``cp -p``, ``rsync -t`` and ``tar`` set the time of the last change back, but not the time
        at which that was done (ctime). Where a file system knows no such time, the header and a
        few pieces of the content tell most other files apart; all of it would take hours to read.
        """
        about = os.fstat(self._file.fileno())
        digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}".encode())
        digest.update(self._read_at(0, self._data))
        for piece in range(_SAMPLES):
            at = self._data + (self.size - self._data) * piece // _SAMPLES
            digest.update(self._read_at(at, _SAMPLE))
        return digest.hexdigest()[:32]

    def _read_header(self) -> None:
        self.size = os.fstat(self._file.fileno()).st_size
        head = self._read_at(0, 64)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8 or not 2 <= length <= min(self.size - 8, _MAX_HEADER):
            refuse_foreign(self.path, head)
            raise DSV3Error(
                "truncated, or not a safetensors file",
                where=self.path,
                found=f"a header said to take {length} bytes in a file of {self.size}",
                fix="Download the file again",
            )
        self._data = 8 + length
        try:
            header = parse_json(self._read_at(8, length).decode("utf-8"), unique=True)
            if not isinstance(header, dict):
                raise ValueError("it is not an object")
            self.metadata = header.pop("__metadata__", {})
            if not (
                isinstance(self.metadata, dict)
                and all(isinstance(value, str) for value in self.metadata.values())
            ):
                raise ValueError("__metadata__ is not an object of strings")
            self.entries = {name: _entry(name, value, self.path) for name, value in header.items()}
            end = 0
            for name, entry in sorted(self.entries.items(), key=lambda e: (e[1].start, e[1].end)):
                if entry.start != end:
                    raise ValueError(
                        f"{name} starts at byte {entry.start} of the data, "
                        f"where {end} is next: tensors overlap or leave a gap"
                    )
                end = entry.end
        except ValueError as error:
            raise DSV3Error(
                "damaged header", where=self.path, found=error, fix="Download the file again"
            ) from None
        if self._data + end != self.size:
            raise DSV3Error(
                "truncated or too long",
                where=self.path,
                found=f"{self.size} bytes",
                expected=f"{self._data + end} by its header",
                fix="Download the file again",
            )


class StreamWriter:
    """Writes one safetensors file: header first, then tensors or bands of rows in any order.

    tensors: (name, dtype, shape) of all tensors to come. The bytes go to ``path`` + ".partial",
    which becomes ``path`` when the ``with`` block ends well and every byte has been written; it
    is removed when the block raises. So a file called ``path`` is always complete.
    """

    def __init__(self, path: str | Path, tensors: Iterable[Planned]):
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + PARTIAL)
        header, self.entries = build_header(tensors)
        self._data = len(header)
        self._left = {name: entry.nbytes for name, entry in self.entries.items()}
        try:
            self._file = open(self.partial, "wb", buffering=0)  # noqa: SIM115 - closed in __exit__
        except OSError as error:
            raise unwritable(self.path, error) from None
        try:
            self._write_at(memoryview(header), 0)
        except BaseException:
            self._abandon()
            raise

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind, value, trace) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            missing = [name for name, left in self._left.items() if left]
            if missing:
                raise RuntimeError(f"{self.path}: never written: {missing[:3]}")
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        except BaseException as error:
            self._abandon()
            if isinstance(error, OSError):
                raise unwritable(self.path, error) from None
            raise

    def write(self, name: str, value: torch.Tensor, first_row: int = 0) -> None:
        """Write a whole tensor, or a band of its rows that starts at ``first_row``."""
        entry = self.entries[name]
        if DTYPE_NAMES.get(value.dtype) != entry.dtype or value.shape[1:] != entry.shape[1:]:
            raise ValueError(f"{name}: {value.dtype} {tuple(value.shape)} does not fit {entry}")
        data = _bytes_of(value.contiguous())
        at = first_row * entry.row_bytes
        if at + len(data) > entry.nbytes:
            raise ValueError(f"{name}: rows from {first_row} on do not fit {entry}")
        self._write_at(data, self._data + entry.start + at)
        self._left[name] -= len(data)

    def _write_at(self, data: memoryview, at: int) -> None:
        try:
            while data:
                put = os.pwrite(self._file.fileno(), data[: 1 << 30], at)
                data, at = data[put:], at + put
        except OSError as error:
            raise unwritable(self.path, error) from None

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):  # some disks report only now that they are full
            self._file.close()
        remove(self.partial)


def build_header(tensors: Iterable[Planned]) -> tuple[bytes, dict]:
    """Header bytes (with their length in front) and name -> Entry, for tensors yet to be written.

    Wide dtypes come first, so that every tensor starts at a multiple of its item size.
    """
    entries: dict[str, Entry] = {}
    at = 0
    for name, dtype, shape in sorted(tensors, key=lambda t: -DTYPES[t[1]].itemsize):
        if name in entries:
            raise ValueError(f"{name} is listed twice")
        end = at + stored_bytes((name, dtype, shape))
        entries[name] = Entry(dtype, tuple(shape), at, end)
        at = end
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": e.dtype, "shape": e.shape, "data_offsets": (e.start, e.end)}
        for name, e in entries.items()
    }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, entries


def stored_bytes(tensor: Planned) -> int:
    """Bytes of a tensor to be written."""
    return prod(tensor[2]) * DTYPES[tensor[1]].itemsize


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is either complete or not there."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        remove(partial)
        raise unwritable(path, error) from None


def remove(path: Path) -> None:
    """Remove an unfinished file of ours if it is there; where that fails, too, the failure that
    led here is the one to be told."""
    with contextlib.suppress(OSError):
        path.unlink()


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files they name."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _entry(name: str, value: object, path: Path) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or not re.fullmatch(r"[A-Z][A-Z0-9_]{0,30}", dtype):
        raise ValueError(f"{name} has an unknown dtype {dtype!r}")
    if dtype not in DTYPES:  # not damage: newer, or of another way to quantise
        raise DSV3Error(
            "unknown dtype, not supported here",
            where=f"{path}: {name}",
            found=dtype,
            expected="one of " + ", ".join(DTYPES),
            fix="Take the checkpoint as released, in FP8 or BF16",
        )
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a shape or offsets that are not whole numbers, 0 or more")
    start, end = offsets
    size = prod(shape) * DTYPES[dtype].itemsize
    if end - start != size:
        raise ValueError(
            f"{name} is {dtype} {shape}, which takes {size} bytes, but has {end - start}"
        )
    return Entry(dtype, tuple(shape), start, end)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.reshape(-1).view(torch.uint8)
    # pyrefly: ignore[bad-argument-type] - numpy's arrays are buffers
    return memoryview(flat.numpy()) if flat.numel() else memoryview(b"")
