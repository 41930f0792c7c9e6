"""Files that others made, opened with care.

A checkpoint comes from the net, a disk, a colleague. Where a file of weights should be there may
be a pipe (opening it would wait for ever), a device, a folder, the 130-byte pointer that git-LFS
leaves when the file itself was not fetched, a web page saved under the file's name, or a text of
gigabytes. Everything that is read goes through here, so that each of these is refused by what it
is, before a byte of it is believed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

from dsv3.errors import DSV3Error

# The longest JSON that is parsed: seven times the index of the 671B model (91,991 names, 9 MB).
MOST_JSON = 64 << 20
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_AGAIN = "Download the file again"
_ORIGINAL = "Download the safetensors files of the original checkpoint"
# First bytes -> (what such a file is, the way out). Lower case; leading white space is skipped.
_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/",
        "a git-LFS pointer, not the file it stands for",
        "Fetch the files themselves with: git lfs pull",
    ),
    (b"<!doctype", "a web page", _AGAIN + "; a page was saved under its name"),
    (b"<html", "a web page", _AGAIN + "; a page was saved under its name"),
    (b"<?xml", "an XML document", _AGAIN + "; an answer of the server was saved under its name"),
    (b"gguf", "a GGUF file, a format of llama.cpp", _ORIGINAL),
    (
        b"pk\x03\x04",
        "a zip archive; torch.save writes pickles in such",
        "Pickles can run code and are never opened. " + _ORIGINAL,
    ),
    *(
        (
            b"\x80" + bytes([version]),
            "a pickle",
            "Pickles can run code and are never opened. " + _ORIGINAL,
        )
        for version in range(2, 6)
    ),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "Unpack it first"),
    (b"\x89hdf", "an HDF5 file", _ORIGINAL),
    (b"\x93numpy", "a NumPy array", _ORIGINAL),
)
# Endings of files that run code when they are read.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def open_plain(path: str | Path, *, absent: str | None = None) -> FileIO:
    """Open a plain file for reading, unbuffered; links are followed.

    absent: what to do when there is no such file, for the error's last words. Raises DSV3Error
    when there is none, when it may not be read, and for a pipe, a device, a socket or a folder,
    none of which is opened for longer than it takes to see that.
    """
    path = Path(path)
    try:
        kind = _kind(os.stat(path).st_mode)
        if kind is None:
            # Should it become a pipe in between, then O_NONBLOCK keeps us from waiting in it.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            file = FileIO(handle, "r")
            kind = _kind(os.fstat(handle).st_mode)
            if kind is None:
                return file
            file.close()
    except FileNotFoundError:
        if path.is_symlink():
            raise DSV3Error(
                "a link that leads nowhere",
                where=path,
                found=os.readlink(path),
                fix="Fetch the file that it stands for",
            ) from None
        raise DSV3Error("no such file", where=path, fix=absent) from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise unreadable(path, error) from None
    raise DSV3Error("not a plain file", where=path, found=kind)


def read_text(path: str | Path, *, most: int = MOST_JSON, absent: str | None = None) -> str:
    """The text of a plain file in UTF-8; a byte order mark at its start is dropped.

    most: bytes beyond which the file is refused unread. Raises DSV3Error as ``open_plain`` does,
    and for a file of another kind, such as a git-LFS pointer.
    """
    path = Path(path)
    with open_plain(path, absent=absent) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise DSV3Error(
                "too large for a file of its kind",
                where=path,
                found=f"{size:,} bytes",
                expected=f"at most {most:,}",
            )
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise unreadable(path, error) from None
    refuse_foreign(path, data[:64])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DSV3Error(
            "not a text in UTF-8",
            where=path,
            found=f"byte 0x{data[error.start]:02x} at {error.start}",
            fix=_AGAIN,
        ) from None


def read_json(
    path: str | Path, *, most: int = MOST_JSON, absent: str | None = None, unique: bool = False
) -> Any:
    """What a JSON file says. unique: refuse an object that has a name twice. See ``read_text``."""
    text = read_text(path, most=most, absent=absent)
    try:
        return parse_json(text, unique=unique)
    except ValueError as error:
        raise DSV3Error("is not JSON", where=path, found=error, fix=_AGAIN) from None


def parse_json(text: str, *, unique: bool = False) -> Any:
    """``json.loads`` whose memory and failures are bounded: every refusal is a ValueError.

    Python needs 64 bytes for the two of an empty list, so a text that is mostly brackets is
    refused. Values of checkpoints come to less than a bracket in eight characters.
    """
    if text.count("[") + text.count("{") > 1000 + len(text) // 8:
        raise ValueError("it is almost nothing but brackets")
    try:
        return json.loads(text, object_pairs_hook=no_duplicates if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "digits" in str(error):  # Python's words tell programmers how to lift its limit
            raise ValueError("a number in it has thousands of digits") from None
        raise


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for ``json.loads``: an object whose names are all different, else ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"{name!r} appears twice")
            seen.add(name)
    return result


def refuse_foreign(path: Path, head: bytes) -> None:
    """Raise DSV3Error for a file that its first bytes show to be something else altogether."""
    if not head:
        raise DSV3Error("the file is empty", where=path, fix=_AGAIN)
    if not any(head):
        raise DSV3Error(
            "the file begins with zeros",
            where=path,
            fix=_AGAIN + "; the download was probably cut off",
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").lower()
    for sign, found, fix in _FOREIGN:
        if start.startswith(sign):
            raise DSV3Error("another kind of file", where=path, found=found, fix=fix)


def refuse_pickle(path: Path) -> None:
    """Raise DSV3Error for a file that would have to be unpickled."""
    if path.suffix in PICKLES:
        raise DSV3Error(
            "pickle files can run code and are never opened",
            where=path,
            expected="a .safetensors file",
        )


def unreadable(path: Path, error: Exception) -> DSV3Error:
    """The system's refusal to read, as an error for people."""
    return DSV3Error("cannot be read", where=path, found=getattr(error, "strerror", None) or error)


def unwritable(path: Path, error: Exception) -> DSV3Error:
    """The system's refusal to write, as an error for people."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DSV3Error(
        "cannot be written",
        where=path,
        found=getattr(error, "strerror", None) or error,
        fix="Free some disk space, or name another folder"
        if full
        else "Name a folder that can be written",
    )


def _kind(mode: int) -> str | None:
    """What a file is when it is not a plain one."""
    if stat.S_ISREG(mode):
        return None
    return next((name for test, name in _KINDS if test(mode)), "a special file")
