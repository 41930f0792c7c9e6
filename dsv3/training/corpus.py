"""The text of a run: what is read, what is held out, and the tokenizer learned from it.

The tokenizer follows from the text, and so a file that is missing or cut is simply made again. A
run that goes on must have the very same one, though: every id that the model has learned would
otherwise mean another piece of text. So each checkpoint holds its digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from dsv3 import data
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup
from dsv3.training.state import digest

TOKENIZER_FILE = "tokenizer.json"
_SAMPLES = 40  # documents of each domain that is made by rule


class Corpus:
    """Domains, tokenizer and held-out tokens of a run.

    domains: documents of plays, code and arithmetic; text: digest of all that can be read (of
    what is made by rule, of a sample);
    tokenizer, and ``tokenizer_digest`` of its file; token_bytes: bytes of text behind each id;
    held_out: name -> tokens of the held-out text. say: told in one line what is being done.
    """

    def __init__(
        self, plays: str | Path | None, code: str | Path | None, say: Callable[[str], None]
    ):
        say("reading the plays, the Python library and the sums (about 10 s)")
        self.domains = data.load_domains(plays, code)
        made = data.with_others(self.domains, ("recall", "chats"))[len(self.domains) :]
        self.text = hashlib.sha256(
            "".join(
                [document for domain in self.domains for document in domain.train]
                + [
                    domain.make(np.random.default_rng(number), 256)
                    for domain in made
                    if domain.make
                    for number in range(_SAMPLES)
                ]
            ).encode()
        ).hexdigest()
        self._say = say

    def learn_tokenizer(
        self, folder: Path, config: ModelConfig, group: TensorGroup, known: str | None
    ) -> None:
        """Make the tokenizer of this text in ``folder``, or take the one that is there.

        known: the digest that a checkpoint remembers. A file that does not have it, cut or of
        another run, is made again; DSV3Error when that gives another tokenizer than the run had.
        """
        file = folder / TOKENIZER_FILE
        if group.rank == 0:
            if known is None or not _has_digest(file, known):
                self._say(f"learning a tokenizer of {config.vocab_size:,} tokens (about 5 s)")
                learned = data.train_tokenizer(
                    data.tokenizer_texts(self.domains), config.vocab_size
                )
                data.save_tokenizer(learned, folder, config.max_position_embeddings)
            else:
                data.save_tokenizer_settings(folder, config.max_position_embeddings)
        self.tokenizer_digest = group.broadcast_object(digest(file) if group.rank == 0 else None)
        if known not in (None, self.tokenizer_digest):
            raise DSV3Error(
                "another tokenizer was learned here",
                where=file,
                found="the same text gives another one now",
                fix="Use the version of tokenizers that the run began with, or give a "
                "new --out folder",
            )
        if not _has_digest(file, self.tokenizer_digest):
            raise DSV3Error(
                "not the tokenizer that rank 0 has just written",
                where=file,
                found=None if file.exists() else "no such file",
                fix="Give an --out folder that all machines share",
            )
        self.tokenizer = Tokenizer.from_file(str(file))
        self.token_bytes = torch.from_numpy(data.token_bytes(self.tokenizer)).to(group.device)
        self._say("counting the held-out text")
        self.held_out = {
            domain.name: data.pack(self.tokenizer, domain.held_out) for domain in self.domains
        }

    def check_held_out(self, length: int) -> None:
        """Raise DSV3Error for a domain whose held-out text does not fill one window."""
        for name, ids in self.held_out.items():
            if len(ids) < length:
                raise DSV3Error(
                    "too little held-out text",
                    where=name,
                    found=f"{len(ids)} tokens",
                    expected=f"{length}, one window, or more",
                )

    def windows(self, length: int, overlap: int, most: int | None) -> dict[str, torch.Tensor]:
        """Held-out windows by domain, all or about ``most`` of each, evenly spaced."""
        windows = {
            name: data.in_order(ids, length + overlap, overlap)
            for name, ids in self.held_out.items()
        }
        return {
            name: some if most is None else some[:: max(len(some) // most, 1)]
            for name, some in windows.items()
        }

    def stream(self, shares: Mapping[str, float], **options) -> data.Stream:
        """Training text of a mixture; options: of ``data.Stream``."""
        domains = data.with_others(self.domains, shares)
        return data.Stream(self.tokenizer, domains, shares, **options)


def _has_digest(file: Path, known: str) -> bool:
    try:
        return digest(file) == known
    except DSV3Error:
        return False
