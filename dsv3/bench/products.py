"""Rows 3 to 5: one FP8 product, as a layer takes it.

On a CPU an FP8 layer is measured whole, activations quantised on the way in, against the formula
that dequantises the weight for each call, and against a weight that is kept in bfloat16. On a GPU
both operands are there in FP8 already, as they are for the libraries beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3 import fp8
from dsv3.bench import peers, plain
from dsv3.bench.chips import chip
from dsv3.bench.row import Check, Peer, Row, Trial, Workbench, gap, limit, peer, timed
from dsv3.fp8 import QuantizedTensor
from dsv3.precision import Precision

CPU_SIDE, GPU_SHAPE = 2048, (18432, 7168)
# Of the largest output: sums in float32 or wider, rounded to bfloat16 in the end; and, on a GPU,
# where a tensor core keeps about 14 bits of 128 products, with other orders of sums.
MOST_GAP = {"cpu": 4e-3, "cuda": 1e-2}


def random_blocks(rows: int, cols: int, device: torch.device) -> QuantizedTensor:
    """A weight: normal numbers, quantised in blocks of 128 x 128."""
    random = torch.Generator().manual_seed(rows + cols)
    parts = [
        fp8.quantize_weight(torch.randn(128, cols, generator=random) * 0.02)
        for _ in range(-(-rows // 128))
    ]
    data = torch.cat([part.data for part in parts])[:rows]
    return QuantizedTensor(data, torch.cat([part.scale for part in parts])).to(device)


def random_activations(rows: int, cols: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(rows)
    return torch.randn(rows, cols, generator=random).bfloat16().to(device)


def exact(x: QuantizedTensor, w: QuantizedTensor) -> Tensor:
    """The float64 product of the dequantised operands."""
    return x.dequantize().double() @ w.dequantize().double().T


def on_cpu(side: int, tokens: int, goals: tuple[float, float | None], bench: Workbench) -> Trial:
    precision = Precision.of("fp8", bench.models.config)
    x = random_activations(tokens, side, bench.device)
    w = random_blocks(side, side, bench.device)
    kept = w.dequantize(torch.bfloat16)

    def eager() -> Tensor:
        return F.linear(x, plain.dequantize(w.data, w.scale, torch.bfloat16))

    ours = partial(precision.rounded, x, w)
    return Trial(
        ours,
        [
            peer("eager dequantise + linear", lambda: eager, goals[0]),
            peer("weight kept in bfloat16", lambda: lambda: F.linear(x, kept), goals[1]),
        ],
        lambda: gap(ours(), exact(fp8.quantize_activation(x), w), MOST_GAP["cpu"]),
    )


def on_gpu(
    shape: tuple[int, int],
    tokens: int,
    goals: dict[str, float],
    ceiling: Callable[[int, int, int, Workbench], Peer] | None,
    bench: Workbench,
) -> Trial:
    """goals: of each library's time over ours."""
    n, k = shape
    precision = Precision.of("fp8", bench.models.config)
    x = fp8.quantize_activation(random_activations(tokens, k, bench.device))
    w = random_blocks(n, k, bench.device)
    wanted = exact(x, w)
    a, b = x.dequantize(torch.bfloat16), w.dequantize(torch.bfloat16)

    def close(call: Callable[[], Tensor]) -> Check:
        return gap(call(), wanted, MOST_GAP["cuda"])

    ours = partial(precision.rounded, x, w)
    against = [
        peer(name, partial(make, x, w), goals.get(name), close)
        for name, make in (("F.scaled_mm", peers.scaled_mm), ("DeepGEMM", peers.deep_gemm))
    ]
    against.append(peer("bfloat16 product", lambda: lambda: a @ b.T))
    if ceiling is not None:
        against.insert(0, ceiling(tokens, n, k, bench))
    return Trial(ours, against, lambda: close(ours))


def memory_ceiling(m: int, n: int, k: int, bench: Workbench) -> Peer:
    """Operands and result once through the memory of the chip."""
    moved = (m + n) * k + 4 * (k // 128) * (m + n // 128) + 2 * m * n
    best = chip(bench.device)
    return limit(f"{best.memory / 1e12:.2f} TB/s", moved / best.memory, 0.75)


def tflops_ceiling(m: int, n: int, k: int, bench: Workbench) -> Peer:
    return limit("1000 TFLOP/s", 2 * m * n * k / 1e15, 1.0)


def rows(suite: str) -> list[Row]:
    one, many, few = "FP8 linear, one token", "FP8 product, many tokens", "FP8 product, few tokens"
    if suite == "cpu":
        size = f"{CPU_SIDE} x {CPU_SIDE}"
        return [
            Row(3, one, f"{size}, M=1", timed(partial(on_cpu, CPU_SIDE, 1, (20, 0.5)))),
            Row(4, many, f"{size}, M=256", timed(partial(on_cpu, CPU_SIDE, 256, (6, None)))),
        ]
    size = " x ".join(map(str, GPU_SHAPE))
    found = [
        Row(3, one, f"{size}, M=1",
            timed(partial(on_gpu, GPU_SHAPE, 1, {"F.scaled_mm": 1.5}, memory_ceiling))),
        Row(4, many, f"{size}, M=4096",
            timed(partial(on_gpu, GPU_SHAPE, 4096, {"F.scaled_mm": 0.95}, tflops_ceiling))),
    ]  # fmt: skip
    return found + [
        Row(5, few, f"{size}, M={tokens}",
            timed(partial(on_gpu, GPU_SHAPE, tokens, {"F.scaled_mm": 1.5, "DeepGEMM": 0.9}, None)))
        for tokens in (16, 64, 128)
    ]  # fmt: skip
