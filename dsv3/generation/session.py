"""A conversation: many generations over one cache."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.cache import LatentCache
from dsv3.errors import DSV3Error
from dsv3.generation.loop import Generation, Stream, stream
from dsv3.generation.rows import as_prompts, check_prompts
from dsv3.generation.sampling import Sampling


class Session:
    """One conversation over one cache: each turn computes only what is new.

    The cache knows which tokens it holds. A turn gives the whole text so far; the longest common
    beginning is kept, the cache is cut back to it, and prefill starts there. So a changed history
    (an edited message, another way to cut a word into tokens, a stream that was closed early)
    costs time and is never wrong.

    prefilled: prompt tokens that the last turn had to compute.
    """

    def __init__(self, model, room: int = 4096):
        """room: tokens the first cache holds (288 MB at 671B)."""
        self.model, self._room = model, room
        self.prefilled = 0
        self._running: Stream | None = None
        self._cache: LatentCache | None = None
        self._draft_cache: LatentCache | None = None

    @property
    def ids(self) -> list[int]:
        """The tokens that the cache holds."""
        return self._cache.tokens(0) if self._cache else []

    def complete(self, prompt: Sequence[int], *, on_token=None, **options) -> Generation:
        """Continue ``prompt``, the whole conversation's ids; options as in ``complete``."""
        run = self.stream(prompt, **options)
        for token in run:
            if on_token:
                on_token(token.row, token.id)
        return run.result

    def stream(
        self,
        prompt: Sequence[int],
        *,
        sampling: Sampling | None = None,
        tokenizer=None,
        should_stop=None,
        **options,
    ) -> Stream:
        """The same, token by token, as ``generation.loop.stream``. One answer a turn: n is 1. A
        turn ends the stream of the turn before, which would go on from another text."""
        sampling = (sampling or Sampling()).but(**options)
        if sampling.n > 1:
            raise DSV3Error(
                "a conversation goes on from one answer",
                where="n",
                found=sampling.n,
                expected="1",
                fix="Use complete for several samples",
            )
        (prompt,) = as_prompts([prompt])
        context = self.model.config.max_position_embeddings
        check_prompts([prompt], self.model.config.vocab_size, context)
        if self._running:
            self._running.close()
        cache = self._make_room(min(len(prompt) + sampling.max_new_tokens, context))
        # The last prompt token is always computed: its logits choose the first new token.
        held, kept = self.ids, 0
        while kept < min(len(held), len(prompt) - 1) and held[kept] == prompt[kept]:
            kept += 1
        if sampling.speculative and self._draft_cache is None:
            self._draft_cache = self.model.new_draft_cache(1, self._room)
        if self._draft_cache is not None:
            # An entry is made of a state and the token after it, so one less can be kept.
            drafts_kept = max(min(kept - 1, self._draft_cache.lengths[0]), 0)
            self._draft_cache.truncate([drafts_kept])
            kept = drafts_kept if sampling.speculative else kept
        cache.truncate([kept])
        self.prefilled = len(prompt) - kept
        self._running = stream(
            self.model,
            [prompt],
            sampling=sampling,
            tokenizer=tokenizer,
            should_stop=should_stop,
            cache=cache,
            draft_cache=self._draft_cache,
        )
        return self._running

    def clear(self) -> None:
        """Forget the conversation and give its memory back."""
        self._cache = self._draft_cache = None

    def _make_room(self, wanted: int) -> LatentCache:
        """A cache of at least ``wanted`` tokens. One that is outgrown is replaced by one at least
        twice as long and computed again: seldom, and so cheap over a long conversation."""
        if self._cache is None or self._cache.max_seq_len < wanted:
            context = self.model.config.max_position_embeddings
            self._room = min(context, max(self._room, 2 * wanted))
            self._cache, self._draft_cache = self.model.new_cache(1, self._room), None
        return self._cache
