"""Checks of chapter 2's exercises."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dsv3.book.exercise import Verdict, judge, judge_statements, judge_value
from dsv3.book.probe import attention_inputs, effective_rank
from dsv3.cache import Step
from dsv3.checkpoint.loading import load_model
from dsv3.generation.tokenizer import load_tokenizer
from dsv3.rope import rotate, rotations


def cache_bytes(answer: float | None) -> Verdict:
    """Bytes of cache a token: 60 layers, 128 heads, d_c = 512, d_h^R = 64, bfloat16."""
    return judge_value(
        "cache_bytes",
        answer,
        69_120,
        {
            576: "that is the count of numbers in one layer; count all layers, in bytes",
            1_152: "that is one layer; every layer has a latent and a rotated key of its own",
            34_560: "that is the count of numbers; bfloat16 takes two bytes for each",
            61_440: "the rotated key is missing: it is not made from the latent, so it is kept too",
            7_680: "the latent is missing; the rotated key alone says only where a token stands",
            1_044_480: "you keep a rotated key for each head. One serves all of them",
            138_240: "you count keys and values apart. One latent serves both",
            130_560: "you count the latent twice, for keys and for values. One serves both",
            8_847_360: "you multiply by the heads. The latent is one for all heads",
            70_272: "those are DeepSeek-V3's 61 layers; this model has 60",
        },
        unit="bytes a token",
    )


_TRUE = {
    "the softmax runs over tokens, for each head by itself": True,
    "compressing the queries makes the cache smaller": False,
    "the cached latent has been through its norm": True,
    "the rotated key is made from the latent": False,
    "decoding makes every head's keys before it attends": False,
    "YaRN slows all pairs down equally": False,
    "a prompt of 10 tokens is rotated as if YaRN were on": True,
}
_WHY = {
    "the softmax runs over tokens, for each head by itself": "it is ordinary multi-head attention (eq. 10). The latent only says where keys and "
    "values come from; no head is weighed against another",
    "compressing the queries makes the cache smaller": "queries are not cached at all: a token's query is used once, for that token. The low "
    "rank saves parameters and, in training, activation memory",
    "the cached latent has been through its norm": "kv_norm comes before the cache, so that nothing has to be normalised again when it is "
    "read",
    "the rotated key is made from the latent": "W^KR multiplies h_t (eq. 3), beside the latent. That is why it must be cached too",
    "decoding makes every head's keys before it attends": "that is the expanded form, for long prompts. A decoded token carries its query into the "
    "latent space and attends to the latents as they lie in the cache",
    "YaRN slows all pairs down equally": "that is position interpolation. YaRN leaves fast pairs alone and has a ramp between",
    "a prompt of 10 tokens is rotated as if YaRN were on": "YaRN is decided by the config, at every length. If it depended on the length, keys in "
    "the cache would be wrong as soon as a text grew past it",
}


def true_or_false(answers: dict[str, bool | None]) -> Verdict:
    """Seven statements about latent attention: true or false."""
    return judge_statements("true_or_false", answers, _TRUE, _WHY)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rms(x: Tensor) -> Tensor:
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def latents(answer: Callable) -> Verdict:
    """What the cache keeps of s tokens: (s, d_c + d_h^R), from h and the weights."""

    def right(h, w_dkv, w_kr, gain, rotation):
        return torch.cat([_rms(h @ w_dkv.T) * gain, rotate(h @ w_kr.T, rotation)], -1)

    def no_norm(h, w_dkv, w_kr, gain, rotation):
        return torch.cat([h @ w_dkv.T, rotate(h @ w_kr.T, rotation)], -1)

    def no_gain(h, w_dkv, w_kr, gain, rotation):
        return torch.cat([_rms(h @ w_dkv.T), rotate(h @ w_kr.T, rotation)], -1)

    def key_normed(h, w_dkv, w_kr, gain, rotation):
        return torch.cat([_rms(h @ w_dkv.T) * gain, rotate(_rms(h @ w_kr.T), rotation)], -1)

    def normed_together(h, w_dkv, w_kr, gain, rotation):
        c, k = _rms(h @ torch.cat([w_dkv, w_kr]).T).split([len(w_dkv), len(w_kr)], -1)
        return torch.cat([c * gain, rotate(k, rotation)], -1)

    def not_rotated(h, w_dkv, w_kr, gain, rotation):
        return torch.cat([_rms(h @ w_dkv.T) * gain, h @ w_kr.T], -1)

    def latent_rotated(h, w_dkv, w_kr, gain, rotation):
        c = _rms(h @ w_dkv.T) * gain
        wide = rotation.repeat(1, len(w_dkv) // len(w_kr))
        return torch.cat([rotate(c, wide), rotate(h @ w_kr.T, rotation)], -1)

    def key_first(h, w_dkv, w_kr, gain, rotation):
        return torch.cat([rotate(h @ w_kr.T, rotation), _rms(h @ w_dkv.T) * gain], -1)

    def centred(h, w_dkv, w_kr, gain, rotation):
        c = h @ w_dkv.T
        return torch.cat(
            [_rms(c - c.mean(-1, keepdim=True)) * gain, rotate(h @ w_kr.T, rotation)], -1
        )

    cases = []
    for seed, (s, d, d_c, d_r) in enumerate([(5, 12, 8, 4), (1, 6, 12, 6), (9, 16, 8, 8)]):
        positions = torch.arange(s) + 100 * seed
        speeds = torch.logspace(0, -2, d_r // 2)
        cases.append(
            (
                3 * _random(s, d, seed=seed),
                _random(d_c, d, seed=seed + 10),
                _random(d_r, d, seed=seed + 20),
                1 + 0.3 * _random(d_c, seed=seed + 30),
                rotations(positions, speeds, 1.0),
            )
        )
    return judge(
        "latents",
        answer,
        right,
        cases,
        {
            "the latent has to pass its norm before it is kept": no_norm,
            "the norm's gain is missing: one learned number for each of the d_c values": no_gain,
            "the rotated key is not normalised, only the latent is": key_normed,
            "the norm is the latent's alone: take the mean of d_c squares, without the key's": normed_together,
            "the key is kept after its rotation; yours has not been turned": not_rotated,
            "leave the latent unrotated. It carries content only; values are made from it too": latent_rotated,
            "the latent comes first, then the rotated key; the weights are stored in that order": key_first,
            "RMSNorm does not take the mean off": centred,
        },
        praise="d_c + d_h^R numbers a token, and nothing else need be remembered",
    )


def directions(answer: float | None) -> Verdict:
    """Directions that hold 99% of the energy of layer 2's keys, in the scene's first 1,024 tokens.

    Computed from the shipped model, so that it stays true when the model changes.
    """
    if answer is None or answer is ...:
        return judge_value("directions", None, 0)
    from dsv3.book.ledger import ROOT

    with torch.no_grad():
        model = load_model(ROOT / "assets/dsv3-mini", precision="fp32")
        scene = (ROOT / "assets/text/hamlet_3_1.txt").read_text(encoding="utf-8")
        tokens = torch.tensor([load_tokenizer(ROOT / "assets/dsv3-mini").encode(scene)[:1024]])
        h = attention_inputs(model, tokens)[2]
        attention, config = model.layers[2].attn, model.config
        step = Step.make(config, [0], [len(h)], len(h), h.device)
        latent = attention.latents(h[None], step)[0, :, : config.kv_lora_rank]
        made = [
            torch.einsum("hdc,tc->thd", weight, latent).flatten(1)
            for weight in attention.wkv_b.per_head()
        ]
        spectra = {
            name: torch.linalg.svdvals(matrix.double())
            for name, matrix in [
                ("keys", made[0]),
                ("values", made[1]),
                ("latents", latent),
                ("inputs", h),
                ("weight", attention.wkv_b.per_head()[0].flatten(0, 1)),
            ]
        }
    keys = spectra["keys"]
    wrong = {
        effective_rank(keys, 0.9): "that is 90% of the energy; 99% was asked for",
        effective_rank(
            keys.sqrt(), 0.99
        ): "square the singular values: energy is the sum of their squares",
        effective_rank(spectra["values"], 0.99): "those are the values; the keys were asked for",
        effective_rank(
            spectra["latents"], 0.99
        ): "those are the latents; multiply them by W^UK to get the keys",
        effective_rank(
            spectra["weight"], 0.99
        ): "that is the matrix W^UK itself. Multiply the latents by it; a text uses fewer of its "
        "directions",
        effective_rank(spectra["inputs"], 0.99): "those are attention's inputs h, not its keys",
    }
    found = effective_rank(keys, 0.99)
    wrong.pop(found, None)
    wrong.setdefault(found - 1, "one fewer than needed: count the direction that passes 99% too")
    return judge_value("directions", answer, found, wrong, unit="directions")


def decode(answer: Callable) -> Verdict:
    """Outputs of all heads for one new token, from the cache, without making keys or values."""

    def scores(q_nope, q_rope, cache, w_uk, scale):
        wide = torch.cat([torch.einsum("hd,hdc->hc", q_nope, w_uk), q_rope], -1)
        return wide @ cache.T * scale

    def out(weights, cache, w_uv):
        latent = weights @ cache[:, : w_uv.shape[-1]]
        return torch.einsum("hc,hvc->hv", latent, w_uv)

    def right(q_nope, q_rope, cache, w_uk, w_uv, scale):
        return out(scores(q_nope, q_rope, cache, w_uk, scale).softmax(-1), cache, w_uv)

    def no_scale(q_nope, q_rope, cache, w_uk, w_uv, scale):
        return right(q_nope, q_rope, cache, w_uk, w_uv, 1.0)

    def no_position(q_nope, q_rope, cache, w_uk, w_uv, scale):
        return right(q_nope, 0 * q_rope, cache, w_uk, w_uv, scale)

    def two_softmaxes(q_nope, q_rope, cache, w_uk, w_uv, scale):
        weights = (
            scores(q_nope, 0 * q_rope, cache, w_uk, scale).softmax(-1)
            + scores(0 * q_nope, q_rope, cache, w_uk, scale).softmax(-1)
        ) / 2
        return out(weights, cache, w_uv)

    def own_scales(q_nope, q_rope, cache, w_uk, w_uv, scale):
        return right(
            q_nope / q_nope.shape[-1] ** 0.5,
            q_rope / q_rope.shape[-1] ** 0.5,
            cache,
            w_uk,
            w_uv,
            1.0,
        )

    def over_heads(q_nope, q_rope, cache, w_uk, w_uv, scale):
        return out(scores(q_nope, q_rope, cache, w_uk, scale).softmax(0), cache, w_uv)

    def position_only(q_nope, q_rope, cache, w_uk, w_uv, scale):
        return right(0 * q_nope, q_rope, cache, w_uk, w_uv, scale)

    cases = []
    for seed, (heads, t, d_h, d_r, d_c, d_v) in enumerate(
        [(3, 7, 6, 4, 10, 5), (4, 1, 8, 2, 4, 8), (2, 20, 4, 6, 5, 3)]
    ):
        r = [
            _random(*shape, seed=10 * seed + place)
            for place, shape in enumerate(
                [(heads, d_h), (heads, d_r), (t, d_c + d_r), (heads, d_h, d_c), (heads, d_v, d_c)]
            )
        ]
        cases.append((*r, (d_h + d_r) ** -0.5))
    verdict = judge(
        "decode",
        answer,
        right,
        cases,
        {
            "the scores are not scaled": no_scale,
            "the rotated part is missing: the score is a sum of content and position, under one "
            "softmax": no_position,
            "the content part is missing from the score": position_only,
            "content and position go into one softmax together, as a sum of scores": two_softmaxes,
            "one scale for the whole score, the one that is given; not one for each part": own_scales,
            "the softmax runs over tokens (the last dimension), for each head by itself": over_heads,
        },
        praise="equal to the expanded form, and no key or value was made",
    )
    if verdict.state == "right":
        heads, t, d_h, d_r, d_c, d_v = 4, 256, 16, 8, 32, 16
        case = [
            _random(*shape, seed=place)
            for place, shape in enumerate(
                [(heads, d_h), (heads, d_r), (t, d_c + d_r), (heads, d_h, d_c), (heads, d_v, d_c)]
            )
        ]
        with FlopCounterMode(display=False) as counter:
            answer(*case, (d_h + d_r) ** -0.5)
        wanted = 2 * heads * (d_c * (d_h + d_v) + t * (2 * d_c + d_r))
        if counter.get_total_flops() > 2 * wanted:
            return Verdict(
                "decode",
                "wrong",
                "the numbers are right, but keys or values are made "
                f"from every latent: {counter.get_total_flops() / wanted:.0f} times "
                "the FLOPs. Multiply the query by W^UK, and W^UV by the mixed latent",
            )
    return verdict


def yarn(answer: Callable) -> Verdict:
    """Radians per position of each pair, (dim / 2,), after YaRN."""

    def pieces(dim, theta, factor, original, fast, slow):
        plain = theta ** (-torch.arange(0, dim, 2) / dim)

        def pair(turns):
            return dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))

        return plain, pair(fast), pair(slow)

    def ramp(dim, low, high):
        return ((torch.arange(dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)

    def right(dim, theta, factor, original, fast=32, slow=1):
        plain, low, high = pieces(dim, theta, factor, original, fast, slow)
        slowed = ramp(dim, max(math.floor(low), 0), min(math.ceil(high), dim - 1))
        return plain / factor * slowed + plain * (1 - slowed)

    def reversed_ramp(dim, theta, factor, original, fast=32, slow=1):
        plain, low, high = pieces(dim, theta, factor, original, fast, slow)
        slowed = 1 - ramp(dim, max(math.floor(low), 0), min(math.ceil(high), dim - 1))
        return plain / factor * slowed + plain * (1 - slowed)

    def interpolated(dim, theta, factor, original, fast=32, slow=1):
        return theta ** (-torch.arange(0, dim, 2) / dim) / factor

    def untouched(dim, theta, factor, original, fast=32, slow=1):
        return theta ** (-torch.arange(0, dim, 2) / dim)

    def not_rounded(dim, theta, factor, original, fast=32, slow=1):
        plain, low, high = pieces(dim, theta, factor, original, fast, slow)
        slowed = ramp(dim, max(low, 0), min(high, dim - 1))
        return plain / factor * slowed + plain * (1 - slowed)

    def not_clamped(dim, theta, factor, original, fast=32, slow=1):
        plain, low, high = pieces(dim, theta, factor, original, fast, slow)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        slowed = (torch.arange(dim // 2) - low) / max(high - low, 1e-3)
        return plain / factor * slowed + plain * (1 - slowed)

    def stretched_length(dim, theta, factor, original, fast=32, slow=1):
        return right(dim, theta, factor, original * factor, fast, slow)

    cases = [
        (64, 10000.0, 40, 4096, 32, 1),
        (64, 10000.0, 4, 256, 32, 1),
        (8, 500.0, 8, 16, 32, 1),
        (128, 1e6, 4, 32768, 32, 1),
    ]
    return judge(
        "yarn",
        answer,
        right,
        cases,
        {
            "the ramp is the wrong way round: the fast pairs, which come first, are left alone": reversed_ramp,
            "you slow all pairs down; that is position interpolation. The fast ones tell neighbours "
            "apart and must stay": interpolated,
            "no pair is slowed down; multiply by the ramp": untouched,
            "round the ends of the ramp outwards: floor of the first, ceiling of the last": not_rounded,
            "the ramp has to stay between 0 and 1 (clamp it)": not_clamped,
            "count turns within the original length, not within the stretched one": stretched_length,
        },
        praise="10 and 23 are the ends of the ramp at 671B",
    )


def tensor_parallel(answer: float | None) -> Verdict:
    """KV groups of a GQA of width 128 that costs a GPU as much as MLA, over 8 GPUs by heads."""
    return judge_value(
        "tensor_parallel",
        answer,
        18,
        {
            2.25: "that is on a single GPU. Over eight, GQA's groups are shared out, and the latent "
            "is not: all heads need all of it",
            0.28125: "you share the latent out over the GPUs; every head reads all 576 values of it",
            36: "keys and values both: a group keeps 2 x 128 numbers a token and layer",
            16: "the rotated key is missing: 512 + 64 values lie on every GPU",
            144: "18 times 8; g groups over 8 GPUs are g / 8 on each",
            4.5: "a group keeps keys and values, 2 x 128 numbers; and its share of a GPU is an eighth",
        },
        unit="groups",
    )
