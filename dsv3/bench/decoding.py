"""Rows 10 and 11: a whole model reads a prompt, and writes behind one.

Prefill: tokens a second of one pass over so many tokens, into a new cache. Decode: tokens a second
of some single-token passes with so many tokens in the cache, which is cut back each time. The peers
are transformers' model of the same weights, and, for FP8, the released code's structure and our own
model in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dsv3.bench.models import Models
from dsv3.bench.row import Check, Row, Trial, Workbench, bit_equal, gap, peer, timed

PREFILL, DECODE = (512, 2048), (64, 512, 2048)
STEPS = 4  # tokens of a round of decoding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float32}
# Goals by the peer's precision: of prefill by length, of decoding by length.
PREFILL_GOALS = {"fp32": (1.8, 4.0), "bf16": (2.0, 8.0)}
DECODE_GOALS = {"fp32": (2.5, 4.0, 7.0), "fp8": (1.5, 1.5, 1.5)}
# Of logits. In bfloat16 and FP8 a router's near-tie may fall the other way, and moves all of them.
GAPS = {"fp32": 2e-5, "bf16": 0.1, "fp8": 0.2}
CHECKED = 64  # tokens that are read for the check, the last of them by a step of decoding


def our_prefill(models: Models, precision: str, tokens: Tensor) -> Callable[[], Tensor]:
    model = models.ours(precision)
    return lambda: model(tokens, cache=model.new_cache(*tokens.shape), last_only=True)


def their_prefill(models: Models, dtype: torch.dtype, tokens: Tensor) -> Callable[[], Tensor]:
    model = models.theirs(dtype)
    return lambda: model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]


def our_decoder(models: Models, precision: str, tokens: Tensor, steps: int) -> Callable[[], Tensor]:
    """Steps behind all tokens but the last, which is what each of them reads."""
    model, (rows, length) = models.ours(precision), tokens.shape
    cache = model.new_cache(rows, length - 1 + steps)
    model(tokens[:, :-1], cache=cache, last_only=True)

    def run() -> Tensor:
        cache.truncate([length - 1] * rows)
        return [model(tokens[:, -1:], cache=cache, last_only=True) for _ in range(steps)][-1]

    return run


def their_decoder(
    models: Models, dtype: torch.dtype, tokens: Tensor, steps: int
) -> Callable[[], Tensor]:
    model = models.theirs(dtype)
    cache = model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    new = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)

    def run() -> Tensor:
        logits = [model(tokens[:, -1:], **new).logits[:, -1] for _ in range(steps)]
        cache.crop(-steps)
        return logits[-1]

    return run


def released_decoder(models: Models, dtype: torch.dtype, tokens: Tensor, steps: int):
    model, length = models.released(dtype), tokens.shape[1]
    cache = model.new_cache(length - 1 + steps)
    model(tokens[:, :-1], cache, 0)

    def run() -> Tensor:
        return [model(tokens[:, -1:], cache, length - 1 + step) for step in range(steps)][-1]

    return run


def check(models: Models, precision: str) -> Check:
    """One decoded token: of float32, against the released structure; of the others, against
    float32. FP8 on a CPU also has to give, bit by bit, what reading the text at once gives."""
    text = models.text(CHECKED)
    found = our_decoder(models, precision, text, 1)()
    if precision == "fp8" and models.device.type == "cpu":
        same = bit_equal(found, models.ours("fp8")(text, last_only=True))
        if not same.passed:
            return same
    if precision == "fp32":
        structure = models.released(torch.float32)
        wanted = structure(text, structure.new_cache(CHECKED), 0)
    else:
        wanted = our_decoder(models, "fp32", text, 1)()
    return gap(found, wanted, GAPS[precision])


def check_theirs(models: Models, precision: str) -> Check:
    """That transformers computes what our float32 does."""
    text = models.text(CHECKED)
    wanted = our_decoder(models, "fp32", text, 1)()
    found = their_decoder(models, DTYPES[precision], text, 1)()
    return gap(found, wanted, GAPS["bf16" if precision == "bf16" else "fp32"])


def prefill(precision: str, length: int, bench: Workbench) -> Trial:
    models, text = bench.models, bench.models.text(length)
    dtype = DTYPES[precision]
    goal = 2.5 if bench.device.type == "cuda" else PREFILL_GOALS[precision][PREFILL.index(length)]
    theirs = peer(
        _named(dtype),
        lambda: their_prefill(models, dtype, text),
        goal,
        lambda _: check_theirs(models, precision),
    )
    ours = our_prefill(models, precision, text)
    return Trial(ours, [theirs], lambda: check(models, precision), tokens=length)


def decode(precision: str, length: int, bench: Workbench) -> Trial:
    models, text = bench.models, bench.models.text(length)
    dtype, at = DTYPES[precision], DECODE.index(length)
    goal = 10.0 if bench.device.type == "cuda" else DECODE_GOALS.get(precision, (None,) * 3)[at]
    against = [
        peer(
            _named(dtype),
            lambda: their_decoder(models, dtype, text, STEPS),
            goal,
            lambda _: check_theirs(models, precision),
        )
    ]
    if precision == "fp8":
        structure = partial(released_decoder, models, torch.bfloat16, text, STEPS)
        single = partial(our_decoder, models, "fp32", text, STEPS)
        against += [
            peer("the released code's structure, FP8", structure, 10),
            peer("dsv3, float32", single, 1),
        ]
    ours = our_decoder(models, precision, text, STEPS)
    return Trial(ours, against, lambda: check(models, precision), tokens=STEPS)


def _named(dtype: torch.dtype) -> str:
    return f"transformers, {str(dtype).removeprefix('torch.')}"


def rows(suite: str) -> list[Row]:
    reading, writing = "model, prefill", "model, decode"
    return [
        Row(
            10, reading, f"{precision}, {length} tokens", timed(partial(prefill, precision, length))
        )
        for precision in ("fp32", "bf16")
        for length in PREFILL
    ] + [
        Row(11, writing, f"{precision}, behind {length}", timed(partial(decode, precision, length)))
        for precision in ("fp32", "bf16", "fp8")
        for length in DECODE
    ]
