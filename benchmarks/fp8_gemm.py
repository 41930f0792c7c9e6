"""The block-scaled FP8 product on a GPU: checked against its specification, timed, written down.

    python benchmarks/fp8_gemm.py [--layers wq_b wo w1 w2] [--tokens 1 64 4096] [--out FILE]

The shapes are those of the 671B model's layers; tokens from one (decoding one text) to thousands
(prefill). Each product is compared with ``fp8_gemm_spec`` before it is timed, and beside it torch's
BF16 product of the same shape. Times are medians of runs by CUDA events, the caches flushed in
between. Writes ``assets/measurements/fp8_gemm.json``, which chapter 4 reads
(``dsv3.book.measured``). Without a GPU that multiplies E4M3 it says so and ends.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from pathlib import Path

import torch

from dsv3.book.measured import FILE
from dsv3.fields import BLOCK

# Weight (out, in): the queries' up-projection and the output of attention; of a dense layer w1 (and
# w3, of the same shape) and w2.
LAYERS = {"wq_b": (24576, 1536), "wo": (7168, 16384), "w1": (18432, 7168), "w2": (7168, 18432)}
TOKENS = (1, 16, 64, 256, 1024, 4096)
MOST_ERROR = 1e-3  # of a product's norm: a tensor core keeps about 14 bits in sums of 128


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Random codes and scales on the GPU, as ``fp8_gemm`` wants them: x, sx, w, sw."""
    generator = torch.Generator("cuda").manual_seed(m + n + k)
    blocks = -(-k // BLOCK)

    def codes(rows: int) -> torch.Tensor:
        numbers = torch.randn(rows, k, device="cuda", generator=generator) * 100
        return numbers.clamp(-448, 448).to(torch.float8_e4m3fn)

    def scales(rows: int) -> torch.Tensor:
        return torch.rand(rows, blocks, device="cuda", generator=generator) * 1e-2 + 1e-3

    return codes(m), scales(m), codes(n), scales(-(-n // BLOCK))


def bytes_moved(m: int, n: int, k: int) -> int:
    """Codes and scales in, FP32 out, each once."""
    blocks = -(-k // BLOCK)
    return (m + n) * k + 4 * blocks * (m + -(-n // BLOCK)) + 4 * m * n


def measure(layer: str, m: int) -> dict:
    from triton.testing import do_bench

    from dsv3.kernels.fp8_gemm import fp8_gemm, fp8_gemm_spec

    n, k = LAYERS[layer]
    x, sx, w, sw = operands(m, n, k)
    spec = fp8_gemm_spec(x, sx, w, sw)
    error = ((fp8_gemm(x, sx, w, sw) - spec).norm() / spec.norm()).item()
    if not error < MOST_ERROR:
        raise SystemExit(f"{layer}, {m} tokens: {error:.2e} from the specification, not measured")
    a, b = x.to(torch.bfloat16), w.to(torch.bfloat16)
    took = do_bench(lambda: fp8_gemm(x, sx, w, sw), return_mode="median") / 1e3
    bf16 = do_bench(lambda: a @ b.T, return_mode="median") / 1e3
    moved = bytes_moved(m, n, k)
    return dict(
        layer=layer,
        m=m,
        n=n,
        k=k,
        microseconds=round(took * 1e6, 2),
        tflops=round(2 * m * n * k / took / 1e12, 2),
        bytes=moved,
        gb_per_s=round(moved / took / 1e9, 1),
        bf16_microseconds=round(bf16 * 1e6, 2),
        bf16_ratio=round(bf16 / took, 3),
        error=float(f"{error:.2g}"),
    )


def described() -> dict:
    """The machine and the versions."""
    import triton

    told = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return dict(
        chip=torch.cuda.get_device_name(),
        driver=told.stdout.split()[0],
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        torch=torch.__version__,
        triton=triton.__version__,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=FILE)
    chosen = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        print("No GPU that multiplies E4M3 here (Ada, Hopper or later): nothing was measured.")
        return
    torch.backends.cuda.matmul.allow_tf32 = False  # the specification adds in FP32
    points = []
    for layer in chosen.layers:
        for m in chosen.tokens:
            points.append(measure(layer, m))
            print(" ".join(f"{name} {value}" for name, value in points[-1].items()), flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(described() | dict(points=points), indent=1) + "\n")
    print(f"written: {chosen.out}")


if __name__ == "__main__":
    main()
