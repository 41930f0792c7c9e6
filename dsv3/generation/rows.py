"""The rows of a batch: prompts as they come in, the texts that grow from them, the account."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from dsv3.cache import check_is_cache
from dsv3.errors import DSV3Error
from dsv3.generation.sampling import Choice, Sampling
from dsv3.generation.stops import Released, RowText


@dataclass(frozen=True)
class Token:
    """One new token. row: of the batch; id; text: what it adds to the row's text ("" where no
    tokenizer was given); logprob: as in ``Choice``, None unless wanted."""

    row: int
    id: int
    text: str = ""
    logprob: float | None = None


class Depth(NamedTuple):
    """What became of the drafts of one depth, the first, second ... of their passes.

    verified: those whose forerunners in the pass had all been accepted; accepted: of these.
    """

    verified: int
    accepted: int


@dataclass
class Generation:
    """What a run gave. With n samples, row n i + k is sample k of prompt i.

    ids: new tokens of each row, the end-of-sequence token left out; stopped_by: for each row
    "eos", "stop" (a stop string), "length" (max_new_tokens), "context" (no room left) or
    "interrupt", and "" where a stream was closed early; seconds: wall time from the first prefilled
    token to the last chosen one, with what the reader of a stream did in between; acceptance: share
    of drafted tokens that were accepted, None where nothing was drafted; cache_bytes: of all caches
    used; passes: how often a row was fed after prefill, over all rows; chosen: tokens of each row
    with those that only ended it. texts: of each row, where a tokenizer was given. logprobs: of
    each id, where they were asked for (``generation.sampling.Choice`` says of which distribution).
    accepted_by_depth: of the first draft of a pass, the second ..., None where nothing was drafted.

    A text ends before its stop string. Its ids are those of the tokens that begin before it, so
    the last of them may run on into it.
    """

    ids: list[list[int]]
    stopped_by: list[str]
    seconds: float
    cache_bytes: int
    acceptance: float | None = None
    passes: int = 0
    chosen: Sequence[int] = ()
    texts: list[str] | None = None
    logprobs: list[list[float | None]] | None = None
    accepted_by_depth: list[Depth] | None = None

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens a row got from a pass after prefill: 1 in plain decoding, up to k + 1 with k
        drafts."""
        return (sum(self.chosen) - len(self.chosen)) / self.passes if self.passes else None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, over the wall time with prefill."""
        return sum(map(len, self.ids)) / self.seconds if self.seconds else 0.0


def as_prompts(prompts) -> list[list[int]]:
    """Prompts as lists: of lists, tensors or arrays of ids, or one of two dimensions (b, s)."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise DSV3Error(
            "not a list of prompts",
            where="prompts",
            found=type(prompts).__name__,
            expected="list[list[int]], or ids of shape (b, s)",
            fix="Give a list of prompts, encoded",
        )
    return [_as_ids(prompt.tolist() if hasattr(prompt, "tolist") else prompt) for prompt in prompts]


