"""From prompts to new tokens: prefill, then one token a row and step.

*Prefill* runs the whole prompt through the model at once and leaves its latents in the cache: many
tokens a pass, limited by arithmetic. *Decode* feeds one token a row and reads every active weight
for it: limited by memory (ISCA 2.3.2), so rows of a batch share the reading.

Prompts of different lengths go through together, padded on the right; the model is told the true
length of each row, and every row keeps its own place in the cache. A row that has ended feeds
nothing any more and the others go on. No row is held back to the shortest prompt.

How a token is chosen from the logits stands in ``dsv3.sampling``; how a step can give two tokens a
row in ``dsv3.speculative``. Both ways of decoding share everything else here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from numbers import Integral
from collections.abc import Callable, Sequence

import torch

from dsv3.errors import DSV3Error
from dsv3.sampling import Chooser
from dsv3.speculative import Speculative

OnToken = Callable[[int, int], None]


@dataclass
class Generation:
    """What a run of ``complete`` gave.

    ids: new tokens of each row, the end-of-sequence token left out; stopped_by: for each row
    "eos", "length" (max_new_tokens), "context" (no room left) or "interrupt"; seconds: wall time
    from the first prefilled token to the last chosen one; acceptance: share of drafted tokens
    that were accepted, None where nothing was drafted; cache_bytes: of all caches used; passes:
    how often a row was fed after prefill, over all rows.
    """

    ids: list[list[int]]
    stopped_by: list[str]
    seconds: float
    cache_bytes: int
    acceptance: float | None = None
    passes: int = 0

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens a row got from a pass after prefill: 1 in plain decoding, up to 2 with drafts."""
        chosen = sum(map(len, self.ids)) + self.stopped_by.count("eos")
        return (chosen - len(self.ids)) / self.passes if self.passes else None

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, over the wall time with prefill."""
        return sum(map(len, self.ids)) / self.seconds if self.seconds else 0.0


def generate(
    model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    speculative: bool = False,
    valid_vocab_size: int | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, without the prompt and without the end-of-sequence token.

    prompts: token ids, ragged. temperature: 0 for greedy. top_p: in (0, 1]. seed: fixes the draw.
    eos_ids: tokens that end a row. on_token(row, id): called for each new token as it is chosen.
    speculative: draft with the MTP module and verify; the same tokens when greedy.
    valid_vocab_size: ids from here on are never chosen (the tokenizer's vocab_size).
    prefill_chunk: prompt tokens per row in one pass; None for all at once.

    Raises DSV3Error for an empty prompt, one that fills the context, an id out of range, or a
    nonsensical option.
    """
    return complete(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed, eos_ids=eos_ids, on_token=on_token, speculative=speculative,
        valid_vocab_size=valid_vocab_size, prefill_chunk=prefill_chunk,
    ).ids


@torch.inference_mode()
def complete(
    model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    on_token: OnToken | None = None,
    speculative: bool = False,
    valid_vocab_size: int | None = None,
    prefill_chunk: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    cache=None,
    draft_cache=None,
) -> Generation:
    """``generate`` with the full account.

    should_stop: asked on rank 0 after each step; True ends all rows on all ranks ("interrupt").
    cache: one that already holds the beginning of each prompt (``cache.lengths`` says how much);
    only the rest is computed. draft_cache: for speculative decoding, with the same lengths.
    """
    check_options(max_new_tokens, temperature, top_p, seed, prefill_chunk)
    valid = _valid_vocab(model.config.vocab_size, valid_vocab_size)
    context = model.config.max_position_embeddings
    check_prompts(prompts, valid, context)
    if not prompts or max_new_tokens == 0:
        return Generation([[] for _ in prompts], ["length"] * len(prompts), 0.0, 0)
    began = time.perf_counter()
    room = min(context, max(map(len, prompts)) + max_new_tokens)
    if cache is None:
        cache = model.new_cache(len(prompts), room)
    rest = [list(prompt[seen:]) for prompt, seen in zip(prompts, cache.lengths)]
    rows = Rows(prompts, max_new_tokens, context, eos_ids, on_token)
    choose = Chooser(model.group, len(prompts), temperature, top_p, seed, valid, should_stop)
    decoder = (Speculative(model, cache, choose, draft_cache) if speculative
               else Plain(model, cache, choose))
    chosen = [[id] for id in choose(prefill(model, cache, rest, prefill_chunk, decoder.watch))]
    passes = 0
    while True:
        rows.add(chosen)
        if choose.interrupted:
            rows.interrupt()
        if not any(rows.left):
            break
        passes += sum(room > 0 for room in rows.left)
        chosen = decoder.step(chosen, rows.left)
    return Generation(rows.ids, rows.stopped_by, time.perf_counter() - began, decoder.nbytes,
                      decoder.acceptance, passes)


