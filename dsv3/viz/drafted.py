"""A text and how it was drafted: what each pass guessed, what the model said, what stayed.

``record`` reads a stream of speculative decoding and keeps of each pass what a picture shows: the
few most probable tokens of both distributions, not the distributions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float64
from torch import Tensor

from dsv3.generation.loop import stream
from dsv3.generation.speculative import Pass
from dsv3.model import Transformer

SHOWN = 4  # tokens of a distribution


@dataclass(frozen=True)
class Chance:
    """A token and its probability of the draft (q, None where nothing was drafted) and the
    model (p)."""

    id: int
    q: float | None
    p: float


@dataclass(frozen=True)
class Place:
    """One place of a pass: the draft in it, None behind the last one, and the likeliest tokens.

    accepting: min(1, p(d) / q(d)); missing: the sum of max(p - q, 0), from which a replacement is
    drawn; state: "accepted", "replaced", "extra" or "dropped"; chosen: the token that stands there,
    None where it was dropped.
    """

    draft: Chance | None
    likely: tuple[Chance, ...]
    accepting: float
    missing: float
    state: str
    chosen: Chance | None


@dataclass(frozen=True)
class Round:
    """One pass. start: number of new tokens before it; held: entries of the cache (prompt and new
    tokens, all but the last) before it, after the model has read the drafts, and in the end."""

    start: int
    places: tuple[Place, ...]
    held: tuple[int, int, int]

    @property
    def accepted(self) -> int:
        return sum(place.state == "accepted" for place in self.places)

    @property
    def drafts(self) -> int:
        return sum(place.draft is not None for place in self.places)


@dataclass(frozen=True)
class Drafted:
    """prompt, ids: tokens that were given and that are new, the first of them by prefill."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    rounds: tuple[Round, ...]

    @property
    def acceptance(self) -> float:
        """Share of all drafts that were accepted."""
        return sum(each.accepted for each in self.rounds) / max(self.drafts, 1)

    @property
    def drafts(self) -> int:
        return sum(each.drafts for each in self.rounds)

    @property
    def per_pass(self) -> float:
        """Tokens that a pass gave, the first token, which is prefill's, left out."""
        return (len(self.ids) - 1) / max(len(self.rounds), 1)

    def states(self) -> list[str]:
        """Of each new token, where it came from; "prefill" for the first."""
        return ["prefill"] + [
            place.state for each in self.rounds for place in each.places if place.chosen
        ]


def record(
    model: Transformer, prompt: Sequence[int], tokens: int, drafts: int, **options
) -> Drafted:
    """Decode ``tokens`` new tokens with ``drafts`` drafts a pass; options as in ``stream``."""
    room = len(prompt) + tokens
    cache, draft_cache = model.new_cache(1, room), model.new_draft_cache(1, room)
    run = stream(
        model,
        [list(prompt)],
        max_new_tokens=tokens,
        speculative=True,
        num_draft_tokens=drafts,
        eos_ids=(),
        cache=cache,
        draft_cache=draft_cache,
        **options,
    )
    ids: list[int] = []
    rounds: list[Round] = []
    last: Pass | None = None
    held = 0
    for token in run:
        now = run.last_pass[0]
        if ids and (now is None or now is not last):
            start = len(ids)
            places = (_lone(token.id),) if now is None else tuple(_places(now))
            fed = held + 1 + (len(now.drafts) if now else 0)
            rounds.append(Round(start, places, (held, fed, cache.lengths[0])))
        last, held = now, cache.lengths[0]
        ids.append(token.id)
    return Drafted(tuple(prompt), tuple(ids), tuple(rounds))


def _lone(id: int) -> Place:
    """Of a pass without drafts, which is plain decoding: for the last token of a text."""
    return Place(None, (), 1.0, 0.0, "extra", Chance(id, None, 1.0))


def _places(done: Pass) -> list[Place]:
    """The places of a pass; behind a rejected draft nothing counts."""
    places = []
    for at, p in enumerate(done.p):
        drafted = at < len(done.drafts)
        q = done.q[at] if drafted else None
        draft = _chance(done.drafts[at], q, p) if drafted else None
        chosen = _chance(done.chosen[at], q, p) if at < len(done.chosen) else None
        if at > done.accepted:
            state = "dropped"
        elif at == done.accepted:
            state = "replaced" if drafted else "extra"
        else:
            state = "accepted"
        accepting = min(1.0, draft.p / draft.q) if draft and draft.q else 1.0
        missing = float((p - q).clamp(min=0).sum()) if q is not None else 0.0
        places.append(
            Place(draft, _likely(q, p, (draft, chosen)), accepting, missing, state, chosen)
        )
    return places


def _chance(id: int, q: Float64[Tensor, " v"] | None, p: Float64[Tensor, " v"]) -> Chance:
    return Chance(id, None if q is None else float(q[id]), float(p[id]))


def _likely(
    q: Float64[Tensor, " v"] | None, p: Float64[Tensor, " v"], always: Sequence[Chance | None]
) -> tuple[Chance, ...]:
    """The draft, the chosen token and the likeliest others, the most probable first."""
    both = p if q is None else p.maximum(q)
    first = [chance.id for chance in always if chance]
    top = [id for id in both.topk(SHOWN + 2).indices.tolist() if both[id] > 0]
    ids = list(dict.fromkeys(first + top))[:SHOWN]
    return tuple(_chance(id, q, p) for id in sorted(ids, key=lambda id: -float(both[id])))
