"""From prompts to new tokens: prefill, then one token a row and step.

*Prefill* runs the whole prompt through the model at once and leaves its latents in the cache: many
tokens a pass, limited by arithmetic. *Decode* feeds one token a row and reads every active weight
for it: limited by memory (ISCA 2.3.2), so rows of a batch share the reading.

Prompts of different lengths go through together, padded on the right; the model is told the true
length of each row, and every row keeps its own place in the cache. A row that has ended leaves
the batch and the others go on. No row is held back to the shortest prompt. Several samples of one
prompt share its prefill: its latents are computed once and copied.

Three doors lead to the same loop: ``stream`` gives tokens one by one, ``complete`` runs to the end
and gives a full account, ``generate`` gives the ids alone. What may be asked for stands in
``dsv3.generation.sampling``; how a step can give several tokens a row in
``dsv3.generation.speculative``. Both ways of decoding share everything else here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch

from dsv3.errors import DSV3Error
from dsv3.generation.decoder import Decoder
from dsv3.generation.rows import (
    Generation,
    Rows,
    Token,
    as_prompts,
    check_beginnings,
    check_prompts,
    check_unused,
)
from dsv3.generation.sampling import Choice, Chooser, Sampling
from dsv3.generation.speculative import Pass, Speculative

OnToken = Callable[[int, int], None]


def prefill(
    model,
    cache,
    rows: Sequence[Sequence[int]],
    chunk: int | None = None,
    watch: Callable | None = None,
) -> torch.Tensor:
    """Run ragged rows of tokens into the cache; logits (b, vocab) after each row's last token.

    Each row needs at least one token. In later chunks the short rows have nothing left and take
    part with length 0. watch(start, hidden, tokens, counts) gets the states of each chunk.
    """
    counts = [len(row) for row in rows]
    width = max(counts)
    tokens = torch.zeros(len(rows), width, dtype=torch.int64, device="cpu")
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, device="cpu")
    chunk = chunk or width
    last: torch.Tensor | None = None
    for start in range(0, width, chunk):
        part = tokens[:, start : start + chunk]
        here = [min(max(count - start, 0), part.shape[1]) for count in counts]
        if watch is None:
            logits = model(part, cache=cache, lengths=here, last_only=True)
        else:
            logits, hidden = model(
                part, cache=cache, lengths=here, last_only=True, return_hidden=True
            )
            watch(start, hidden, tokens, counts)
        if last is None:
            last = logits
        else:
            fed = torch.tensor(here, device=last.device) > 0
            last = torch.where(fed[:, None], logits, last)
    assert last is not None  # each row has a token
    return last


class Plain(Decoder):
    """Decodes a batch one token a row and step: the form that speculative decoding must equal."""

    watch = None  # nothing to keep of prefill but the cache
    acceptance = accepted_by_depth = None  # nothing is drafted

    def __init__(self, model, cache, choose: Chooser, *, owned: bool):
        super().__init__(model, cache, choose, owned=owned)
        self.last_pass = [None] * len(choose.generators)

    def copies(self, n: int, cache) -> None:
        """Go on with ``n`` copies of every row, after prefill; ``cache`` holds theirs."""
        self._hold(cache, owned=True)

    def step(self, chosen: list[list[int]], left: list[int]) -> list[list[Choice]]:
        """The tokens that follow ``chosen``, those of the last step; none for a text that ended
        before it.

        left: how many tokens each text may still take; 0 for one that has ended.
        """
        self.drop_ended(left)
        logits = self.model(
            torch.tensor([chosen[row] for row in self.rows], device="cpu"),
            cache=self.cache,
            lengths=[min(left[row], 1) for row in self.rows],
            last_only=True,
        )
        return self.by_text(self.choose(logits, self.rows), len(left))


class Stream(Iterator[Token]):
    """One run of generation, an iterator of ``Token``. result: the account so far."""

    def __init__(
        self,
        model,
        prompts,
        sampling: Sampling,
        tokenizer=None,
        should_stop: Callable[[], bool] | None = None,
        cache=None,
        draft_cache=None,
    ):
        config = model.config
        token_bytes, absent = None, ()
        if tokenizer is not None:
            absent = tokenizer.ids_without_token(config.vocab_size)
            sampling = sampling.but(banned_ids=(*sampling.banned_ids, *absent))
            token_bytes = tokenizer.text_bytes
        elif sampling.stop:
            raise DSV3Error(
                "stop strings need a tokenizer",
                where="stop",
                found=sampling.stop,
                fix="Give tokenizer=load_tokenizer(...)",
            )
        prompts = as_prompts(prompts)
        check_prompts(prompts, config.vocab_size, config.max_position_embeddings, absent)
        check_beginnings(prompts, cache, draft_cache, sampling, config.max_position_embeddings)
        rows = [prompt for prompt in prompts for _ in range(sampling.n)]
        eos = model.eos_ids if sampling.eos_ids is None else sampling.eos_ids
        self._model, self._prompts, self._sampling = model, prompts, sampling
        # pyrefly: ignore[bad-argument-type] - Sampling keeps its ids as tuples
        self._rows = Rows(rows, config.max_position_embeddings, sampling, eos, token_bytes)
        self._choose = Chooser(
            model.group.everyone, len(rows), sampling, config.vocab_size, should_stop
        )
        self._has_texts = tokenizer is not None
        self._passes, self._seconds = 0, 0.0
        works = rows and sampling.max_new_tokens
        self._decoder = self._make_decoder(cache, draft_cache) if works else None
        self._tokens = self._run()

    def __next__(self) -> Token:
        return next(self._tokens)

    def close(self) -> None:
        """End the run here."""
        self._tokens.close()

    @property
    def result(self) -> Generation:
        rows, decoder = self._rows, self._decoder
        return Generation(
            rows.ids,
            rows.stopped_by,
            self._seconds,
            decoder.nbytes if decoder else 0,
            decoder.acceptance if decoder else None,
            self._passes,
            rows.chosen,
            ["".join(pieces) for pieces in rows.pieces] if self._has_texts else None,
            rows.logprobs if self._sampling.logprobs else None,
            decoder.accepted_by_depth if decoder else None,
        )

    @property
    def last_pass(self) -> Sequence[Pass | None]:
        """What the last pass drafted and verified for each row (on rank 0); None for a row without
        drafts. The tokens read since are those of its ``chosen``."""
        return self._decoder.last_pass if self._decoder else [None] * len(self._rows.ids)

    @torch.inference_mode()
    def _run(self) -> Generator[Token, None, None]:
        rows, choose, decoder = self._rows, self._choose, self._decoder
        if decoder is None:
            rows.stopped_by = ["length"] * len(rows.ids)
            return
        began = time.perf_counter()
        chosen = choose(self._prefill(decoder))
        while True:
            certain = rows.add(chosen)
            if choose.interrupted:
                certain += rows.interrupt()
            self._seconds = time.perf_counter() - began
            held = decoder.cache.lengths
            yield from certain
            if not any(rows.left):
                return
            check_unused(decoder.cache, held)
            self._passes += sum(room > 0 for room in rows.left)
            chosen = decoder.step([[choice.id for choice in some] for some in chosen], rows.left)

    @property
    def _room(self) -> int:
        """Tokens of the longest row when it is full."""
        return min(
            self._model.config.max_position_embeddings,
            max(map(len, self._prompts)) + self._sampling.max_new_tokens,
        )

    def _make_decoder(self, cache, draft_cache) -> Plain | Speculative:
        longest = max(map(len, self._prompts))
        owned = cache is None and draft_cache is None
        if cache is None:  # that of one prefill for several samples is copied into a longer one
            cache = self._model.new_cache(
                len(self._prompts), self._room if self._sampling.n == 1 else longest
            )
        for kept in (cache, draft_cache):
            # A row that is there whole is computed from its last token on: that gives the logits.
            if kept is not None:
                kept.truncate(
                    [
                        min(length, len(prompt) - 1)
                        for length, prompt in zip(kept.lengths, self._prompts)
                    ]
                )
        if self._sampling.speculative:
            return Speculative(self._model, cache, self._choose, draft_cache, owned=owned)
        return Plain(self._model, cache, self._choose, owned=owned)

    def _prefill(self, decoder: Plain | Speculative) -> torch.Tensor:
        """Fill the caches; the logits that choose each row's first token."""
        n = self._sampling.n
        rest = [prompt[seen:] for prompt, seen in zip(self._prompts, decoder.cache.lengths)]
        logits = prefill(
            self._model, decoder.cache, rest, self._sampling.prefill_chunk, decoder.watch
        )
        if n > 1:
            decoder.copies(n, decoder.cache.copies(n, self._room))
        return logits.repeat_interleave(n, dim=0)


