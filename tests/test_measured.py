"""The GPU measurement of the FP8 product: its arithmetic, its file, and words where it is not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import fp8_gemm
from dsv3.book import measured
from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig
from dsv3.viz import measured_roofline_figure

FIELDS = {"chip", "driver", "date", "torch", "triton", "points"}
POINT = dict(layer="wo", m=2, n=3, k=128, tflops=2.0, bytes=402, gb_per_s=1.0, bf16_ratio=1.5)
MADE_UP = dict(chip="X1", driver="5", date="2026-01-02", torch="2", triton="3", points=[POINT])


def test_the_shapes_are_those_of_the_671b_model():
    shapes = {spec.hf_name: spec.shape for spec in layout(ModelConfig.deepseek_v3())}
    first = "model.layers.0."
    assert {
        "wq_b": shapes[first + "self_attn.q_b_proj.weight"],
        "wo": shapes[first + "self_attn.o_proj.weight"],
        "w1": shapes[first + "mlp.gate_proj.weight"],
        "w2": shapes[first + "mlp.down_proj.weight"],
    } == fp8_gemm.LAYERS
    assert shapes[first + "mlp.up_proj.weight"] == fp8_gemm.LAYERS["w1"]  # w3


def test_bytes_are_those_of_all_operands_once():
    # 2 x 300 codes with 2 x 3 scales, 130 x 300 codes with 2 x 3 scales, 2 x 130 results.
    assert fp8_gemm.bytes_moved(2, 130, 300) == 600 + 24 + 39_000 + 24 + 1040


def test_a_measurement_is_read_and_told(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "FILE", tmp_path / "fp8_gemm.json")
    measured.FILE.write_text(json.dumps(MADE_UP))
    found = measured.fp8_gemm_measurement()
    assert found == MADE_UP
    told = measured.in_words(found)
    for word in ("X1", "driver 5", "2026-01-02", "torch 2", "Triton 3", "2 TFLOP/s", "1.50 times"):
        assert word in told
    assert measured.roofline_lines(found) == {"wo": [(2 * 2 * 3 * 128 / 402, 2e12)]}


def test_measured_points_sit_under_the_roof():
    lines = {"wo": [(2.0, 3e12), (500.0, 5e14)]}
    axes = measured_roofline_figure(lines, flops=1e15, memory=2e12).axes[0]
    roof, wo = axes.lines[:2]
    assert list(roof.get_xdata()) == [1, 500, 1e4] and list(roof.get_ydata()) == [2, 1000, 1000]
    assert list(wo.get_xdata()) == [2, 500] and list(wo.get_ydata()) == [3, 500]


def test_the_committed_measurement_adds_up():
    found = measured.fp8_gemm_measurement()
    assert set(found) >= FIELDS and found["points"]
    for point in found["points"]:
        m, n, k = point["m"], point["n"], point["k"]
        assert (n, k) == fp8_gemm.LAYERS[point["layer"]]
        assert point["bytes"] == fp8_gemm.bytes_moved(m, n, k)
        seconds = point["microseconds"] / 1e6
        assert point["tflops"] == pytest.approx(2 * m * n * k / seconds / 1e12, rel=0.01)
        assert point["error"] < fp8_gemm.MOST_ERROR


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_benchmark_says_so_and_writes_nothing(tmp_path):
    script = Path(fp8_gemm.__file__)
    done = subprocess.run(
        [sys.executable, script, "--out", tmp_path / "x.json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert done.stdout.startswith("No GPU that multiplies E4M3") and not list(tmp_path.iterdir())
