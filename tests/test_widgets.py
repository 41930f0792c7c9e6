"""Widgets without a browser: the numbers they show, what their controls do, what they print."""

from __future__ import annotations

import base64
import re
import warnings
from pathlib import Path

import every_widget
import matplotlib.image
import matplotlib.lines
import matplotlib.patches
import pytest
import torch

from dsv3 import ModelConfig, Transformer, costs, load_model, load_tokenizer
from dsv3.book.saved import WIDGET
from dsv3.errors import DSV3Error
from dsv3.moe import Router
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch, max_violation
from dsv3.training.simulation import simulate
from dsv3.viz import scene as scenes
from dsv3.viz import show, widgets
from dsv3.viz.cache_scene import size, times
from dsv3.viz.routing_scene import routing_scene
from dsv3.viz.scene import Scene, still
from dsv3.viz.widgets import KVCacheCalculator, LoadBalanceSimulator, RoutingExplorer
from dsv3.viz.widgets.explorer import reroute, router_scores, routers, token_text
from dsv3.viz.widgets.panel import AT_REST, Panel

SHIPPED = Path(__file__).parents[1] / "assets" / "dsv3-mini"
TEXT = "To be, or not to be"


@pytest.fixture(scope="module")
def shipped():
    return load_model(SHIPPED, precision="fp32"), load_tokenizer(SHIPPED)


@pytest.fixture
def explorer(shipped):
    return RoutingExplorer(*shipped, TEXT)


@pytest.fixture(scope="module")
def defined():
    return every_widget.names()


@pytest.fixture(params=every_widget.CASES)
def widget(request, defined):
    return every_widget.make(request.param, defined)


def test_every_widget_is_among_the_cases(widget, defined):
    kinds = {kind for kind in widgets.__all__ if issubclass(getattr(widgets, kind), Panel)}
    assert kinds == {case.code.partition("(")[0] for case in every_widget.CASES.values()}
    assert every_widget.CASES[widget.title].slider in [
        control.description for control in widget.children[0].children
    ]


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, scenes.Text)]


def router(**changes) -> Router:
    config = ModelConfig.mini().but(
        n_routed_experts=12, n_group=4, num_experts_per_tok=3, **changes
    )
    made = Router(config, Precision.of("fp32", config))
    torch.manual_seed(1)
    torch.nn.init.normal_(made.weight, std=0.2)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias, std=0.3)
    return made


# Scenes -----------------------------------------------------------------------------------------


def test_the_still_picture_has_one_artist_for_each_mark(widget):
    scene = widget.scene()
    kinds = {
        scenes.Rect: matplotlib.patches.FancyBboxPatch,
        scenes.Circle: matplotlib.patches.Ellipse,
        scenes.Line: matplotlib.lines.Line2D,
        scenes.Text: matplotlib.text.Text,
        scenes.Image: matplotlib.image.AxesImage,
    }
    axes = widget.still().axes[0]
    drawn = sorted(
        [
            artist
            for artist in axes.get_children()
            if artist.get_zorder() is not None
            and type(artist) in kinds.values()
            and artist in [*axes.patches, *axes.lines, *axes.texts, *axes.images]
        ],
        key=lambda artist: artist.zorder,
    )
    assert [type(artist) for artist in drawn] == [
        *(kinds[type(mark)] for mark in scene.marks),
        matplotlib.text.Text,
    ]
    words = [artist.get_text() for artist in axes.texts]
    assert words == [*texts(scene), AT_REST]


def test_the_browser_gets_the_same_marks(widget):
    scene, sent = widget.scene(), widget.drawing.scene
    assert [mark["kind"] for mark in sent["marks"]] == [
        type(mark).__name__.lower() for mark in scene.marks
    ]
    assert [mark["text"] for mark in sent["marks"] if mark["kind"] == "text"] == texts(scene)
    assert [mark["label"] for mark in sent["marks"] if "label" in mark] == scene.labels()
    assert (sent["width"], sent["height"], sent["alt"]) == (scene.width, scene.height, scene.alt)


def test_all_marks_stand_on_the_page(widget):
    scene = widget.scene()
    for mark in scene.marks:
        points = (
            mark.points
            if isinstance(mark, scenes.Line)
            else [(mark.x, mark.y), (mark.x + mark.width, mark.y + mark.height)]
            if isinstance(mark, scenes.Rect)
            else [(mark.x, mark.y)]
        )
        for x, y in points:
            assert -1 <= x <= scene.width + 1 and -1 <= y <= scene.height + 1, mark


