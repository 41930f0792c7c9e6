"""A state_dict has a checkpoint's names and the model's own numbers, and converted files go in."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from checkpoints import tiny_config, write_checkpoint
from safetensors.torch import load_file

from dsv3 import Transformer, load_model
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.layout import layout
from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup

PRECISIONS = ("fp32", "bf16", "fp8")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint in FP8 with ragged blocks, and the same cut for two ranks."""
    folder, parts = tmp_path_factory.mktemp("released"), tmp_path_factory.mktemp("converted")
    write_checkpoint(folder, tiny_config())
    convert(folder, parts, 2, progress=False)
    return folder, parts


def converted(folder, rank: int) -> dict[str, torch.Tensor]:
    return {
        name: value
        for kind in ("model", "mtp")
        for name, value in load_file(folder / f"{kind}{rank}-mp2.safetensors").items()
    }


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert set(one) == set(other)
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value.float(), other[name].float()), name


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_converted_file_loads_as_a_state_dict(released, precision, rank):
    """Into every precision, with nothing missing and nothing left over."""
    folder, parts = released
    group = TensorGroup(rank, 2)
    model = Transformer(load_model(folder, group=group).config, precision, group)
    done = model.load_state_dict(converted(parts, rank))
    assert not done.missing_keys and not done.unexpected_keys
    assert_same(model.state_dict(), load_model(folder, precision, group=group).state_dict())


def test_its_names_are_those_of_the_files(released):
    """In fp8 each weight has its scales beside it, but wkv_b, which the core keeps wider."""
    folder, parts = released
    model = load_model(folder, "fp8", group=TensorGroup(1, 2))
    names, stored = set(model.state_dict()), converted(parts, 1)
    assert {name for name in stored if not name.endswith("wkv_b.scale")} == names
    for name, value in model.state_dict().items():
        kept = stored[name].dtype == torch.float8_e4m3fn and "wkv_b" not in name
        assert (value.dtype == torch.float8_e4m3fn) == kept, name
        if kept:
            assert torch.equal(value.view(torch.uint8), stored[name].view(torch.uint8)), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_goes_round(released, precision):
    config = load_model(released[0]).config
    model = load_model(released[0], precision)
    again = Transformer(config, precision)
    again.load_state_dict(model.state_dict())
    assert_same(again.state_dict(), model.state_dict())
    assert_same(copy.deepcopy(model).state_dict(), model.state_dict())
    kept = io.BytesIO()
    torch.save(model.state_dict(), kept)
    kept.seek(0)
    again.load_state_dict(torch.load(kept))
    assert_same(again.state_dict(), model.state_dict())


def test_a_copy_loads_into_itself(released):
    """Hooks of a deep copy belong to the copy."""
    model = load_model(released[0], "fp32")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = copy.deepcopy(model)
    other.load_state_dict({name: torch.zeros_like(value) for name, value in before.items()})
    assert_same(model.state_dict(), before)
    assert not any(value.any() for value in other.state_dict().values())


def test_scales_and_gate_bias_are_buffers(released):
    model = load_model(released[0], "fp8")
    buffers = dict(model.named_buffers())
    assert "layers.1.ffn.gate.bias" in buffers and "layers.0.attn.wo.scale" in buffers
    experts = model.layers[1].ffn.experts
    assert {"w13_scale", "w2_scale"} == set(dict(experts.named_buffers()))
    codes = (torch.float8_e4m3fn,)
    wide = {n for n, p in model.named_parameters() if p.dtype not in codes}
    assert not any(name.endswith(("scale", "bias")) for name in wide)


def test_parameters_and_buffers_count_what_the_layout_counts(released):
    model = load_model(released[0], "fp32")
    specs = layout(model.config, scales=False, mtp_copies=False)
    assert sum(value.numel() for value in model.state_dict().values()) == sum(
        spec.numel for spec in specs
    )


EXPERT = "layers.1.ffn.experts.2.w3.weight"


