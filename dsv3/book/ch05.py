"""Checks of chapter 5's exercises, and the suspects of the one that looks for a leak."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsv3.book.exercise import Verdict, judge, judge_numbers, judge_statements, judge_value


def index_table(answer: dict[str, int | None]) -> Verdict:
    """Which token module k is fed at position i, which it is asked for, and where it ends."""
    right = {
        "k = 1, i = 5: fed": 6,
        "k = 1, i = 5: asked for": 7,
        "k = 2, i = 3: fed": 5,
        "k = 2, i = 3: asked for": 6,
        "k = 2: last i": 4,
    }

    def why(key: str, value: int) -> str:
        if key.endswith("last i"):
            return (
                f"at position {value} module 2 is asked for t_{value + 3}, and there are seven"
                if value > 4
                else f"go on: at position {value + 1} its target t_{value + 4} is still there"
            )
        k, i = int(key[4]), int(key[11])
        if value == i:
            return "that token is in the state already; module k is fed t_(i+k)"
        if key.endswith("fed"):
            return (
                "that is the token it is asked for; fed with it, it would only have to repeat it"
                if value == i + k + 1
                else f"module {k} is fed t_(i+k)"
            )
        return (
            "that is the token it was just fed; it is asked for the one after"
            if value == i + k
            else f"module {k} is asked for t_(i+k+1)"
        )

    return judge_numbers("index_table", answer, right, why, "fed t_(i+k), asked for t_(i+k+1)")


def _slices(window: Tensor, k: int, fed: int, asked: int) -> tuple[Tensor, Tensor, Tensor]:
    length = window.shape[1] - 1 - k
    if fed + length > window.shape[1] or asked + length > window.shape[1]:
        raise IndexError
    return window[:, :length], window[:, fed : fed + length], window[:, asked : asked + length]


def shift(answer: Callable) -> Verdict:
    """window (b, T + 1 + k), k -> what is read, fed and asked for, each (b, T)."""
    cases = [
        (torch.arange(9)[None], 1),
        (torch.arange(24).view(2, 12) + 100, 2),
        (torch.arange(20).view(2, 10) + 7, 3),
    ]
    return judge(
        "shift",
        answer,
        lambda window, k: _slices(window, k, k, k + 1),
        cases,
        {
            "the module is fed the token it is asked for: the leak. Feed it t_(i+k), one earlier": (
                lambda window, k: _slices(window, k, k + 1, k + 1)
            ),
            "the module is asked for the token it has just been fed; ask for the one after": (
                lambda window, k: _slices(window, k, k, k)
            ),
            "fed and asked for are both one place too early: the report's i counts from 1, a "
            "column from 0, and the difference is the same": (
                lambda window, k: _slices(window, k, k - 1, k)
            ),
            "that is right for k = 1 alone; the slices start at k and k + 1": (
                lambda window, k: _slices(window, k, 1, 2)
            ),
            "these slices fit k = 1 alone": (
                lambda window, k: (window[:, :-2], window[:, 1:-1], window[:, 2:])
            ),
            "all three have to be T wide: cut off their ends": (
                lambda window, k: (window, window[:, k:], window[:, k + 1 :])
            ),
        },
        praise="what is fed starts at k, what is asked for at k + 1",
    )


def mtp_claims(answer: dict[str, bool | None]) -> Verdict:
    """Eight statements about the module, its training and its drafts."""
    return judge_statements(
        "mtp_claims",
        answer,
        {
            "with more training, parallel heads would learn the toy's second halves": False,
            "the MTP module has attention and experts of its own": True,
            "the embedding gets a gradient from the next token's loss alone": False,
            "an MTP loss near 0 on ordinary text means a very good module": False,
            "with greedy decoding, a bad module changes the text": False,
            "a draft that the model finds likelier than the module does is always kept": True,
            "a module that drafts one word all the time changes what is drawn": False,
            "after a rejected draft the pass has still given one token": True,
        },
        {
            "with more training, parallel heads would learn the toy's second halves": "which half "
            "comes is decided by a token that they do not see",
            "the MTP module has attention and experts of its own": "eq. 22 is a whole layer; only "
            "embedding and head are shared",
            "the embedding gets a gradient from the next token's loss alone": "the module reads "
            "and predicts through the same tables, so both gradients add up there",
            "an MTP loss near 0 on ordinary text means a very good module": "ordinary text has "
            "chance in it; below what chance leaves there is only a leak",
            "with greedy decoding, a bad module changes the text": "every token is the model's "
            "own choice; drafts only decide how many passes it takes",
            "a draft that the model finds likelier than the module does is always kept": "min(1, "
            "p/q) is 1 there",
            "a module that drafts one word all the time changes what is drawn": "kept plus "
            "missing is p for every q, also for one that is certain",
            "after a rejected draft the pass has still given one token": "the first answer of the "
            "pass did not depend on the draft",
        },
    )


# --- the leak ---------------------------------------------------------------------------------


def _suspect_a(model, window: Tensor) -> Tensor:
    _, hidden = model(window[:, :-2], return_hidden=True)
    return model.mtp_logits(hidden, window[:, :-2])[0]  # fed what the state knows already


def _suspect_b(model, window: Tensor) -> Tensor:
    _, hidden = model(window[:, 1:-1], return_hidden=True)
    return model.mtp_logits(hidden, window[:, 2:])[0]  # all of it one place late: the leak


def _suspect_c(model, window: Tensor) -> Tensor:
    _, hidden = model(window[:, :-2], return_hidden=True)
    return model.mtp_logits(hidden, window[:, 1:-1])[0]  # right


def _suspect_d(model, window: Tensor) -> Tensor:
    _, hidden = model(window[:, :-2], return_hidden=True)
    before = torch.cat([hidden[:, :1], hidden[:, :-1]], 1)
    return model.mtp_logits(before, window[:, 1:-1])[0]  # each state one old


# Four ways to say what is asked about at each position: (model, window (b, T + 2)) -> (b, T, V).
suspects: dict[str, Callable] = {"A": _suspect_a, "B": _suspect_b, "C": _suspect_c, "D": _suspect_d}


def reach(answer: dict[str, int | None]) -> Verdict:
    """How far ahead of its position each suspect looks."""

    def why(key: str, value: int) -> str:
        if value > 2:
            return (
                "too far. Changes of 1e-5 and less are rounding: tokens share the products of "
                "their experts. Ask for more than 1e-3"
            )
        if key == "B":
            return "it looks further than that. Change t_(i+2), too"
        if value == 2:
            return "what t_(i+2) moves there is rounding, or another position's answer"
        if key == "A":
            return "t_(i+1) moves nothing there; this one is a parallel head in disguise"
        return "change the token at i + 1 alone, and look at the answer at i"

    return judge_numbers(
        "reach",
        answer,
        {"A": 0, "B": 2, "C": 1, "D": 1},
        why,
        "B leaks: its slices fit together, one place late, and it reads the t_(i+2) that it is "
        "asked for. (A never sees the next token; D's state is one old. Bugs, but no leaks)",
    )


# --- counting and measuring -------------------------------------------------------------------

# Of the shipped model on the chapter's 24 windows of 130 tokens.
OVERLAP, OVERLAP_AT_1, OVERLAP_AT_2 = 0.7095, 0.7422, 0.7691
GREEDY, SHIFTED = 0.6680, 0.0505


def _expected(kept: Sequence[float]) -> float:
    tokens, chance = 1.0, 1.0
    for share in kept:
        chance *= share
        tokens += chance
    return tokens


def tokens_per_pass(answer: Callable) -> Verdict:
    """kept: for each depth, the share kept given that all before were -> tokens of a pass."""
    cases = [([0.8],), ([0.6, 0.5, 0.4],), ([0.9, 0.9],), ([],), ([0.5, 0.0, 1.0],)]

    def without_first(kept):
        return _expected(kept) - 1

    def of_the_first(kept):
        return sum(kept[0] ** depth for depth in range(len(kept) + 1)) if kept else 1.0

    def only_if_all(kept):
        return 1 + len(kept) * math.prod(kept)

    return judge(
        "tokens_per_pass",
        answer,
        _expected,
        cases,
        {
            "you add the shares up. A draft counts only if all before it were kept: multiply": (
                lambda kept: 1 + sum(kept)
            ),
            "the token that every pass gives is missing": without_first,
            "you use the first share at every depth; they fall": of_the_first,
            "a pass that keeps the first drafts and loses a later one still gives those": (
                only_if_all
            ),
            "that counts a token only if all drafts are kept; each depth adds its own": (
                lambda kept: 1 + (math.prod(kept) if kept else 0)
            ),
        },
        praise="1 + a1 + a1 a2 + ...",
    )


def overlap(answer: float | None) -> Verdict:
    """Share of drafts accepted at temperature 0.5 on the held-out windows of the chapter."""
    return judge_value(
        "overlap",
        answer,
        OVERLAP,
        {
            OVERLAP_AT_1: "that is temperature 1: divide both logits by 0.5 before the softmax",
            GREEDY: "that is greedy agreement of the best tokens; sum min(p, q) over all words",
            OVERLAP_AT_2: "that is temperature 2: you multiplied the logits by 0.5. Divide",
            SHIFTED: "p and q are about different tokens: the module at i speaks of the token that "
            "the model is asked for at i + 1",
        },
        tolerance=0.004,
        praise="about 7 in 10; compare it with greedy agreement on the same text",
    )


# --- close the book ---------------------------------------------------------------------------


def _draw(weights: Tensor, v: float) -> int:
    return int((weights.cumsum(0) > v * weights.sum()).nonzero()[0])


def _draw_unscaled(weights: Tensor, v: float) -> int:
    above = (weights.cumsum(0) > v).nonzero()
    return int(above[0]) if len(above) else -1


def _accept(
    p: Tensor,
    q: Tensor,
    drafts: Sequence[int],
    u: Sequence[float],
    v: float,
    *,
    ratio: Callable = lambda p, q: p / q,
    leftover: Callable = lambda p, q: (p - q).clamp(min=0),
    bonus: bool = True,
    stops: bool = True,
    draw: Callable = _draw,
) -> list[str]:
    tokens: list[int] = []
    for depth, draft in enumerate(drafts):
        if u[depth] < ratio(p[depth][draft], q[depth][draft]):
            tokens.append(draft)
        else:
            tokens.append(draw(leftover(p[depth], q[depth]), v))
            if stops:
                return [*map(str, tokens)]
    tokens += [draw(p[len(drafts)], v)] if bonus else []
    return [*map(str, tokens)]


def accept_or_reject(answer: Callable) -> Verdict:
    """p (k + 1, V), q (k, V), drafts, u (k numbers), v -> the tokens of this pass, 1 to k + 1."""
    random = torch.Generator().manual_seed(5)
    cases = []
    for k in (1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4):
        p, q = (
            torch.rand(n, 6, generator=random, dtype=torch.float64) ** 2 + 0.01 for n in (k + 1, k)
        )
        p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
        drafts = q.multinomial(1, generator=random)[:, 0].tolist()
        u = (torch.rand(k, generator=random, dtype=torch.float64) * 0.9).tolist()
        cases.append((p, q, drafts, u, float(torch.rand((), generator=random))))

    def wrong(**how) -> Callable:
        return lambda *given: _accept(*given, **how)

    def in_words(*given) -> list[str] | None:  # a token is another one, not a bit off
        tokens = answer(*given)
        return None if tokens is None or tokens is ... else [str(int(token)) for token in tokens]

    return judge(
        "accept_or_reject",
        in_words if callable(answer) else answer,
        _accept,
        cases,
        {
            "the replacement is drawn from p. That favours what the module drafts too often; draw "
            "it from what is missing, max(p - q, 0)": wrong(leftover=lambda p, q: p),
            "the replacement is drawn from q, the distribution that was just refused": wrong(
                leftover=lambda p, q: q
            ),
            "max(p - q, 0) is what is missing, |p - q| is also what there is too much of": wrong(
                leftover=lambda p, q: (p - q).abs()
            ),
            "what is missing does not sum to 1: compare its running sum with v times its total": (
                wrong(draw=_draw_unscaled)
            ),
            "you keep a draft with q / p; it is p / q": wrong(ratio=lambda p, q: q / p),
            "you keep a draft only where p >= q. A draft with p < q is kept with chance p / q": (
                wrong(ratio=lambda p, q: float(p >= q))
            ),
            "you keep a draft with probability p, as if nobody had drawn it from q": wrong(
                ratio=lambda p, q: p
            ),
            "when all drafts are kept, the pass has one more answer: draw it from the last p": (
                wrong(bonus=False)
            ),
            "you go on after a rejected draft; what follows was computed for another text": wrong(
                stops=False
            ),
        },
        tolerance=0.0,
        praise="the same tokens on all 12 inputs, of one to four drafts",
    )


def pays_up_to(answer: Callable) -> Verdict:
    """n0, p, c -> the largest number of texts for which drafting is not slower."""
    cases = [(5412.0, 0.87, 0.04), (300.0, 0.6, 0.1), (40.0, 0.9, 0.25)]
    return judge(
        "pays_up_to",
        answer,
        lambda n0, p, c: n0 * (1 + p) / (2 * (1 + c)),
        cases,
        {
            "from n0 / 2 on a pass with drafts waits for arithmetic; it still pays a while, since "
            "it gives 1 + p tokens": lambda n0, p, c: n0 / 2,
            "at n0 texts a plain pass is busy, and one with drafts takes twice as long": (
                lambda n0, p, c: n0
            ),
            "that is right and rounded; leave the number as it is": (
                lambda n0, p, c: math.floor(n0 * (1 + p) / (2 * (1 + c)))
            ),
            "the module's own cost c is missing": lambda n0, p, c: n0 * (1 + p) / 2,
            "each text brings two tokens to a pass with drafts: divide by 2": (
                lambda n0, p, c: n0 * (1 + p) / (1 + c)
            ),
            "1 + p tokens come from a pass, not p": lambda n0, p, c: n0 * p / (2 * (1 + c)),
        },
        praise="(1 + p) / (2 (1 + c)) of the batch that fills the arithmetic",
    )