def test_a_still_picture_is_shown_without_a_warning(shipped):
    """Also with letters that no font of matplotlib has."""
    explorer = RoutingExplorer(*shipped, "雪 😀 ﷽ $x$ \t\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = show(explorer.still(), alt=explorer.alt)
    assert image.data.startswith(b"\x89PNG")


def test_a_colour_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="pink"):
        Scene(10, 10, "x").rect(0, 0, 1, 1, fill="pink")


def test_colours_of_the_scenes_are_those_of_the_style_sheet():
    sheet = (Path(scenes.__file__).parent / "widgets" / "drawing.css").read_text()
    assert set(re.findall(r"--dsv3-([a-z]+):", sheet)) == set(scenes.COLOURS)


def test_equal_scenes_give_equal_pictures(shipped):
    """A notebook that is run again compares equal."""
    first, second = (show(RoutingExplorer(*shipped, TEXT).still(), alt="x") for _ in range(2))
    assert first.data == second.data


# What a notebook stores ------------------------------------------------------------------------


def test_an_output_holds_the_still_picture_beside_the_widget(widget):
    """So that the next day, without a kernel, there is something to see and a way on."""
    data, metadata = widget._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png", WIDGET}
    assert data["text/plain"] == repr(widget) == f"[Figure: {widget.title}. {widget.alt}]"
    assert metadata["image/png"]["alt"] == f"{widget.title}. {widget.alt}"
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "Run All Above Selected Cell" in AT_REST


def test_the_line_above_the_picture_says_how_to_use_it(widget):
    assert widget.hint in widget._note.value and "arrow keys" in widget.hint


def test_every_control_says_what_it_is(widget):
    controls = widget.children[0].children
    assert all(control.description for control in controls)
    assert len({control.description for control in controls}) == len(controls)


def test_alt_text_has_the_numbers(explorer):
    assert "chosen experts 10 with weight" in explorer.alt and "MaxVio" in explorer.alt
    assert "DeepSeek-V3, MLA 2.3 GB" in KVCacheCalculator().alt


# Routing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_at_the_start_the_explorer_shows_the_models_own_routing(precision):
    model, tokenizer = load_model(SHIPPED, precision=precision), load_tokenizer(SHIPPED)
    explorer = RoutingExplorer(model, tokenizer, TEXT)
    watch, kept = RouterWatch(model), {}
    for layer, gate in routers(model).items():
        gate.register_forward_hook(lambda _, __, out, layer=layer: kept.update({layer: out}))
    with torch.inference_mode():
        model(torch.tensor([explorer.ids]))
    for layer in routers(model):
        explorer.layer.value = layer
        routing, load = explorer.routing(), watch.load[f"layers.{layer}.ffn.gate"]
        assert torch.equal(routing.chosen, kept[layer][1][0])
        assert torch.equal(routing.weights, kept[layer][0][0])
        assert torch.equal(routing.load.float(), load)
        assert routing.max_violation == max_violation(load)
        assert any(
            text.endswith(f"= {max_violation(load):.2f}") for text in texts(explorer.scene())
        )
    watch.close()


