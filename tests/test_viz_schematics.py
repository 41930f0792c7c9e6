"""Schematics: their numbers are computed, and nothing on them is cut or covered."""

import inspect
import itertools
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from dsv3 import viz
from dsv3.config import ModelConfig
from dsv3.costs import PLAIN, REPORT, Layout
from dsv3.costs.experts import EFFECTIVE_LINKS
from dsv3.fp8 import quantize_activation, quantize_weight
from dsv3.parallel.timeline import Durations
from dsv3.training.phases import phases_of
from dsv3.training.recipe import Recipe
from dsv3.training.step import StepValues
from dsv3.viz import cluster_schematics as cluster
from dsv3.viz import cut_schematics as cut
from dsv3.viz import drafting_schematics as drafting
from dsv3.viz import fp8_products_schematics as products
from dsv3.viz import fp8_schematics as fp8
from dsv3.viz import fp8_training_schematics as training
from dsv3.viz import layout_schematics as layouts
from dsv3.viz import mtp_schematics as mtp
from dsv3.viz import parallel_schematics as parallel
from dsv3.viz import pipeline_schematics as pipeline
from dsv3.viz import run_schematics as runs
from dsv3.viz import schematic
from dsv3.viz import shard_schematics as shard
from dsv3.viz import step_schematics as step
from dsv3.viz import training_schematics as windows
from dsv3.viz.scene import Circle, Line, Polygon, Rect, Scene, Text, still, text_width

MODULES = [
    fp8, products, training, mtp, drafting, parallel, cut, shard, cluster, pipeline, layouts,
    windows, step, runs,
]  # fmt: skip
# Other arguments that a chapter may give.
MORE = {
    "bits_of(0.3)": lambda: fp8.bits_of(0.3),
    "encode_by_hand(-15.9)": lambda: fp8.encode_by_hand(-15.9),
    "encode_by_hand(0.016)": lambda: fp8.encode_by_hand(0.016),
    "tiles_and_blocks(large)": lambda: products.tiles_and_blocks(8, 768, 700),
    "scales_in_product(other)": lambda: products.scales_in_product(3, 4, lit=0, k=0),
    "accumulation(14)": lambda: products.accumulation((300.0, 0.1), kept=14),
    "retiling(one)": lambda: training.retiling([0.5], (0, 3), (1.0, 0.9)),
    "outlier_block(small)": lambda: fp8.outlier_block([[1, 2, -0.5], [3, 1e5, 0.1]]),
    "draft_and_verify(rejected)": lambda: drafting.draft_and_verify(chosen=(" say",)),
    "draft_and_verify(2 of 3)": lambda: drafting.draft_and_verify(
        drafts=(" be", ",", " and"), chosen=(" be", ",", " that")
    ),
    "draft_and_verify(4, long)": lambda: drafting.draft_and_verify(
        ("word",) * 20, (" astonishing", "\n", "  ", "c"), (" astonishing", "d")
    ),
    "rejection_rule(other)": lambda: drafting.rejection_rule(
        (0.9, 0.02, 0.08, 0.0), (0.1, 0.3, 0.05, 0.55), ("a", "b", "c", "d")
    ),
    "busy_batch(other)": lambda: drafting.busy_batch((8, 64, 512, 16384)),
    "time_shift(leak)": lambda: mtp.time_shift(leak=True),
    "time_shift(10 tokens)": lambda: mtp.time_shift(tuple("abcdefghij"), at=8),
    "collectives(one)": lambda: parallel.collectives(("all-to-all",)),
    "data_parallel(2)": lambda: parallel.data_parallel((("a", "b"), ("c",)), ((1, 2), (3, -5))),
    "column_row_cut(other)": lambda: cut.column_row_cut(
        (-3, 2), ((1, 0, 0, -1), (9, 8, -7, 5)), ((1, 1), (0, 2), (3, 4), (-1, -2))
    ),
    "what_one_gpu_cannot_hold(report)": lambda: shard.what_one_gpu_cannot_hold(formats=REPORT),
    "zero_shards(2)": lambda: shard.zero_shards(2, REPORT),
    "dispatch_between_nodes(2 nodes)": lambda: cluster.dispatch_between_nodes(
        (32, 36, 40, 44, 48, 52, 56, 255), home=7
    ),
    "two_networks(4 : 1)": lambda: cluster.two_networks(EFFECTIVE_LINKS),
    "experts_for_free(4 : 1)": lambda: cluster.experts_for_free(links=EFFECTIVE_LINKS),
    "pipeline_cut(2, 1)": lambda: pipeline.pipeline_cut(2, 1),
    "pipeline_cut(3, 3)": lambda: pipeline.pipeline_cut(3, 3, Durations(1, 1.5, 0.5)),
    "stage_placement(2)": lambda: pipeline.stage_placement(2, ("ZB1P", "DualPipeV")),
    "layout_2048(small)": lambda: layouts.layout_2048(Layout(4, 32, 16), home=0),
    "layout_2048(ZeRO-3)": lambda: layouts.layout_2048(Layout(12, 128, 128, zero=3), home=15),
    "packing(other)": lambda: windows.packing(
        (("BOS", "a", "b", "EOS"), ("BOS", "c", "EOS"), ("BOS", "d", "e", "EOS")), 4, at=1
    ),
    "one_step(ours)": lambda: windows.one_step(StepValues(learning_rate=0.0025, mtp_weight=0.1)),
    "adamw_state(plain)": lambda: step.adamw_state(PLAIN, ModelConfig.mini()),
    "clipping(three)": lambda: step.clipping(
        {"first": (-1, 2), "second": (0.125, 0.5), "third": (-0.5, -2)}, bound=1.5
    ),
    "bias_rule(one takes all)": lambda: step.bias_rule((120, 0, 0), (0.01, -0.0104, 0), 0.002),
    "two_phases(ours)": lambda: runs.two_phases(
        runs.stretches(phases_of(ModelConfig.mini(), Recipe()))
    ),
    "resume(a run)": lambda: runs.resume([8.1 - 0.2 * step for step in range(12)]),
    "resume(early)": lambda: runs.resume((3.0, 2.5, 2.75, 2.0), saved=1, killed=2),
    "prefill_decode(one)": lambda: layouts.prefill_decode(layouts.DEPLOYMENTS[2:]),
}


