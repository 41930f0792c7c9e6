"""Tokenizers in other formats than tokenizer.json: what they are, and the way to one.

A checkpoint whose folder holds no tokenizer.json often holds its tokenizer all the same, in the
format of another library. Copying the files again would not help there, so each is recognised by
its name and its first bytes, and the message says how a tokenizer.json is made of it.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.files import open_plain

# "IQ== 0": a token's bytes in base64, and its id.
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?$")


def no_tokenizer(folder: Path) -> DSV3Error:
    """The error for a folder without tokenizer.json, which says what is there instead."""
    where = folder / "tokenizer.json"
    for name in ("tiktoken.model", "tokenizer.model"):
        if (folder / name).exists() and _TIKTOKEN.match(_first_line(folder / name)):
            return DSV3Error(
                "no such file",
                where=where,
                found=f"a tiktoken tokenizer, {name}",
                fix=_from_tiktoken(folder, name),
            )
    slow = "AutoTokenizer.from_pretrained('.').save_pretrained('.')"
    if (folder / "tokenizer.model").exists():
        return DSV3Error(
            "no such file",
            where=where,
            found="a sentencepiece tokenizer, tokenizer.model",
            expected="a byte-level tokenizer.json",
            fix="DeepSeek-V3 and its family have byte-level tokenizers: use the tokenizer.json of "
            "the model that this one was made from",
        )
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return DSV3Error(
            "no such file",
            where=where,
            found="its parts, vocab.json and merges.txt",
            fix='Make it of them in that folder with transformers: python -c "from transformers '
            f'import AutoTokenizer; {slow}"',
        )
    return DSV3Error(
        "no such file", where=where, fix="Copy the checkpoint's tokenizer files into the folder"
    )


def _from_tiktoken(folder: Path, name: str) -> str:
    code = next(iter(sorted(folder.glob("tokenization_*.py"))), None)
    source = code.name if code else "the code that came with the model"
    return (
        "tiktoken files are not read. There, with transformers and tiktoken: from "
        "transformers.convert_slow_tokenizer import TikTokenConverter; TikTokenConverter("
        f"{name!r}, pattern=P, extra_special_tokens=T).converted().save('tokenizer.json'). "
        f"{source} says P, pat_str, and T, all special tokens by their ids, reserved ones too"
    )


def _first_line(file: Path) -> bytes:
    with open_plain(file) as opened:
        return opened.read(4096).partition(b"\n")[0]
