"""Broken checkpoints: every door refuses them in one line that names the thing, and leaves nothing.

The doors are load_model, convert, cast and inspect. Damage that only values show (NaN codes) is
found by load_model and cast; convert copies bytes and inspect reads headers.
"""

import json

import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from safetensors.torch import save_file

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.inspect import report
from dsv3.checkpoint.loading import load_model
from dsv3.config import QuantizationConfig
from dsv3.errors import DSV3Error

pytestmark = pytest.mark.slow

DOORS = {
    "load": lambda folder, out: load_model(folder),
    "convert": lambda folder, out: convert(folder, out, 2, progress=False),
    "cast": lambda folder, out: cast(folder, out, "bf16", progress=False),
    "inspect": lambda folder, out: report(folder),
}
WO = "model.layers.1.self_attn.o_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def good():
    return random_tensors(tiny_config())


def nan_code(t):
    t[WO].view(torch.uint8)[3, 5] = 0x7F


def negative_nan_code(t):
    t[WO].view(torch.uint8)[319, 511] = 0xFF


def put(name, change):
    def damage(t):
        t[name] = change(t[name]).contiguous()

    return damage


HEADERS = {  # what headers show: (damage, words of the message)
    "missing tensor": (lambda t: t.pop("model.norm.weight"), "missing tensor", "model.norm.weight"),
    "missing scale": (lambda t: t.pop(WO + "_scale_inv"), "missing scale", WO + "_scale_inv"),
    "half an MTP layer": (
        lambda t: [t.pop(n) for n in list(t) if ".layers.2.mlp" in n],
        "missing tensor",
        "model.layers.2.mlp",
    ),
    "transposed": (put(WO, lambda w: w.t()), "wrong shape", WO),
    "scale of another grid": (put(WO + "_scale_inv", lambda s: s[:-1]), "wrong shape", WO),
    "another vocabulary": (put("lm_head.weight", lambda w: w[:-1]), "wrong shape", "lm_head"),
    "weight not FP8": (put(WO, lambda w: w.view(torch.int8)), "wrong dtype", WO),
    "FP8 where BF16 belongs": (
        put("lm_head.weight", lambda w: w.to(torch.float8_e4m3fn)),
        "wrong dtype",
        "lm_head",
    ),
    "E5M2": (put(WO, lambda w: w.view(torch.float8_e5m2)), "wrong dtype", WO),
    "integer bias": (put(BIAS, lambda b: b.long()), "wrong dtype", BIAS),
    "scale of whole numbers": (put(WO + "_scale_inv", lambda s: s.long()), "wrong dtype", WO),
    "plain weight beside scales": (put(WO, lambda w: w.bfloat16()), "scales beside a weight", WO),
    "unexpected": (
        lambda t: t.update({"model.extra.weight": torch.ones(1)}),
        "unexpected tensor",
        "model.extra.weight",
    ),
}


def refused(door, folder, out, *words):
    with pytest.raises(DSV3Error) as error:
        DOORS[door](folder, out)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    assert not out.exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", HEADERS)
def test_headers(tmp_path, good, case, door):
    damage, *words = HEADERS[case]
    tensors = dict(good)
    damage(tensors)
    write_checkpoint(tmp_path / "in", tiny_config(), tensors)
    refused(door, tmp_path / "in", tmp_path / "out", *words)


VALUES = {
    "NaN code": (nan_code, "NaN"),
    "negative NaN code": (negative_nan_code, "NaN"),
    "NaN scale": (put(WO + "_scale_inv", lambda s: s * float("nan")), "scale"),
    "infinite scale": (put(WO + "_scale_inv", lambda s: s * float("inf")), "scale"),
    "negative scale": (put(WO + "_scale_inv", lambda s: -s), "scale"),
}


@pytest.mark.parametrize("door", ["load", "cast"])
@pytest.mark.parametrize("case", VALUES)
def test_values(tmp_path, case, door):
    damage, word = VALUES[case]
    tensors = random_tensors(tiny_config())
    damage(tensors)
    write_checkpoint(tmp_path / "in", tiny_config(), tensors, shards=1)
    name = "layers.1." if door == "load" else "model.layers.1."
    refused(door, tmp_path / "in", tmp_path / "out", word, name)