def pictures() -> list[tuple[str, object]]:
    """Every schematic with what it draws unasked, if anything, and the cases of ``MORE``."""
    found = {
        f"{name}()": draw
        for module in MODULES
        for name, draw in inspect.getmembers(module, inspect.isfunction)
        if inspect.signature(draw).return_annotation == "Scene"
        and draw.__module__ == module.__name__
        and not name.startswith("_")
        and all(p.default is not p.empty for p in inspect.signature(draw).parameters.values())
    }
    return list((found | MORE).items())


@pytest.fixture(scope="module", params=pictures(), ids=lambda case: case[0])
def scene(request) -> Scene:
    return request.param[1]()


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, Text)]


def edges(mark) -> tuple[float, float, float, float]:
    """Left, top, right, bottom; of a text, of its small letters and digits."""
    if isinstance(mark, Rect):
        return mark.x, mark.y, mark.x + mark.width, mark.y + mark.height
    if isinstance(mark, Circle):
        r = mark.radius
        return mark.x - r, mark.y - r, mark.x + r, mark.y + r
    if isinstance(mark, (Line, Polygon)):
        xs, ys = zip(*mark.points)
        return min(xs), min(ys), max(xs), max(ys)
    width = text_width(mark.text, mark.size, bold=mark.bold, code=mark.code)
    left = mark.x - {"start": 0, "middle": width / 2, "end": width}[mark.anchor]
    return left, mark.y - 0.42 * mark.size, left + width, mark.y + 0.42 * mark.size


def test_nothing_lies_outside_the_page(scene):
    assert scene.width <= 760
    for mark in scene.marks:
        left, top, right, bottom = edges(mark)
        assert left >= -2 and top >= -2, mark
        assert right <= scene.width + 2 and bottom <= scene.height + 2, mark


