"""The experiments: arms that differ in what they say, paired starts, and what the results say."""

import json
import re
from math import isfinite
from pathlib import Path
from statistics import fmean

import nbformat
import pytest
import torch

from dsv3.attention import Attention
from dsv3.checkpoint.layout import layout
from dsv3.commands.experiment import NAMES
from dsv3.training.experiments import EXPERIMENTS, Results, read_results
from dsv3.training.experiments.arms import BASE, Arm
from dsv3.training.experiments.results import STORED
from dsv3.training.experiments.runs import size
from dsv3.training.experiments.surgery import NoShared, build

CHAPTER = Path(__file__).parents[1] / "chapters" / "06_training.ipynb"
ARMS = [
    pytest.param(arm, id=f"{name}-{label}")
    for name, experiment in EXPERIMENTS.items()
    for label, arm in experiment.arms.items()
]


def test_the_command_names_every_experiment_and_each_has_its_base():
    assert tuple(EXPERIMENTS) == NAMES
    for experiment in EXPERIMENTS.values():
        assert experiment.base in experiment.arms and len(experiment.arms) > 1


@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_is_built_and_learns(arm):
    model = build(arm, seed=1)
    tokens = torch.randint(0, BASE.vocab_size, (1, 8))
    model(tokens).square().mean().backward()
    reached = {name for name, value in model.layers.named_parameters() if value.grad is not None}
    assert reached == {name for name, _ in model.layers.named_parameters()}


@pytest.mark.parametrize("name", ["balance", "attention", "experts"])
def test_arms_weigh_as_much_and_work_as_much_where_the_question_says_so(name):
    sizes = [size(build(arm, 1)) for arm in EXPERIMENTS[name].arms.values()]
    for what, within in (("parameters", 0.045), ("activated", 0.006)):
        values = [one[what] for one in sizes]
        assert max(values) - min(values) <= within * max(values), what


def test_a_dense_model_of_either_size():
    arms = EXPERIMENTS["sparse"].arms
    experts, active, large = (size(build(arms[label], 1)) for label in arms)
    assert abs(active["parameters"] - experts["activated"]) < 0.006 * active["parameters"]
    assert abs(large["parameters"] - experts["parameters"]) < 0.002 * large["parameters"]
    assert large["parameters"] == large["activated"]


def test_sizes_are_those_of_the_checkpoint():
    spec = sum(one.numel for one in layout(BASE, scales=False, mtp=False, mtp_copies=False))
    biases = (BASE.num_hidden_layers - BASE.first_k_dense_replace) * BASE.n_routed_experts
    found = size(build(Arm(), 1))
    assert found["parameters"] == spec - biases, "a bias is stepped, not trained"
    assert found["cached"] == BASE.latent_dim * BASE.num_hidden_layers


@pytest.mark.parametrize("kv_heads, head_dim", [(4, 36), (2, 48), (1, 58)])
def test_plain_attention_stands_where_latent_attention_was(kv_heads, head_dim):
    model = build(Arm(kv_heads=kv_heads, head_dim=head_dim), 1)
    found = [module for module in model.modules() if isinstance(module, Attention)]
    assert len(found) == BASE.num_hidden_layers + 1
    assert size(model)["cached"] == 2 * kv_heads * head_dim * BASE.num_hidden_layers


def test_what_two_arms_have_alike_begins_alike():
    """A pair differs in the choice, not in luck: equal names and shapes, equal first values."""
    one, other = build(Arm(), 3), build(Arm(kv_heads=1, head_dim=58), 3)
    mine, its = dict(one.named_parameters()), dict(other.named_parameters())
    alike = [name for name in mine if name in its and "attn." not in name]
    assert len(alike) > 20 and all(torch.equal(mine[name], its[name]) for name in alike)
    again = dict(build(Arm(), 4).named_parameters())
    assert not torch.equal(mine["layers.1.ffn.gate.weight"], again["layers.1.ffn.gate.weight"])


def test_first_values_have_the_width_of_what_they_read():
    weights = dict(build(Arm(kv_heads=4, head_dim=36), 1).named_parameters())
    depth = (2 * BASE.num_hidden_layers) ** 0.5
    for name, wanted in (
        ("layers.0.attn.attention.wq.weight", 128**-0.5),
        ("layers.0.attn.attention.wo.weight", 144**-0.5 / depth),
        ("layers.1.ffn.experts.w2", 128**-0.5 / depth),
        ("embed.weight", 0.3),
    ):
        assert float(weights[name].detach().std()) == pytest.approx(wanted, rel=0.03), name


