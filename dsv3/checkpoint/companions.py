"""The small files beside the weights: tokenizer, template, licence, and code that they point at.

An output of ``cast`` or ``convert`` should open wherever the input did. So what belongs to a
checkpoint comes along, and that includes the Python files which ``auto_map`` in config.json or
tokenizer_config.json names. They are copied as text and never run here; whoever opens the output
with ``trust_remote_code`` decides that anew. A pointer to a file that is not there is dropped,
since nothing would open with it.

One rule about links: a companion is a plain file of the folder, or a link of the hub's cache into
its own blobs; what any other link leads to is not copied. A ``LICENSE`` that leads to somebody's
private key would otherwise be published with the output. (Weights may be read through any link:
their content is numbers, and a folder of links to shards elsewhere is common.)
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsv3.checkpoint.folder import LOCK_FILE
from dsv3.checkpoint.safetensors_io import PARTIAL, remove, write_text
from dsv3.config import CONFIG_FILE
from dsv3.errors import DSV3Error, Notice
from dsv3.files import PICKLES, open_plain, parse_json, read_text, unwritable

TOKENIZER_CONFIG = "tokenizer_config.json"
# Small files that belong to a checkpoint and are carried along; none of them is run.
COMPANIONS = (
    "*token*",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "*.tiktoken",
    "*.model",
    "additional_chat_templates/*.jinja",
)
_CODE = re.compile(r"([A-Za-z_]\w*)\.\w+")


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, template and licence files, and the code they point at, each complete or not
    at all. A ``Notice`` names what is left out because it is a link that leads elsewhere."""
    code = has_code(source)
    patterns = (*COMPANIONS, *(["*.py"] if code else []))
    for path in sorted({p for pattern in patterns for p in source.glob(pattern)}):
        if path.name in (CONFIG_FILE, LOCK_FILE) or path.suffix in (
            *PICKLES,
            ".safetensors",
            PARTIAL,
        ):
            continue
        if not _belongs(path, source):
            warnings.warn(Notice(f"{path}: left out, since it is {_what(path)}"), stacklevel=2)
            continue
        if path.name == TOKENIZER_CONFIG:
            write_text(target / path.name, openable(read_text(path), source))
            continue
        copied = target / path.relative_to(source)
        partial = copied.with_name(path.name + PARTIAL)
        try:
            copied.parent.mkdir(exist_ok=True)
            with open_plain(path) as original, open(partial, "wb") as copy:
                shutil.copyfileobj(original, copy)
            partial.replace(copied)
        except OSError as error:
            remove(partial)
            raise unwritable(copied, error) from None


def openable(text: str, source: Path) -> str:
    """The text of a config without pointers to code files that ``source`` does not have.

    It comes back as it is, to the byte, where all that it points at is there.
    """
    try:
        data = parse_json(text)
    except ValueError:
        return text  # who reads it will say so
    pointers = data.get("auto_map") if isinstance(data, dict) else None
    if not isinstance(pointers, dict):
        return text
    kept = {
        name: value
        for name, value in pointers.items()
        if all(file and _belongs(source / file, source) for file in _code_files(value))
    }
    if kept == pointers:
        return text
    del data["auto_map"]
    if kept:
        data["auto_map"] = kept
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def has_code(source: Path) -> bool:
    """Whether a checkpoint's configs point at Python files in its folder."""
    for name in (CONFIG_FILE, TOKENIZER_CONFIG):
        if (source / name).is_file():
            try:
                data = parse_json(read_text(source / name))
            except (DSV3Error, ValueError):
                continue
            if isinstance(data, dict) and any(_code_files(data.get("auto_map"))):
                return True
    return False


def _code_files(pointer: Any) -> Iterator[str]:
    """Names of the files that an auto_map or a value of it needs ("module.Class"; pointers into
    another repository, "name--module.Class", need none here); "" for what is no such pointer."""
    if isinstance(pointer, (list, dict)):
        for value in pointer.values() if isinstance(pointer, dict) else pointer:
            yield from _code_files(value)
    elif isinstance(pointer, str) and "--" not in pointer:
        match = _CODE.fullmatch(pointer)
        yield f"{match[1]}.py" if match else ""


def _what(path: Path) -> str:
    """Why a file does not belong to its folder."""
    if path.is_symlink() and not path.exists():
        return "a link that leads nowhere"
    if path.is_symlink() or path.is_file():
        return "a link that leads out of the folder"
    return "a folder" if path.is_dir() else "not a plain file"


def _belongs(path: Path, source: Path) -> bool:
    """Whether a file is a plain one of ``source``, or a link of the hub's cache into its blobs."""
    folder, real = source.resolve(), path.resolve()
    blobs = folder.parent.parent / "blobs"
    in_cache = folder.parent.name == "snapshots" and real.parent == blobs.resolve()
    return real.is_file() and (real.is_relative_to(folder) or in_cache)
