"""load_model: every rank takes its own slices; save_model: the released layout again."""

import json

import pytest
import torch
from checkpoints import (
    quantize_naive,
    read_folder,
    released_shapes,
    same_bits,
    tiny_config,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.layout import layout
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.safetensors_io import SafetensorsFile
from dsv3.checkpoint.saving import save_model
from dsv3.config import QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup


def dequantized(tensors, name):
    """Block by block, as the released cast does it."""
    value, scale = tensors[name], tensors.get(name + "_scale_inv")
    if scale is None:
        return value.float()
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    grid = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    return value.float() * grid[: value.shape[0], : value.shape[1]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"tie_word_embeddings": True},
        {"gate_bias": False},
        {"quantization_config": None},
        {"num_nextn_predict_layers": 0},
    ],
)
def test_every_weight_arrives(tmp_path, changes):
    config = tiny_config(**changes)
    tensors = write_checkpoint(tmp_path, config)
    model = load_model(tmp_path, "fp32")
    names = {spec.name: spec.hf_name for spec in layout(config, scales=False, mtp_copies=False)}
    assert set(model.state_dict()) == set(names)
    for name, hf_name in names.items():
        assert torch.equal(model.state_dict()[name], dequantized(tensors, hf_name)), name


def test_fp8_codes_and_scales_stay_as_stored(tmp_path):
    tensors = write_checkpoint(tmp_path, tiny_config())
    model = load_model(tmp_path)
    wo = model.layers[1].attn.wo
    name = "model.layers.1.self_attn.o_proj.weight"
    assert same_bits(wo.weight, tensors[name])
    assert same_bits(wo.scale, tensors[name + "_scale_inv"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e8m0fnu, torch.uint8])
def test_power_of_two_scales_in_three_dtypes(tmp_path, dtype):
    config = tiny_config(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    tensors = write_checkpoint(tmp_path, config, scale_dtype=dtype)
    model = load_model(tmp_path, "fp32")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name + "_scale_inv"].dtype == dtype
    assert torch.equal(model.state_dict()["layers.0.attn.wkv_a.weight"], dequantized(tensors, name))


@pytest.mark.parametrize("copies, shards", [(True, 1), (False, 3)])
def test_mtp_copies_and_index_are_optional(tmp_path, copies, shards):
    config = tiny_config()
    tensors = write_checkpoint(tmp_path, config, copies=copies, shards=shards)
    model = load_model(tmp_path, "fp32")
    eh_proj = tensors["model.layers.2.eh_proj.weight"].float()
    assert torch.equal(model.state_dict()["mtp.0.eh_proj.weight"], eh_proj)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_hold_the_model_and_read_their_own_slices(tmp_path, monkeypatch, size):
    config = tiny_config()
    tensors = write_checkpoint(tmp_path, config)
    files = []
    monkeypatch.setattr(SafetensorsFile, "close", lambda self: files.append(self))
    whole = load_model(tmp_path, "fp32")
    full = sum(file.bytes_read for file in files)
    assert full == sum(
        t.nbytes
        for n, t in tensors.items()
        if not n.endswith((".2.embed_tokens.weight", "shared_head.head.weight"))
    )
    ranks, read = [], []
    for rank in range(size):
        files.clear()
        ranks.append(load_model(tmp_path, "fp32", group=TensorGroup(rank, size)))
        read.append(sum(file.bytes_read for file in files))
    kinds = released_shapes(config)
    states, everything = [model.state_dict() for model in ranks], whole.state_dict()
    for spec in layout(config, scales=False, mtp_copies=False):
        parts = [held[spec.name] for held in states if spec.name in held]
        expected = everything[spec.name]
        if "mlp.experts." in spec.hf_name:
            assert len(parts) == 1 and torch.equal(parts[0], expected)
        elif kinds[spec.hf_name][1] == tuple(parts[0].shape):
            assert all(torch.equal(part, expected) for part in parts)
        else:
            dim = 1 if spec.hf_name.endswith(("o_proj.weight", "down_proj.weight")) else 0
            assert torch.equal(torch.cat(parts, dim), expected), spec.name

    def cost(name, tensor):  # bytes one rank has to read of one stored tensor
        if ".experts." in name:
            return tensor.nbytes / size  # on average
        if any(
            key in name
            for key in ("q_b_proj", "kv_b_proj", "embed_tokens", "lm_head", "gate_proj", "up_proj")
        ):
            return tensor.nbytes // size
        return tensor.nbytes  # replicated, or cut along columns: whole rows are read

    own = sum(
        cost(n, t)
        for n, t in tensors.items()
        if not n.endswith((".2.embed_tokens.weight", "shared_head.head.weight"))
    )
    assert read == [own] * size


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_an_unquantised_checkpoint_loads_in_every_precision(tmp_path, precision):
    write_checkpoint(tmp_path, tiny_config(quantization_config=None))
    logits = load_model(tmp_path, precision)(torch.arange(8)[None])
    assert logits.shape == (1, 8, 64) and logits.isfinite().all()


