"""Chapter 6's widget without a browser: what a log says, what is drawn of it, its controls."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dsv3.errors import DSV3Error
from dsv3.training import read_log
from dsv3.training.log import LOG_FILE, RunLog, Stretch
from dsv3.training.samples import Sample, read_samples, save_samples
from dsv3.viz import scene as scenes
from dsv3.viz.run_scene import BATCH, LEFT, LOSSES, RIGHT, run_scene
from dsv3.viz.scene import COLOURS, Scene, still
from dsv3.viz.widgets import TrainingRun
from dsv3.viz.written import wrapped

SHIPPED = Path(__file__).parents[1] / "assets" / "dsv3-mini"
LINES = [json.loads(line) for line in (SHIPPED / LOG_FILE).read_text().splitlines()]
LAST, ROUTER = LINES[-1]["step"], "layers.3.ffn.gate"
SAMPLES = [
    Sample(step=step, tokens=8192 * step, prompt=prompt, text=f"{text} of {step}")
    for step in (1600, 400, 2800)
    for prompt, text in (("def f(x):\n", "    return x"), ("1 + 1 =", " 2"))
]


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, scenes.Text)]


def line_at(step: int, name: str = "loss") -> dict:
    """The last line of the file up to a step that has a field."""
    return [line for line in LINES if line["step"] <= step and name in line][-1]


def curves(scene: Scene, colour: str, top: float, height: float) -> list[tuple]:
    """Points of the curves of a colour within a band of the picture."""
    return [
        mark.points
        for mark in scene.marks
        if isinstance(mark, scenes.Line) and mark.stroke == colour and not mark.dashed
        and len(mark.points) > 2 and all(top <= y <= top + height for _, y in mark.points)
    ]  # fmt: skip


def bars(scene: Scene) -> list[str]:
    return [label for label in scene.labels() if label.startswith("expert ")]


# The log ----------------------------------------------------------------------------------------


def test_a_log_is_read_by_kinds_of_lines(tmp_path):
    log = read_log(SHIPPED)
    assert [line for line in LINES if "loss" in line] == list(log.steps)
    assert [line for line in LINES if "held_out" in line] == list(log.held_out)
    assert list(log.moments) == sorted({line["step"] for line in LINES})
    assert log.domains == ("plays", "code", "arithmetic") and ROUTER in log.routers
    assert log.step_at(1206)["step"] == 1200 and log.step_at(LAST)["step"] == 3540
    assert log.held_out_at(399) is None and log.held_out_at(400)["step"] == 400
    assert log.held_out_at(3199)["step"] == 2800


def test_the_windows_grow_where_the_recipe_says():
    """26 million tokens of 8,192 a step, then windows of 1,024: after step 3,174."""
    assert read_log(SHIPPED).stretches == (Stretch(0, 10, 256), Stretch(3170, 3180, 1024))
    assert 3170 < math.ceil(26_000_000 / 8192) <= 3180
    lengths = {line["seq_len"] for line in LINES if "held_out" in line}
    assert lengths == {each.seq_len for each in read_log(SHIPPED).stretches}


def test_a_batch_that_grows_is_no_longer_window():
    step, tokens, lines = 0, 0, []
    for step in range(1, 31):
        windows = 2 + 2 * step // 10
        tokens += 64 * windows
        if step % 5 == 0:
            lines.append({"step": step, "tokens": tokens, "windows": windows})
    assert RunLog(tuple(lines), ()).stretches[1:] == ()


def test_what_is_no_log_is_refused(tmp_path):
    file = tmp_path / LOG_FILE
    whole = json.dumps(LINES[0]) + "\n"
    file.write_text(whole + json.dumps(LINES[1])[:99])  # killed while it wrote
    assert len(read_log(tmp_path).steps) == 1
    for bad in ("{}", "[1]", "7", '{"step": 3', '{"step": 3, "tokens": 9, "loss": 2.0}', ""):
        file.write_text(whole + bad + "\n")
        with pytest.raises(DSV3Error, match="line 2"):
            read_log(tmp_path)
    file.write_text('{"step": 3, "tokens": 9}\n')
    with pytest.raises(DSV3Error, match="no step is logged yet"):
        read_log(file)
    with pytest.raises(DSV3Error, match="no such file"):
        read_log(tmp_path / "elsewhere.jsonl")


# The picture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [10, 400, 1230, 3180, LAST])
def test_the_numbers_are_the_logs(step):
    scene = run_scene(read_log(SHIPPED), step, router=ROUTER)
    line, shown = line_at(step), texts(scene)
    assert shown[0].startswith(f"Step {step:,} of {LAST:,}, {line['tokens'] / 1e6:.1f} million")\
        or line["tokens"] < 1e5  # fmt: skip
    assert shown[0].endswith(f"loss {line['loss']:.3f}, MTP loss {line['mtp_loss']:.3f}")
    if step >= 400:
        looked = line_at(step, "held_out")
        for domain, figures in looked["held_out"].items():
            assert f"{domain} {figures['loss']:.3f}" in shown
            assert f"{domain} {figures['loss']:.3f}" in scene.alt
        assert f"at step {looked['step']:,}:" in shown[1]
    else:
        assert "No look at held-out text yet" in shown[1] and "plays" in shown
    for words in (
        f"{line['lr']:.2g}".replace("e-0", "e-"),
        f"{line['mtp_weight']:g}",
        f"{line['bias_speed']:g}",
        f"{line['windows']} × {256 if step < 3180 else '1,024'} tokens",
        f"{line['max_violation'][ROUTER]:.2f}",
    ):
        assert words in shown, words
    load = line["load"][ROUTER]
    assert bars(scene) == [
        f"expert {expert}: {tokens:,} tokens, {tokens * 16 / sum(load):.2f} times the mean"
        for expert, tokens in enumerate(load)
    ]
    assert f"MaxVio {line['max_violation'][ROUTER]:.2f}" in scene.alt
    still(scene)


def test_loads_of_a_domain_are_those_of_the_last_look():
    log = read_log(SHIPPED)
    for step, look in ((2000, 2000), (2390, 2000), (LAST, LAST)):
        scene = run_scene(log, step, router=ROUTER, load_of="code")
        load = line_at(step, "held_out")["load_by_domain"]["code"][ROUTER]
        assert line_at(step, "held_out")["step"] == look
        assert [f"{tokens:,} tokens" in label for tokens, label in zip(load, bars(scene))] == 16 * [
            True
        ]
        violation = max(load) * 16 / sum(load) - 1
        assert f"layer 3, held-out code: MaxVio {violation:.2f}" in scene.alt
        red = [m for m in scene.marks if isinstance(m, scenes.Rect) and m.fill == "vermillion"]
        assert len(red) == 1
    early = run_scene(log, 390, router=ROUTER, load_of="code")
    assert bars(early) == [] and "no loads were logged up to here" in texts(early)[-1]


def test_the_curves_go_through_the_logs_values():
    """In one scale, told by the labels of their axis; what comes after the moment is grey."""
    log, (top, height) = read_log(SHIPPED), LOSSES
    scene = run_scene(log, 2000, router=ROUTER)
    axis = {
        float(mark.text): mark.y
        for mark in scene.marks
        if isinstance(mark, scenes.Text) and mark.x == LEFT - 9 and mark.text.isdigit()
    }
    assert axis[0] - axis[8] == pytest.approx(height)

    def expected(step, value):
        return LEFT + (RIGHT - LEFT) * step / LAST, axis[0] - (axis[0] - axis[8]) * value / 8

    (blue,) = curves(scene, "blue", top, height)
    (orange,) = curves(scene, "orange", top, height)
    looks = [line for line in LINES if "held_out" in line]
    for points, values in (
        (blue, {line["step"]: line["loss"] for line in LINES if "loss" in line}),
        (orange, {at["step"]: at["held_out"]["plays"]["loss"] for at in looks}),
    ):
        every = {round(expected(s, v)[0], 3): expected(s, v)[1] for s, v in values.items()}
        assert points[-1][0] == pytest.approx(expected(2000, 0)[0])
        for x, y in points:
            assert y == pytest.approx(every[round(x, 3)])
    assert len(orange) == 5 and 100 > len(blue) > 50
    grey = curves(scene, "line", top, height)
    assert len(grey) == 5 and all(points[0][0] <= blue[-1][0] < points[-1][0] for points in grey)


def test_schedules_that_hold_are_drawn_with_corners():
    scene = run_scene(read_log(SHIPPED), LAST, router=ROUTER)
    gamma = next(
        mark.points
        for mark in scene.marks
        if isinstance(mark, scenes.Line) and mark.stroke == "blue" and len(mark.points) == 4
        and mark.points[-1][0] > RIGHT - 1 and mark.points[2][0] > LEFT + 0.8 * (RIGHT - LEFT)
        and mark.points[0][1] - mark.points[-1][1] == pytest.approx(-18)
    )  # fmt: skip
    zero = next(line["step"] for line in LINES if line.get("bias_speed") == 0)
    x = LEFT + (RIGHT - LEFT) * (zero - 10) / LAST  # it changed after the line before
    assert gamma[1][0] == gamma[2][0] == pytest.approx(x)


def test_the_moment_and_the_new_windows_have_their_lines():
    log = read_log(SHIPPED)
    for step in (10, 3180):
        scene = run_scene(log, step, router=ROUTER)
        lines = [m for m in scene.marks if isinstance(m, scenes.Line) and len(m.points) == 2]
        upright = [(m.stroke, m.points[0][0]) for m in lines if m.points[0][0] == m.points[1][0]]
        x = LEFT + (RIGHT - LEFT) * step / LAST
        change = LEFT + (RIGHT - LEFT) * 3175 / LAST
        assert upright == 2 * [("soft", change)] + 2 * [("ink", x)]
        assert "windows of 256 → 1,024 tokens" in texts(scene)
        assert "Between steps 3,170 and 3,180 the windows grow from 256 to 1,024" in scene.alt


def variant(**changes) -> RunLog:
    """The shipped log with fields of its steps changed; None takes one out."""
    steps = tuple(
        {k: v for k, v in (line | changes).items() if v is not None}
        for line in LINES[:40]
        if "loss" in line
    )
    return RunLog(steps, ())


def test_poorer_logs_are_drawn_too():
    """No MTP, no router, no look at held-out text, one line, values that are no numbers."""
    scene = run_scene(variant(mtp_loss=None, load={}, max_violation={}), 100)
    assert "MTP loss" not in scene.alt and "MaxVio" not in scene.alt and bars(scene) == []
    still(scene)
    one = RunLog(read_log(SHIPPED).steps[:1], ())
    still(run_scene(one, 10, router=ROUTER))
    broken = variant()
    for line in broken.steps[20:]:
        line["loss"] = line["grad_norm"] = math.nan
    scene = run_scene(broken, 300, router=ROUTER)
    assert "loss nan" in scene.alt
    points = [p for m in scene.marks if isinstance(m, scenes.Line) for p in m.points]
    assert all(math.isfinite(x) and math.isfinite(y) for x, y in points)
    still(scene)
    widget = TrainingRun(variant(load={}, max_violation={}))
    assert widget.router.value is None and widget.router not in widget.children[0].children


def test_a_long_log_is_drawn_with_few_points_and_its_own_moment():
    steps = tuple(
        {"step": 1 + at, "tokens": 64 * (1 + at), "windows": 1, "lr": 0.1, "loss": 2 + at % 7}
        for at in range(20_000)
    )
    log = RunLog(steps, ())
    scene = run_scene(log, 12_346)
    assert f"loss {2 + 12_345 % 7:.3f}" in texts(scene)[0]
    assert len(json.dumps(scene.as_dict())) < 60_000
    assert len(scene.keys()) == 60


# What was written -------------------------------------------------------------------------------


def test_the_newest_text_up_to_the_moment_is_shown():
    widget = TrainingRun(SHIPPED, SAMPLES, step=10)
    widget.prompt.value = "1 + 1 ="
    for step, shown in ((10, None), (400, 400), (1590, 400), (1600, 1600), (LAST, 2800)):
        widget.step.value = step
        said = texts(widget.scene())
        if shown is None:
            assert "No text yet: the first is of step 400." in said
        else:
            tokens = f"{8192 * shown / 1e6:.1f} million tokens"
            assert f"Written at step {shown:,} ({tokens})" in said
            assert said[-2:] == ["1 + 1 =", f" 2 of {shown}"]
            assert f"1 + 1 = 2 of {shown}" in widget.alt
    widget.prompt.value = "def f(x):\n"
    assert texts(widget.scene())[-2:] == ["def f(x):", "    return x of 2800"]
    still(widget.scene())


def test_texts_are_cut_into_lines():
    rows = wrapped("one two", " three four\n\n\tfive", 10)
    assert rows == [("one two", ""), ("", "three four"), ("", ""), ("", "    five")]
    assert wrapped("ab", "c" * 7, 4) == [("ab", "cc"), ("", "cccc"), ("", "c")]
    assert wrapped("", "a\x1b\rb\ufffd", 9) == [("", "a▯▯b\ufffd")]
    assert wrapped("a\nb", "", 9) == [("a", ""), ("b", "")]
    prompt, text = "x = [1, 2,\n", "    3]  # and more words than a line has room for\n" * 3
    rows = wrapped(prompt, text, 16)
    assert all(len(given + written) <= 16 for given, written in rows)
    assert "".join("".join(given + written for given, written in rows).split()) == "".join(
        (prompt + text).split()
    )
    long = Sample(step=10, tokens=9, prompt="p", text="word " * 2000)
    assert texts(run_scene(read_log(SHIPPED), 20, router=ROUTER, samples=[long]))[-1] == "…"


def test_samples_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "new" / "samples.json"
    save_samples(file, SAMPLES)
    assert read_samples(file) == sorted(SAMPLES, key=lambda sample: sample.step)
    assert TrainingRun(SHIPPED, file).alt == TrainingRun(SHIPPED, SAMPLES).alt
    for bad in ('{"step": 1}', '[{"step": 1}]', "[3]", '[{"step": "1", "tokens": 1}]', "{}"):
        file.write_text(bad)
        with pytest.raises(DSV3Error, match="not samples of a training run"):
            read_samples(file)


# The widget -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control, value",
    [
        ("step", 1230),
        ("router", "mtp.0.ffn.gate"),
        ("load_of", "arithmetic"),
        ("prompt", "1 + 1 ="),
    ],
)
def test_each_control_changes_the_picture(control, value):
    widget = TrainingRun(SHIPPED, SAMPLES)
    before = widget.drawing.scene
    getattr(widget, control).value = value
    assert widget.drawing.scene != before and widget.message() == ""
    assert widget.drawing.scene == widget.scene().as_dict()


def test_a_place_in_the_curves_is_chosen():
    widget = TrainingRun(SHIPPED, step=1203)
    assert widget.step.value == 1200
    keys = widget.scene().keys()
    steps = [int(key.removeprefix("step ")) for key in keys]
    assert steps[0] == 10 and steps[-1] == LAST and len(steps) == 60 and steps == sorted(steps)
    widget.drawing._hear(None, {"chosen": f"step {steps[7]}"}, None)
    assert widget.step.value == steps[7]
    chosen = [mark.key for mark in widget.scene().marks if mark.chosen]
    assert chosen == [f"step {steps[7]}"]
    for junk in ({"chosen": "step 11"}, {"chosen": 3}, {}, "step 10"):
        widget.drawing._hear(None, junk, None)
    assert widget.step.value == steps[7]


def test_a_domain_before_the_first_look_is_said():
    widget = TrainingRun(SHIPPED, step=390, load_of="plays")
    assert "first look at held-out text was at step 400" in widget.message()
    widget.step.value = 400
    assert widget.message() == ""


@pytest.mark.parametrize("option", [{"router": "layers.9.ffn.gate"}, {"load_of": "poems"}])
def test_what_the_log_has_not_is_refused(option):
    with pytest.raises(DSV3Error, match="not in this log"):
        TrainingRun(SHIPPED, **option)


def test_the_stored_picture_is_small():
    text = "What news, my lord? The king is come to town,\nand with him all the court.\n" * 12
    long = [Sample(step=9, tokens=9, prompt="SCENE I. Verona.\n\n", text=text)]
    for widget in (TrainingRun(SHIPPED), TrainingRun(SHIPPED, long, load_of="code")):
        data, metadata = widget._repr_mimebundle_()
        assert len(data["image/png"]) * 3 / 4 < 100_000
        assert metadata["image/png"]["alt"].startswith("Training run. Step 3,541 of 3,541")


def test_the_default_text_of_loads_is_the_batch():
    assert TrainingRun("dsv3-mini").load_of.value == BATCH
    assert {mark.fill for mark in TrainingRun(SHIPPED).scene().marks} - {None} <= set(COLOURS)


# The run that comes with samples -----------------------------------------------------------------


def test_the_second_run_has_samples_of_its_own_steps():
    """What is shown beside a step was written at a checkpoint of the same run, not after it."""
    run = SHIPPED.parent / "second-run"
    log, samples = read_log(run), read_samples(run / "samples.json")
    steps = sorted({sample.step for sample in samples})
    assert len(steps) >= 10 and steps[-1] <= log.moments[-1]
    tokens = {line["step"]: line["tokens"] for line in log.steps}
    for sample in samples:
        assert tokens.get(sample.step, sample.tokens) == sample.tokens
        assert len([other for other in samples if other.step == sample.step]) == 4
    for at in (40, steps[-1]):
        newest = max(step for step in steps if step <= at)
        (sample,) = (s for s in samples if s.step == newest and s.prompt == samples[0].prompt)
        shown = " ".join(texts(run_scene(log, at, samples=[sample])))
        assert f"Written at step {newest}" in shown and sample.text.split()[0] in shown
