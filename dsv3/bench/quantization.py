"""Rows 1 and 2: from FP8 blocks to numbers, and from numbers to FP8 tiles. Bit by bit.

On a CPU against the plain formula; on a GPU, where only memory counts, against a copy that moves as
many bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dsv3 import fp8
from dsv3.bench import plain
from dsv3.bench.products import random_activations, random_blocks
from dsv3.bench.row import Check, Goal, Peer, Row, Trial, Workbench, bit_equal, peer, timed
from dsv3.layers import RMSNorm
from dsv3.precision import Precision

CPU_SIDE, GPU_SHAPE = 2048, (18432, 7168)


def copy_of(moved: int, device: torch.device, share: float) -> Peer:
    """A copy that reads and writes ``moved`` bytes in all."""
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Peer("a copy of as many bytes", lambda: target.copy_(source), Goal(share))


def dequantization(dtype: torch.dtype, shape: tuple[int, int], bench: Workbench) -> Trial:
    blocks = random_blocks(*shape, bench.device)
    formula = partial(plain.dequantize, blocks.data, blocks.scale, dtype)
    if bench.device.type == "cpu":
        ours = partial(blocks.dequantize, dtype)
        peers = [peer("eager formula", lambda: formula, 12)]
    else:
        from dsv3.kernels.weight_dequant import weight_dequant

        ours = partial(weight_dequant, blocks.data, blocks.scale, dtype)
        moved = blocks.nbytes + blocks.data.numel() * dtype.itemsize
        peers = [copy_of(moved, bench.device, 0.9), peer("eager formula", lambda: formula)]
    return Trial(ours, peers, lambda: bit_equal(ours(), formula()))


def activations(rows: int, cols: int, bench: Workbench) -> Trial:
    x = random_activations(rows, cols, bench.device)
    ours, formula = partial(fp8.quantize_activation, x), partial(plain.quantize, x)

    def check() -> Check:
        found, (codes, scale) = ours(), formula()
        wrong = bit_equal(found.data, codes).found + bit_equal(found.scale, scale).found
        return Check("bit-equal", wrong, 0)

    if bench.device.type == "cpu":
        return Trial(ours, [peer("eager formula", lambda: formula, 5)], check)
    moved = x.nbytes + x.numel() + 4 * x.numel() // 128
    return Trial(
        ours, [copy_of(moved, bench.device, 0.85), peer("eager formula", lambda: formula)], check
    )


def norm_and_quantization(rows: int, cols: int, bench: Workbench) -> Trial:
    """What a layer does with the residual stream before its first product, and the norm alone."""
    x = random_activations(rows, cols, bench.device)
    norm = RMSNorm(cols, device=bench.device)
    norm.weight.fill_(1.0)
    precision = Precision.of("fp8", bench.models.config)

    def ours() -> Any:
        return precision.operand(norm(x))

    def check() -> Check:
        found, (codes, scale) = ours(), plain.quantize(norm(x))
        wrong = bit_equal(found.data, codes).found + bit_equal(found.scale, scale).found
        return Check("bit-equal", wrong, 0)

    return Trial(ours, [peer("the norm alone", lambda: lambda: norm(x), 1 / 1.15)], check)


def rows(suite: str) -> list[Row]:
    one, two = "block dequantisation", "activation quantisation"
    shape = (CPU_SIDE, CPU_SIDE) if suite == "cpu" else GPU_SHAPE
    size = " x ".join(map(str, shape))
    found = [
        Row(1, one, f"{size} to {name}", timed(partial(dequantization, dtype, shape)))
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))
    ]
    for tokens in (1, 256) if suite == "cpu" else (4096,):
        found.append(Row(2, two, f"{tokens} x 7168", timed(partial(activations, tokens, 7168))))
    if suite == "gpu":
        call = partial(norm_and_quantization, 4096, 7168)
        found.append(Row(2, two, "behind RMSNorm, 4096 x 7168", timed(call)))
    return found
