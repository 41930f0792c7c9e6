"""Speculative decoding: the MTP module guesses tokens, the model checks them (TR 2.2, 5.4.3).

Decoding is limited by reading the weights, once for every pass, whether the pass holds one token
or a few. So let something cheap guess the next tokens, and check the guesses in the pass that is
due anyway. More than one token comes out of it whenever a guess was right. Nothing is lost when it
was wrong: the pass has also computed what should have stood there.

The text is t_0 ... t_n, where t_n has been chosen and not been fed. One step with k drafts:

    draft     q_1 = MTP(h_{n-1}, t_n);      d_1 ~ q_1      a guess at t_{n+1}
              q_2 = MTP(g_1, d_1);          d_2 ~ q_2      a guess at t_{n+2}, and so on, k times
    verify    p_1 ... p_{k+1} = model([t_n, d_1, d_2 ...])  true distributions at n+1 ... n+k+1
    from the left, accept d_j with probability min(1, p_j(d_j) / q_j(d_j)): t_{n+j} = d_j
    the first that is not accepted is replaced by a token from max(p_j - q_j, 0), normalised;
    it and the drafts after it are taken out of the cache again
    if all are accepted, one more: t_{n+k+1} ~ p_{k+1}

A token x leaves this either accepted, with probability q(x) min(1, p(x)/q(x)) = min(p, q), or as
a replacement. The replacements make up for exactly what is missing, since
min(p, q) + max(p - q, 0) = p. So the text has the distribution of plain decoding whatever the
drafts are worth; bad drafts only cost time. Drawing the replacement from p instead would favour
tokens that the draft disfavours. Greedy is the case in which p and q are certain: d is accepted
when it is the model's own choice, and the tokens are those of plain decoding, one by one.

Every pass gives one token that is no draft. Draft j is added if it and all before it are accepted:
with a_j, the acceptance of those drafts whose forerunners were accepted, a pass yields

    1 + a_1 + a_1 a_2 + a_1 a_2 a_3 + ...   tokens.

With one draft, as DeepSeek-V3 serves, that is 1 + a; the report measures a = 85 to 90% and 1.8
times the speed (TR 5.4.3). Each term is smaller than the one before it, and each costs a run of
the module and one more token in the pass.

g_j, the module's own state behind d_j, stands where the model's state h_{n+j-1} belongs. The head
reads the next token from either, so they are alike, and serving systems draft so with one module.
But they are not the same: in training the module saw states of the model alone, and from g_1 on it
reads what it was not trained on. What that costs is measured by acceptance by depth (chapter 5):
in the small model it falls after the first draft, and not always further.

The module has a cache of its own, whose entry i is made of the state h_i and the token t_{i+1}.
Every state that the model computes goes in as soon as the token after it is certain. Entries made
of guesses are taken back as soon as the drafts are drawn. In prefill it sees all prompt tokens but
the last, whose successor is the first token chosen.

A model with several MTP modules drafts with the first one only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from dsv3.cache import LatentCache
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.generation.decoder import Decoder
from dsv3.generation.rows import Depth
from dsv3.generation.sampling import Choice, Chooser, draw, draw_each


@dataclass(frozen=True)
class Pass:
    """What one pass of draft and verify did for one row.

    drafts: the k guesses; q: what each was drawn from; p: the model's distributions in their places
    and after the last, of which those behind a rejected draft count for nothing; chosen: the tokens
    that came out, the accepted drafts and one more (also where the text ended before the last of
    them); accepted: how many of the drafts.
    """

    drafts: tuple[int, ...]
    q: Float64[Tensor, "k vocab"]
    p: Float64[Tensor, "n vocab"]  # n = k + 1
    chosen: tuple[int, ...]
    accepted: int


def verify(
    p: Float64[Tensor, " v"], q: Float64[Tensor, " v"], draft: int, generator: torch.Generator
) -> int:
    """The token that follows, given what ``draft`` was drawn from: ``draft``, or a replacement.

    p, q: the model's distribution and the draft's. A replacement never equals the draft, because
    p < q there.
    """
    u = torch.rand((), dtype=torch.float64, device="cpu", generator=generator).item()
    if u * q[draft] < p[draft]:  # with probability min(1, p(d) / q(d))
        return draft
    missing = (p - q).clamp(min=0)  # what the accepted drafts leave open of p
    # Where p and q differ by rounding alone, nothing is missing.
    return draw(missing, generator) if missing.any() else draft


def judge(
    p: Float64[Tensor, "n v"],
    q: Float64[Tensor, "k v"],
    drafts: Sequence[int],
    generator: torch.Generator,
) -> Pass:
    """What follows a row's text: its drafts up to the first that is rejected, and one token more.

    p, q: the model's distributions, where the drafts stand and after them, and the drafts'; both
    may be longer. Without drafts this is plain decoding.
    """
    k = len(drafts)
    for place, guess in enumerate(drafts):
        follows = verify(p[place], q[place], guess, generator)
        if follows != guess:
            return Pass(tuple(drafts), q[:k], p[: k + 1], (*drafts[:place], follows), place)
    return Pass(tuple(drafts), q[:k], p[: k + 1], (*drafts, draw(p[k], generator)), k)


def check_can_draft(config: ModelConfig, num_draft_tokens: int) -> None:
    """Raise DSV3Error unless such a model has a module to draft with, and room for the drafts."""
    if not config.num_nextn_predict_layers:
        raise DSV3Error(
            "the model cannot draft",
            where="speculative",
            found="num_nextn_predict_layers 0",
            expected="1 or more",
            fix="Leave out --speculative, or use a checkpoint with its MTP layer",
        )
    # A prompt, the token that is fed with the drafts, and the one after them.
    most = max(config.max_position_embeddings - 3, 1)
    if num_draft_tokens > most:
        raise DSV3Error(
            "more drafts than a text has room for",
            where="num_draft_tokens",
            found=num_draft_tokens,
            expected=f"at most {most} (max_position_embeddings - 3)",
            fix="Draft fewer: each one more is less often accepted",
        )


class Speculative(Decoder):
    """Decodes a batch by drafting and verifying; one step gives each row 1 to k + 1 tokens.

    k is the sampling's ``num_draft_tokens``. last_pass: what the last step did for each row, None
    for one without drafts; on rank 0, which alone decides, and None for all rows on the others.
    """

    def __init__(
        self,
        model,
        cache: LatentCache,
        choose: Chooser,
        draft_cache: LatentCache | None = None,
        *,
        owned: bool,
    ):
        """Both caches hold the same beginning of each text, if any."""
        k = choose.sampling.num_draft_tokens
        check_can_draft(model.config, k)
        if draft_cache is None:
            draft_cache = model.new_draft_cache(len(cache.lengths), cache.max_seq_len)
        if draft_cache.lengths != cache.lengths:
            raise DSV3Error(
                "the draft cache does not go with the cache",
                where="draft_cache",
                found=f"lengths {draft_cache.lengths}",
                expected=f"lengths {cache.lengths}",
                fix=f"Cut both back with truncate, at most to "
                f"{list(map(min, cache.lengths, draft_cache.lengths))}",
            )
        super().__init__(model, cache, choose, draft_cache, owned=owned)
        self.draft_cache, self.k = draft_cache, k
        # (b, s, d): states of the last pass, which the draft cache has not seen; from prefill on.
        self.hidden: Tensor
        self.last_pass: list[Pass | None] = [None] * len(choose.generators)
        self._drafts = 0
        self._verified, self._accepted = [0] * k, [0] * k  # by depth, over all rows

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were accepted; None before the first one."""
        return sum(self._accepted) / self._drafts if self._drafts else None

    @property
    def accepted_by_depth(self) -> list[Depth] | None:
        """What became of the first, second, ... draft of a pass; None before the first one."""
        counts = zip(self._verified, self._accepted)
        return [Depth(*pair) for pair in counts] if self._drafts else None

    def watch(self, start: int, hidden: Tensor, prompts: Tensor, counts: list[int]) -> None:
        """A chunk of prefill: hidden (b, s, d) at positions ``start`` and on.

        prompts (b, longest) and counts (b) are those of the whole prompts.
        """
        following = prompts[:, start + 1 : start + 1 + hidden.shape[1]]
        width = following.shape[1]
        known = [min(max(count - 1 - start, 0), width) for count in counts]
        if any(known):
            self.model.mtp_logits(
                hidden[:, :width], following, cache=self.draft_cache, lengths=known, last_only=True
            )
        if start == 0:
            self.hidden = torch.zeros_like(hidden[:, :1])
        for row, count in enumerate(counts):
            if start < count <= start + hidden.shape[1]:  # the prompt ends in this chunk
                self.hidden[row, 0] = hidden[row, count - 1 - start]

    def copies(self, n: int, cache: LatentCache) -> None:
        """Go on with ``n`` copies of every row, after prefill; ``cache`` holds theirs."""
        self.draft_cache = self.draft_cache.copies(n, cache.max_seq_len)
        self._hold(cache, self.draft_cache, owned=True)
        self.hidden = self.hidden.repeat_interleave(n, dim=0)

    def step(self, chosen: list[list[int]], left: list[int]) -> list[list[Choice]]:
        """The tokens that follow ``chosen``, those of the last step; none for a text that ended
        before it.

        left: how many tokens each text may still take; 0 for one that has ended. Where such a row
        is still in the batch it is fed nothing (and gets a 0 that nobody reads). A row has no more
        drafts than room for them and the token after.
        """
        staying = self.drop_ended(left)
        if staying is not None:
            self.hidden = self.hidden[staying]
        texts, chosen = len(left), [chosen[row] for row in self.rows]
        counts = [min(left[row], self.k + 1) for row in self.rows]  # t_n and the drafts
        width = max(counts)
        drafts, q = self.draft(chosen, counts)
        fed = [_padded([ids[-1], *guesses], width) for ids, guesses in zip(chosen, drafts)]
        before = self.cache.lengths
        logits, self.hidden = self.model(
            torch.tensor(fed, device="cpu"), cache=self.cache, lengths=counts, return_hidden=True
        )
        ids = None
        if self.choose.decides:
            p = self.choose.distribution(logits)
            generators = self.choose.of(self.rows)
            passes = [
                judge(p[row], q[row], drafts[row], generators[row]) if count else None
                for row, count in enumerate(counts)
            ]
            self.last_pass = [None] * texts
            for row, done in zip(self.rows, passes):
                self.last_pass[row] = done if done and done.drafts else None
            ids = [id for done in passes for id in _padded(done.chosen if done else [0], width, -1)]
        answer = self.choose.agree(logits, ids, self.rows)
        after = [
            [choice for choice in answer[width * row : width * (row + 1)] if choice.id >= 0]
            for row in range(len(counts))
        ]
        for guesses, choices in zip(drafts, after):
            self._drafts += len(guesses)
            for depth in range(min(len(choices), len(guesses))):
                self._verified[depth] += 1
                self._accepted[depth] += depth < len(choices) - 1
        self.cache.truncate(
            [
                length + min(len(choices), count)
                for length, choices, count in zip(before, after, counts)
            ]
        )
        return self.by_text(after, texts)

    def draft(
        self, chosen: list[list[int]], counts: list[int]
    ) -> tuple[list[list[int]], Float64[Tensor, "b k v"]]:
        """Guesses for each row, one fewer than its ``counts``, and the distributions behind them
        (on rank 0).

        The states of the last pass enter the draft cache here, each with the token chosen after it.
        """
        rows, device = len(counts), self.hidden.device
        most = max(max(counts) - 1, 0)
        drafts: list[list[int]] = [[] for _ in counts]
        q = torch.empty(
            rows, most, self.model.config.vocab_size, dtype=torch.float64, device=device
        )
        # First the model's states with tokens that are certain, then the module's own with guesses.
        hidden, width = self.hidden, self.hidden.shape[1]
        following = [_padded(ids, width) for ids in chosen]
        entering = [len(ids) if count > 1 else 0 for ids, count in zip(chosen, counts)]
        certain = [
            length + new for length, new in zip(self.draft_cache.lengths, entering, strict=True)
        ]
        for depth in range(most):
            logits, states = self.model.mtp_logits(
                hidden,
                torch.tensor(following, device="cpu"),
                cache=self.draft_cache,
                lengths=entering,
                last_only=True,
            )
            ids = None
            if self.choose.decides:
                q[:, depth] = self.choose.distribution(logits)
                fed = [row for row, new in enumerate(entering) if new]
                drawn = draw_each(q[fed, depth], self.choose.of([self.rows[row] for row in fed]))
                ids = [0] * rows
                for row, id in zip(fed, drawn, strict=True):
                    ids[row] = id
            guesses = [guess.id for guess in self.choose.agree(logits, ids, self.rows)]
            for row, new in enumerate(entering):
                drafts[row] += guesses[row : row + 1] if new else []
            last = torch.tensor(entering, device=device) - 1
            hidden = states[torch.arange(rows, device=device), last][:, None]
            following = [[guess] for guess in guesses]
            entering = [int(count > depth + 2) for count in counts]
        self.draft_cache.truncate(certain)
        return drafts, q


def _padded(ids: Sequence[int], width: int, by: int = 0) -> list[int]:
    """ids, and ``by`` behind them up to ``width``."""
    return [*ids, *[by] * (width - len(ids))]
