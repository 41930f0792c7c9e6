"""inspect: published totals for the 671B preset, hand counts and headers for a small one."""

import json
import re

import pytest
from safetensors.torch import load_file

from checkpoints import released_shapes, tiny_config, write_checkpoint
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.convert import convert
from dsv3.errors import DSV3Error
from dsv3.inspect import (activated_parameters, cache_bytes_per_token, inspect, memory_per_rank,
                          report, table)
from dsv3.model import Transformer


@pytest.fixture(scope="module")
def v3():
    return report(preset="deepseek-v3", ranks=16)


def test_671b(v3):
    # fact 2
    assert v3["parameters"] == {
        "main": 671_026_419_200, "activated": 37_552_297_472, "mtp": 11_610_068_224,
        "by_dtype": {"BF16": 3_918_786_560, "F32": 41_555_600, "F8_E4M3": 680_571_043_840},
        "total": 684_531_386_000}
    assert v3["bytes"] == 688_574_839_360 and v3["tensors"] == 91_991
    assert set(v3) == {"parameters", "bytes", "tensors", "per_rank"}


def test_671b_without_embedding_and_cache():
    config = ModelConfig.deepseek_v3()
    assert activated_parameters(config, embedding=False) == 36_625_618_432
    assert cache_bytes_per_token(config) == 70_272


def test_671b_per_rank(v3):
    """Replicated tensors, counted by hand, are what 16 ranks hold beyond one copy."""
    ranks = v3["per_rank"]
    assert [r["rank"] for r in ranks] == list(range(16)) and len({r["bytes"] for r in ranks}) == 1
    d, layers, moe = 7168, 62, 59  # MTP layer included
    fp8 = 1536 * d + 576 * d
    scales = (12 * 56 + 5 * 56) * 4
    vectors = (1536 + 512 + 2 * d) * 2
    router = (256 * d) * 2 + 256 * 4
    mtp = (2 * d * d + 3 * d) * 2
    replicated = layers * (fp8 + scales + vectors) + moe * router + mtp + d * 2
    copies = 2 * 129280 * d * 2
    assert 16 * ranks[0]["bytes"] == 688_574_839_360 - copies + 15 * replicated


def test_671b_memory_and_what_fits(v3):
    text = table(v3, ModelConfig.deepseek_v3())
    rows = {int(m[1]): m[0].split() for m in re.finditer(r"^ +(\d+) +[\d.]+ .*$", text, re.M)}
    assert set(rows) == {1, 2, 4, 8, 16}
    assert rows[8][3] == "-" and rows[8][5] != "-"    # eight 80 GB cards are too small, H200 fit
    assert rows[16][3] != "-"
    stored = v3["per_rank"][0]["bytes"]
    assert stored < memory_per_rank(ModelConfig.deepseek_v3(), 16) < 1.02 * stored


@pytest.mark.parametrize("changes", [{}, {"quantization_config": None}, {"q_lora_rank": None}])
def test_a_checkpoint_on_disk(tmp_path, changes):
    config = tiny_config(**changes)
    tensors = write_checkpoint(tmp_path, config)
    result = report(tmp_path, ranks=2)
    assert result["bytes"] == sum(t.nbytes for t in tensors.values())
    assert result["tensors"] == len(tensors)
    assert result["parameters"]["total"] == sum(t.numel() for t in tensors.values())
    sizes = {n: shape[0] * (shape[1] if len(shape) > 1 else 1)
             for n, (_, shape) in released_shapes(config, copies=False).items()}
    mtp = sum(n for name, n in sizes.items() if name.startswith("model.layers.2."))
    assert result["parameters"]["mtp"] == mtp
    assert result["parameters"]["main"] == sum(sizes.values()) - mtp
    assert result["parameters"]["main"] + mtp == sum(
        p.numel() for p in Transformer(config, "bf16").parameters())
    one_expert = 3 * 512 * 320
    assert result["parameters"]["activated"] == result["parameters"]["main"] - 2 * one_expert
    convert(tmp_path, tmp_path / "out", 2, progress=False)
    for rank in range(2):
        files = [load_file(tmp_path / "out" / f"{kind}{rank}-mp2.safetensors")
                 for kind in ("model", "mtp")]
        assert result["per_rank"][rank] == {
            "rank": rank, "tensors": sum(map(len, files)),
            "bytes": sum(t.nbytes for f in files for t in f.values())}


def test_dtypes_are_those_of_the_file(tmp_path):
    import torch
    config = tiny_config(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    write_checkpoint(tmp_path, config, scale_dtype=torch.uint8)
    assert "U8" in report(tmp_path)["parameters"]["by_dtype"]


def test_prints_json_or_a_table(capsys):
    inspect(preset="mini", ranks=2, as_json=True)
    assert json.loads(capsys.readouterr().out) == report(preset="mini", ranks=2)
    inspect(preset="mini")
    assert "activated per token" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    ({}, "either a model folder or a preset"), ({"preset": "v4"}, "unknown preset"),
    ({"preset": "deepseek-v3", "ranks": 32}, "FP8 block")])
def test_refusals(arguments, message):
    with pytest.raises(DSV3Error, match=message):
        report(**arguments)


def test_a_converted_folder_is_named_as_such(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config())
    convert(tmp_path / "in", tmp_path / "out", 2, progress=False)
    with pytest.raises(DSV3Error, match="converted for 2 ranks"):
        report(tmp_path / "out")