def test_without_a_shared_expert_nothing_is_added():
    model = build(EXPERIMENTS["experts"].arms["none shared, 3 of 16"], 1)
    assert sum(isinstance(module, NoShared) for module in model.modules()) == 3
    assert model.config.num_experts_per_tok == 3


def results(losses: dict[str, list[float]]) -> Results:
    runs = [
        {"arm": arm, "seed": seed, "loss": loss, "size": {"parameters": 1, "activated": 1}}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    return Results({"base": "plain", "runs": runs})


def test_differences_are_taken_within_pairs():
    """Seeds scatter by 1, pairs by nothing: the spread of the difference is 0."""
    found = results({"new": [2.5, 3.5, 1.5], "plain": [3.0, 4.0, 2.0]})
    assert found.arms == ["plain", "new"]
    assert found.of("new").mean == pytest.approx(2.5) and found.of("new").deviation == 1
    assert found.against("new").values == (-0.5, -0.5, -0.5)
    assert found.against("new").deviation == 0
    assert "-0.500 ± 0.000" in found.table().splitlines()[-1]


def test_results_are_json():
    assert json.loads(json.dumps(results({"plain": [1.0]}).told))


# What is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_whole(name):
    """Every arm from the same three seeds, over the experiment's tokens, with nothing missing."""
    told, experiment = read_results(name).told, EXPERIMENTS[name]
    for key in ("question", "report", "limit", "base", "tokens"):
        assert told[key] == getattr(experiment, key)
    assert told["command"] == f"dsv3 experiment {name}"
    seeds = {arm: [r["seed"] for r in told["runs"] if r["arm"] == arm] for arm in experiment.arms}
    assert seeds == {arm: [1, 2, 3] for arm in experiment.arms}
    for run in told["runs"]:
        assert run["size"] == size(build(experiment.arms[run["arm"]], 1))
        assert run["loss"] == pytest.approx(fmean(d["loss"] for d in run["by_domain"].values()))
        tokens, losses = zip(*run["curve"])
        assert tokens[-1] >= experiment.tokens > tokens[-2] and all(map(isfinite, losses))


def test_stored_results_are_small():
    assert sum(file.stat().st_size for file in STORED.glob("*.json")) < 2**20


def test_runs_that_two_experiments_share_are_the_same():
    """The usual arm is trained once: chance must not differ between two tables."""
    usual = {
        name: [run["loss"] for run in read_results(name).told["runs"] if run["arm"] == arm]
        for name, arm in (
            ("balance", "bias rule"),
            ("mtp", "with MTP"),
            ("sparse", "experts"),
            ("attention", "MLA"),
            ("experts", "1 shared, 2 of 16"),
        )
    }
    assert len(set(map(tuple, usual.values()))) == 1


def said_of(name: str) -> list[tuple[str, str]]:
    """What chapter 6 says of an experiment's means and deviations."""
    cells = nbformat.read(CHAPTER, as_version=4).cells
    (text,) = (cell.source for cell in cells if cell.id == f"experiment-{name}-meaning")
    return re.findall(r"([+−]?\d+\.\d+) ± (\d+\.\d+)", text)


@pytest.mark.parametrize("name", NAMES)
def test_what_the_chapter_says_is_in_the_runs(name):
    """Each "mean ± deviation" of the text is that of an arm, or of its difference to the base: in
    loss (nats, or percent of the base's), or in the largest MaxVio of the main routers."""
    found, base = read_results(name), read_results(name).told["base"]
    spreads = []
    for figure in (lambda run: run["loss"], worst_violation):
        for arm in found.arms:
            own, gap = found.of(arm, figure), found.against(arm, figure)
            spreads += [(own.mean, own.deviation), (gap.mean, gap.deviation)]
            whole = found.of(base, figure).mean
            if whole:
                spreads.append((100 * gap.mean / whole, 100 * gap.deviation / whole))
    claims = said_of(name)
    assert claims
    for mean, deviation in claims:
        digits = len(mean.partition(".")[2])
        wanted = float(mean.replace("−", "-")), float(deviation)
        assert wanted in {(round(m, digits), round(d, digits)) for m, d in spreads}, wanted


def worst_violation(run: dict) -> float:
    """0 for a dense model."""
    main = (v for name, v in run["max_violation"].items() if name.startswith("layers."))
    return max(main, default=0.0)
