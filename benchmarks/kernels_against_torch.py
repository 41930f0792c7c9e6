"""The Triton kernels against plain torch, byte for byte, on inputs that are hard to round.

    python benchmarks/kernels_against_torch.py

On a GPU the kernels are compiled; without one they run in Triton's interpreter. For each kernel
and kind of input: the numbers that went in, the bytes that came out, and how many of these differ
from what torch's own operations give. NaNs of FP32 and BF16 count as equal whatever their payload.
A sum depends on the order of its terms, so the product is tried on codes and scales whose sums are
exact in FP32, and there every order gives the same. The exit code is 1 if any byte differs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

if not torch.cuda.is_available():  # before Triton is loaded: it reads this once
    os.environ["TRITON_INTERPRET"] = "1"

from dsv3.kernels import act_quant, fp8_gemm, weight_dequant

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
CODES = torch.arange(127, dtype=torch.uint8).view(E4M3).float()  # the positive numbers of E4M3
BESIDE = 16  # numbers that share a tile with the one that sets its scale


class Compared(NamedTuple):
    kernel: str
    inputs: str
    numbers: int
    bytes: int
    differ: int


def activations() -> Iterator[tuple[str, torch.Tensor]]:
    """Kind of input -> (rows, channels) in FP32."""
    generator = torch.Generator().manual_seed(4)
    sizes = torch.logspace(-38, 38, 400, dtype=torch.float64)[:, None]
    drawn = torch.randn(400, 300, generator=generator, dtype=torch.float64)
    yield "random, all sizes, a ragged tile", (drawn * sizes).float()
    # One number of 448 makes the scale of a tile 1: the others are rounded as they are.
    ties = (CODES[:-1] + CODES[1:]) / 2
    yield "ties", _tiles(ties, 448.0)
    sides = [torch.nextafter(x, torch.tensor(to)) for x in (ties, CODES) for to in (0.0, 448.0)]
    yield "one step beside ties and codes", _tiles(torch.cat(sides), 448.0)
    yield "subnormal", _tiles(torch.arange(-128, 129) * 2.0**-13, 448.0)
    # An infinity makes the scale NaN, and the codes are those of the numbers themselves.
    beyond = torch.tensor([448.0, 463.9, 464.0, 464.1, 480.0, 1e6, 3.4e38])
    yield "beyond the range", _tiles(torch.cat([beyond, -beyond]), math.inf)
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 1.2e-38, 3.4e38]
    alone = torch.zeros(len(special), 128)
    alone[:, 77] = torch.tensor(special)
    yield "zeros, infinities, NaN, the smallest", alone
    powers = 448 * 2.0 ** torch.arange(-30, 115)
    nearest = torch.cat([powers, *(torch.nextafter(powers, torch.tensor(s)) for s in (0.0, 3e38))])
    yield "scales beside powers of two", _tiles(nearest, 0.0, 1)


def _tiles(numbers: torch.Tensor, first: float, each: int = BESIDE) -> torch.Tensor:
    """Tiles of 128 that begin with ``first`` and hold so many of the numbers, then zeros."""
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % each)).view(-1, each)
    return torch.nn.functional.pad(numbers, (1, 127 - each)).index_fill_(1, torch.tensor(0), first)


def weights() -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Kind of input -> codes (rows, cols), scales of their 128 x 128 blocks."""
    generator = torch.Generator().manual_seed(5)
    every = torch.arange(256, dtype=torch.uint8).view(2, 128).view(E4M3)
    for scale in (1.0, 0.3, 1e-12, 2.0**-140, 2.0**119):
        yield f"all 256 codes, scale {scale:.3g}", every, torch.full((1, 1), scale)
    codes = torch.randint(0, 127, (576, 7168), generator=generator, dtype=torch.uint8)
    codes = codes + 128 * torch.randint(0, 2, codes.shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(5, 56, generator=generator) * 1e-2 + 1e-4
    yield "576 x 7168: 4.5 blocks of rows", codes.view(E4M3), scales
    yield "70 x 200: ragged both ways", codes[:70, :200].contiguous().view(E4M3), scales[:1, :2]


def compare(kernel: str, inputs: str, numbers: int, found, expected) -> Compared:
    """Count the bytes in which two tuples of tensors differ."""
    total = differ = 0
    for a, b in zip(found, expected, strict=True):
        a, b = _bytes(a.cpu()), _bytes(b.cpu())
        total += len(b)
        differ += int((a != b).sum()) if len(a) == len(b) else len(b)
    return Compared(kernel, inputs, numbers, total, differ)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    if x.dtype != E4M3:
        x = torch.where(x.isnan(), torch.nan, x)
    return x.contiguous().flatten().view(torch.uint8)


def comparisons() -> Iterator[Compared]:
    for scale_format in ("float32", "ue8m0"):
        for kind, x in activations():
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                given = x.to(dtype)
                yield compare(
                    f"act_quant, {scale_format} scales",
                    f"{kind}, {_short(dtype)}",
                    x.numel(),
                    act_quant.act_quant(given.to(DEVICE), scale_format),
                    act_quant.act_quant_spec(given, scale_format),
                )
    for dtype in (torch.float32, torch.bfloat16):
        for kind, codes, scale in weights():
            yield compare(
                f"weight_dequant to {_short(dtype)}",
                kind,
                codes.numel(),
                [weight_dequant.weight_dequant(codes.to(DEVICE), scale.to(DEVICE), dtype)],
                [weight_dequant.weight_dequant_spec(codes, scale, dtype)],
            )
    for m, n, k in ((1, 128, 128), (5, 576, 300), (130, 200, 1000)):
        pieces = exact_product(m, n, k)
        yield compare(
            "fp8_gemm",
            f"{m} x {n} x {k}, sums exact",
            m * k + n * k,
            [fp8_gemm.fp8_gemm(*(piece.to(DEVICE) for piece in pieces))],
            [fp8_gemm.fp8_gemm_spec(*pieces)],
        )


def exact_product(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Codes and scales whose products sum exactly in FP32: few bits, powers of two nearby."""
    generator = torch.Generator().manual_seed(m + n + k)
    codes = [
        torch.randint(-8, 9, (rows, k), generator=generator).float().to(E4M3) for rows in (m, n)
    ]
    blocks = -(-k // 128)
    scales = [
        2.0 ** torch.randint(-2, 3, (rows, blocks), generator=generator)
        for rows in (m, -(-n // 128))
    ]
    return codes[0], scales[0], codes[1], scales[1]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> int:
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "Triton's interpreter, on the CPU"
    print(f"Kernels in {where}, against torch {torch.__version__}\n")
    print(f"{'kernel':28} {'inputs':48} {'numbers':>10} {'bytes':>10} {'differ':>7}")
    lines = []
    for line in comparisons():
        lines.append(line)
        print("{:28} {:48} {:10,} {:10,} {:7,}".format(*line))
    numbers, total, differ = (sum(getattr(x, name) for x in lines) for name in Compared._fields[2:])
    print(
        f"\n{len(lines)} comparisons: {numbers:,} numbers, {total:,} bytes out, {differ:,} differ"
    )
    return differ > 0


if __name__ == "__main__":
    raise SystemExit(main())