def test_cast_checks_all_scales_before_it_writes_the_first_shard(tmp_path):
    tensors = random_tensors(tiny_config())
    name = [n for i, n in enumerate(tensors) if i % 3 == 2 and n + "_scale_inv" in tensors][-1]
    tensors[name + "_scale_inv"][0, 0] = float("nan")
    write_checkpoint(tmp_path / "in", tiny_config(), tensors)  # the weight is in the last shard
    refused("cast", tmp_path / "in", tmp_path / "out", "scale", name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("quantization", [None, QuantizationConfig()])
def test_router_bias(tmp_path, value, quantization):
    config = tiny_config(quantization_config=quantization)
    tensors = random_tensors(config)
    tensors[BIAS][1] = value
    write_checkpoint(tmp_path / "in", config, tensors)
    refused("load", tmp_path / "in", tmp_path / "out", "router bias", "layers.1.ffn.gate.bias")


def test_e8m0_nan_scale(tmp_path):
    config = tiny_config(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    tensors = random_tensors(config, scale_dtype=torch.uint8)
    tensors[WO + "_scale_inv"][0, 0] = 255
    write_checkpoint(tmp_path / "in", config, tensors)
    refused("load", tmp_path / "in", tmp_path / "out", "scale", "layers.1.attn.wo")


@pytest.mark.parametrize("door", DOORS)
def test_a_truncated_shard(tmp_path, good, door):
    write_checkpoint(tmp_path / "in", tiny_config(), good)
    shard = tmp_path / "in" / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(door, tmp_path / "in", tmp_path / "out", "truncated", shard.name)


@pytest.mark.parametrize("door", DOORS)
def test_a_missing_shard(tmp_path, good, door):
    write_checkpoint(tmp_path / "in", tiny_config(), good)
    (tmp_path / "in" / "model-00002-of-00003.safetensors").unlink()
    refused(door, tmp_path / "in", tmp_path / "out", "missing", "model-00002-of-00003")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("target", ["../elsewhere.safetensors", "pytorch_model.bin"])
def test_an_index_that_leads_astray(tmp_path, good, door, target):
    write_checkpoint(tmp_path / "in", tiny_config(), good)
    save_file({WO: good[WO]}, tmp_path / "elsewhere.safetensors")
    (tmp_path / "in" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    path = tmp_path / "in" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][WO] = target
    path.write_text(json.dumps(index))
    refused(door, tmp_path / "in", tmp_path / "out", target)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "qwen2"}, ["qwen2", "distilled"]),
        ({"hidden_size": 256}, ["wrong shape"]),
        ({"num_hidden_layers": 3}, ["unexpected", "model.layers.2.enorm"]),
        ({"num_hidden_layers": 1}, ["missing", "model.layers.1.enorm"]),
        ({"num_hidden_layers": 1, "num_nextn_predict_layers": 0}, ["unexpected", "model.layers.1"]),
        ({"gate_bias": False}, ["unexpected", "e_score_correction_bias"]),
        ({"q_lora_rank": None}, ["q_proj"]),
        ({"tie_word_embeddings": True}, ["differ", "lm_head", "embed_tokens"]),
        ({"quantization_config": None}, ["wrong dtype", "F8_E4M3", "quantization_config"]),
    ],
)
def test_a_config_of_another_model(tmp_path, good, door, change, words):
    write_checkpoint(tmp_path / "in", tiny_config(), good)
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(door, tmp_path / "in", tmp_path / "out", *words)


@pytest.mark.parametrize("door", DOORS)
def test_a_bf16_cast_that_kept_its_quantization_config(tmp_path, door):
    """The released cast script leaves it in place."""
    tensors = random_tensors(tiny_config(quantization_config=None))
    write_checkpoint(tmp_path / "in", tiny_config(), tensors)
    refused(door, tmp_path / "in", tmp_path / "out", "BF16", "remove quantization_config")


@pytest.mark.parametrize("door", DOORS)
def test_no_config(tmp_path, good, door):
    write_checkpoint(tmp_path / "in", tiny_config(), good)
    (tmp_path / "in" / "config.json").unlink()
    refused(door, tmp_path / "in", tmp_path / "out", "config.json")


@pytest.mark.parametrize("door", DOORS)
def test_no_folder(tmp_path, door):
    refused(door, tmp_path / "none", tmp_path / "out", "none")


def test_a_converted_rank_is_missing(tmp_path, good):
    write_checkpoint(tmp_path / "in", tiny_config(), good)
    convert(tmp_path / "in", tmp_path / "out", 1, progress=False)
    (tmp_path / "out" / "model0-mp1.safetensors").unlink()
    with pytest.raises(DSV3Error, match="no such file") as error:
        load_model(tmp_path / "out")
    assert "model0-mp1.safetensors" in str(error.value)