def test_what_does_not_fit_is_named(released, as_in_use):
    model = load_model(released[0], "fp32")
    good = model.state_dict()
    for name in (EXPERT, "layers.0.attn.wo.weight"):
        with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
            model.load_state_dict({n: v for n, v in good.items() if n != name})
        with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
            model.load_state_dict({**good, name: torch.zeros(1)})
        with pytest.raises(DSV3Error, match=f"without its scale.*|{name}"):
            model.load_state_dict({**good, name: good[name].to(torch.float8_e4m3fn)})
    for name in ("layers.9.attn.wo.weight", "layers.1.ffn.experts.99.w1.weight", "layers.0.x"):
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{name}"):
            model.load_state_dict({**good, name: torch.zeros(1)})
    done = model.load_state_dict({EXPERT: torch.ones_like(good[EXPERT])}, strict=False)
    assert EXPERT not in done.missing_keys and "embed.weight" in done.missing_keys
    assert model.layers[1].ffn.experts.w13[2, 1].min() == 1


@pytest.mark.parametrize("name", [EXPERT, "layers.0.attn.wo.weight", "layers.0.attn.wkv_b.weight"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_no_weight_is_refused(released, as_in_use, precision, name):
    """Codes that came as bytes would be taken for numbers from 0 to 255."""
    model = load_model(released[0], precision)
    good, scale = model.state_dict(), name.removesuffix("weight") + "scale"
    weight, ones = torch.zeros(good[name].shape), torch.ones(1, 1)
    for kind in (torch.uint8, torch.int8, torch.float8_e5m2, torch.int64, torch.bool):
        for scales in ({}, {scale: ones}):
            with pytest.raises(DSV3Error, match=f"{name}.*{kind}"):
                model.load_state_dict({**good, name: weight.to(kind), **scales})
    with pytest.raises(DSV3Error, match=f"{name}.*torch.bfloat16 with scales"):
        model.load_state_dict({**good, name: weight.bfloat16(), scale: ones})
    for thing in (None, "x", weight.numpy()):
        with pytest.raises(DSV3Error, match=f"{name}"):
            model.load_state_dict({n: v for n, v in {**good, name: thing}.items() if n != scale})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_copied_and_not_assigned(released, precision):
    """Assigned, they would keep the file's dtype, and the stacks of experts would stay empty."""
    model = load_model(released[0], precision)
    good, empty = model.state_dict(), Transformer(model.config, precision, device="meta")
    with pytest.raises(DSV3Error, match="assign=True.*leave out assign"):
        empty.load_state_dict(good, assign=True)
    with pytest.raises(DSV3Error, match="meta device.*to_empty"):
        empty.load_state_dict(good)
    empty.to_empty(device="cpu").load_state_dict(good)
    assert_same(empty.state_dict(), good)


def test_stacks_are_no_names(released):
    model = load_model(released[0], "fp8")
    for stack in ("w13", "w2", "w2_scale"):
        key = f"layers.1.ffn.experts.{stack}"
        with pytest.raises(RuntimeError, match=f"Unexpected key.*{key}"):
            model.load_state_dict({**model.state_dict(), key: torch.zeros(1)})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tied_head_has_no_name_of_its_own(precision):
    """Files leave it out; one that is there all the same has to be the embedding."""
    config = tiny_config(tie_word_embeddings=True)
    whole = Transformer(config).init_weights(0).state_dict()
    assert "head.weight" not in whole
    model = Transformer(config, precision)
    for state in (whole, {**whole, "head.weight": whole["embed.weight"].clone()}):
        model.load_state_dict(state)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.embed.weight, whole["embed.weight"].to(model.embed.weight))
    with pytest.raises(DSV3Error, match="head.weight and embed.weight"):
        model.load_state_dict({**whole, "head.weight": torch.zeros_like(whole["embed.weight"])})
    with pytest.raises(RuntimeError, match="Missing key.*embed.weight"):
        model.load_state_dict({n: v for n, v in whole.items() if n != "embed.weight"})
