"""Row 17: the memory of a model in use: its weights, its cache, its workspace.

What a model holds is read from the system, not added up from its tensors: whatever else a fast form
keeps (weights in another format, tables, buffers of a library) counts as well. FP8 weights are a
quarter of float32 ones; with what stays wider (embedding, head, router, wkv_b) a model in FP8 is to
take a third. Each measurement is made in a process of its own, on a CPU (``memory``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from dsv3.bench.memory import SHARDS, apart, write_slice
from dsv3.bench.models import CONFIG
from dsv3.bench.row import Check, Goal, Line, Row, Workbench, bit_equal, quantity
from dsv3.checkpoint.loading import load_model
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.latent import LatentFormat
from dsv3.layers import Linear

THIRD = Goal(1 / 3, most=True)
TOKENS = 2048


def in_use(
    config: ModelConfig, row: Row, bench: Workbench, allowed: float, start: Callable = apart
) -> Iterator[Line]:
    """A checkpoint loaded in FP8 and in float32, then used. start: how a job is run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_slice(folder, config.but(quantization_config=QuantizationConfig()), SHARDS)
        check = same_weights(folder)
        if not check.passed:
            yield Line(row.number, row.name, row.case, "", "failed", check=str(check))
            return
        loads = {form: start("load", folder, form, "cpu") for form in ("fp8", "fp32")}
        used = {form: start("use", folder, form) for form in ("fp8", "fp32")}
    same = "weights compared"
    for what, when, goal in (
        ("kept", "in use", THIRD),
        ("peak", "from loading on, at the peak", None),
    ):
        mine, theirs = (used[form][what] / 1e6 for form in ("fp8", "fp32"))
        yield quantity(row, f"fp8, {when}: fp32", mine, theirs, "MB", goal, same)
    for form, told in loads.items():
        peak, held = told["peak"] / 1e6, told["held"] / 1e6
        yield quantity(row, f"loading in {form}: its weights", peak, held, "MB", None, same)


def same_weights(folder: Path) -> Check:
    """That the FP8 model multiplies the numbers that the float32 model holds."""
    coded, plain = (load_model(folder, form, "cpu") for form in ("fp8", "fp32"))
    wrong = 0.0
    for one, other in zip(coded.modules(), plain.modules(), strict=True):
        blocks = one.matrix if isinstance(one, Linear) else None
        if isinstance(blocks, QuantizedTensor) and isinstance(other, Linear):
            wrong += bit_equal(blocks.dequantize(), other.weight).found
    return Check("weights bit-equal", wrong, 0)


def caches(row: Row, bench: Workbench, allowed: float) -> Iterator[Line]:
    """Bytes a token: in FP8 beside bfloat16, and beside what transformers keeps of 512."""
    large, models, text = ModelConfig.deepseek_v3(), bench.models, bench.models.text(512)
    packed = LatentFormat(large.kv_lora_rank, large.qk_rope_head_dim).bytes
    what = "fp8, a token and layer of DeepSeek-V3: bfloat16"
    yield quantity(row, what, packed, 2 * large.latent_dim, "bytes", None)
    ours = models.ours("fp32").new_cache(1, text.numel()).data.nbytes
    with torch.inference_mode():
        theirs = models.theirs(torch.float32)(text, use_cache=True, logits_to_keep=1)
    kept = sum(
        part.nbytes
        for layer in theirs.past_key_values.layers
        for part in (layer.keys, layer.values)
    )
    each = ours / text.numel(), kept / text.numel()
    yield quantity(row, "fp32, a token: transformers", *each, "bytes", None)


def workspace(
    kind: str, row: Row, bench: Workbench, allowed: float, start: Callable = apart
) -> Iterator[Line]:
    """The peak of a pass above the weights, its cache with it."""
    peaks = {form: start(kind, TOKENS, form)["peak"] / 1e6 for form in ("fp32", "fp8")}
    yield quantity(row, "fp8: fp32", peaks["fp8"], peaks["fp32"], "MB", None)
    theirs = start(kind, TOKENS, "transformers")["peak"] / 1e6
    yield quantity(row, "fp32: transformers", peaks["fp32"], theirs, "MB", None)


def rows(suite: str) -> list[Row]:
    if suite == "gpu":
        return []
    name = "memory in use"
    cases = {
        "a model of 108M": partial(in_use, CONFIG),
        "cache": caches,
        f"workspace, prefill of {TOKENS}": partial(workspace, "read"),
        f"workspace, one token behind {TOKENS}": partial(workspace, "write"),
    }
    return [Row(17, name, case, measure, least=20) for case, measure in cases.items()]