def test_no_text_lies_on_another_and_none_is_tiny(scene):
    written = [mark for mark in scene.marks if isinstance(mark, Text)]
    assert min(mark.size for mark in written) >= 11
    places = [(mark, edges(mark)) for mark in written]
    for (one, a), (other, b) in itertools.combinations(places, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{one.text!r} on {other.text!r}"


def _crosses(start, end, area) -> bool:
    """Whether a segment enters the area (Liang and Barsky)."""
    enter, leave = 0.0, 1.0
    for axis in (0, 1):
        step = end[axis] - start[axis]
        for bound, sign in ((area[axis], -1), (area[axis + 2], 1)):
            room = sign * (bound - start[axis])
            if step == 0:
                if room < 0:
                    return False
            elif sign * step < 0:
                enter = max(enter, room / (sign * step))
            else:
                leave = min(leave, room / (sign * step))
    return enter < leave


def test_no_line_runs_through_a_text(scene):
    """Unless a surface lies between them, as in a sign on an arrow's circle."""
    lines = [(place, mark) for place, mark in enumerate(scene.marks) if isinstance(mark, Line)]
    for above, text in enumerate(scene.marks):
        if not isinstance(text, Text):
            continue
        left, top, right, bottom = edges(text)
        for place, line in lines:
            for start, end in itertools.pairwise(line.points):
                if not _crosses(start, end, (left + 1, top + 1, right - 1, bottom - 1)):
                    continue
                hidden = any(
                    isinstance(mark, (Rect, Circle)) and mark.fill and not mark.opacity
                    for mark in scene.marks[place:above]
                    if (box := edges(mark))[0] <= left and box[2] >= right
                )
                assert hidden, f"a line through {text.text!r}"


def test_a_text_stays_in_its_box(scene):
    boxes = [mark for mark in scene.marks if isinstance(mark, Rect)]
    for text in (mark for mark in scene.marks if isinstance(mark, Text)):
        left, _, right, _ = edges(text)
        around = [
            box
            for box in boxes
            if box.x < text.x < box.x + box.width and box.y < text.y < box.y + box.height
        ]
        for box in around if text.anchor == "middle" else []:
            assert left >= box.x - 0.5 and right <= box.x + box.width + 0.5, text.text


def test_the_picture_says_what_it_shows(scene):
    assert len(scene.alt.split()) >= 8 and scene.alt.endswith(".")
    shown = viz.draw(scene)
    assert shown.data.startswith(b"\x89PNG") and shown.alt == scene.alt


# Parts ------------------------------------------------------------------------------------------


def test_width_of_a_text_is_that_of_the_still_picture():
    page = Scene(400, 40, "Some letters on a page.")
    page.text(0, 20, "exponent 1/512 − Σ", size=13, bold=True)
    figure = still(page)
    drawn = figure.axes[0].texts[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert text_width("exponent 1/512 − Σ", 13, bold=True) == pytest.approx(
        drawn.width / figure.dpi * 80, rel=0.05
    )


def test_an_arrow_ends_in_a_head_and_bad_ones_are_refused():
    page = Scene(100, 100, "An arrow.")
    schematic.arrow(page, (0, 50), (80, 50), label="x (b, s, d)")
    line, head, label = page.marks
    assert line.points == ((0, 50), (72, 50)) and head.points[0] == (80, 50)
    assert label.y < 50 and label.text == "x (b, s, d)"
    with pytest.raises(ValueError, match="two points"):
        schematic.arrow(page, (0, 0))
    with pytest.raises(ValueError, match="no such side"):
        schematic.arrow(page, (0, 0), (9, 9), label="x", side="inside")


def test_surfaces_reach_the_browser_with_corners_and_opacity():
    page = Scene(50, 50, "A surface.")
    page.polygon((0, 0), (9.123, 0), (0, 9), fill="blue", opacity=0.25)
    assert page.as_dict()["marks"] == [
        {
            "kind": "polygon",
            "fill": "blue",
            "opacity": 0.25,
            "stroke_width": 1.0,
            "points": [[0, 0], [9.12, 0], [0, 9]],
        }
    ]
    surface = still(page).axes[0].patches[0]
    assert len(surface.get_xy()) == 4 and surface.get_facecolor()[3] == 0.25
    drawn = (Path(viz.__file__).parent / "widgets" / "drawing.js").read_text()
    assert 'kind === "polygon"' in drawn and "fillOpacity = mark.opacity" in drawn


def test_numbers_are_written_for_people():
    assert [schematic.number(v) for v in (458752.0, -0.25, 1e-5, 0.0, float("nan"))] == [
        "458,752",
        "−0.25",
        "0.0000100",
        "0",
        "NaN",
    ]
    assert schematic.power(-9) == "2⁻⁹"


# Chapter 4 --------------------------------------------------------------------------------------


def test_the_bits_are_those_of_the_formats():
    """Read off the picture and decoded by the definition of each format."""
    scene = fp8.bits_of(11.4)
    bits = [mark for mark in scene.marks if isinstance(mark, Text) and mark.text in ("0", "1")]
    rows = {}
    for mark in (mark for mark in bits if mark.code):
        rows[mark.y] = rows.get(mark.y, "") + mark.text
    brain, e5m6, e5m2, e4m3, scale = rows.values()
    for word, exponent, bias, near in (
        (brain, 8, 127, 11.375),
        (e5m6, 5, 15, 11.375),
        (e5m2, 5, 15, 12),
        (e4m3, 4, 7, 11),
    ):
        power, fraction = int(word[1 : 1 + exponent], 2), word[1 + exponent :]
        assert 2 ** (power - bias) * (1 + int(fraction, 2) / 2 ** len(fraction)) == near
    assert 2 ** (int(scale, 2) - 127) == 16
    for words in ("11.375", "12", "11", "16", "128", "64", "4", "8", "65,024", "57,344", "448"):
        assert words in texts(scene)
    with pytest.raises(ValueError, match="448"):
        fp8.bits_of(500)


def test_the_table_of_codes_is_torchs():
    shown = texts(fp8.e4m3_codes())
    values = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = values[~values.isnan()].tolist()
    read = {float(Fraction(text)) for text in shown if re.fullmatch(r"[\d./]+", text)}
    assert set(finite) <= read and "NaN" in shown
    assert any("253 numbers" in text for text in shown)


@pytest.mark.parametrize("value", [11.4, -0.3, 15.9, 0.016, 440])
def test_encoding_by_hand_ends_in_torchs_code(value):
    shown = texts(fp8.encode_by_hand(value))
    code = torch.tensor(value).to(torch.float8_e4m3fn)
    assert f"= 0x{int(code.view(torch.uint8)):02X}" in shown
    assert schematic.number(float(code), 4) in shown
    with pytest.raises(ValueError, match="448"):
        fp8.encode_by_hand(1000)


def test_the_outlier_hurts_its_own_row_only():
    scene = fp8.outlier_block()
    wrong = [mark for mark in scene.marks if isinstance(mark, Rect) and mark.fill == "vermillion"]
    assert len(wrong) == 11 + 2 + 1  # one is the legend's
    assert len({mark.y for mark in wrong[11:13]}) == 1
    x, scale = torch.tensor(fp8.OUTLIER, dtype=torch.float32), 458752 / 448
    back = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert int(((back - x).abs() > x / 16).sum()) == 11
    with pytest.raises(ValueError, match="rows"):
        fp8.outlier_block([1, 2])


def test_blocks_and_tiles_are_counted_as_quantised_tensors_have_them():
    scene = products.tiles_and_blocks(tokens=3, channels=300, rows=576)
    x, w = quantize_activation(torch.ones(3, 300)), quantize_weight(torch.ones(576, 300))
    for tensor in (x, w):
        assert " × ".join(map(str, tensor.scale.shape)) + " scales" in texts(scene)
    assert any("64 of 128 rows" in text for text in texts(scene))
    with pytest.raises(ValueError, match="tokens"):
        products.tiles_and_blocks(tokens=9)


def test_the_scales_that_meet_share_the_block_of_k_and_the_output_block():
    scene = products.scales_in_product(blocks=4, out_blocks=3, lit=1, k=2)
    assert {"sx[m, 2]", "sw[1, 2]", "sx[m, 2] · sw[1, 2]"} <= set(texts(scene))
    place = {mark.text: mark for mark in scene.marks if isinstance(mark, Text)}
    assert place["sw[1, 2]"].x == place["y"].x and place["sx[m, 2]"].y == place["y"].y
    assert all(place[text].bold for text in ("sw[1, 2]", "sx[m, 2]", "y"))  # and lit
    with pytest.raises(ValueError, match="block from 0 to 3"):
        products.scales_in_product(k=4)


def test_what_is_kept_of_aligned_products_is_a_floor():
    shown = texts(products.accumulation((448.0, 60.0, 9.5, 3.25, 0.8125), kept=8))
    step = 2**8 / 2**7  # the largest begins at 2^8; the eighth bit is worth 2
    kept = [p // step * step for p in (448.0, 60.0, 9.5, 3.25, 0.8125)]
    assert schematic.number(sum(kept)) in shown and "521.5625" in shown
    with pytest.raises(ValueError, match="products"):
        products.accumulation((1.0,))


def test_the_summed_axis_has_the_same_size_in_both_operands():
    shown = texts(training.training_products(256, 384, 512))
    shapes = [
        tuple(map(int, t[1:-1].split(","))) for t in shown if re.fullmatch(r"\(\d+, \d+\)", t)
    ]
    for one, two, result in (shapes[:3], shapes[3:6], shapes[6:]):
        assert one[1] == two[0] and result == (one[0], two[1])
    assert shapes[8] == (512, 384)  # of dW as of W
    with pytest.raises(ValueError, match="128"):
        training.training_products(tokens=64)


def test_new_power_of_two_scales_keep_every_mantissa():
    scene = training.retiling()
    shown = texts(scene)
    assert shown.count("0") >= 3 and sum("%" in text for text in shown) == 3
    assert "powers of two the exponent bits move, the mantissa bits stay and 0 values" in scene.alt
    with pytest.raises(ValueError, match="448"):
        training.retiling([400.0])