@pytest.mark.parametrize("strength", [-4.0, -1.0, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("groups, top_k", [(1, 3), (2, 3), (4, 3), (2, 6), (4, 12)])
def test_choices_by_the_definition(strength, groups, top_k):
    """Against eq. 16 written out for one token at a time; biases strongly negative too."""
    gate = router(topk_group=2)
    gate.bias.data -= 2.0
    scores = torch.rand(9, 12)
    routing = reroute(gate, scores, strength, groups, top_k)
    for token in range(9):
        biased = (scores[token] + strength * gate.bias).tolist()
        sums = [sum(sorted(biased[3 * g : 3 * g + 3])[-2:]) for g in range(4)]
        best = sorted(range(4), key=lambda group: -sums[group])[:groups]
        allowed = [expert for expert in range(12) if expert // 3 in best]
        chosen = sorted(allowed, key=lambda expert: -biased[expert])[:top_k]
        assert routing.open[token].nonzero().flatten().tolist() == sorted(best)
        assert routing.sums[token].tolist() == pytest.approx(sums, abs=1e-5)
        assert sorted(routing.chosen[token].tolist()) == sorted(chosen)
        total = sum(float(scores[token, expert]) for expert in chosen)
        for expert, weight in zip(routing.chosen[token].tolist(), routing.weights[token].tolist()):
            assert weight == pytest.approx(2.5 * float(scores[token, expert]) / total, abs=1e-5)


def test_without_bias_and_without_limit_the_best_scores_win():
    gate, scores = router(), torch.rand(9, 12)
    routing = reroute(gate, scores, 0.0, groups=4)
    assert torch.equal(routing.chosen, scores.topk(3).indices)
    assert routing.open.all() and not routing.bias.any()


def test_the_bias_moves_choices_and_never_weights_of_the_same_choice():
    gate, scores = router(), torch.rand(50, 12)
    plain, biased = reroute(gate, scores, 0.0), reroute(gate, scores, 0.5)
    assert not torch.equal(plain.chosen.sort().values, biased.chosen.sort().values)
    same = (plain.chosen.sort().values == biased.chosen.sort().values).all(1)
    assert same.any()
    assert torch.allclose(plain.weights.sort().values[same], biased.weights.sort().values[same])


def test_a_router_without_bias_or_groups():
    gate, scores = router(gate_bias=False), torch.rand(4, 12)
    assert torch.equal(reroute(gate, scores, 3.0).chosen, gate.choose(scores))
    config = ModelConfig.mini().but(n_group=1, topk_group=1)
    gate = Router(config, Precision.of("fp32", config))
    gate.bias.data.zero_()
    routing = reroute(gate, torch.rand(4, 16))
    assert routing.open.shape == (4, 1) and routing.open.all()
    assert "open" not in " ".join(texts(routing_scene(routing, 0, "abcd", 0)))


def test_scores_do_not_depend_on_how_they_are_watched(shipped):
    model, tokenizer = shipped
    before = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    scores = router_scores(model, tokenizer.encode(TEXT))
    assert {layer: tuple(value.shape) for layer, value in scores.items()} == {
        2: (8, 16),
        3: (8, 16),
    }
    assert before == {
        name: len(module._forward_pre_hooks) for name, module in model.named_modules()
    }


# The explorer's controls ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "control, value",
    [
        ("layer", 2),
        ("token", 2),
        ("strength", -2.0),
        ("groups", 1),
        ("top_k", 7),
        ("text", "Not so."),
    ],
)
def test_each_control_changes_picture_and_numbers(explorer, control, value):
    before = explorer.drawing.scene
    getattr(explorer, control).value = value
    assert explorer.drawing.scene != before
    assert explorer.drawing.scene == explorer.scene().as_dict()
    assert explorer.drawing.scene["alt"] != before["alt"]


def test_labels_say_the_numbers_of_every_expert_and_group(explorer):
    routing, token = explorer.routing(), explorer.token.value
    said = "\n".join(explorer.scene().labels()).replace("−", "-")
    for expert in range(16):
        score, bias = float(routing.scores[token, expert]), float(routing.bias[expert])
        assert (
            f"expert {expert} of group {expert // 4}" in said
            and f"score {score:.3f}, bias {bias:+.3f}, sum {score + bias:.3f}" in said
        )
        assert f"chosen by {routing.load[expert]} of 8 tokens" in said
    for weight in routing.weights[token].tolist():
        assert f"chosen, weight {weight:.3f}" in said
    for group in range(4):
        assert f"{routing.sums[token, group]:.3f}\n" in said
    assert said.count("closed: its experts are out") == 2
    assert said.count("out: its group is closed") == 8


def test_a_token_is_chosen_by_its_key(explorer):
    assert explorer.scene().keys() == [f"token {token}" for token in range(8)]
    explorer.drawing._hear(None, {"chosen": "token 3"}, None)
    assert explorer.token.value == 3
    chosen = [mark for mark in explorer.drawing.scene["marks"] if mark.get("chosen")]
    assert [mark["key"] for mark in chosen] == ["token 3"]
    for junk in ({"chosen": "token 99"}, {"chosen": 3}, {}, "token 1", {"chosen": "x"}):
        explorer.drawing._hear(None, junk, None)
    assert explorer.token.value == 3


def test_more_experts_than_there_are_is_said_and_not_done(explorer):
    assert explorer.message() == ""
    explorer.top_k.value = 16
    assert explorer.message() == "16 experts asked for, 8 shown: 2 open groups hold no more."
    assert explorer.routing().chosen.shape == (8, 8)
    assert explorer.message() in explorer._note.value
    explorer.groups.value = 1
    assert "4 shown: 1 open group holds no more" in explorer.message()
    explorer.groups.value = 4
    assert explorer.message() == "" and explorer.routing().chosen.shape == (8, 16)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "there is no text"),
        ("  \n", "there is no text"),
        ("word " * 1100, "longer than the model's context"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_in_words(explorer, text, said):
    before = explorer.drawing.scene
    explorer.text.value = text
    assert said in explorer.message() and "still shows the text before" in explorer.message()
    assert explorer.drawing.scene == before
    explorer.text.value = "Better."
    assert explorer.message() == "" and explorer.texts[1] == "B"


def test_a_shorter_text_moves_the_chosen_token(explorer):
    explorer.text.value = "To"
    assert (explorer.token.max, explorer.token.value) == (1, 1)
    assert explorer.scene().keys() == ["token 0", "token 1"]


def test_a_long_text_is_shown_in_pages(explorer):
    explorer.text.value = "To be, or not to be: that is the question. " * 20
    last, seen = len(explorer.ids) - 1, set()
    explorer.token.value = 0
    for _ in range(10):  # from page to page: the last key goes on, and is "earlier" at the end
        keys = explorer.scene().keys()
        seen |= set(keys)
        if f"token {last}" in keys:
            break
        assert f"go to {keys[-1]} of {last + 1}" in explorer.scene().labels()
        explorer.drawing.choose(keys[-1])
    assert seen == {f"token {token}" for token in range(last + 1)}
    before = explorer.token.value
    explorer.drawing.choose(keys[-1])
    assert explorer.token.value == before - 1


def test_a_model_without_experts_is_refused(shipped):
    config = ModelConfig.mini().but(first_k_dense_replace=4, num_nextn_predict_layers=0)
    with pytest.raises(DSV3Error, match="no layer with experts"):
        RoutingExplorer(Transformer(config).init_weights(0), shipped[1], TEXT)
    with pytest.raises(DSV3Error, match="no text"):
        RoutingExplorer(*shipped, " ")


def test_the_picture_holds_the_released_sizes():
    """256 experts in 8 groups: columns of three pixels, numbers under the pointer."""
    config = ModelConfig.deepseek_v3().but(hidden_size=32)
    gate = Router(config, Precision.of("fp32", config))
    torch.nn.init.normal_(gate.weight, std=0.2)
    torch.nn.init.normal_(gate.bias, std=0.1)
    routing = reroute(gate, gate.scores(torch.randn(30, 32)).detach())
    scene = routing_scene(routing, 3, ["word"] * 30, 5)
    assert sum("expert" in label and "score" in label for label in scene.labels()) == 256
    still(scene)


def test_tokens_are_written_so_that_they_can_be_seen(shipped):
    tokenizer = shipped[1]
    shown = [token_text(tokenizer, id) for id in tokenizer.encode("a b\n\t\x07😀")]
    assert shown[0] == "<bos>" and "".join(shown[1:]).startswith("a·b⏎⇥�")
    assert all(text and text.isprintable() for text in shown)
    assert any(re.fullmatch(r"[0-9A-F ]+", text) for text in shown[-4:])


# The calculator ---------------------------------------------------------------------------------


def row(calculator: KVCacheCalculator, name: str) -> str:
    return next(label for label in calculator.scene().labels() if label.startswith(f"{name}:"))


def test_bytes_a_token_are_those_of_the_papers():
    shown = texts(KVCacheCalculator().scene())
    for number in (
        "70,272",
        "31,232",
        "249,856",
        "3,997,696",
        "4,997,120",
        "327,680",
        "516,096",
        "× 4.66",
        "× 7.34",
        "× 56.9",
        "× 71.1",
    ):
        assert number in shown
    rows = {row.name: row for row in KVCacheCalculator().rows}
    large = ModelConfig.deepseek_v3()
    assert rows["DeepSeek-V3, MLA"].per_token(1) == costs.latent_bytes_per_token(large, 1)
    assert rows["DeepSeek-V3 as MHA"].per_token(2) == costs.as_mha(large).bytes_per_token()


def test_large_ratios_are_written_out():
    calculator = KVCacheCalculator()
    calculator.tokens.value, calculator.texts.value = 131_072, 1024
    calculator.memory.value = 640 * 10**9
    assert "1,048 times the memory: does not fit" in row(
        calculator, "DeepSeek-V3 as MHA, wide keys"
    )
    for label in calculator.scene().labels():
        assert "e+" not in label
    assert [times(ratio) for ratio in (0.444, 7.344, 99.94, 99.96, 1048)] == [
        "0.444",
        "7.34",
        "99.9",
        "100",
        "1,048",
    ]


def test_totals_and_how_many_fit():
    calculator = KVCacheCalculator()
    calculator.tokens.value = 131_072
    assert "9.21 GB a text, 9.21 GB in all: 11.5% of the memory" in row(
        calculator, "DeepSeek-V3, MLA"
    )
    assert "8 texts of this length fit" in row(calculator, "DeepSeek-V3, MLA")
    assert "6.55 times the memory: does not fit" in row(calculator, "DeepSeek-V3 as MHA")
    calculator.texts.value, calculator.itemsize.value = 16, 1
    label = row(calculator, "DeepSeek-V3, MLA")
    assert "576 values × 61 layers × 1 B = 35,136 B a token" in label
    assert "4.61 GB a text, 73.7 GB in all" in label and "17 texts" in label


@pytest.mark.parametrize("control", ["tokens", "texts", "itemsize", "memory"])
def test_each_control_of_the_calculator_changes_the_picture(control):
    calculator = KVCacheCalculator()
    slider = getattr(calculator, control)
    for option in slider.options:
        before = calculator.drawing.scene
        if option[1] != slider.value:
            slider.value = option[1]
            assert calculator.drawing.scene != before


def test_bars_are_as_long_as_their_bytes():
    calculator = KVCacheCalculator()
    bars = [
        mark
        for mark in calculator.scene().marks
        if isinstance(mark, scenes.Rect) and mark.fill in ("blue", "sky")
    ]
    widths = [bar.width for bar in bars]
    per_token = [row.per_token(2) for row in calculator.rows]
    for number in (2, 5, 6):  # those that end on the page
        assert widths[number] / widths[0] == pytest.approx(per_token[number] / per_token[0])
    assert max(widths) == widths[3] == widths[4]  # cut off at the edge, marked as such


@pytest.mark.parametrize(
    "bytes, said",
    [
        (0, "0 B"),
        (999, "999 B"),
        (70_272, "70.3 KB"),
        (999_600, "1 MB"),
        (9.995e9, "10 GB"),
        (2e10, "20 GB"),
        (1.234e9, "1.23 GB"),
        (1.31e14, "131 TB"),
    ],
)
def test_sizes_are_written_in_three_digits(bytes, said):
    assert size(bytes) == said


# The simulator ----------------------------------------------------------------------------------


def test_the_simulator_shows_the_simulation():
    run = simulate(experts=16, k=4, tokens=256, gamma=0.01, skew=0.5, steps=100)
    simulator = LoadBalanceSimulator()
    simulator.gamma.value, simulator.steps.value = 0.01, 100
    said, shown = simulator.scene().labels(), texts(simulator.scene())
    assert (
        f"γ = 0.01: MaxVio {run.max_violation[0]:.2f} in step 1, "
        f"{run.max_violation[-20:].mean():.2f} in the last 20 steps on average"
    ) in shown
    curve = next(
        mark
        for mark in simulator.scene().marks
        if isinstance(mark, scenes.Line) and len(mark.points) == 100
    )
    heights = torch.tensor([y for _, y in curve.points])
    assert torch.allclose(heights, 254 - 180 * run.max_violation / 3, atol=1e-3)
    for expert in range(16):
        assert any(
            label.startswith(
                f"expert {expert}: {run.loads[-1, expert]:.0f} tokens in step 100, mean 64"
            )
            for label in said
        )
    assert f"{run.bias[-1, 0]:+.3f}".replace("-", "−") in shown


@pytest.mark.parametrize(
    "control, value",
    [("gamma", 0.0), ("gamma", 0.3), ("skew", 2.0), ("skew", 0.0), ("tokens", 64), ("steps", 20)],
)
def test_each_control_of_the_simulator_changes_the_picture(control, value):
    simulator = LoadBalanceSimulator()
    before = simulator.drawing.scene
    getattr(simulator, control).value = value
    assert simulator.drawing.scene != before and simulator.drawing.scene["alt"] != before["alt"]


def test_without_speed_nothing_gets_better_and_with_too_much_it_swings():
    def late(gamma: float) -> float:
        simulator = LoadBalanceSimulator()
        simulator.gamma.value = gamma
        return float(re.search(r"start, ([0-9.]+) at", simulator.alt)[1])

    assert late(0.0) > 0.7 > 0.3 > late(0.001) and late(0.3) > 1.0
