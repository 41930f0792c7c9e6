"""Pictures of chapter 6: numbers on them are those of schedules, costs, logs and results.

That nothing on a schematic is cut or covered is held in ``test_viz_schematics``; here the same is
held for the figures.
"""

import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text as Letters
from torch import nn

from dsv3 import viz
from dsv3.config import ModelConfig
from dsv3.costs import PLAIN, REPORT, TOKENS_PER_STEP, parameter_count
from dsv3.training import RunLog, read_log
from dsv3.training.balance import max_violation
from dsv3.training.experiments import Results
from dsv3.training.experiments.gradients import GradientError, Harm
from dsv3.training.optimizer import AdamW, make_optimizer
from dsv3.training.phases import phases_of
from dsv3.training.recipe import Recipe
from dsv3.training.schedules import Schedules
from dsv3.training.step import StepValues
from dsv3.viz import compared, run_schematics, step_schematics, training_schematics
from dsv3.viz import training_figures as figures
from dsv3.viz.scene import Circle, Line, Rect, Text

ROUTERS = ("layers.1.ffn.gate", "layers.2.ffn.gate", "mtp.0.ffn.gate")
LOG = Path(__file__).parents[1] / "assets" / "dsv3-mini" / "log.jsonl"


LINES = [json.loads(line) for line in LOG.read_text().splitlines()]


@pytest.fixture(scope="module")
def log() -> RunLog:
    return read_log(LOG)


def results(arms=("plain", "other arm", "a third"), experts=(16, 16, 32), seeds=3) -> Results:
    """Made up: arm a loses 0.02 a more than the first, seeds scatter by much more."""
    runs = []
    for place, (arm, count) in enumerate(zip(arms, experts)):
        for seed in range(1, seeds + 1):
            common, own = np.random.default_rng(seed), np.random.default_rng([seed, place])
            loss = 3 + 0.1 * common.standard_normal() + 0.02 * place
            noise = 0.05 * common.standard_normal(30)
            load = {
                domain: {
                    name: own.integers(1, 900, count).tolist()
                    for name in ROUTERS[: 3 * (count > 0)]
                }
                for domain in ("plays", "code", "arithmetic")
            }
            runs.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "loss": loss,
                    "load_by_domain": load,
                    "curve": [
                        (30_000 * (k + 1), loss + 4 * math.exp(-k / 4) + float(noise[k]))
                        for k in range(30)
                    ],
                }
            )
    return Results({"base": arms[0], "tokens": 900_000, "runs": runs})


def grid(found) -> dict[int, dict[float, float]]:
    return {
        length: {depth: found(length) for depth in (0.1, 0.5, 0.9)} for length in (64, 256, 512)
    }


def texts(scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, Text)]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Letters)]


def product_errors(worst: int = 29) -> list[GradientError]:
    """Made up: with blocks a token's error is twice that with tiles, in one place 9.5 times."""
    attention = [f"attn.{name}" for name in ("wq_a", "wq_b", "wkv_a", "wkv_b", "wo")]
    dense = [f"ffn.{name}" for name in ("w1", "w3", "w2")]
    shared = [f"ffn.shared_experts.{name}" for name in ("w1", "w3", "w2")]
    moe = [*attention, "ffn.experts.w13", "ffn.experts.w2", *shared]
    layers = {"layers.0": attention + dense, "layers.1": moe, "layers.2": moe, "mtp.0": moe}
    names = [f"{layer}.{name}" for layer, some in layers.items() for name in some]
    return [
        GradientError(
            name=name,
            tokens=100,
            tile=Harm(whole=0.02, token=0.02),
            block=Harm(whole=0.02, token=0.02 * (9.5 if place == worst else 2)),
            spread=100.0 * 3 ** (place % 5),
        )
        for place, name in enumerate(names)
    ]


