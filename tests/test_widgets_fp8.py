"""Chapter 4's widgets without a browser: the numbers they show, what their controls do."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dsv3 import load_model, load_tokenizer
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor, quantize_activation, quantize_weight
from dsv3.fp8.small_floats import FORMATS, SmallFloat
from dsv3.viz import scene as scenes
from dsv3.viz.microscope_scene import SHOWS, microscope_scene, number, percent
from dsv3.viz.reading import written
from dsv3.viz.scene import Scene, still
from dsv3.viz.specimen import Specimen
from dsv3.viz.widgets import NumberLine, ScaleMicroscope
from dsv3.viz.widgets.microscope import activations, stored_matrices
from dsv3.viz.widgets.number_line import CASES

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


# The number line --------------------------------------------------------------------------------


NAMED = {
    "E4M3": torch.float8_e4m3fn,
    "E5M2": torch.float8_e5m2,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
}


def named(name: str) -> SmallFloat:
    return next(format for format in FORMATS if format.name == name)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 0.0025])
def test_the_number_line_rounds_as_torch_does(name, scale):
    line = NumberLine(format=name, scale=scale)
    for value in (11.4, 10.5, 11.5, -3.3, 0.001, 1e-9, 0.0, 447.0, 300.1):
        scaled = torch.tensor(value / scale, dtype=torch.float64)
        if name == "E4M3":
            scaled = scaled.clamp(-448, 448)
        stored = scaled.float().to(NAMED[name])
        line.value.value = repr(value)
        reading = line.reading()
        assert reading.rounded == float(stored) and reading.result == float(stored) * scale
        width = torch.uint8 if stored.itemsize == 1 else torch.uint16
        assert reading.code == int(stored.view(width))
        if math.isfinite(reading.error):
            assert reading.error == pytest.approx(float(stored) * scale - value, abs=1e-12)


@pytest.mark.parametrize("name", [format.name for format in FORMATS])
@pytest.mark.parametrize("case", [value for value in CASES.values() if value])
def test_every_telling_case_in_every_format_is_drawn_and_said(name, case):
    line = NumberLine(format=name)
    line.case.value = case
    assert line.value.value == case and line.case.value == case
    assert line.message() == "" and len(line.reading().verdict()) < 110
    scene = line.scene()
    still(scene)
    assert line.reading().verdict() == texts(scene)[0]
    for mark in scene.marks:
        assert not isinstance(mark, scenes.Circle) or -1 <= mark.x <= scene.width + 1


@pytest.mark.parametrize(
    "value, format, said",
    [
        ("10.5", "E4M3", "10.5 is halfway from 10 to 11: a tie, and 10 has the even code"),
        ("11.5", "E4M3", "11.5 is halfway from 11 to 12: a tie, and 12 has the even code"),
        ("11", "E4M3", "11 is a number of E4M3: nothing is lost"),
        ("500", "E4M3", "500 lies beyond 448, the largest number: it saturates, to 448"),
        ("-inf", "E4M3", "−∞ lies beyond −448, the largest number: it saturates, to −448"),
        ("70000", "FP16", "70000 lies beyond 65504, the largest number: it becomes infinity"),
        ("inf", "E5M2", "infinity stays infinity: E5M2 has a code for it"),
        ("nan", "BF16", "NaN stays NaN, in BF16 too"),
        ("1e-9", "E4M3", "1·10⁻⁹ is nearer to 0 than to 0.001953125: it becomes 0"),
        ("0.3", "UE8M0", "0.3 lies between 0.25 and 0.5: a scale is rounded up, to 0.5"),
        ("-1", "UE8M0", "a scale is never 0 or negative"),
    ],
)
def test_what_happens_is_said(value, format, said):
    line = NumberLine(format=format)
    line.value.value = value
    assert said in line.reading().verdict() and said in line.alt


def test_bits_and_formula_are_those_of_the_code():
    scene = NumberLine(10.5).scene()
    bits = [mark.text for mark in scene.marks if isinstance(mark, scenes.Text) and mark.code]
    assert "".join(bits) == f"{0x52:08b}" and "0x52" in texts(scene)
    assert "2^(10 − 7) × (1 + 2/8) = 10" in texts(scene)
    assert "2^−6 × 1/8 = 0.001953125" in texts(NumberLine(0.001).scene())


def test_the_slider_stops_at_numbers_and_at_ties():
    line = NumberLine(10.0)
    assert line.drag.value == 0x52
    line.drag.value += 0.5
    assert line.value.value == "10.5" and line.reading().around.tie
    line.drag.value += 1e-9  # as browsers add up
    assert line.value.value == "10.5"
    line.value.value = "10.4"
    assert (line.drag.value, line.value.value) == (0x52 + 3 / 8, "10.4")
    line.drag.value += 1e-9
    assert line.value.value == "10.4"
    line.drag.value += 1 / 8
    line.drag.value = 126.5  # half a step beyond the last
    assert line.value.value == "464"
    line.drag.value = -1.0
    assert float(line.value.value) == -(2.0**-9)
    line.scale.value = "0.5"
    line.drag.value = 0x52
    assert line.value.value == "5" and line.reading().scaled == 10.0


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_point_is_chosen_by_its_key(format):
    line = NumberLine(11.4, format.name, 0.25)
    keys = line.scene().keys()
    points = [key for key in keys if key.startswith("point")]
    assert 5 <= len(points) <= 40
    for key in (points[0], points[-1]):
        line.drawing._hear(None, {"chosen": key}, None)
        assert line.reading().code == int(key.removeprefix("point "))
        assert line.reading().error == 0
        line.value.value = "11.4"
    line.drawing._hear(None, {"chosen": "format E5M2"}, None)
    assert line.format.value == "E5M2" and line.reading().format == named("E5M2")


@pytest.mark.parametrize(
    "control, value",
    [
        ("format", "E5M2"),
        ("case", "0.001"),
        ("value", "-7.7"),
        ("drag", 33.25),
        ("scale", "0.3"),
        ("power", -3),
    ],
)
def test_each_control_of_the_number_line_changes_the_picture(control, value):
    line = NumberLine()
    before = line.drawing.scene
    getattr(line, control).value = value
    assert line.drawing.scene != before and line.drawing.scene["alt"] != before["alt"]
    assert line.drawing.scene == line.scene().as_dict()


def test_the_two_ways_to_give_a_scale_agree():
    line = NumberLine()
    line.power.value = -6
    assert line.scale.value == "0.015625" and line.reading().scale == 2.0**-6
    line.scale.value = "2^3"
    assert line.power.value == 3 and line.reading().scale == 8.0
    line.scale.value = "0.0025"
    assert line.power.value == 3 and line.reading().scale == 0.0025


@pytest.mark.parametrize(
    "field, text, said",
    [
        ("value", "", "this is no number"),
        ("value", "eleven", "this is no number"),
        ("value", "1/0", "this is no number"),
        ("value", "2^9999", "this is no number"),
        ("scale", "0", "a scale is a positive number"),
        ("scale", "-1", "a scale is a positive number"),
        ("scale", "nan", "a scale is a positive number"),
        ("scale", "inf", "a scale is a positive number"),
        ("scale", "x", "this is no number"),
    ],
)
def test_what_is_no_number_is_refused_in_words(field, text, said):
    line = NumberLine()
    before = line.drawing.scene
    getattr(line, field).value = text
    assert said in line.message() and "still shows" in line.message()
    assert line.drawing.scene == before
    getattr(line, field).value = "2"
    assert line.message() == "" and line.drawing.scene != before


def test_a_very_large_or_small_number_is_shown():
    line = NumberLine()
    for value in ("1e308", "-1e308", "5e-324", "−∞", "3/8"):
        line.value.value = value
        assert line.message() == ""
        for power in (-16, 16):
            line.power.value = power
            still(line.scene())


@pytest.mark.parametrize(
    "value, said",
    [(11.4, "11.4"), (-0.0, "−0"), (2.0**-133, "9.184·10⁻⁴¹"), (math.inf, "∞"), (math.nan, "NaN")],
)
def test_numbers_of_the_line_are_written_out(value, said):
    assert written(value) == said and not re.search("e|-", written(value))