def prefill(model, cache, rows: Sequence[Sequence[int]], chunk: int | None = None,
            watch: Callable | None = None) -> torch.Tensor:
    """Run ragged rows of tokens into the cache; logits (b, vocab) after each row's last token.

    Each row needs at least one token. In later chunks the short rows have nothing left and take
    part with length 0. watch(start, hidden, tokens, counts) gets the states of each chunk.
    """
    device = model.group.device
    counts = [len(row) for row in rows]
    width = max(counts)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
    tokens = tokens.to(device)
    chunk = chunk or width
    last = None
    for start in range(0, width, chunk):
        part = tokens[:, start : start + chunk]
        here = [min(max(count - start, 0), part.shape[1]) for count in counts]
        if watch is None:
            logits = model(part, cache=cache, lengths=here, last_only=True)
        else:
            logits, hidden = model(part, cache=cache, lengths=here, last_only=True,
                                   return_hidden=True)
            watch(start, hidden, tokens, counts)
        if last is None:
            last = logits
        else:
            fed = torch.tensor(here, device=device) > 0
            last = torch.where(fed[:, None], logits, last)
    return last


class Plain:
    """Decodes a batch one token a row and step: the form that speculative decoding must equal."""

    watch = None  # nothing to keep of prefill but the cache
    acceptance = None  # nothing is drafted

    def __init__(self, model, cache, choose: Chooser):
        self.model, self.cache, self.choose = model, cache, choose

    @property
    def nbytes(self) -> int:
        """Bytes of the cache."""
        return self.cache.nbytes

    def step(self, chosen: list[list[int]], left: list[int]) -> list[list[int]]:
        """The tokens that follow ``chosen``, those of the last step.

        left: how many tokens each row may still take; 0 for a row that has ended, which is fed
        nothing.
        """
        tokens = torch.tensor(chosen, device=self.model.group.device)
        logits = self.model(tokens, cache=self.cache, lengths=[min(room, 1) for room in left],
                            last_only=True)
        return [[id] for id in self.choose(logits)]


class Rows:
    """The growing rows of a batch and why each one ended."""

    def __init__(self, prompts, max_new_tokens: int, context: int, eos_ids: Sequence[int],
                 on_token: OnToken | None):
        self.ids: list[list[int]] = [[] for _ in prompts]
        self.stopped_by = [""] * len(prompts)
        self.room = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
        self.full = ["length" if room == max_new_tokens else "context" for room in self.room]
        self.eos, self.on_token = set(eos_ids), on_token

    @property
    def left(self) -> list[int]:
        """How many tokens each row may still take; 0 for a row that has ended."""
        return [0 if reason else room - len(ids)
                for reason, room, ids in zip(self.stopped_by, self.room, self.ids)]

    def add(self, chosen: Sequence[Sequence[int]]) -> None:
        """Give each row its tokens; those that come after its end are dropped."""
        for row, ids in enumerate(chosen):
            for id in ids:
                if not self.stopped_by[row]:
                    self.add_one(row, id)

    def add_one(self, row: int, id: int) -> None:
        """Append one token to a row that has not ended, or end it."""
        if id in self.eos:
            self.stopped_by[row] = "eos"
            return
        self.ids[row].append(id)
        if self.on_token:
            self.on_token(row, id)
        if len(self.ids[row]) == self.room[row]:
            self.stopped_by[row] = self.full[row]

    def interrupt(self) -> None:
        """End the rows that are still going."""
        self.stopped_by = [reason or "interrupt" for reason in self.stopped_by]


