"""Checkpoints as other tools leave them: loaded, cast and converted as what they are."""

import json
import warnings

import pytest
import torch
from checkpoints import (
    quantize_naive,
    random_tensors,
    read_folder,
    released_shapes,
    same_bits,
    tiny_config,
    write_checkpoint,
)
from test_checkpoint import dequantized

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.inspect import report
from dsv3.checkpoint.loading import load_model
from dsv3.errors import DSV3Error, Notice
from dsv3.parallel.tensor import TensorGroup

WO, WKV_A = (
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
)
TOKENS = torch.arange(8)[None]


def edit_config(folder, **changes):
    data = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        data[name] = value
    (folder / "config.json").write_text(json.dumps(data))


def plain(tensors, *names):
    """Some FP8 weights in bfloat16, without their scales."""
    out = dict(tensors)
    for name in names:
        out[name] = dequantized(tensors, name).bfloat16()
        del out[name + "_scale_inv"]
    return out


# Mixed forms ------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path):
    """Two weights kept in BF16, one of them told by config.json; scales in BF16 elsewhere."""
    tensors = plain(random_tensors(tiny_config()), WO, WKV_A)
    scale = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    tensors[scale] = tensors[scale].bfloat16()
    write_checkpoint(tmp_path / "in", tiny_config(), tensors)
    data = json.loads((tmp_path / "in" / "config.json").read_text())["quantization_config"]
    edit_config(
        tmp_path / "in",
        quantization_config={
            **data,
            "modules_to_not_convert": ["lm_head", "model.layers.1.self_attn.o_proj"],
        },
    )
    return tmp_path / "in", tensors


def test_a_mixed_checkpoint_loads_as_it_is(mixed):
    folder, tensors = mixed
    model = load_model(folder, "fp32")
    for name, hf_name in (
        ("layers.1.attn.wo.weight", WO),
        ("layers.0.attn.wkv_a.weight", WKV_A),
        ("layers.0.attn.wo.weight", WO.replace(".1.", ".0.")),
    ):
        assert torch.equal(model.state_dict()[name], dequantized(tensors, hf_name)), name
    wo = load_model(folder, "fp8").layers[1].attn.wo  # plain: quantised here
    codes, scales = quantize_naive(tensors[WO].float())
    assert same_bits(wo.weight.data, codes) and same_bits(wo.scale.data, scales)
    by_dtype = report(folder)["parameters"]["by_dtype"]
    expected: dict[str, int] = {}
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    for tensor in tensors.values():
        expected[names[tensor.dtype]] = expected.get(names[tensor.dtype], 0) + tensor.numel()
    assert by_dtype == expected