DRAWN = {
    "schedules": lambda log: figures.schedules_figure(),
    "schedules, ours": lambda log: figures.schedules_figure(Recipe().schedules, 256),
    "run": figures.run_figure,
    "loads": lambda log: figures.loads_figure(log, "layers.3.ffn.gate"),
    "norms": figures.grad_norm_figure,
    "retrieval": lambda log: figures.retrieval_figure(
        grid(lambda n: float(n < 300)), grid(lambda n: 1 - n / 5000), 256
    ),
    "compared": lambda log: compared.compared(results()),
    "compared, four": lambda log: compared.compared(
        results(("MLA", "MHA", "GQA", "MQA"), (16, 16, 16, 16))
    ),
    "compared, two": lambda log: compared.compared(results(("bf16", "fp8"), (16, 16), 5)),
    "compared, alike": lambda log: compared.compared(results(seeds=1), lambda run: 1.0, "ones"),
    "tiles, blocks": lambda log: compared.tiles_against_blocks(product_errors()),
    "tiles, blocks, worst first": lambda log: compared.tiles_against_blocks(product_errors(0)),
    "curves": lambda log: compared.curves(results()),
    "domains": lambda log: compared.loads_by_domain(results()),
    "domains, some dense": lambda log: compared.loads_by_domain(
        results(("experts", "dense, as active", "dense, as large"), (16, 0, 0))
    ),
}


def written(figure: Figure) -> list[tuple[str, object]]:
    """Every text that is drawn, with the page that it takes. Labels of ticks that lie outside of
    their axes exist and are not drawn."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    outside = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    outside |= {tick.label1, tick.label2}
    return [
        (text.get_text(), text.get_window_extent(canvas.get_renderer()))
        for text in figure.findobj(Letters)
        if text.get_visible() and text.get_text().strip() and text not in outside
    ]


@pytest.mark.parametrize("name", DRAWN)
def test_words_on_figures_are_whole_and_apart(log, name):
    figure = DRAWN[name](log)
    assert len(viz.show(figure, alt="a figure").data) < 60_000
    page, places = figure.bbox, written(figure)
    for said, box in places:
        assert box.x0 >= page.x0 - 1 and box.x1 <= page.x1 + 1, said
        assert box.y0 >= page.y0 - 1 and box.y1 <= page.y1 + 1, said
    for (one, a), (other, b) in itertools.combinations(places, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
        assert apart, f"{one!r} on {other!r}"


# Schematics -------------------------------------------------------------------------------------


def test_a_window_is_asked_for_what_follows():
    """Rows read off the page, against the documents end to end."""
    stream = [word for document in training_schematics.DOCUMENTS for word in document]
    scene = training_schematics.packing(length=7, at=1)
    rows: dict[float, list[tuple[float, str]]] = {}
    for mark in scene.marks:
        if isinstance(mark, Text) and mark.anchor == "middle":
            rows.setdefault(mark.y, []).append((mark.x, mark.text))
    read = [[word for _, word in sorted(row)] for row in rows.values()]
    assert read[0] == stream
    assert read[2:5] == [stream[7 + shift : 14 + shift] for shift in (0, 1, 2)]
    grey = [m for m in scene.marks if isinstance(m, Rect) and m.fill == "ink" and m.width > 20]
    assert len(grey) == 2 * 5  # 5 tokens of "2 + 3 =" and its BOS see "be" and EOS
    assert "10 times across" in scene.alt
    with pytest.raises(ValueError, match="window"):
        training_schematics.packing(at=3)


def test_a_step_has_the_values_it_is_given():
    shown = texts(training_schematics.one_step())
    report = Schedules.deepseek_v3()
    assert {"× 1", f"× {report.mtp_weight.at(0)}", "× 0.0001", "norm at most 1"} <= set(shown)
    assert {"η = 2.2·10⁻⁴", f"γ = {report.bias_speed.at(0)}"} <= set(shown)
    late = StepValues(learning_rate=7.3e-6, mtp_weight=0.1, bias_speed=0.0, clip=0.5)
    assert {"η = 7.3·10⁻⁶", "× 0.1", "γ = 0", "norm at most 0.5"} <= set(
        texts(training_schematics.one_step(late))
    )


def test_no_gradient_reaches_the_bias():
    """Its arrows are dashed and green; none of a gradient's comes near its rule."""
    scene = training_schematics.one_step()
    lines = [mark for mark in scene.marks if isinstance(mark, Line)]
    assert {line.dashed for line in lines if line.stroke == "green"} == {True}
    assert {line.dashed for line in lines if line.stroke == "vermillion"} == {False}
    rule = next(m for m in scene.marks if isinstance(m, Rect) and m.stroke == "green")
    for line in lines:
        if line.stroke == "vermillion" and line.points[0][1] < rule.y + rule.height:
            assert all(x > rule.x + rule.width for x, _ in line.points)


