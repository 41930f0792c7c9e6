"""What was measured on a GPU and committed, for readers who have none.

``benchmarks/fp8_gemm.py`` writes ``assets/measurements/fp8_gemm.json`` on a machine with a GPU:

    {"chip": "NVIDIA H200", "driver": "580.159.04", "date": "2026-11-26",
     "torch": "2.11.0+cu130", "triton": "3.6.0",
     "points": [{"layer": "w1", "m": 64, "n": 18432, "k": 7168, "microseconds": 54.24,
                 "tflops": 311.79, "bytes": 137344512, "gb_per_s": 2532.2,
                 "bf16_microseconds": 75.84, "bf16_ratio": 1.398, "error": 0.00013}, ...]}

A point is the block-scaled product of m tokens with one weight; bytes are all operands, scales and
the result, each counted once; bf16_ratio is how many times as long torch's BF16 product takes.

``benchmarks/accumulation.py`` writes ``accumulation.json`` beside it: how many of a tensor core's
sums are, bit for bit, those of each emulated reading.
"""

from __future__ import annotations

import json

from dsv3.book.ledger import ROOT

FILE = ROOT / "assets" / "measurements" / "fp8_gemm.json"
SUMS = FILE.with_name("accumulation.json")


def fp8_gemm_measurement() -> dict:
    """The committed measurement of the FP8 product, as above."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def accumulation_measurement() -> dict:
    """What a tensor core answered: chip and versions, and "lines", one for each kind of inputs,
    length k, and with or without promotion: errors, shares of equal sums, the first eight sums."""
    return json.loads(SUMS.read_text(encoding="utf-8"))


def in_words(found: dict) -> str:
    """One line for the chapter: where and when it was measured, and the best point."""
    best = max(found["points"], key=lambda point: point["tflops"])
    return (
        f"Measured on {found['chip']} (driver {found['driver']}), {found['date']}, torch "
        f"{found['torch']}, Triton {found['triton']}: {best['tflops']:.0f} TFLOP/s at best, for "
        f"{best['m']:,} tokens of {best['layer']}, {best['bf16_ratio']:.2f} times as fast as BF16"
    )


def roofline_lines(found: dict) -> dict[str, list[tuple[float, float]]]:
    """Layer -> (FLOPs per byte, FLOPs a second) of its products, for the figure of the roofline."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in found["points"]:
        flops = 2.0 * point["m"] * point["n"] * point["k"]
        lines.setdefault(point["layer"], []).append(
            (flops / point["bytes"], point["tflops"] * 1e12)
        )
    return lines
