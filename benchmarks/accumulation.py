"""What a tensor core keeps of a sum of FP8 products: hardware against both emulated readings.

    python -m benchmarks.accumulation [--out FILE]

A kernel multiplies codes of 64 by 64 outputs and leaves each sum in the tensor core's register for
all of K, or takes it out every 128 (promotion). The sums, and those of cuBLAS with and without its
fast accumulation, are compared bit by bit with ``dsv3.fp8.accumulation`` for each reading and
number of fraction bits. Writes ``assets/measurements/accumulation.json``, which chapter 4 reads and
the tests hold the emulator to. Without a GPU that multiplies E4M3 it says so and ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from benchmarks.fp8_gemm import described
from dsv3.book.measured import SUMS
from dsv3.fp8.accumulation import READINGS, Accumulator

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SIDE = 64  # outputs are SIDE x SIDE; the smallest tile that Hopper multiplies in E4M3
BITS = range(12, 15)
KINDS = ("positive", "mixed", "wide")


@triton.jit
def sums_kernel(
    x_ptr, w_ptr, out_ptr, k, PROMOTE: tl.constexpr, SIDE: tl.constexpr, STEP: tl.constexpr
):
    """x w^T of one tile; every sum made in the tensor core from first to last, or PROMOTE."""
    row, depth = tl.arange(0, SIDE), tl.arange(0, STEP)
    acc = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    for first in range(0, k, STEP):
        x = tl.load(x_ptr + row[:, None] * k + first + depth[None, :])
        w = tl.load(w_ptr + row[None, :] * k + first + depth[:, None])
        acc = acc + tl.dot(x, w) if PROMOTE else tl.dot(x, w, acc)
    tl.store(out_ptr + row[:, None] * SIDE + row[None, :], acc)


def inputs(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (SIDE, the longest K) of x and w: "positive", even from 0 to 448; "mixed", of both
    signs; or "wide", of both signs and sizes from 2^-8 to 2^8 and around."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))
    shape = (2, SIDE, LENGTHS[-1])
    if kind == "positive":
        values = 448 * torch.rand(shape, generator=generator)
    else:
        values = torch.randn(shape, generator=generator) * 100
    if kind == "wide":
        values *= 2.0 ** torch.randint(-15, 2, shape, generator=generator)
    x, w = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    return x, w


def on_hardware(x: torch.Tensor, w: torch.Tensor, promoted: bool) -> dict[str, torch.Tensor]:
    """Sums (SIDE, SIDE) in float64 from the GPU: of the kernel above, and of cuBLAS."""
    x, w = x.contiguous().cuda(), w.contiguous().cuda()
    out = torch.empty(SIDE, SIDE, device="cuda")
    k = x.shape[1]
    sums_kernel[(1,)](x, w, out, k, PROMOTE=promoted, SIDE=SIDE, STEP=min(k, 128))
    one = torch.ones((), device="cuda")
    cublas = torch._scaled_mm(
        x, w.t(), one, one, out_dtype=torch.float32, use_fast_accum=not promoted
    )
    return {"kernel": out.double().cpu(), "cublas": cublas.double().cpu()}


def compare(kind: str) -> list[dict]:
    """A line for each length, with and without promotion."""
    lines = []
    x, w = inputs(kind)
    for k in LENGTHS:
        xk, wk = x[:, :k], w[:, :k]
        exact = xk.double() @ wk.double().T
        for promoted in (False, True):
            by = on_hardware(xk, wk, promoted)
            found = by["kernel"]
            line = dict(
                inputs=kind,
                k=k,
                promoted=promoted,
                largest=float(((found - exact) / exact).abs().max()),
                norm=float((found - exact).norm() / exact.norm()),
                equal={},
                sums=found[0, :8].tolist(),
            )
            for reading in READINGS:
                for bits in BITS:
                    emulated = Accumulator(
                        bits, aligned_with=reading, promote_every=128 if promoted else None
                    ).matmul(xk, wk)
                    for name, sums in by.items():
                        share = float((emulated == sums).double().mean())
                        line["equal"][f"{name}, {reading} {bits}"] = round(share, 4)
            best = max(line["equal"], key=line["equal"].__getitem__)
            print(
                f"{kind:8} K {k:5} {'promoted' if promoted else 'plain':8} largest error "
                f"{line['largest']:.2e}, of the norm {line['norm']:.2e}; equal to {best} bits: "
                f"{line['equal'][best]:.2%}",
                flush=True,
            )
            lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SUMS)
    chosen = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("No GPU that multiplies E4M3 here (Ada, Hopper or later): nothing was measured.")
        return
    lines = [line for kind in KINDS for line in compare(kind)]
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(described() | dict(lines=lines), indent=1) + "\n")
    print(f"written: {chosen.out}")


if __name__ == "__main__":
    main()
