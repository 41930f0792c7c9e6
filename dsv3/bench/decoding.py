"""Rows 10, 11 and 16: a whole model reads a prompt, writes behind one, and behind many.

Prefill: tokens a second of one pass over so many tokens, into a new cache. Decode: tokens a second
of some single-token passes with so many tokens in the cache, which is cut back each time. The peers
are transformers' model of the same weights, and, for FP8, the released code's structure and our own
model in float32. On a GPU we write by compiled code, captured as CUDA graphs (``model.compile()``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dsv3.bench.models import Models
from dsv3.bench.row import Check, Row, Trial, Workbench, bit_equal, gap, peer, timed
from dsv3.model import Transformer

PREFILL, DECODE = (512, 2048), (64, 512, 2048)
STEPS = 4  # tokens of a round of decoding
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.float32}
# Goals by the peer's precision: of prefill by length, of decoding by length.
PREFILL_GOALS = {"fp32": (1.8, 4.0), "bf16": (2.0, 8.0)}
DECODE_GOALS = {"fp32": (2.5, 4.0, 7.0), "fp8": (1.5, 1.5, 1.5)}
CAPTURED_GOAL = 10.0
# Of logits. In bfloat16 and FP8 a router's near-tie may fall the other way, and moves all of them.
GAPS = {"fp32": 2e-5, "bf16": 0.1, "fp8": 0.2}
BATCHES, BATCH_LENGTH = (1, 4, 16, 64), 64
CHECKED = 64  # tokens that are read for the check, the last of them by a step of decoding


def our_prefill(models: Models, precision: str, tokens: Tensor) -> Callable[[], Tensor]:
    model = models.ours(precision)
    return lambda: model(tokens, cache=model.new_cache(*tokens.shape), last_only=True)


def their_prefill(models: Models, dtype: torch.dtype, tokens: Tensor) -> Callable[[], Tensor]:
    model = models.theirs(dtype)
    return lambda: model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]


def our_decoder(model: Transformer, tokens: Tensor, steps: int) -> Callable[[], Tensor]:
    """Steps behind all tokens but the last, which is what each of them reads."""
    rows, length = tokens.shape
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


def check(models: Models, precision: str, model: Transformer | None = None) -> Check:
    """One decoded token: of float32, against the released structure; of the others, against
    float32. FP8 on a CPU also has to give, bit by bit, what reading the text at once gives.
    model: the one that is measured, where it is not simply ours."""
    text, plain = models.text(CHECKED), models.ours(precision)
    found = our_decoder(model or plain, text, 1)()
    if precision == "fp8" and models.device.type == "cpu":
        same = bit_equal(found, plain(text, last_only=True))
        if not same.passed:
            return same
    if precision == "fp32":
        structure = models.released(torch.float32)
        wanted = structure(text, structure.new_cache(CHECKED), 0)
    else:
        wanted = our_decoder(models.ours("fp32"), text, 1)()
    return gap(found, wanted, GAPS[precision])


def check_theirs(models: Models, precision: str) -> Check:
    """That transformers computes what our float32 does."""
    text = models.text(CHECKED)
    wanted = our_decoder(models.ours("fp32"), text, 1)()
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


def decode(precision: str, length: int, captured: bool, bench: Workbench) -> Trial:
    """captured: by compiled code, in CUDA graphs."""
    models, text = bench.models, bench.models.text(length)
    dtype, at = DTYPES[precision], DECODE.index(length)
    goal = CAPTURED_GOAL if captured else DECODE_GOALS.get(precision, (None,) * 3)[at]
    model = models.compiled(precision) if captured else models.ours(precision)
    ours = our_decoder(model, text, STEPS)
    against = [
        peer(
            _named(dtype),
            lambda: their_decoder(models, dtype, text, STEPS),
            goal,
            lambda _: check_theirs(models, precision),
        )
    ]
    if captured:
        ours()  # what is captured when it comes again is captured now
        each = partial(our_decoder, models.ours(precision), text, STEPS)
        against.append(peer("dsv3, neither compiled nor captured", each))
    if precision == "fp8":
        structure = partial(released_decoder, models, torch.bfloat16, text, STEPS)
        single = partial(our_decoder, models.ours("fp32"), text, STEPS)
        against += [
            peer("the released code's structure, FP8", structure, 10),
            peer("dsv3, float32", single, 1),
        ]
    return Trial(ours, against, lambda: check(models, precision, model), tokens=STEPS)


def batch(rows: int, bench: Workbench) -> Trial:
    """FP8 beside float32, a token of each of so many texts. What a text is told must not depend on
    the others: on a CPU each row's logits are those it has alone, bit by bit."""
    models = bench.models
    text = models.text(BATCH_LENGTH, rows)
    ours = our_decoder(models.ours("fp8"), text, STEPS)
    theirs = our_decoder(models.ours("fp32"), text, STEPS)

    def same() -> Check:
        found = ours()
        near = gap(found, theirs(), GAPS["fp8"])
        if bench.device.type != "cpu":
            return near
        for row in {0, rows - 1}:
            alone = our_decoder(models.ours("fp8"), text[row : row + 1], STEPS)()
            if not (as_alone := bit_equal(found[row : row + 1], alone)).passed:
                return as_alone
        return replace(near, what="rows bit-equal to those alone, gap")

    return Trial(ours, [peer("dsv3, float32", lambda: theirs, 1)], same, tokens=rows * STEPS)


def _named(dtype: torch.dtype) -> str:
    return f"transformers, {str(dtype).removeprefix('torch.')}"


def rows(suite: str) -> list[Row]:
    reading, writing = "model, prefill", "model, decode"
    return [
        Row(10, reading, f"{precision}, {length} tokens",
            timed(partial(prefill, precision, length)), weight=length / 256)
        for precision in ("fp32", "bf16")
        for length in PREFILL
    ] + [
        Row(11, writing, f"{precision}, behind {length}",
            timed(partial(decode, precision, length, suite == "gpu")),
            weight=1 + length / 512 * (precision == "bf16"))
        for precision in ("fp32", "bf16", "fp8")
        for length in DECODE
    ] + [
        Row(16, "model, decode of a batch", f"fp8, {count} text{'s' * (count > 1)}",
            timed(partial(batch, count)), weight=1 + count / 16)
        for count in BATCHES
    ]  # fmt: skip