@pytest.mark.parametrize("formats", [REPORT, PLAIN])
def test_bytes_of_a_weight_are_those_of_the_formats(formats):
    scene = step_schematics.adamw_state(formats)
    cells = [m for m in scene.marks if isinstance(m, Rect)]
    assert len(cells) == formats.bytes_per_parameter
    whole = formats.bytes_per_parameter * parameter_count(ModelConfig.deepseek_v3()) / 1e12
    assert f"{whole:.2f} TB" in texts(scene)
    betas = make_optimizer(nn.Linear(2, 2)).param_groups[0]["betas"]
    first, second = (f"{beta:g} {m} + {1 - beta:.2g} g" for beta, m in zip(betas, "mv"))
    assert all(any(t.startswith(s) for t in texts(scene)) for s in (first, second))


def test_a_step_is_lost_where_the_weights_are_bfloat16():
    """By the optimizer itself: one step of the report's rate, from 0.5."""
    for dtype, stays in ((torch.float32, False), (torch.bfloat16, True)):
        weight = nn.Parameter(torch.full((8,), 0.5, dtype=dtype))
        weight.grad = torch.ones_like(weight)
        AdamW([{"params": [weight], "weight_decay": 0.0}], lr=2.2e-4).step()
        assert bool((weight == 0.5).all()) == stays
        if not stays:
            said = " ".join(texts(step_schematics.adamw_state()))
            assert f"{weight[0].item():.5f} in FP32" in said


def test_clipped_gradients_are_torchs():
    scene = step_schematics.clipping()
    for vector in step_schematics.GRADIENTS.values():
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor(vector)
        norm = float(nn.utils.clip_grad_norm_([weight], 1.0))
        kept = "(" + ", ".join(f"{float(g):.2g}".replace("-", "−") for g in weight.grad) + ")"
        assert any(kept in text for text in texts(scene)), kept
        assert any(text.endswith(f"= {norm:g}") for text in texts(scene))
    (circle,) = [mark for mark in scene.marks if isinstance(mark, Circle)]
    tips = [m.points[0] for m in scene.marks if type(m).__name__ == "Polygon"]
    ends = [math.dist(tip, (circle.x, circle.y)) / circle.radius for tip in tips]
    assert ends == pytest.approx([0.5, 5, 1])
    with pytest.raises(ValueError, match="bound above 0"):
        step_schematics.clipping(bound=0)


def test_the_bias_moves_by_the_sign_of_the_load():
    loads, old = step_schematics.LOADS, step_schematics.BIASES
    shown = texts(step_schematics.bias_rule())
    mean = sum(loads) / len(loads)
    new = [b + 0.001 * ((load < mean) - (load > mean)) for b, load in zip(old, loads)]
    row = shown[shown.index("expert 0") :]
    after = [row[row.index(f"expert {e}") + 3] for e in range(len(loads))]
    assert [float(text.replace("−", "-")) for text in after] == pytest.approx(
        [1000 * b for b in new]
    )
    assert f"MaxVio {max_violation(torch.tensor(loads).float()):g}" in shown


def test_every_part_of_the_report_reads_as_many_tokens_a_step():
    for part in run_schematics.REPORT_STRETCHES:
        assert part.windows * part.seq_len == TOKENS_PER_STEP
    assert texts(run_schematics.two_phases()).count("= 62.9M tokens per step") == 2
    surfaces = [m for m in run_schematics.two_phases().marks if isinstance(m, Rect)]
    sizes = [m.width * m.height for m in surfaces]
    assert sizes == pytest.approx([sizes[0]] * 3, rel=0.01)


def test_parts_of_our_run_are_its_phases():
    phases = phases_of(ModelConfig.mini(), Recipe())
    first, second = run_schematics.stretches(phases)
    assert (first.seq_len, second.seq_len) == (256, 1024)
    assert first.yarn == 1 and second.yarn == phases[1].config.rope_scaling.factor
    assert second.rates == pytest.approx((8e-4, 8e-5))


def test_the_second_process_repeats_what_was_lost():
    shown = [line["loss"] for line in LINES if "loss" in line][:12]
    scene = run_schematics.resume(shown, saved=4, killed=9)
    rings, dots = (
        [(m.x, m.y) for m in scene.marks[:-20] if isinstance(m, Circle) and m.fill == fill]
        for fill in ("paper", "orange")
    )
    assert len(set(rings) & set(dots)) == 5
    with pytest.raises(ValueError, match="then a kill"):
        run_schematics.resume(shown, saved=9, killed=4)


