"""Checks of chapter 1's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dsv3.book import bpe
from dsv3.book.exercise import Verdict, judge, judge_statements, judge_value


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kv_bytes(answer: float | None) -> Verdict:
    """Bytes of cache a token: 32 layers, 32 heads, 8 KV heads of width 128, bfloat16."""
    return judge_value(
        "kv_bytes",
        answer,
        131_072,
        {
            65_536: "half is missing: keys and values are both kept, and each number has two bytes",
            32_768: "two factors of 2 are missing: keys and values, and two bytes a number",
            4_096: "that is one layer; every layer has its own keys and values",
            2_048: "that is the count of numbers in one layer; count all layers, in bytes",
            524_288: "that is 32 KV heads. Queries are not kept, and only 8 heads have keys",
            262_144: "that is 32 heads and one factor of 2; only the 8 KV heads are kept, and each "
            "number of K and of V has two bytes",
            16_384: "divide by nothing: keys and values of all 8 KV heads are kept",
        },
        unit="bytes a token",
    )


def rms_norm(answer: Callable) -> Verdict:
    """x (..., d) -> x / rms(x) * weight."""

    def right(x, weight, eps=1e-6):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight

    def layer_norm(x, weight, eps=1e-6):
        x = x - x.mean(-1, keepdim=True)
        return right(x, weight, eps)

    def by_length(x, weight, eps=1e-6):
        return x * (x.pow(2).sum(-1, keepdim=True) + eps).rsqrt() * weight

    def to_length_1(x, weight, eps=1e-6):
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) * weight

    def over_all(x, weight, eps=1e-6):
        return x * (x.pow(2).mean() + eps).rsqrt() * weight

    def late_eps(x, weight, eps=1e-6):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps) * weight

    def not_rooted(x, weight, eps=1e-6):
        return x / (x.pow(2).mean(-1, keepdim=True) + eps) * weight

    x = _random(2, 3, 8)
    cases = [
        (x + 1, _random(8, seed=1)),
        (x * 30, torch.ones(8)),
        (x[0] * 1e-3, torch.ones(8)),
        (torch.zeros(2, 8), torch.ones(8)),
    ]
    return judge(
        "rms_norm",
        answer,
        right,
        cases,
        {
            "you take the mean off first: that is LayerNorm. RMSNorm does not centre": layer_norm,
            "you divide by the length of x, the root of the sum. RMS is the root of the mean, so the "
            "result should have rms 1 at any width": by_length,
            "you divide by the length of x, the root of the sum. RMS is the root of the mean, and eps "
            "stands under the root": to_length_1,
            "one token's size should not depend on another's: take the mean over the last dimension "
            "only, with keepdim=True": over_all,
            "eps belongs under the root, beside the mean square; for small x it makes a difference": late_eps,
            "the root is missing: divide by the root of the mean square": not_rooted,
            "the weight is missing: each channel has its own factor, learned": lambda x, weight, eps=1e-6: (
                right(x, torch.ones_like(weight), eps)
            ),
        },
        praise="equal on all inputs, tiny ones and zeros among them",
    )


def rope(answer: Callable) -> Verdict:
    """x (s, d) and positions (s,) -> x with its neighbouring pairs turned."""

    def turned(x, positions, base=10000.0, sign=1, exponent=2.0, shift=0):
        d = x.shape[-1]
        speed = base ** (-exponent * torch.arange(d // 2) / d)
        angle = sign * (positions[:, None] + shift) * speed
        a, b = x[:, 0::2], x[:, 1::2]
        pairs = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return torch.stack(pairs, -1).flatten(-2)

    def halves(x, positions, base=10000.0):
        d = x.shape[-1]
        order = torch.arange(d).view(2, -1).T.flatten()
        out = torch.empty_like(x)
        out[:, order] = turned(x[:, order], positions, base)
        return out

    def halves_out(x, positions, base=10000.0):
        out = turned(x, positions, base)
        return torch.cat([out[:, 0::2], out[:, 1::2]], -1)

    cases = [
        (_random(5, 8), torch.arange(5)),
        (_random(3, 6, seed=1), torch.tensor([7, 2, 40])),
        (_random(2, 4, seed=2), torch.tensor([3, 9]), 500.0),
    ]
    return judge(
        "rope",
        answer,
        turned,
        cases,
        {
            "you turn value j together with value j + d/2. The released weights want neighbours: "
            "0 with 1, 2 with 3": halves,
            "the pairs are turned rightly, but come out in two halves: put each pair back side by "
            "side, with torch.stack(..., -1).flatten(-2)": halves_out,
            "you turn the other way round: a cos - b sin comes first, a sin + b cos second": lambda *case: (
                turned(*case, sign=-1)
            ),
            "pair j turns by base ** (-2j / d): your exponent is -j / d": lambda *case: turned(
                *case, exponent=1.0
            ),
            "position 0 is not turned at all: your positions are one too large": lambda *case: (
                turned(*case, shift=1)
            ),
        },
        praise="equal on all inputs, other bases and positions out of order among them",
    )


def claims(answers: dict[str, bool | None]) -> Verdict:
    """Which sentences about attention and its cache are true."""
    right = {
        "a": False,
        "b": True,
        "c": False,
        "d": False,
        "e": True,
        "f": False,
        "g": True,
        "h": False,
    }
    return judge_statements(
        "claims",
        answers,
        right,
        {
            "a": "the mask lets a token see itself and those before it; what it computed for them "
            "would have to change with every new token otherwise, and nothing could be kept",
            "b": "a query is used once, by its own token, and never by a later one",
            "c": "a rotated key has its angle from its own position alone, and that does not change",
            "d": "each pair turns at its own speed, and the weights were trained with it. Pair other "
            "values and they turn at speeds that they never met",
            "e": "in prefill all queries of a pass share what is read, weights and keys alike; the "
            "one query of a decoded token has nobody to share with",
            "f": "each text has keys and values of its own: twice the texts are twice the bytes and "
            "twice the arithmetic. Only the weights are shared by a batch",
            "g": "n_h / n_kv queries use each key that was read, so there is that much more "
            "arithmetic for a byte",
            "h": "without a cache the text of t tokens goes through the model again for every new "
            "token; with it, one token does",
        },
        praise="all eight; you can explain the cache to somebody else",
    )


def causal_weights(answer: Callable) -> Verdict:
    """Scores (s, t) of the last s of t tokens -> causal softmax weights (s, t)."""

    def keep(s, t, first):
        return torch.arange(t) <= torch.arange(first, first + s)[:, None]

    def right(scores):
        s, t = scores.shape
        return scores.masked_fill(~keep(s, t, t - s), -math.inf).softmax(-1)

    def corner(scores):
        return scores.masked_fill(~keep(*scores.shape, 0), -math.inf).softmax(-1)

    def zero(scores):
        s, t = scores.shape
        return scores.masked_fill(~keep(s, t, t - s), 0.0).softmax(-1)

    def afterwards(scores):
        s, t = scores.shape
        return scores.softmax(-1) * keep(s, t, t - s)

    def down(scores):
        s, t = scores.shape
        return scores.masked_fill(~keep(s, t, t - s), -math.inf).softmax(0).nan_to_num(0.0)

    def strict(scores):
        s, t = scores.shape
        return scores.masked_fill(~keep(s, t, t - s - 1), -math.inf).softmax(-1)

    cases = [
        (_random(4, 4),),
        (_random(3, 7, seed=1) * 4,),
        (_random(1, 5, seed=2) - 9,),
        (_random(2, 2, seed=3) + 1,),
    ]
    return judge(
        "causal_weights",
        answer,
        right,
        cases,
        {
            "your mask starts in the upper left corner. Behind a cache the first query is token "
            "t - s, and sees all tokens up to it": corner,
            "a masked score of 0 is a score like any other, and e^0 = 1 gets weight. Use -inf": zero,
            "you mask behind the softmax: the rows no longer sum to 1. Mask the scores": afterwards,
            "you take the softmax over the queries: it goes over the keys, the last dimension": down,
            "a token sees itself, too: the diagonal stays open": strict,
            "nothing is masked: a token would see those that come later": lambda scores: (
                scores.softmax(-1)
            ),
        },
        praise="equal on all inputs, with and without a cache",
    )


def previous_token_head(answer: Callable, maps: Tensor | None = None) -> Verdict:
    """maps (layers, heads, s, s) -> (layer, head) with the most weight one token back."""

    def by(offset, rows=slice(None)):
        def find(maps):
            weight = maps.diagonal(offset, -2, -1)[..., rows].mean(-1)
            best = int(weight.argmax())
            return best // maps.shape[1], best % maps.shape[1]

        return find

    right = by(-1)
    cases = []
    for seed in range(4):
        scores = _random(3, 4, 6, 6, seed=seed) * 2
        cases.append((scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1),))
    praise = "the right head on all inputs"
    if maps is not None:
        layer, head = right(maps)
        share = float(maps[layer, head].diagonal(-1).mean())
        praise = f"in our model it is layer {layer}, head {head}: {share:.0%} on average"
    return judge(
        "previous_token_head",
        answer,
        right,
        cases,
        {
            "that is the head that looks most at the token itself, on the diagonal; one below it "
            "(offset -1) is the token before": by(0),
            "that is a place in the flattened list of heads; give (layer, head)": lambda maps: (
                right(maps)[0] * maps.shape[1] + right(maps)[1]
            ),
            "the other way round: (layer, head)": lambda maps: right(maps)[::-1],
            "that is the head that looks most at the first token": lambda maps: _best(
                maps[:, :, 1:, 0].mean(-1)
            ),
            "offset +1 is above the diagonal, where no query may look; the token before is at -1": by(
                1
            ),
        },
        praise=praise,
    )


def _best(weight: Tensor) -> tuple[int, int]:
    """Layer and head of the largest of (layers, heads) weights."""
    best = int(weight.argmax())
    return best // weight.shape[1], best % weight.shape[1]


def grouped(answer: Callable) -> Verdict:
    """q (heads, s, d), k and v (kv_heads, s, d) -> causal attention (heads, s, d)."""

    def attention(q, k, v, scale=None):
        scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ v

    def right(q, k, v, scale=None):
        share = len(q) // len(k)
        return attention(q, k.repeat_interleave(share, 0), v.repeat_interleave(share, 0), scale)

    def in_turn(q, k, v):
        share = len(q) // len(k)
        return attention(q, k.repeat(share, 1, 1), v.repeat(share, 1, 1))

    def seeing_all(q, k, v):
        share = len(q) // len(k)
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v

    cases = []
    for heads, kv_heads, s, d in ((4, 2, 5, 8), (6, 3, 4, 6), (3, 1, 3, 4), (2, 2, 6, 4)):
        cases.append(
            tuple(_random(n, s, d, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
        )
    return judge(
        "grouped",
        answer,
        right,
        cases,
        {
            "you repeat the KV heads in turn (0, 1, 0, 1): neighbouring heads share one, so repeat "
            "each (0, 0, 1, 1), as repeat_interleave does": in_turn,
            "the scores are not divided by the root of d": lambda q, k, v: right(q, k, v, 1.0),
            "the scores are divided by d; divide by its root": lambda q, k, v: right(
                q, k, v, 1 / q.shape[-1]
            ),
            "tokens see those that come later: the mask is missing": seeing_all,
        },
        praise="equal for MHA, GQA and MQA",
    )


def bpe_encode(answer: Callable) -> Verdict:
    """A piece of text and the ranks of merges -> its tokens."""

    merges = "t+h e+r h+e th+e o+t ot+h n+o no+t o+th oth+er i+n in+g t+i t+ing".split()
    ranks = {tuple(merge.split("+")): rank for rank, merge in enumerate(merges)}
    pieces = "the there not other note x hehe nothere noting ting".split()
    cases = [(piece, ranks) for piece in (*pieces, "")]
    return judge(
        "bpe_encode",
        answer,
        bpe.right,
        cases,
        {
            "you take the longest known token from the left. BPE repeats the merges in the order in "
            "which they were learned, and can end with other tokens": bpe.longest,
            "you merge the first pair that is known at all. Among all pairs, the one with the lowest "
            "rank, the one learned first, goes first": bpe.first_found,
            "you merge once and stop; go on until no pair is left that has a rank": bpe.once,
            "you take the highest rank first; merges are repeated in the order in which they were "
            "learned, lowest rank first": bpe.last,
        },
        praise="the same tokens on all inputs, an empty one among them",
    )


def kv_heads_that_fit(answer: Callable) -> Verdict:
    """Largest divisor of heads whose cache of one text fits into so many GB (10^9 bytes); or 0."""

    def by(both=2, whole=True, giga=1e9, divisor=True, smallest=False):
        def find(heads, head_dim, layers, tokens, gigabytes):
            for count in range(1, heads + 1) if smallest else range(heads, 0, -1):
                size = both * count * head_dim * (layers if whole else 1) * tokens * 2
                if size <= gigabytes * giga and (not divisor or heads % count == 0):
                    return count
            return 0

        return find

    cases = [
        (128, 128, 61, 131_072, 40),
        (64, 128, 80, 131_072, 43),
        (64, 128, 80, 131_072, 1),
        (12, 64, 12, 4096, 0.126),
        (32, 128, 32, 8192, 1.0),
        (32, 128, 32, 8192, 1.1),
    ]
    return judge(
        "kv_heads_that_fit",
        answer,
        by(),
        cases,
        {
            "heads must share evenly: only divisors of heads can be the number of KV heads": by(
                divisor=False
            ),
            "you count keys or values; both are kept": by(both=1),
            "you count one layer": by(whole=False),
            "a GB is 10^9 bytes here, as on the label of a GPU; 2^30 bytes are a GiB": by(
                giga=2**30
            ),
            "that is the smallest number that fits; more KV heads are better, so look for the "
            "largest": by(smallest=True),
        },
        praise="you can now size the cache of a model that you have not seen",
    )
