"""inspect: published totals for the 671B preset, hand counts and headers for a small one."""

import json
import re

import pytest
from checkpoints import released_shapes, tiny_config, write_checkpoint
from safetensors.torch import load_file

from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.inspect import (
    activated_parameters,
    cache_bytes_per_token,
    contents,
    memory_per_rank,
    report,
)
from dsv3.cli import main
from dsv3.commands.inspect import table
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer


@pytest.fixture(scope="module")
def v3():
    return report(preset="deepseek-v3", ranks=16)


def test_671b(v3):
    # fact 2
    assert v3["parameters"] == {
        "main": 671_026_419_200,
        "activated": 37_552_297_472,
        "mtp": 11_610_068_224,
        "by_dtype": {"BF16": 3_918_786_560, "F32": 41_555_600, "F8_E4M3": 680_571_043_840},
        "total": 684_531_386_000,
    }
    assert v3["bytes"] == 688_574_839_360 and v3["tensors"] == 91_991
    assert set(v3) == {"parameters", "bytes", "tensors", "per_rank"}


def test_671b_without_embedding_and_cache():
    config = ModelConfig.deepseek_v3()
    assert activated_parameters(config, embedding=False) == 36_625_618_432
    assert cache_bytes_per_token(config) == 70_272


def test_kimi_k2():
    """1,026,408,232,448 weights, as counted from the published shards' headers; as the hub counts
    moonshotai/Kimi-K2-Instruct, in 139,644 tensors of 1,029,173,256,720 bytes, with 61 leftover
    rotary buffers (56 values of BF16 each) that no config asks for. Its card says 1T and 32B; the
    1.04T and 32.6B of its technical report do not follow from its config.json."""
    kimi = report(preset="kimi-k2")
    assert kimi["parameters"]["main"] == 1_026_408_232_448 and kimi["parameters"]["mtp"] == 0
    assert kimi["tensors"] + 61 == 139_644
    assert kimi["parameters"]["total"] + 61 * 56 == 1_026_470_731_056
    assert kimi["bytes"] + 61 * 56 * 2 == 1_029_173_256_720
    without_embedding = activated_parameters(ModelConfig.kimi_k2(), embedding=False)
    assert round(without_embedding / 1e9) == 32


def test_moonlight():
    """The hub counts 15,960,111,936 values, with 27 rotary buffers of 64; the card says 2.24B
    activated and 15.29B in all without embedding and head, and 16B and 3B with them."""
    moonlight, config = report(preset="moonlight")["parameters"], ModelConfig.moonlight()
    assert moonlight["total"] + 27 * 64 == 15_960_111_936
    both = 2 * config.vocab_size * config.hidden_size
    assert f"{(moonlight['main'] - both) / 1e9:.2f}" == "15.29"
    assert f"{(moonlight['activated'] - both) / 1e9:.2f}" == "2.24"
    assert f"{moonlight['main'] / 1e9:.0f} {moonlight['activated'] / 1e9:.0f}" == "16 3"


def test_glm_4_7_flash():
    """zai-org/GLM-4.7-Flash on the hub: 31,221,488,576 values in 9,703 tensors (revision
    7dd20894), 62,442,983,168 bytes by its dtypes; the card says 30B-A3B."""
    glm, config = report(preset="glm-4.7-flash"), ModelConfig.glm_4_7_flash()
    assert glm["parameters"]["total"] == 31_221_488_576
    assert glm["tensors"] == 9_703 and glm["bytes"] == 62_442_983_168
    both = 2 * config.vocab_size * config.hidden_size
    assert round(glm["parameters"]["main"] / 1e9) == 30
    assert round((glm["parameters"]["activated"] - both) / 1e9) == 3


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
    text = table(contents(preset="deepseek-v3", ranks=16))
    rows = {
        int(m[1]): m[0].split() for m in re.finditer(r"^ +(\d+) +[\d.]+ .*$", text, re.MULTILINE)
    }
    assert set(rows) == {1, 2, 4, 8, 16}
    assert rows[8][3] == "-" and rows[8][5] != "-"  # eight 80 GB cards are too small, H200 fit
    assert rows[16][3] != "-"
    assert rows[4][6] == "-" and rows[4][7] != "-"  # four of 192 GiB hold it, four of 183 do not
    # 81,559 MiB, a tenth left free, less the weights, over 70,272 bytes a token
    held = memory_per_rank(ModelConfig.deepseek_v3(), 16)
    room = (81_559 * 2**20 * 0.9 - held) / 70_272
    assert float(rows[16][3]) == pytest.approx(room / 1000, abs=1)
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
    sizes = {
        n: shape[0] * (shape[1] if len(shape) > 1 else 1)
        for n, (_, shape) in released_shapes(config, copies=False).items()
    }
    mtp = sum(n for name, n in sizes.items() if name.startswith("model.layers.2."))
    assert result["parameters"]["mtp"] == mtp
    assert result["parameters"]["main"] == sum(sizes.values()) - mtp
    assert result["parameters"]["main"] + mtp == sum(
        value.numel() for value in Transformer(config, "bf16").state_dict().values()
    )
    one_expert = 3 * 512 * 320
    assert result["parameters"]["activated"] == result["parameters"]["main"] - 2 * one_expert
    convert(tmp_path, tmp_path / "out", 2, progress=False)
    for rank in range(2):
        files = [
            load_file(tmp_path / "out" / f"{kind}{rank}-mp2.safetensors")
            for kind in ("model", "mtp")
        ]
        assert result["per_rank"][rank] == {
            "rank": rank,
            "tensors": sum(map(len, files)),
            "bytes": sum(t.nbytes for f in files for t in f.values()),
        }


def test_dtypes_are_those_of_the_file(tmp_path):
    import torch

    config = tiny_config(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    write_checkpoint(tmp_path, config, scale_dtype=torch.uint8)
    assert "U8" in report(tmp_path)["parameters"]["by_dtype"]


def test_prints_json_or_a_table(capsys):
    assert main(["inspect", "--preset", "mini", "--tp", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report(preset="mini", ranks=2)
    assert main(["inspect", "--preset", "mini"]) == 0
    assert "activated per token" in capsys.readouterr().out
    assert main(["inspect", "--preset", "glm-4.7-flash"]) == 0
    assert "glm4_moe_lite, the name of GLM-4.7-Flash" in capsys.readouterr().out


def test_the_table_believes_the_files(tmp_path):
    """A weight that an FP8 checkpoint keeps in plain numbers counts with its own bytes."""
    config = tiny_config()
    tensors = write_checkpoint(tmp_path, config)
    name = "model.layers.0.self_attn.o_proj.weight"
    plain = {**tensors, name: tensors[name].float()}
    scales = plain.pop(f"{name}_scale_inv")
    write_checkpoint(tmp_path / "mixed", config, plain)
    whole, mixed = (next(contents(path).fits()) for path in (tmp_path, tmp_path / "mixed"))
    assert mixed.stored - whole.stored == 3 * tensors[name].numel() - scales.nbytes
    assert mixed.memory == whole.memory  # it is quantised when it is loaded


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "either a model folder or a preset"),
        ({"preset": "v4"}, "unknown preset"),
        ({"preset": "deepseek-v3", "ranks": 32}, "FP8 block"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(DSV3Error, match=message):
        report(**arguments)


def test_a_converted_folder_is_named_as_such(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_config())
    convert(tmp_path / "in", tmp_path / "out", 2, progress=False)
    with pytest.raises(DSV3Error, match="converted for 2 ranks"):
        report(tmp_path / "out")