def test_a_mixed_checkpoint_is_cast_both_ways(mixed, tmp_path):
    folder, tensors = mixed
    cast(folder, tmp_path / "bf16", "bf16", progress=False)
    found = read_folder(tmp_path / "bf16")
    assert set(found) == set(released_shapes(tiny_config()))
    for name, tensor in found.items():
        expected = tensors[name]
        if name + "_scale_inv" in tensors:
            expected = dequantized(tensors, name).bfloat16()
        assert same_bits(tensor, expected), name
    assert "quantization_config" not in json.loads((tmp_path / "bf16/config.json").read_text())
    cast(folder, tmp_path / "fp8", "fp8", progress=False)
    found = read_folder(tmp_path / "fp8")
    codes, scales = quantize_naive(tensors[WO].float())
    assert same_bits(found.pop(WO), codes) and same_bits(found.pop(WO + "_scale_inv"), scales)
    assert (
        found.pop(WKV_A).dtype == torch.float8_e4m3fn
        and found.pop(WKV_A + "_scale_inv") is not None
    )
    assert set(found) == set(tensors) - {WO, WKV_A}
    assert all(same_bits(tensor, tensors[name]) for name, tensor in found.items())
    assert "modules_to_not_convert" not in (tmp_path / "fp8" / "config.json").read_text()
    with pytest.raises(DSV3Error, match="scales of another format.*found ue8m0"):
        cast(folder, tmp_path / "x", "fp8", "ue8m0", progress=False)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_mixed_checkpoint_converts_and_loads_the_same(mixed, tmp_path, tp):
    folder, _ = mixed
    convert(folder, tmp_path / "out", tp, progress=False)
    for rank in range(tp):
        a, b = (
            load_model(place, group=TensorGroup(rank, tp)).state_dict()
            for place in (folder, tmp_path / "out")
        )
        assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_wider_checkpoint_is_cast(tmp_path, dtype):
    config = tiny_config(quantization_config=None)
    tensors = {
        name: value if "bias" in name else value.to(dtype)
        for name, value in random_tensors(config).items()
    }
    write_checkpoint(tmp_path / "in", config, tensors)
    edit_config(tmp_path / "in", torch_dtype=str(dtype).removeprefix("torch."))
    cast(tmp_path / "in", tmp_path / "out", "bf16", progress=False)
    for name, tensor in read_folder(tmp_path / "out").items():
        wide = tensors[name]
        assert same_bits(tensor, wide if "bias" in name else wide.bfloat16()), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(DSV3Error, match="bf16 already"):
        cast(tmp_path / "out", tmp_path / "x", "bf16", progress=False)
    cast(tmp_path / "in", tmp_path / "fp8", "fp8", progress=False)
    found = read_folder(tmp_path / "fp8")
    codes, _ = quantize_naive(tensors[WO].float())
    assert same_bits(found[WO], codes) and found["lm_head.weight"].dtype == torch.bfloat16


# Redundancy -------------------------------------------------------------------------------------


def inv_freq(t):
    for layer, count in enumerate((64, 56)):  # Kimi K2's files have 56 of 32 that turn
        t[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(count)
    t["model.rotary_emb.cos_cached"] = torch.ones(1, 128, 128)
    t["model.rotary_emb.sin_cached"] = torch.ones(128, 64)  # of each pair once


@pytest.mark.parametrize(
    "changes, edits, damage",
    [
        ({}, {}, inv_freq),
        (
            {"tie_word_embeddings": True},
            {},
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].float()}),
        ),
        ({"tie_word_embeddings": True}, {}, lambda t: None),
        ({}, {"num_nextn_predict_layers": 0}, lambda t: None),
        ({}, {"num_nextn_predict_layers": None}, lambda t: None),
    ],
)
def test_harmless_redundancy(tmp_path, changes, edits, damage):
    config = tiny_config(**changes)
    tensors = random_tensors(config)
    base = write_checkpoint(tmp_path / "base", config, tensors)
    tensors = dict(base)
    damage(tensors)
    write_checkpoint(tmp_path / "in", config, tensors)
    edit_config(tmp_path / "in", **edits)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model = load_model(tmp_path / "in", "fp32")
    assert torch.equal(model(TOKENS), load_model(tmp_path / "base", "fp32")(TOKENS))
    assert len(model.mtp) == (0 if edits else 1)
    assert [w.category for w in seen] == [Notice] * bool(edits)
    report(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "converted", 2, progress=False)
    cast(tmp_path / "in", tmp_path / "cast", "bf16", progress=False)
    assert not any("inv_freq" in name for name in read_folder(tmp_path / "cast"))
    assert len(load_model(tmp_path / "cast").mtp) == len(model.mtp)


def test_buffers_of_another_shape_and_heads_that_differ_are_refused(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    for number, (name, value, words) in enumerate(
        [
            ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(64, 2), "unexpected"),
            ("lm_head.weight", torch.ones(64, 320), "lm_head.weight and model.embed_tokens"),
        ]
    ):
        tensors = random_tensors(config) | {name: value}
        write_checkpoint(tmp_path / str(number), config, tensors)
        with pytest.raises(DSV3Error, match=words):
            load_model(tmp_path / str(number))


