"""What was measured and committed: on a GPU, for readers who have none; on quiet cores, for all.

``benchmarks/fp8_gemm.py`` writes ``assets/measurements/fp8_gemm.json`` on a machine with a GPU:

    {"chip": "NVIDIA H200", "driver": "580.159.04", "date": "2026-11-26",
     "torch": "2.11.0+cu130", "triton": "3.6.0",
     "points": [{"layer": "w1", "m": 64, "n": 18432, "k": 7168, "microseconds": 54.24,
                 "tflops": 311.79, "bytes": 137344512, "gb_per_s": 2532.2,
                 "bf16_microseconds": 75.84, "bf16_ratio": 1.398, "error": 0.00013}, ...]}

A point is the block-scaled product of m tokens with one weight; bytes are all operands, scales and
the result, each counted once; bf16_ratio is how many times as long torch's BF16 product takes.

``benchmarks/accumulation.py`` writes ``accumulation.json`` beside it: how many of a tensor core's
sums are, bit for bit, those of each emulated reading. ``dsv3 bench --curves`` writes
``cost_curves.json``: how time and memory grow on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from dsv3.book.ledger import ROOT

FILE = ROOT / "assets" / "measurements" / "fp8_gemm.json"
SUMS = FILE.with_name("accumulation.json")
CURVES = FILE.with_name("cost_curves.json")


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


def cost_curves() -> dict:
    """How costs grow: "machine", and "curves" as ``dsv3.bench.curves.Curve`` tells them: group and
    name, points (size, and quartiles of a quantity), slope and slope_at_the_end."""
    return json.loads(CURVES.read_text(encoding="utf-8"))


def slopes(found: Mapping) -> str:
    """A line a curve: its first and last point, and its slopes."""
    lines, before = [], None
    for curve in found["curves"]:
        (first, *_), (last, *_) = curve["points"][0], curve["points"][-1]
        head = f"{curve['group']}, {first:,.0f} to {last:,.0f} {curve['size']}"
        if head != before:
            lines.append(head)
        low, high = (_short(curve["points"][at][2]) for at in (0, -1))
        lines.append(
            f"  {curve['name']:38}{low:>6} to{high:>7} {curve['quantity']}  slope "
            f"{curve['slope']:.2f}, end {curve['slope_at_the_end']:.2f}"
        )
        before = head
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