def test_save_then_load(tmp_path):
    config = tiny_config()
    model = Transformer(config).init_weights(1)
    save_model(model, tmp_path / "one")
    save_model(model, tmp_path / "many", max_shard_bytes=3_000_000)
    one, many = read_folder(tmp_path / "one"), read_folder(tmp_path / "many")
    assert {n: (t.dtype, t.shape) for n, t in one.items()} == {
        s.hf_name: (one[s.hf_name].dtype, s.shape) for s in layout(config, mtp_copies=False)
    }
    assert set(one) == set(many) and all(same_bits(one[n], many[n]) for n in one)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 3_100_000 for f in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {n: f.name for f in files for n in load_file(f)}
    loaded = load_model(tmp_path / "many", "fp32")
    for name, weight in loaded.state_dict().items():
        hf_name = next(s.hf_name for s in layout(config) if s.name == name)
        assert torch.equal(weight, dequantized(one, hf_name)), name
    weight = model.state_dict()["layers.1.attn.wkv_a.weight"]
    error = (loaded.state_dict()["layers.1.attn.wkv_a.weight"] - weight).norm() / weight.norm()
    assert 0.01 < error < 0.04  # FP8 was there, and no more than FP8


def test_save_writes_scales_in_the_format_of_the_config(tmp_path):
    config = tiny_config(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    model = Transformer(config).init_weights(3)
    save_model(model, tmp_path)
    saved, name = read_folder(tmp_path), "model.layers.0.self_attn.o_proj.weight"
    codes, scales = quantize_naive(model.layers[0].attn.wo.weight.detach(), power_of_two=True)
    assert torch.equal(saved[name + "_scale_inv"].float(), scales)
    assert torch.equal(saved[name].float(), codes.float())


def test_save_unquantised_is_exact_in_bf16(tmp_path):
    config = tiny_config(quantization_config=None, tie_word_embeddings=True)
    model = Transformer(config, "bf16").init_weights(1)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, "bf16")
    before = model.state_dict()
    for name, weight in loaded.state_dict().items():  # what is kept in float32 is rounded once
        assert torch.equal(weight.float(), before[name].bfloat16().float())
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_save_refuses_what_it_cannot_write(tmp_path):
    config = tiny_config()
    with pytest.raises(DSV3Error, match="FP8 model"):
        save_model(Transformer(config, "fp8"), tmp_path / "a")
    with pytest.raises(DSV3Error, match="several ranks"):
        save_model(Transformer(config, group=TensorGroup(0, 2)), tmp_path / "a")
    (tmp_path / "b").mkdir()
    save_file({"t": torch.ones(1)}, tmp_path / "b" / "other.safetensors")
    with pytest.raises(DSV3Error, match="another checkpoint"):
        save_model(Transformer(config).init_weights(0), tmp_path / "b")
