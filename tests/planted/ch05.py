"""Wrong answers to chapter 5's exercises, each with what the check must say to it."""

from __future__ import annotations

import math

from dsv3.book.ch05 import GREEDY, OVERLAP_AT_1, OVERLAP_AT_2, SHIFTED

TABLE = {
    "k = 1, i = 5: fed": 6,
    "k = 1, i = 5: asked for": 7,
    "k = 2, i = 3: fed": 5,
    "k = 2, i = 3: asked for": 6,
    "k = 2: last i": 4,
}


def leaking(window, k):
    length = window.shape[1] - 1 - k
    return window[:, :length], window[:, k + 1 :], window[:, k + 1 :]


def repeating(window, k):
    length = window.shape[1] - 1 - k
    return window[:, :length], window[:, k:][:, :length], window[:, k : length + k]


def early(window, k):
    length = window.shape[1] - 1 - k
    return window[:, :length], window[:, k - 1 : k - 1 + length], window[:, k : k + length]


def first_module(window, k):
    length = window.shape[1] - 1 - k
    return window[:, :length], window[:, 1 : 1 + length], window[:, 2 : 2 + length]


def overlong(window, k):
    return window[:, : -1 - k], window[:, k:], window[:, k + 1 :]


CLAIMS = {
    "with more training, parallel heads would learn the toy's second halves": False,
    "the MTP module has attention and experts of its own": True,
    "the embedding gets a gradient from the next token's loss alone": False,
    "an MTP loss near 0 on ordinary text means a very good module": False,
    "with greedy decoding, a bad module changes the text": False,
    "a draft that the model finds likelier than the module does is always kept": True,
    "a module that drafts one word all the time changes what is drawn": False,
    "after a rejected draft the pass has still given one token": True,
}
REACH = {"A": 0, "B": 2, "C": 1, "D": 1}


def rebuilt(*, ratio=lambda p, q: p / q, leftover=lambda p, q: (p - q).clamp(min=0), last=True):
    """The exercise's function with a part of it replaced."""

    def draw(weights, v):
        return int((weights.cumsum(0) > v * weights.sum()).nonzero()[0])

    def accept_or_reject(p, q, drafts, u, v):
        out = []
        for j, x in enumerate(drafts):
            if u[j] >= ratio(float(p[j, x]), float(q[j, x])):
                return [*out, draw(leftover(p[j], q[j]), v)]
            out.append(x)
        return [*out, draw(p[-1], v)] if last else out

    return accept_or_reject


def never_stopping(p, q, drafts, u, v):
    one = rebuilt()
    out = []
    for j, x in enumerate(drafts):
        out.append(one(p[j : j + 2], q[j : j + 1], [x], u[j : j + 1], v)[0])
    return [*out, one(p[-1:], q[:0], [], [], v)[0]]


def unscaled(p, q, drafts, u, v):
    weights, out = p[-1], []
    for j, x in enumerate(drafts):
        if u[j] >= p[j, x] / q[j, x]:
            weights = (p[j] - q[j]).clamp(min=0)
            break
        out.append(x)
    above = (weights.cumsum(0) > v).nonzero()
    return [*out, above[0] if len(above) else -1]


PLANTED = {
    "index_table": [
        (TABLE | {"k = 1, i = 5: fed": 7}, "the token it is asked for"),
        (TABLE | {"k = 1, i = 5: fed": 5}, "in the state already"),
        (TABLE | {"k = 2, i = 3: asked for": 5}, "it was just fed"),
        (TABLE | {"k = 2: last i": 5}, "t_8"),
        (TABLE | {"k = 2: last i": 3}, "go on"),
        (TABLE | {"k = 2: last i": "or"}, "a whole number"),
    ],
    "shift": [
        (leaking, "the leak"),
        (repeating, "has just been fed"),
        (early, "one place too early"),
        (first_module, "right for k = 1 alone"),
        (overlong, "has shape (1, 8), expected (1, 7)"),
        (lambda w, k: (w[:, :-2], w[:, 1:-1], w[:, 2:]), "fit k = 1 alone"),
        (lambda w, k: (w, w[:, k:], w[:, k + 1 :]), "cut off their ends"),
    ],
    "mtp_claims": [
        (
            CLAIMS
            | {"with more training, parallel heads would learn the toy's second halves": True},
            "they do not see",
        ),
        (
            CLAIMS | {"an MTP loss near 0 on ordinary text means a very good module": True},
            "only a leak",
        ),
        (
            CLAIMS | {"a module that drafts one word all the time changes what is drawn": True},
            "for every q",
        ),
    ],
    "reach": [
        (REACH | {"B": 1}, "Change t_(i+2), too"),
        (REACH | {"D": 2}, "is rounding"),
        (REACH | {"A": 1}, "parallel head in disguise"),
        (dict.fromkeys("ABCD", 3), "share the products of their experts"),
    ],
    "tokens_per_pass": [
        (lambda kept: 1 + sum(kept), "you add the shares up"),
        (lambda kept: rebuilt_sum(kept) - 1, "every pass gives is missing"),
        (lambda kept: 1 + (math.prod(kept) if kept else 0), "only if all drafts are kept"),
        (lambda kept: sum(kept[0] ** n for n in range(len(kept) + 1)) if kept else 1, "they fall"),
    ],
    "overlap": [
        (OVERLAP_AT_1, "temperature 1"),
        (OVERLAP_AT_2, "temperature 2"),
        (GREEDY, "greedy agreement"),
        (SHIFTED, "different tokens"),
    ],
    "accept_or_reject": [
        (rebuilt(leftover=lambda p, q: p), "drawn from p"),
        (rebuilt(leftover=lambda p, q: q), "drawn from q"),
        (rebuilt(ratio=lambda p, q: q / p), "it is p / q"),
        (rebuilt(ratio=lambda p, q: p >= q), "only where p >= q"),
        (rebuilt(ratio=lambda p, q: p), "as if nobody had drawn it"),
        (rebuilt(last=False), "one more answer"),
        (rebuilt(leftover=lambda p, q: (p - q).abs()), "too much of"),
        (unscaled, "compare its running sum"),
        (never_stopping, "you go on after a rejected draft"),
    ],
    "pays_up_to": [
        (lambda n0, p, c: n0 / 2, "still pays a while"),
        (lambda n0, p, c: n0, "twice as long"),
        (lambda n0, p, c: int(n0 * (1 + p) / (2 * (1 + c))), "right and rounded"),
        (lambda n0, p, c: n0 * (1 + p) / 2, "own cost c"),
        (lambda n0, p, c: n0 * (1 + p) / (1 + c), "divide by 2"),
    ],
}


def rebuilt_sum(kept):
    tokens, chance = 1.0, 1.0
    for share in kept:
        chance *= share
        tokens += chance
    return tokens