# Figures ----------------------------------------------------------------------------------------


def test_schedules_are_drawn_as_they_are_told():
    told = Schedules.deepseek_v3()
    rate, batch, mtp, bias = figures.schedules_figure().axes
    x, y = rate.lines[0].get_data()
    for at, level in zip(x[::97], y[::97]):
        steps = 2000 if level == 2.2e-4 or at > 0.1 else None
        if steps:
            assert level == pytest.approx(told.learning_rate.at(steps, at * 1e12), rel=1e-6)
    assert max(y) == 2.2e-4 and y[-1] == 7.3e-6 and y[0] == 2.2e-4 / 2000
    edges = {t.get_text().strip() for panel in (rate, batch, mtp, bias) for t in panel.texts}
    assert {"10T", "14.3T", "0.469T"} <= edges and any("0.167T" in text for text in edges)
    assert batch.lines[0].get_ydata()[-1] == 15360
    assert list(mtp.lines[0].get_ydata()) == [0.3, 0.3, 0.1, 0.1]
    assert list(bias.lines[0].get_xdata())[1] == 14.3


def test_a_run_is_drawn_from_its_log(log):
    left, right = figures.run_figure(log).axes
    steps = [line for line in LINES if "loss" in line]
    assert list(left.lines[2].get_ydata()) == [line["loss"] for line in steps]
    last = LINES[-1]["held_out"]
    for line, domain in zip(right.lines, last):
        assert line.get_label() == domain
        assert line.get_ydata()[-1] == last[domain]["bits_per_byte"]
    assert right.lines[3].get_xdata()[0] == pytest.approx(26, abs=0.1)


def test_a_short_run_is_drawn_over_its_steps(log):
    left, right = figures.run_figure(log, over="steps").axes
    assert left.get_xlabel() == right.get_xlabel() == "step"
    assert left.lines[2].get_xdata()[-1] == [line for line in LINES if "loss" in line][-1]["step"]
    assert right.lines[0].get_xdata()[-1] == LINES[-1]["step"]
    with pytest.raises(ValueError, match="seconds"):
        figures.run_figure(log, over="seconds")


def test_a_growing_batch_is_no_longer_window():
    """More windows of one length: nothing is marked; longer ones are, where they begin."""
    windows = [(16, 64), (24, 64), (32, 64), (8, 256)]
    lines, tokens = [], 0
    for step, (count, length) in enumerate(windows, 1):
        tokens += count * length
        lines.append(dict(step=step, tokens=tokens, windows=count, loss=1.0))
    assert figures._changes(RunLog.of(lines[:3])) == []
    assert figures._changes(RunLog.of(lines)) == [lines[2]["tokens"] / 1e6]


def test_the_mean_of_a_constant_is_the_constant():
    assert figures._smooth([2.0] * 7, 5) == pytest.approx([2.0] * 7)


def test_loads_and_violations_agree_with_the_log(log):
    figure = figures.loads_figure(log, "layers.3.ffn.gate")
    steps = [line for line in LINES if "loss" in line]
    violation = figure.axes[1].lines[0].get_ydata()
    assert violation == pytest.approx(
        [line["max_violation"]["layers.3.ffn.gate"] for line in steps], abs=6e-4
    )
    shares = figure.axes[0].collections[0].get_array().reshape(16, len(steps))
    assert np.asarray(shares).mean(0) == pytest.approx(np.ones(len(steps)))
    with pytest.raises(ValueError, match="no router"):
        figures.loads_figure(log, "layers.0.ffn.gate")


def test_clipped_steps_are_counted(log):
    over = sum(line["grad_norm"] > 0.5 for line in LINES if "loss" in line)
    assert any(
        f"clipped: {over} of 354" in text for text in words(figures.grad_norm_figure(log, 0.5))
    )


def test_needles_are_means_over_depths():
    found = {64: {0.1: 1.0, 0.9: 0.5}, 128: {0.1: 0.0, 0.9: 0.25}}
    lines = figures.retrieval_figure(found, found, 64).axes[0].lines
    assert list(lines[0].get_ydata()) == [0.75, 0.125]
    assert list(lines[1].get_ydata()) == [0.5, 1.0]