def _as_ids(prompt):
    """A prompt with the ids that lie in it as tensors of one number as such."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)):
        return prompt
    return [id.tolist() if hasattr(id, "tolist") else id for id in prompt]


def check_prompts(
    prompts: Sequence[Sequence[int]], vocab_size: int, context: int, no_tokens: Sequence[int] = ()
) -> None:
    """Raise DSV3Error for the first prompt that cannot be run. no_tokens: ids that are none."""
    none = set(no_tokens)
    for row, prompt in enumerate(prompts):
        where = f"prompt {row}"
        if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)):
            raise DSV3Error(
                "not a list of token ids",
                where=where,
                found=type(prompt).__name__,
                expected="list[int]",
                fix="Give a list of prompts, encoded",
            )
        if not prompt:
            raise DSV3Error(
                "empty prompt",
                where=where,
                found="0 tokens",
                expected="at least 1",
                fix="Begin with the bos token",
            )
        if len(prompt) >= context:
            raise DSV3Error(
                "prompt longer than the context",
                where=where,
                found=f"{len(prompt)} tokens",
                expected=f"at most {context - 1} (max_position_embeddings - 1)",
                fix="Shorten the prompt",
            )
        for id in prompt:
            if isinstance(id, bool) or not isinstance(id, Integral) or not 0 <= id < vocab_size:
                raise DSV3Error(
                    "token id out of range",
                    where=where,
                    found=id,
                    expected=f"0 to {vocab_size - 1}",
                    fix="Encode with the tokenizer of this checkpoint",
                )
            if id in none:
                raise DSV3Error(
                    "an id that is no token",
                    where=where,
                    found=id,
                    fix="Encode with the tokenizer of this checkpoint",
                )


def check_beginnings(
    prompts: Sequence[Sequence[int]], cache, draft_cache, sampling: Sampling, context: int
) -> None:
    """Raise DSV3Error unless each row of the caches holds a beginning of its prompt and has room.

    An entry of a draft cache is about the token after its own.
    """
    for name, kept in (("cache", cache), ("draft_cache", draft_cache)):
        if kept is not None:
            check_is_cache(kept, name)
            if len(kept.lengths) != len(prompts):
                raise DSV3Error(
                    "the cache is for another batch",
                    where=name,
                    found=f"{len(kept.lengths)} rows",
                    expected=f"{len(prompts)}, one a prompt",
                )
    for row, prompt in enumerate(prompts):
        for name, kept, ids in (("cache", cache, prompt), ("draft_cache", draft_cache, prompt[1:])):
            if kept is None or (name == "draft_cache" and not sampling.speculative):
                continue
            need = len(prompt) + (sampling.max_new_tokens - 1 if sampling.n == 1 else 0)
            if kept.max_seq_len < min(need, context - 1):
                raise DSV3Error(
                    "the cache is too short",
                    where=f"{name}, row {row}",
                    found=f"room for {kept.max_seq_len} tokens",
                    expected=f"{min(need, context - 1)} or more",
                    fix="Make it longer (max_seq_len)",
                )
            held = kept.tokens(row)
            if len(held) > len(prompt):
                raise DSV3Error(
                    "the cache holds more than the prompt",
                    where=f"{name}, row {row}",
                    found=f"{len(held)} tokens",
                    expected=f"at most {len(prompt)}",
                    fix="Cut it back with cache.truncate, or start with a new one",
                )
            for place, (was, id) in enumerate(zip(held, ids)):
                if was not in (id, -1):  # -1: written by hand, and nobody knows for what
                    raise DSV3Error(
                        "the cache holds another text",
                        where=f"{name}, row {row}",
                        found=f"token {was} at {place}",
                        expected=id,
                        fix=f"Cut it back with cache.truncate, at most to {place}",
                    )


def check_unused(cache, held: list[int]) -> None:
    """Between two steps of a stream its reader may have used the cache for something else."""
    if cache.lengths != held:
        raise DSV3Error(
            "the cache was used elsewhere while this stream was open",
            where="cache",
            found=f"lengths {cache.lengths}",
            expected=f"lengths {held}",
            fix="Close a stream before its cache serves another",
        )


class Rows:
    """The growing rows of a batch and why each one ended.

    A token counts as soon as it is chosen. It appears in ``ids`` when it is certain to stay:
    at once, or with a tokenizer when its text is (``dsv3.generation.stops``).
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        context: int,
        sampling: Sampling,
        eos_ids: Iterable[int],
        token_bytes: Callable[[int], bytes] | None,
    ):
        count = len(prompts)
        self.ids: list[list[int]] = [[] for _ in range(count)]
        self.logprobs: list[list[float | None]] = [[] for _ in range(count)]
        self.pieces: list[list[str]] = [[] for _ in range(count)]
        self.stopped_by = [""] * count
        self.chosen = [0] * count  # tokens, with those that end a row
        self.room = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.full = [
            "length" if room == sampling.max_new_tokens else "context" for room in self.room
        ]
        self.eos = set(eos_ids)
        self._texts = [RowText(token_bytes, sampling.stop) for _ in range(count)]

    @property
    def left(self) -> list[int]:
        """How many tokens each row may still take; 0 for a row that has ended."""
        return [
            0 if reason else room - chosen
            for reason, room, chosen in zip(self.stopped_by, self.room, self.chosen)
        ]

    def add(self, choices: Sequence[Sequence[Choice]]) -> list[Token]:
        """Give each row its tokens; those that come after its end are dropped. Returns the
        tokens that are certain now."""
        certain = []
        for row, some in enumerate(choices):
            for choice in some:
                if not self.stopped_by[row]:
                    certain += self._add_one(row, choice)
        return certain

    def interrupt(self) -> list[Token]:
        """End the rows that are still going."""
        return [
            token
            for row, reason in enumerate(self.stopped_by)
            if not reason
            for token in self._end(row, "interrupt")
        ]

    def _add_one(self, row: int, choice: Choice) -> list[Token]:
        self.chosen[row] += 1
        if choice.id in self.eos:
            return self._end(row, "eos")
        certain = self._keep(row, self._texts[row].push(choice))
        if self._texts[row].stopped:
            self.stopped_by[row] = "stop"
        elif self.chosen[row] == self.room[row]:
            certain += self._end(row, self.full[row])
        return certain

    def _end(self, row: int, reason: str) -> list[Token]:
        self.stopped_by[row] = reason
        return self._keep(row, self._texts[row].flush())

    def _keep(self, row: int, released: list[Released]) -> list[Token]:
        for (id, logprob), text in released:
            self.ids[row].append(id)
            self.logprobs[row].append(logprob)
            self.pieces[row].append(text)
        return [Token(row, id, text, logprob) for (id, logprob), text in released]
