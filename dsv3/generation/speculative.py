"""Speculative decoding: the MTP module guesses one token, the model checks it (TR 2.2, 5.4.3).

Decoding is limited by reading the weights, once for every pass, whether the pass holds one token
or two. So let something cheap guess the next token, and check the guess in the pass that is due
anyway. Two tokens come out of one pass whenever the guess was right. Nothing is lost when it was
wrong: the pass has also computed what should have stood there.

The text is t_0 ... t_n, where t_n has been chosen and not been fed. One step:

    draft     q = MTP(h_{n-1}, t_n);  d ~ q            a guess at t_{n+1}
    verify    p, p' = model([t_n, d])                  true distributions at n+1, and after d
    accept d  with probability min(1, p(d) / q(d)):    t_{n+1} = d, t_{n+2} ~ p'
    or else   t_{n+1} ~ max(p - q, 0), normalised      d is taken out of the cache again

A token x leaves this either accepted, with probability q(x) min(1, p(x)/q(x)) = min(p, q), or as
a replacement. The replacements make up for exactly what is missing, since
min(p, q) + max(p - q, 0) = p. So the text has the distribution of plain decoding whatever the
drafts are worth; bad drafts only cost time. Drawing the replacement from p instead would favour
tokens that the draft disfavours. Greedy is the case in which p and q are certain: d is accepted
when it is the model's own choice, and the tokens are those of plain decoding, one by one.

With acceptance rate a, a pass yields 1 + a tokens. The report measures a = 85 to 90% and 1.8
times the speed (TR 5.4.3).

The module has a cache of its own, whose entry i is made of the state h_i and the token t_{i+1}.
Every state that the model computes goes in as soon as the token after it is certain. So it never
holds a guess, and nothing is ever taken back from it. In prefill it sees all prompt tokens but
the last, whose successor is the first token chosen.

A model with several MTP modules drafts with the first one only.
"""

from __future__ import annotations

import torch

from dsv3.cache import LatentCache
from dsv3.errors import DSV3Error
from dsv3.generation.sampling import Choice, Chooser, draw


def verify(p: torch.Tensor, q: torch.Tensor, draft: int, generator: torch.Generator) -> int:
    """The token that follows, given what ``draft`` was drawn from: ``draft``, or a replacement.

    p, q: (v,) float64, the model's distribution and the draft's. A replacement never equals the
    draft, because p < q there.
    """
    u = torch.rand((), dtype=torch.float64, device="cpu", generator=generator).item()
    if u * q[draft] < p[draft]:  # with probability min(1, p(d) / q(d))
        return draft
    missing = (p - q).clamp(min=0)  # what the accepted drafts leave open of p
    # Where p and q differ by rounding alone, nothing is missing.
    return draw(missing, generator) if missing.any() else draft


class Speculative:
    """Decodes a batch by drafting and verifying; one step gives each row one or two tokens.

    accepted, drafts: of all rows so far.
    """

    def __init__(
        self, model, cache: LatentCache, choose: Chooser, draft_cache: LatentCache | None = None
    ):
        """Both caches hold the same beginning of each text, if any."""
        if not len(model.mtp):
            raise DSV3Error(
                "the model cannot draft",
                where="speculative",
                found="num_nextn_predict_layers 0",
                expected="1 or more",
                fix="Leave out --speculative, or use a checkpoint with its MTP layer",
            )
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
        self.model, self.cache, self.choose = model, cache, choose
        self.draft_cache = draft_cache
        # (b, s, d): states of the last pass, which the draft cache has not seen; from prefill on.
        self.hidden: torch.Tensor
        self.accepted = self.drafts = 0

    @property
    def nbytes(self) -> int:
        """Bytes of both caches."""
        return self.cache.nbytes + self.draft_cache.nbytes

    @property
    def acceptance(self) -> float | None:
        """Share of the drafts that were accepted; None before the first one."""
        return self.accepted / self.drafts if self.drafts else None

    def watch(
        self, start: int, hidden: torch.Tensor, prompts: torch.Tensor, counts: list[int]
    ) -> None:
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
        self.cache, self.hidden = cache, self.hidden.repeat_interleave(n, dim=0)

    def step(self, chosen: list[list[int]], left: list[int]) -> list[list[Choice]]:
        """The tokens that follow ``chosen``, those of the last step.

        left: how many tokens each row may still take; 0 for a row that has ended. Such a row is
        fed nothing, and a row with room for one token alone needs no draft.
        """
        device = self.hidden.device
        drafting = [room >= 2 for room in left]
        guesses, q = self.draft(chosen, drafting) if any(drafting) else ([0] * len(left), None)
        before, width = self.cache.lengths, 2 if any(drafting) else 1
        fed = torch.tensor(
            [[ids[-1], guess][:width] for ids, guess in zip(chosen, guesses)], device=device
        )
        logits, self.hidden = self.model(
            fed, cache=self.cache, lengths=[min(room, 2) for room in left], return_hidden=True
        )
        ids = self.judge(logits, q, guesses, left) if self.choose.decides else None
        answer = self.choose.agree(logits, ids)
        after = [
            [choice for choice in answer[width * row : width * (row + 1)] if choice.id >= 0]
            for row in range(len(left))
        ]
        self.drafts += sum(drafting)
        self.accepted += sum(len(choices) == 2 for choices in after)
        self.cache.truncate(
            [
                length + len(choices) if room else length
                for length, choices, room in zip(before, after, left)
            ]
        )
        return after

    def draft(
        self, chosen: list[list[int]], drafting: list[bool]
    ) -> tuple[list[int], torch.Tensor]:
        """A guess for each drafting row (0 for the others), and the distributions (b, v) behind it.

        The states of the last pass enter the draft cache here, each with the token chosen after it.
        """
        width = self.hidden.shape[1]
        following = torch.tensor([(ids + [0])[:width] for ids in chosen], device=self.hidden.device)
        counts = [len(ids) if drafts else 0 for ids, drafts in zip(chosen, drafting)]
        logits, _ = self.model.mtp_logits(
            self.hidden, following, cache=self.draft_cache, lengths=counts, last_only=True
        )
        q = self.choose.distribution(logits)
        ids = None
        if self.choose.decides:
            ids = [
                draw(q_row, generator) if drafts else 0
                for q_row, generator, drafts in zip(q, self.choose.generators, drafting)
            ]
        return [guess.id for guess in self.choose.agree(logits, ids)], q

    def judge(
        self, logits: torch.Tensor, q: torch.Tensor | None, guesses: list[int], left: list[int]
    ) -> list[int]:
        """The tokens after a pass with logits (b, 1 or 2, vocab): one or two numbers a row, flat.

        The second is -1 where the draft was rejected or there was none. An ended row has 0 first.
        """
        # p: the model's, where the draft d stands ([row, 0]) and after it ([row, 1]);
        # q: what d was drawn from.
        p = self.choose.distribution(logits)
        answer = []
        for row, (room, guess) in enumerate(zip(left, guesses)):
            generator = self.choose.generators[row]
            first, second = 0, -1
            if room >= 2:
                assert q is not None  # what the guess was drawn from
                first = verify(p[row, 0], q[row], guess, generator)
                if first == guess:
                    second = draw(p[row, 1], generator)
            elif room == 1:
                first = draw(p[row, 0], generator)
            answer += [first, second][: logits.shape[1]]
        return answer