def test_arms_are_compared_within_pairs():
    """Seeds scatter by 0.1, pairs by nothing: what is said is 0.02 and 0.04, without spread."""
    made = results()
    figure = compared.compared(made)
    left, right = figure.axes
    said = [text for text in words(figure) if "±" in text and "\n" not in text]
    assert said == ["+0.020 ± 0.000", "+0.040 ± 0.000"]
    share = 0.04 / made.of("plain").mean
    assert f"{share:+.1%}" in words(figure)
    assert [compared._percent(x) for x in (0.0013, -0.0164, 4.17)] == ["+0.13%", "−1.6%", "+417%"]
    assert any("900,000 tokens per run, 3 seeds per arm" in text for text in words(figure))
    assert "nats per token" in left.get_xlabel() and "plain" in right.get_xlabel()
    for word, box in written(figure):
        for line in right.lines:
            x, y = right.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
            assert line.get_marker() not in set("os^") or not box.contains(x, y), word
    dots = sorted(float(line.get_xdata()[0]) for line in left.lines if line.get_marker() in "os^")
    assert dots == pytest.approx(sorted(run["loss"] for run in made.told["runs"]))
    text = compared.described(made)
    assert "other arm: mean" in text and "against plain +0.020 ± 0.000" in text
    with pytest.raises(ValueError, match="2 to 4 arms"):
        compared.compared(results(("only",), (16,)))


def test_curves_differ_from_the_base_by_what_was_added():
    _, right = compared.curves(results()).axes
    for line, gap in zip(right.lines, (0.02, 0.04)):
        assert line.get_ydata() == pytest.approx([gap] * 30)


@pytest.mark.parametrize("worst", [0, 29])
def test_the_product_is_named_where_blocks_add_most(worst):
    made = product_errors(worst)
    above, below = compared.tiles_against_blocks(made).axes
    said = [text.get_text() for text in above.texts if "times" in text.get_text()]
    assert said == [f"{made[worst].name}: 9.5 times"]
    drawn = {line.get_label(): list(line.get_ydata()) for line in above.lines}
    assert drawn["tiles, 1 × 128"] == [one.tile.token for one in made]
    assert drawn["blocks, 128 × 128"] == [one.block.token for one in made]
    assert [one.spread for one in made] in [list(line.get_ydata()) for line in below.lines]
    labels = [label.get_text() for label in below.get_xticklabels()]
    assert labels[13:18] == ["routed w13", "routed w2", "shared w1", "shared w3", "shared w2"]
    layers = [text.get_text() for text in above.texts if "times" not in text.get_text()]
    assert layers == ["layers.0", "layers.1", "layers.2", "mtp.0"]


def test_specialisation_is_in_bits():
    """Three domains with experts of their own: log2(3), whatever the domains' sizes."""
    apart = {f"domain {i}": {"r": [(7 + i) * (e == i) for e in range(3)]} for i in range(3)}
    alike = {f"domain {i}": {"r": [7 * (i + 1)] * 3} for i in range(3)}
    assert compared.specialisation({"load_by_domain": apart}, "r") == pytest.approx(math.log2(3))
    assert compared.specialisation({"load_by_domain": alike}, "r") == pytest.approx(0, abs=1e-9)


def test_dense_arms_have_no_panel_and_each_says_its_bits():
    made = results(("experts", "dense"), (16, 0))
    figure = compared.loads_by_domain(made, seed=2)
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    for title, router in zip(titles, ROUTERS):
        bits = made.of("experts", lambda run, router=router: compared.specialisation(run, router))
        assert f"layer {router.split('.')[1]}: {bits.mean:.2f} ± {bits.deviation:.2f} bits" in title
    assert "seed 2" in figure.axes[1].get_xlabel() and len(figure.axes) == 3
    with pytest.raises(ValueError, match="no seed 9"):
        compared.loads_by_domain(made, seed=9)
    assert not re.search("dense", "".join(words(figure)))


def test_what_a_bad_batch_adds_is_drawn_without_its_own_loss():
    runs = {"clipped": [9.0, 2.1, 2.0], "not clipped": [9.0, 2.3, 2.4]}
    (axes,) = figures.disturbed_figure(runs, [2.0, 2.0, 1.9]).axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["clipped"].get_xdata()) == [42, 43]
    assert drawn["clipped"].get_ydata() == pytest.approx([0.1, 0.1])
    assert drawn["not clipped"].get_ydata() == pytest.approx([0.3, 0.5])