def test_an_index_may_point_nowhere_where_nobody_goes(tmp_path):
    write_checkpoint(tmp_path, tiny_config())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= {
        "model.old.weight": "gone.safetensors",
        "model.older.weight": "model-00001-of-00003.safetensors",
    }
    path.write_text(json.dumps(index))
    load_model(tmp_path)
    index["weight_map"][WO] = "gone.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(DSV3Error, match="a file that is missing.*gone"):
        load_model(tmp_path)


def test_promised_mtp_that_is_not_there(tmp_path):
    """As transformers saves it: num_nextn_predict_layers 1 and no such weights."""
    tensors = {n: t for n, t in random_tensors(tiny_config()).items() if ".layers.2." not in n}
    write_checkpoint(tmp_path / "in", tiny_config(), tensors)
    with pytest.warns(Notice, match="holds? none: drafting is off"):
        model = load_model(tmp_path / "in", "fp32")
    assert len(model.mtp) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        assert report(tmp_path / "in")["parameters"]["mtp"] == 0
        cast(tmp_path / "in", tmp_path / "cast", progress=False)
        convert(tmp_path / "in", tmp_path / "converted", 1, progress=False)
    for name in ("cast", "converted"):  # what is written is true, so nothing more is said
        with warnings.catch_warnings():
            warnings.simplefilter("error", Notice)
            other = load_model(tmp_path / name, "bf16")
        assert (
            json.loads((tmp_path / name / "config.json").read_text())["num_nextn_predict_layers"]
            == 0
        )
        assert len(other.mtp) == 0


# Other formats ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, dtype, word",
    [
        ("model.layers.0.mlp.gate_proj.qweight", torch.int32, "GPTQ or AWQ"),
        ("model.layers.0.mlp.gate_proj.weight_packed", torch.int32, "compressed-tensors"),
        ("model.layers.0.mlp.gate_proj.weight.absmax", torch.float32, "bitsandbytes"),
        ("model.layers.0.mlp.gate_proj.scales", torch.uint32, "MLX"),
        ("model.layers.1.mlp.experts.gate_up_proj", torch.bfloat16, "one tensor a layer"),
        ("base_model.model.layers.0.self_attn.o_proj.lora_A.weight", torch.float32, "LoRA"),
    ],
)
def test_another_format_is_named(tmp_path, name, dtype, word):
    config = tiny_config(quantization_config=None)
    tensors = random_tensors(config)
    tensors.pop("model.layers.0.mlp.gate_proj.weight")
    tensors[name] = torch.ones(4, 4).to(dtype)
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(DSV3Error, match=word) as error:
        load_model(tmp_path)
    assert "remove quantization_config" not in str(error.value)


def test_fp8_without_blocks_is_not_told_to_add_a_quantization_config(tmp_path):
    config = tiny_config(quantization_config=None)
    tensors = random_tensors(config)
    tensors[WO] = tensors[WO].to(torch.float8_e4m3fn)
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(DSV3Error, match="without a grid of scales"):
        load_model(tmp_path)


def test_the_advice_for_fp8_without_quantization_config_works(tmp_path):
    tensors = random_tensors(tiny_config())
    write_checkpoint(tmp_path, tiny_config(quantization_config=None), tensors)
    with pytest.raises(DSV3Error, match="An FP8 checkpoint needs") as error:
        load_model(tmp_path)
    said = json.loads("{" + str(error.value).partition("needs ")[2].partition(" in its ")[0] + "}")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **said}))
    load_model(tmp_path)


def test_a_grid_of_scales_of_another_size(tmp_path):
    tensors = random_tensors(tiny_config())
    tensors[WO + "_scale_inv"] = torch.ones(7, 7)
    write_checkpoint(tmp_path, tiny_config(), tensors)
    with pytest.raises(DSV3Error, match="wrong shape.*blocks of 128x128"):
        load_model(tmp_path)