def stream(
    model,
    prompts,
    *,
    sampling: Sampling | None = None,
    tokenizer=None,
    should_stop: Callable[[], bool] | None = None,
    cache=None,
    draft_cache=None,
    **options,
) -> Stream:
    """The new tokens of all prompts as they become certain; arguments as in ``complete``.

    Everything is checked before this returns. ``close()``, or leaving a loop and dropping the
    stream, ends it between two passes: the caches hold whole tokens and can be used again. On
    several ranks every rank reads the stream, and all of them close it at the same token.
    """
    sampling = (sampling or Sampling()).but(**options)
    return Stream(model, prompts, sampling, tokenizer, should_stop, cache, draft_cache)


def complete(
    model,
    prompts,
    *,
    sampling: Sampling | None = None,
    tokenizer=None,
    on_token: OnToken | None = None,
    should_stop: Callable[[], bool] | None = None,
    cache=None,
    draft_cache=None,
    **options,
) -> Generation:
    """``generate`` with the full account.

    should_stop: asked on rank 0 after each step; True ends all rows on all ranks ("interrupt").
    cache: one that already holds the beginning of each prompt, or all of it; only the rest is
    computed, and what it holds is checked against the prompt. draft_cache: for speculative
    decoding, with the same lengths.
    """
    sampling = (sampling or Sampling()).but(**options)
    run = Stream(model, prompts, sampling, tokenizer, should_stop, cache, draft_cache)
    for token in run:
        if on_token:
            on_token(token.row, token.id)
    return run.result


def generate(
    model,
    prompts,
    max_new_tokens: int | None = None,
    *,
    sampling: Sampling | None = None,
    tokenizer=None,
    on_token: OnToken | None = None,
    **options,
) -> list[list[int]]:
    """New tokens for each prompt, without the prompt and without the end-of-sequence token.

    prompts: token ids, ragged: a list of lists, tensors or arrays, or one (b, s). sampling and
    options: what to do, the fields of ``generation.sampling.Sampling``; options change those of
    sampling. A text ends at the model's own end tokens unless ``eos_ids`` says otherwise.
    tokenizer: needed for stop strings; where given, ids that are none of its tokens are never
    chosen. on_token(row, id): called for each new token. With n samples, n rows a prompt, beside
    each other.

    Raises DSV3Error for an empty prompt, one that fills the context, an id out of range, an option
    that makes no sense or does not exist.
    """
    if max_new_tokens is not None:
        options["max_new_tokens"] = max_new_tokens
    return complete(
        model, prompts, sampling=sampling, tokenizer=tokenizer, on_token=on_token, **options
    ).ids
