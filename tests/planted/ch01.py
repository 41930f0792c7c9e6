"""Wrong answers to chapter 1's exercises, each with what the check must say to it."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def centred(x, weight, eps=1e-6):
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


def unit_length(x, weight, eps=1e-6):
    return F.normalize(x, dim=-1) * weight


def unweighted(x, weight, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], None, eps)


def eps_outside(x, weight, eps=1e-6):
    return weight * x / (torch.sqrt(torch.mean(x**2, -1, True)) + eps)


def writes_over_input(x, weight, eps=1e-6):
    x /= torch.sqrt((x**2).mean(-1, keepdim=True) + eps)
    return x * weight


def rotate_half(x, positions, base=10000.0):
    half = x.shape[-1] // 2
    speed = 1 / base ** (torch.arange(half) / half)
    angle = positions[:, None] * speed
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin


def as_complex(x, positions, base=10000.0, step=2, sign=1.0):
    d = x.shape[-1]
    speed = 1 / base ** (torch.arange(0, d, 2) * step / 2 / d)
    turn = torch.polar(torch.ones(len(x), d // 2), sign * positions[:, None] * speed)
    return torch.view_as_real(torch.view_as_complex(x.reshape(len(x), -1, 2)) * turn).flatten(1)


def unzipped(x, positions, base=10000.0):
    pairs = as_complex(x, positions, base).view(len(x), -1, 2)
    return torch.cat([pairs[..., 0], pairs[..., 1]], 1)


def square_mask(scores):
    return scores.masked_fill(~torch.ones_like(scores).tril().bool(), float("-inf")).softmax(1)


def zero_mask(scores):
    s, t = scores.shape
    return (scores * torch.ones(s, t).tril(t - s)).softmax(-1)


def masked_late(scores):
    s, t = scores.shape
    return scores.softmax(-1).tril(t - s)


def not_itself(scores):
    s, t = scores.shape
    seen = torch.ones(s, t).tril(t - s - 1).bool()
    return torch.where(seen, scores, torch.tensor(float("-inf"))).softmax(-1)


def own_token(maps):
    averages = [[float(head.diagonal().mean()) for head in layer] for layer in maps]
    best = max(max(row) for row in averages)
    return next((i, row.index(best)) for i, row in enumerate(averages) if best in row)


def flat_index(maps):
    return int(torch.stack([head.diagonal(-1).mean() for layer in maps for head in layer]).argmax())


def head_first(maps):
    heads = maps.shape[1]
    return flat_index(maps) % heads, flat_index(maps) // heads


def heads_in_turn(q, k, v):
    return F.scaled_dot_product_attention(
        q, k.repeat(len(q) // len(k), 1, 1), v.repeat(len(q) // len(v), 1, 1), is_causal=True
    )


def unscaled(q, k, v):
    share = len(q) // len(k)
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(share, 0), v.repeat_interleave(share, 0), is_causal=True, scale=1.0
    )


def sees_the_future(q, k, v):
    share = len(q) // len(k)
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
    )


def longest_match(piece, ranks):
    vocabulary, tokens, start = {"".join(pair) for pair in ranks}, [], 0
    while start < len(piece):
        end = len(piece)
        while end > start + 1 and piece[start:end] not in vocabulary:
            end -= 1
        tokens.append(piece[start:end])
        start = end
    return tokens


def leftmost_pair(piece, ranks):
    tokens = list(piece)
    while True:
        for i in range(len(tokens) - 1):
            if (tokens[i], tokens[i + 1]) in ranks:
                tokens = tokens[:i] + [tokens[i] + tokens[i + 1]] + tokens[i + 2 :]
                break
        else:
            return tokens


def cache_bytes(count, head_dim, layers, tokens, kinds=2):
    return kinds * count * head_dim * layers * tokens * 2


def any_number(heads, head_dim, layers, tokens, gigabytes):
    return min(heads, int(gigabytes * 1e9 // cache_bytes(1, head_dim, layers, tokens)))


def keys_alone(heads, head_dim, layers, tokens, gigabytes):
    fits = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and cache_bytes(n, head_dim, layers, tokens, kinds=1) <= gigabytes * 1e9
    ]
    return max(fits, default=0)


def one_layer(heads, head_dim, layers, tokens, gigabytes):
    fits = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0 and cache_bytes(n, head_dim, 1, tokens) <= gigabytes * 1e9
    ]
    return max(fits, default=0)


ALL_TRUE = dict.fromkeys("abcdefgh", True)
ALL_FALSE = dict.fromkeys("abcdefgh", False)
RIGHT = dict(zip("abcdefgh", (False, True, False, False, True, False, True, False)))

PLANTED = {
    "kv_bytes": [
        (2 * 8 * 128 * 2, "one layer"),
        (8 * 128 * 32 * 2, "half is missing"),
        (2 * 32 * 128 * 32 * 2, "32 KV heads"),
        (131.072, "too small"),
    ],
    "rms_norm": [
        (centred, "LayerNorm"),
        (unit_length, "root of the sum"),
        (unweighted, "weight is missing"),
        (eps_outside, "under the root"),
        (writes_over_input, "changes its input"),
    ],
    "rope": [
        (rotate_half, "neighbours"),
        (unzipped, "two halves"),
        (lambda *case: as_complex(*case, sign=-1.0), "other way round"),
        (lambda *case: as_complex(*case, step=1), "exponent"),
    ],
    "claims": [
        (ALL_TRUE, "before it"),
        (ALL_FALSE, "never by a later one"),
        (RIGHT | {"f": True}, "of its own"),
    ],
    "causal_weights": [
        (square_mask, "upper left"),
        (zero_mask, "-inf"),
        (masked_late, "behind the softmax"),
        (not_itself, "sees itself"),
    ],
    "previous_token_head": [
        (own_token, "the token itself"),
        (flat_index, "flattened"),
        (head_first, "other way round"),
    ],
    "grouped": [
        (heads_in_turn, "repeat_interleave"),
        (unscaled, "root of d"),
        (sees_the_future, "mask is missing"),
    ],
    "bpe_encode": [(longest_match, "longest known token"), (leftmost_pair, "lowest rank")],
    "kv_heads_that_fit": [
        (any_number, "divisors"),
        (keys_alone, "both are kept"),
        (one_layer, "one layer"),
    ],
}
