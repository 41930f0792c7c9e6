"""Documents to an endless stream of tokens, and the stream to windows.

Documents are packed end to end and windows are cut anywhere, without a mask between documents, as
in TR 4.2: the model learns from the begin token that what came before no longer counts.

The domains are mixed by tokens, not by documents: the next document always comes from the domain
that is furthest behind its share. Each domain reads its documents in a new order in each epoch.
Windows are read in a shuffled order, about 262,000 tokens at a time. Read in a row, a batch of
windows would be one scene of a play, the next one a page of sums, and each step would pull the
model and its routers another way: after 1.1 million tokens of the small model's training the loss
on held-out plays was 5.80 nats a token in a row and 5.35 shuffled.

Domains made by rule (``Domain.make``) never end and never repeat. How far they may reach, from a
fact to the question about it, can grow with the tokens read: what is asked for at a long distance
from the start is learned late or not at all.

All of this follows from the seed alone, so the number of tokens read is the whole state of the
stream. A run that is stopped and resumed reads what it would have read.

Of the code, a tenth of the documents is read with a hole to fill in (TR 4.1): the text behind the
hole comes before the text within it, so that a model that only reads forward learns to write what
fits between two given parts::

    BOS <fim_begin> prefix <fim_hole> suffix <fim_end> middle EOS
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count

import numpy as np
import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from dsv3.data.domains import Domain
from dsv3.data.vocabulary import BOS, EOS, FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3.errors import DSV3Error

_CHUNK = 1 << 20  # tokens by which the buffer grows
_SHUFFLED = 1 << 18  # tokens whose windows are shuffled together


def fill_in_middle(document: str, rng: np.random.Generator) -> str:
    """The document with its text cut at two random characters, in prefix-suffix-middle order."""
    text = document.removeprefix(BOS).removesuffix(EOS)
    first, second = sorted(rng.integers(0, len(text) + 1, 2).tolist())
    return (
        BOS
        + FIM_BEGIN
        + text[:first]
        + FIM_HOLE
        + text[second:]
        + FIM_END
        + text[first:second]
        + EOS
    )


class Stream:
    """Endless packed training text; ``position`` counts tokens read and is its whole state.

    shares: share of tokens by domain name, in any unit; length: tokens of a window; targets:
    tokens that follow each window; fim_rate: share of code documents with a hole; reach: tokens of
    the stream so far -> most tokens of a document that is made by rule (default: a window's).
    ``Stream(..., position=p)`` with the same other arguments goes on bit-equal from p.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        domains: list[Domain],
        shares: Mapping[str, float],
        *,
        length: int,
        targets: int,
        seed: int,
        fim_rate: float = 0.1,
        reach: Callable[[float], float] | None = None,
        position: int = 0,
    ):
        names = [domain.name for domain in domains]
        unknown = [name for name in shares if name not in names]
        if unknown or not shares or min(shares.values()) < 0 or not sum(shares.values()) > 0:
            raise DSV3Error(
                "wrong shares",
                where="stream",
                found=dict(shares),
                expected="numbers of at least 0 for " + ", ".join(names),
            )
        used = [
            (number, domain)
            for number, domain in enumerate(domains)
            if shares.get(domain.name, 0) > 0
        ]
        empty = [domain.name for _, domain in used if not (domain.train or domain.make)]
        if empty:
            raise DSV3Error("no documents", where=f"stream, domain {empty[0]}")
        if position % length:
            raise DSV3Error(
                "a stream goes on between two windows",
                where="position",
                found=position,
                expected=f"a multiple of {length}",
            )
        self.position, self.length, self.targets = position, length, targets
        self._seed = seed
        self._shares = np.array([shares[domain.name] for _, domain in used])
        self._shares = self._shares / self._shares.sum()
        self._reach = reach or (lambda tokens: length)
        self._sources = [
            self._made(tokenizer, domain.make, [seed, number])
            if domain.make
            else _epochs(
                tokenizer, domain, [seed, number], fim_rate if domain.name == "code" else 0.0
            )
            for number, domain in used
        ]
        self._read = np.zeros(len(used), dtype=np.int64)  # tokens of each domain in _ids
        self._ids, self._filled = np.empty(_CHUNK, dtype=np.int32), 0

    def draw(self, count: int) -> Int64[Tensor, "{count} tokens"]:
        """The next ``count`` windows, (count, length + targets) int64.

        The tokens behind a window are targets of its last inputs only and are inputs of another
        window, so each token is read as input once.
        """
        first = self.position // self.length
        self.position += count * self.length
        return torch.stack([self._window(first + i) for i in range(count)])

    def _window(self, number: int) -> Int64[Tensor, " tokens"]:
        together = max(_SHUFFLED // self.length, 1)
        chunk, place = divmod(number, together)
        order = np.random.default_rng([self._seed, chunk]).permutation(together)
        start = (chunk * together + int(order[place])) * self.length
        end = start + self.length + self.targets
        self._fill(end)
        return torch.from_numpy(self._ids[start:end]).long()

    def _fill(self, end: int) -> None:
        """Append documents until ``end`` tokens are there."""
        while self._filled < end:
            # Behind by d tokens: share * (tokens so far) - tokens of this domain.
            behind = self._shares * self._filled - self._read
            number = int(behind.argmax())
            ids = next(self._sources[number])
            while self._filled + len(ids) > len(self._ids):
                self._ids = np.concatenate([self._ids, np.empty(_CHUNK, dtype=np.int32)])
            self._ids[self._filled : self._filled + len(ids)] = ids
            self._filled += len(ids)
            self._read[number] += len(ids)

    def _made(
        self, tokenizer: Tokenizer, make: Callable[[np.random.Generator, int], str], seed: list[int]
    ) -> Iterator[np.ndarray]:
        """Token ids of one document after another, each with a random generator of its own."""
        for number in count():
            text = make(np.random.default_rng([*seed, number]), round(self._reach(self._filled)))
            yield np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def _epochs(
    tokenizer: Tokenizer, domain: Domain, seed: list[int], fim_rate: float
) -> Iterator[np.ndarray]:
    """Token ids of one document after another, int32, epoch after epoch, each in a new order."""
    plain = _encode(tokenizer, domain.train)
    epoch = 0
    while True:
        rng = np.random.default_rng([*seed, epoch])
        order = rng.permutation(len(plain))
        holes = np.flatnonzero(rng.random(len(plain)) < fim_rate)
        cut = dict(
            zip(
                holes.tolist(),
                _encode(tokenizer, [fill_in_middle(domain.train[number], rng) for number in holes]),
            )
        )
        for number in order.tolist():
            yield cut.get(number, plain[number])
        epoch += 1


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.asarray(item.ids, dtype=np.int32) for item in encoded]


def in_order(ids: np.ndarray, length: int, overlap: int) -> Int64[Tensor, "windows length"]:
    """Consecutive windows (n, length) for validation; neighbours share ``overlap`` tokens.

    With overlap 1 + D each token is predicted once: the last tokens of a window are only targets
    there. What does not fill a window at the end is left out.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(ids)).long()
    return tokens.unfold(0, length, length - overlap)
