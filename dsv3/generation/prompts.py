"""Prompts from a file: one a line.

What a line is differs by who asks. Python's ``splitlines`` cuts at ten characters, the paragraph
mark of a word processor and the form feed of an old listing among them; a prompt that holds one
would fall apart. Here a line ends with a line feed, with or without a return before it, as editors
have it; only in a file without any line feed do returns end lines, as they did on old Macs.

A file saved on Windows may begin with a byte order mark, which is not part of the first prompt,
or be UTF-16. A pipe is welcome: ``--input-file <(sort questions)`` and ``-``, standard input.
"""

from __future__ import annotations

import codecs
import os
import select
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dsv3.errors import DSV3Error

_MOST = 256 << 20  # bytes; a device such as /dev/zero never ends
_PATIENCE = 2  # seconds of silence after which a reader of a pipe is told what is awaited
# The longer marks first: that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def read_prompts(file: str) -> list[str]:
    """The lines of ``file`` that are not blank; "-" is standard input.

    Raises DSV3Error when it cannot be read, is not text, or holds no prompt.
    """
    where = "standard input" if file == "-" else file
    text = _decode(_read(file, where), where)
    lines = (
        [line.removesuffix("\r") for line in text.split("\n")] if "\n" in text else text.split("\r")
    )
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DSV3Error(
            "no prompts in the file",
            where=where,
            found=f"{text.count(chr(10))} empty lines" if text else "0 bytes",
            expected="one prompt a line",
        )
    return prompts


@contextmanager
def handed_down(texts: list[str] | None) -> Iterator[None]:
    """Standard input that holds these prompts, for rank 0: what was a pipe has been read."""
    if texts is None:
        yield
        return
    with tempfile.TemporaryFile() as file:
        # With a mark and returns of its own, so that none of the prompts' is taken for one.
        file.write(("\ufeff" + "".join(f"{text}\r\n" for text in texts)).encode())
        file.seek(0)
        os.dup2(file.fileno(), 0)
        yield


def from_standard_input(arguments: Sequence[str]) -> list[str]:
    """The same command line, with its prompts read from standard input instead of a file."""
    changed = list(arguments)
    for at, word in enumerate(arguments):
        if word == "--input-file":
            changed[at + 1] = "-"
        elif word.startswith("--input-file="):
            changed[at] = "--input-file=-"
    return changed


def _read(file: str, where: str) -> bytes:
    """All bytes of a file, a pipe or a terminal."""
    parts, size, told = [], 0, False
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to would wait in silence.
        handle = 0 if file == "-" else os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            while size <= _MOST:
                if not select.select([handle], [], [], _PATIENCE)[0]:
                    if not told:
                        print(f"dsv3: waiting for prompts from {where}", file=sys.stderr)
                    told = True
                elif part := os.read(handle, 1 << 20):
                    parts.append(part)
                    size += len(part)
                else:
                    return b"".join(parts)
        finally:
            if handle:
                os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise DSV3Error(
            "cannot read the prompts", where=where, found=getattr(error, "strerror", None) or error
        ) from None
    raise DSV3Error(
        "too large for a file of prompts",
        where=where,
        found=f"more than {_MOST >> 20} MiB",
        fix="Split it over several runs",
    )


def _decode(data: bytes, where: str) -> str:
    mark, encoding = next((entry for entry in _MARKS if data.startswith(entry[0])), (b"", "utf-8"))
    data = data.removeprefix(mark)
    # In UTF-16 and UTF-32 every second byte of plain English is zero.
    if encoding == "utf-8" and data.count(0) > len(data) // 4:
        raise DSV3Error(
            "not a UTF-8 text file",
            where=where,
            found=f"{data.count(0)} zero bytes of {len(data)}",
            fix="If it is UTF-16, save it as UTF-8, or with a byte order mark",
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DSV3Error(
            f"not a {encoding.upper()} text file",
            where=where,
            found=f"byte {error.start}",
            fix="Save it as UTF-8",
        ) from None
