"""Chapter 4's widgets without a browser: the numbers they show, what their controls do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dsv3 import load_model, load_tokenizer
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor, quantize_activation, quantize_weight
from dsv3.viz import scene as scenes
from dsv3.viz.microscope_scene import SHOWS, microscope_scene, number, percent
from dsv3.viz.scene import Scene, still
from dsv3.viz.specimen import Specimen
from dsv3.viz.widgets import ScaleMicroscope
from dsv3.viz.widgets.microscope import activations, stored_matrices

SHIPPED = Path(__file__).parents[1] / "assets" / "dsv3-mini"
TEXT = "To be, or not to be"


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED, precision="fp8"), load_tokenizer(SHIPPED)


@pytest.fixture
def microscope(shipped):
    return ScaleMicroscope(*shipped, text=TEXT)


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, scenes.Text)]


def specimen(values: torch.Tensor, exact: bool = True) -> Specimen:
    return Specimen("a matrix", values, quantize_weight(values), exact, ("rows", "columns"))


# The microscope's numbers -----------------------------------------------------------------------


def test_all_fp8_matrices_of_a_folder_are_there_as_stored():
    found = stored_matrices(SHIPPED)
    stored = load_file(SHIPPED / "model.safetensors")
    assert len(found) == sum(value.dtype == torch.float8_e4m3fn for value in stored.values())
    name, ours = "model.layers.2.mlp.experts.5.down_proj.weight", found["layers.2.ffn.experts.5.w2"]
    assert torch.equal(ours.data.view(torch.uint8), stored[name].view(torch.uint8))
    assert torch.equal(ours.scale, stored[f"{name}_scale_inv"])
    assert {"layers.0.ffn.w1", "layers.3.attn.wkv_b", "mtp.0.ffn.shared_experts.w3"} <= set(found)


def test_a_model_in_fp8_has_all_but_what_it_keeps_in_plain_numbers(shipped):
    names = set(stored_matrices(shipped[0]))
    missing = set(stored_matrices(SHIPPED)) - names
    assert missing and all(name.endswith("attn.wkv_b") for name in missing)


def test_nothing_in_fp8_is_refused():
    with pytest.raises(DSV3Error, match="no FP8 matrices"):
        ScaleMicroscope(load_model(SHIPPED, precision="fp32"))


def test_activations_are_what_the_layer_reads(shipped):
    model, tokenizer = shipped
    ids = tokenizer.encode(TEXT)
    kept = activations(model, ids)
    embedded = model.embed.weight[ids].float()
    normed = F.rms_norm(embedded, (192,), model.layers[0].attn_norm.weight, 1e-6)
    assert torch.equal(kept["layers.0.attn"], normed.to(torch.bfloat16))
    assert kept["layers.1.ffn.w2"].shape == (len(ids), 512)
    assert kept["mtp.0.attn"].shape == (len(ids) - 1, 192)
    assert not any(value.requires_grad for value in kept.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_errors_of_a_tile_are_those_of_torchs_cast(microscope):
    microscope.matrix.value = "x of attn.wo"
    x = microscope.specimen().values
    tile = x[3, 128:256]
    block = microscope.specimen().block((3, 1))
    whole = float(x.abs().max()) / 448
    for name, scale in {
        "own": float(tile.abs().max()) / 448,
        "ue8m0": 2.0 ** torch.tensor(float(tile.abs().max()) / 448).log2().ceil().item(),
        "tensor": whole,
    }.items():
        rounded = (tile / scale).to(torch.float8_e4m3fn).float() * scale
        assert float(block.scales[name]) == pytest.approx(scale, rel=1e-6)
        assert torch.allclose(block.rounded(name)[0], rounded, rtol=1e-6, atol=0)
        off = float((rounded - tile).norm() / tile.norm())
        assert block.error(name) == pytest.approx(off, rel=1e-4)
        worst = ((rounded - tile) / tile).abs().nan_to_num(0).max()
        row, col = block.worst(name)
        assert float(block.errors(name)[row, col]) == pytest.approx(float(worst), rel=1e-4)


def test_stored_weights_are_their_own_measure(microscope):
    microscope.matrix.value = "attn.wq_b"
    matrix = microscope.specimen()
    other = quantize_weight(matrix.values, "ue8m0").dequantize()
    for place in ((0, 0), (3, 1)):
        rows, cols = matrix.spans(place)
        inside = slice(rows.start, rows.stop), slice(cols.start, cols.stop)
        block = matrix.block(place)
        assert block.error("own") == 0
        assert torch.equal(block.rounded("ue8m0").abs(), other[inside].abs())
        assert block.error("ue8m0") > 0.01
    assert "the weights before rounding are not in the file" in texts(microscope.scene())
    assert "none is off" in texts(microscope.scene())


def test_exponents_are_the_bits_of_the_codes():
    values = torch.randn(130, 128).exp() * torch.randn(130, 128).sign()
    values[0, :40] = 0
    values[1, :64] = values.abs().max() / 448 * 2.0**-8
    block = specimen(values).block((0, 0))
    codes = quantize_weight(values).data[:128].view(torch.uint8)
    fields = ((codes >> 3) & 15).to(torch.int64)
    fields[(codes & 127) == 0] = -1
    assert torch.equal(block.exponents, fields)
    assert {-1, 0, 15} <= set(fields.flatten().tolist())


def test_values_lost_to_zero_are_counted():
    values = torch.ones(128, 256)
    values[:, 128:] = 2.0**-20
    block = specimen(values).block((0, 1))
    assert block.lost("tensor") == 128 * 128 and block.error("tensor") == 1.0
    assert block.lost("own") == block.lost("ue8m0") == 0


# The microscope's picture -----------------------------------------------------------------------


def test_blocks_say_their_scales_and_ragged_ones_are_drawn_smaller(microscope):
    microscope.matrix.value = "attn.wkv_a"  # 160 x 192
    stored, scene = microscope.specimen().quantized, microscope.scene()
    assert scene.keys() == ["block 0 0", "block 0 1", "block 1 0", "block 1 1"]
    said = "\n".join(scene.labels())
    for row in range(2):
        for col in range(2):
            assert f"scale {number(float(stored.scale[row, col]))}" in said
    assert "block 1, 1: rows 128 to 159, columns 128 to 191" in said
    rects = {mark.key: mark for mark in scene.marks if mark.key}
    whole, corner = rects["block 0 0"], rects["block 1 1"]
    assert corner.width / whole.width == pytest.approx(64 / 128)
    assert corner.height / whole.height == pytest.approx(32 / 128)


@pytest.mark.parametrize(
    "control, value",
    [
        ("layer", "layers.0"),
        ("layer", "mtp.0"),
        ("matrix", "attn.wo"),
        ("matrix", "x of attn.wq_b"),
        *(("show", key) for key in SHOWS if key != "value"),
    ],
)
def test_each_control_of_the_microscope_changes_the_picture(microscope, control, value):
    before = microscope.drawing.scene
    getattr(microscope, control).value = value
    assert microscope.drawing.scene != before
    assert microscope.drawing.scene == microscope.scene().as_dict()


def test_every_matrix_of_every_layer_is_shown(microscope):
    seen = set()
    for _, layer in microscope.layer.options:
        microscope.layer.value = layer
        for name in microscope.matrix.options:
            microscope.matrix.value = name
            assert microscope.message() == "" and name.split(".")[-1] in microscope.alt
            seen.add((layer, name))
    assert ("layers.1", "x of ffn.w2") in seen and ("mtp.0", "ffn.experts.w2") in seen


def test_experts_have_their_slider(microscope):
    assert microscope.expert.disabled
    microscope.matrix.value = "ffn.experts.w1"
    assert not microscope.expert.disabled and microscope.expert.max == 15
    before = microscope.drawing.scene
    microscope.expert.value = 7
    assert microscope.drawing.scene != before
    ours = microscope.matrices["layers.2.ffn.experts.7.w1"]
    assert torch.equal(microscope.specimen().quantized.scale, ours.scale)
    microscope.matrix.value = "attn.wo"
    assert microscope.expert.disabled


def test_a_block_is_chosen_by_its_key_and_stays_where_there_is_one(microscope):
    microscope.matrix.value = "attn.wq_b"
    microscope.drawing._hear(None, {"chosen": "block 9 1"}, None)
    assert microscope.place == (9, 1) and "Inside block 9, 1" in texts(microscope.scene())
    microscope.drawing._hear(None, {"chosen": "block 99 1"}, None)
    assert microscope.place == (9, 1)
    microscope.matrix.value = "attn.wkv_a"
    assert microscope.place == (1, 1)
    chosen = [mark["key"] for mark in microscope.drawing.scene["marks"] if mark.get("chosen")]
    assert chosen == ["block 1 1"]


def test_each_value_of_a_tile_says_its_way_through_the_code(microscope):
    microscope.matrix.value = "x of attn.wq_a, wkv_a"
    microscope.drawing.choose("block 2 0")
    x = microscope.specimen().values
    codes = quantize_activation(x)
    said = microscope.scene().labels()
    for channel in (0, 77, 127):
        old, new = number(float(x[2, channel])), number(float(codes.dequantize()[2, channel]))
        code = f"{float(codes.data[2, channel]):g}".replace("-", "−")
        assert any(f"channel {channel}: {old} → code {code} → {new}" in label for label in said)


@pytest.mark.parametrize(
    "text, said",
    [("", "there is no text"), ("word " * 90, "longer than the picture"), ("\ud800", "Unicode")],
)
def test_a_text_the_microscope_cannot_read_is_refused_in_words(microscope, text, said):
    before = microscope.drawing.scene
    microscope.text.value = text
    assert said in microscope.message() and "still shows the text before" in microscope.message()
    assert microscope.drawing.scene == before
    microscope.matrix.value = "x of attn.wq_b"
    microscope.text.value = "Better."
    assert microscope.message() == ""
    assert microscope.specimen().values.shape[0] == len(microscope.tokenizer.encode("Better."))


def test_without_a_tokenizer_there_are_weights_alone(shipped):
    microscope = ScaleMicroscope(shipped[0])
    assert microscope.text.disabled
    assert not any(name.startswith("x of") for name in microscope.matrix.options)


@pytest.mark.parametrize("values", [torch.zeros(5, 7), torch.full((3, 200), 1e-30)])
def test_a_block_of_nothing_is_drawn(values):
    still(microscope_scene(specimen(values), (0, 0), "value"))
    still(microscope_scene(specimen(values), (0, 0), "tensor"))


def test_a_large_matrix_is_shown_in_part():
    """As large as the released ones: the first 64 x 64 blocks, in one image."""
    codes = torch.ones(70 * 128, 65 * 128).to(torch.float8_e4m3fn)
    scale = torch.rand(70, 65) + 0.1
    stored = QuantizedTensor(codes, scale)
    large = Specimen("large", stored.dequantize(), stored, False, ("rows", "columns"))
    scene = microscope_scene(large, (1, 1), "value")
    assert len(scene.keys()) == 64 * 64 and "the first 64 × 64 are shown" in texts(scene)


@pytest.mark.parametrize(
    "value, said", [(0.0, "0"), (-0.00123456, "−0.00123"), (5.5e-6, "5.50·10⁻⁶"), (448.0, "448")]
)
def test_numbers_are_written_in_three_digits(value, said):
    assert number(value) == said
    assert [percent(share) for share in (0, 0.0267, 0.999)] == ["0%", "2.7%", "100%"]