class Session:
    """One conversation over one cache: each turn computes only what is new.

    ``ids`` are the tokens the cache holds. A turn gives the whole text so far; the longest common
    beginning is kept, the cache is cut back to it, and prefill starts there. So a changed history
    (an edited message, another way to cut a word into tokens) costs time and is never wrong.
    """

    def __init__(self, model, room: int = 4096):
        """room: tokens the first cache holds (288 MB at 671B)."""
        self.model, self._room = model, room
        self.ids: list[int] = []
        self.prefilled = 0  # prompt tokens that the last turn had to compute
        self._cache = self._draft_cache = None

    def complete(self, prompt: Sequence[int], **options) -> Generation:
        """Continue ``prompt``, the whole conversation's ids; options as in ``complete``."""
        wanted = len(prompt) + options.get("max_new_tokens", 64)
        check_prompts([prompt], self.model.config.vocab_size,
                      self.model.config.max_position_embeddings)
        self._make_room(min(wanted, self.model.config.max_position_embeddings))
        # The last prompt token is always computed: its logits choose the first new token.
        kept = 0
        while kept < min(len(self.ids), len(prompt) - 1) and self.ids[kept] == prompt[kept]:
            kept += 1
        speculative = options.get("speculative", False)
        if speculative and self._draft_cache is None:
            self._draft_cache = self.model.new_draft_cache(1, self._room)
        if self._draft_cache is not None:
            # An entry is made of a state and the token after it, so one less can be kept.
            drafts_kept = max(min(kept - 1, self._draft_cache.lengths[0]), 0)
            self._draft_cache.truncate([drafts_kept])
            kept = drafts_kept if speculative else kept
        self._cache.truncate([kept])
        self.ids, self.prefilled = list(prompt[:kept]), len(prompt) - kept
        result = complete(self.model, [prompt], cache=self._cache, draft_cache=self._draft_cache,
                          **options)
        # The last token chosen has not been fed, so the cache may be one shorter than the text.
        self.ids = [*prompt, *result.ids[0]][: self._cache.lengths[0]]
        return result

    def clear(self) -> None:
        """Forget the conversation and give its memory back."""
        self.ids, self._cache, self._draft_cache = [], None, None

    def _make_room(self, wanted: int) -> None:
        """A cache of at least ``wanted`` tokens. One that is outgrown is replaced by one at least
        twice as long and computed again: seldom, and so cheap over a long conversation."""
        if self._cache is None or self._cache.max_seq_len < wanted:
            context = self.model.config.max_position_embeddings
            self._room = min(context, max(self._room, 2 * wanted))
            self._cache, self.ids = self.model.new_cache(1, self._room), []
            self._draft_cache = None


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, context: int) -> None:
    """Raise DSV3Error for the first prompt that cannot be run."""
    for row, prompt in enumerate(prompts):
        where = f"prompt {row}"
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise DSV3Error("not a list of token ids", where=where, found=type(prompt).__name__,
                            expected="list[int]", fix="Give a list of prompts, encoded")
        if not prompt:
            raise DSV3Error("empty prompt", where=where, found="0 tokens",
                            expected="at least 1", fix="Begin with the bos token")
        if len(prompt) >= context:
            raise DSV3Error("prompt longer than the context", where=where,
                            found=f"{len(prompt)} tokens",
                            expected=f"at most {context - 1} (max_position_embeddings - 1)",
                            fix="Shorten the prompt")
        for id in prompt:
            if not isinstance(id, Integral) or not 0 <= id < vocab_size:
                raise DSV3Error("token id out of range", where=where, found=id,
                                expected=f"0 to {vocab_size - 1}",
                                fix="Encode with the tokenizer of this checkpoint")


def check_options(max_new_tokens, temperature, top_p, seed, prefill_chunk=None) -> None:
    """Raise DSV3Error for an option that makes no sense."""

    def require(name: str, value, fits: bool, expected: str) -> None:
        if not fits:
            raise DSV3Error("not a usable value", where=name, found=value, expected=expected)

    require("max_new_tokens", max_new_tokens,
            isinstance(max_new_tokens, int) and max_new_tokens >= 0, "an integer of at least 0")
    require("temperature", temperature, 0 <= temperature < float("inf"), "0 or more")
    require("top_p", top_p, 0 < top_p <= 1, "more than 0, at most 1")
    require("seed", seed, isinstance(seed, int), "an integer")
    require("prefill_chunk", prefill_chunk,
            prefill_chunk is None or isinstance(prefill_chunk, int) and prefill_chunk > 0,
            "an integer of at least 1")


def _valid_vocab(model_vocab: int, valid: int | None) -> int:
    """How many ids may be chosen; a tokenizer with more ids than the model belongs elsewhere."""
    if valid is None:
        return model_vocab
    if not 0 < valid <= model_vocab:
        raise DSV3Error("tokenizer and model do not belong together", where="valid_vocab_size",
                        found=valid, expected=f"1 to the model's vocab_size, {model_vocab}")
    return valid
