"""Wrong answers to chapter 2's exercises, each with what the check must say to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from dsv3.rope import rotate


def statements(**changes):
    keys = [
        "the softmax runs over tokens, for each head by itself",
        "compressing the queries makes the cache smaller",
        "the cached latent has been through its norm",
        "the rotated key is made from the latent",
        "decoding makes every head's keys before it attends",
        "YaRN slows all pairs down equally",
        "a prompt of 10 tokens is rotated as if YaRN were on",
    ]
    answers = dict(zip(keys, [True, False, True, False, False, False, True]))
    for number, value in changes.items():
        answers[keys[int(number[1:])]] = value
    return answers


def latent_as_it_comes(h, w_dkv, w_kr, gain, rotation):
    return torch.cat((F.linear(h, w_dkv), rotate(F.linear(h, w_kr), rotation)), dim=1)


def everything_normed(h, w_dkv, w_kr, gain, rotation):
    c = F.rms_norm(F.linear(h, w_dkv), gain.shape, gain, 1e-6)
    k = F.linear(h, w_kr)
    return torch.cat((c, rotate(F.rms_norm(k, k.shape[-1:], None, 1e-6), rotation)), dim=1)


def layer_norm(h, w_dkv, w_kr, gain, rotation):
    c = F.layer_norm(F.linear(h, w_dkv), gain.shape, gain, None, 1e-6)
    return torch.cat((c, rotate(F.linear(h, w_kr), rotation)), dim=1)


def key_without_position(h, w_dkv, w_kr, gain, rotation):
    c = F.rms_norm(F.linear(h, w_dkv), gain.shape, gain, 1e-6)
    return torch.cat((c, F.linear(h, w_kr)), dim=1)


def expanding(q_nope, q_rope, cache, w_uk, w_uv, scale):
    c, k_r = cache.split([w_uk.shape[-1], q_rope.shape[-1]], dim=-1)
    k = torch.einsum("hdc,tc->htd", w_uk, c)
    v = torch.einsum("hvc,tc->htv", w_uv, c)
    a = torch.einsum("hd,htd->ht", q_nope, k) + q_rope @ k_r.T
    return torch.einsum("ht,htv->hv", (a * scale).softmax(-1), v)


def mixed(q_nope, q_rope, cache, w_uk, w_uv, weights_of):
    d_c = w_uk.shape[-1]
    content = torch.einsum("hd,hdc->hc", q_nope, w_uk) @ cache[:, :d_c].T
    weights = weights_of(content, q_rope @ cache[:, d_c:].T)
    return torch.einsum("hvc,hc->hv", w_uv, weights @ cache[:, :d_c])


def unscaled(q_nope, q_rope, cache, w_uk, w_uv, scale):
    return mixed(q_nope, q_rope, cache, w_uk, w_uv, lambda a, b: (a + b).softmax(1))


def content_alone(q_nope, q_rope, cache, w_uk, w_uv, scale):
    return mixed(q_nope, q_rope, cache, w_uk, w_uv, lambda a, b: (a * scale).softmax(1))


def scale_for_each(q_nope, q_rope, cache, w_uk, w_uv, scale):
    d_h, d_r = q_nope.shape[1], q_rope.shape[1]
    return mixed(
        q_nope,
        q_rope,
        cache,
        w_uk,
        w_uv,
        lambda a, b: (a / math.sqrt(d_h) + b / math.sqrt(d_r)).softmax(1),
    )


def heads_compete(q_nope, q_rope, cache, w_uk, w_uv, scale):
    return mixed(q_nope, q_rope, cache, w_uk, w_uv, lambda a, b: ((a + b) * scale).softmax(0))


def speeds(dim, theta):
    return 1 / theta ** (torch.arange(0, dim, 2) / dim)


def ends(dim, theta, original, fast, slow):
    def at(turns):
        return dim * math.log(original / turns / (2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(at(fast)), 0), min(math.ceil(at(slow)), dim - 1)


def all_slower(dim, theta, factor, original, fast=32, slow=1):
    return speeds(dim, theta) / factor


def fast_pairs_slowed(dim, theta, factor, original, fast=32, slow=1):
    low, high = ends(dim, theta, original, fast, slow)
    keep = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return speeds(dim, theta) * (keep + (1 - keep) / factor)


def runs_on(dim, theta, factor, original, fast=32, slow=1):
    low, high = ends(dim, theta, original, fast, slow)
    slowed = (torch.arange(dim // 2) - low) / max(high - low, 0.001)
    return speeds(dim, theta) * (1 - slowed + slowed / factor)


def long_context(dim, theta, factor, original, fast=32, slow=1):
    low, high = ends(dim, theta, factor * original, fast, slow)
    slowed = ((torch.arange(dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
    return speeds(dim, theta) * (1 - slowed + slowed / factor)


PLANTED = {
    "cache_bytes": [
        (2 * 576, "one layer"),
        (512 * 60 * 2, "rotated key is missing"),
        (60 * 2 * (512 + 128 * 64), "for each head"),
        (576 * 60, "two bytes"),
    ],
    "true_or_false": [
        (statements(_1=True), "queries are not cached"),
        (statements(_3=True), "W^KR multiplies h_t"),
        (statements(_6=False), "decided by the config"),
        (statements(_0=False), "no head is weighed"),
    ],
    "latents": [
        (latent_as_it_comes, "pass its norm"),
        (everything_normed, "not normalised"),
        (layer_norm, "does not take the mean off"),
        (key_without_position, "after its rotation"),
    ],
    "directions": [(123, "W^UK itself"), (25, "90%"), (42, "the values"), (61, "the latents")],
    "decode": [
        (expanding, "times the FLOPs"),
        (unscaled, "not scaled"),
        (content_alone, "rotated part is missing"),
        (scale_for_each, "one scale"),
        (heads_compete, "over tokens"),
    ],
    "yarn": [
        (all_slower, "position interpolation"),
        (fast_pairs_slowed, "wrong way round"),
        (runs_on, "between 0 and 1"),
        (long_context, "original length"),
    ],
    "tensor_parallel": [(2.25, "single GPU"), (144, "g / 8"), (9 / 32, "share the latent out")],
}
