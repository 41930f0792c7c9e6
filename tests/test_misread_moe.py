"""What is often read about experts, put into the package for a moment: an oracle must notice.

Each test makes one mistake of chapter 3's table with ``mutated``. The check passes without it and
fails with it, so nothing here could turn into the common error unseen. The oracle is
transformers' DeepSeek-V3 with several groups and biases around -6.
"""

from __future__ import annotations

import pytest
import torch
from test_oracle import BOUND, CASES, gap, random_pair, tokens
from test_training_balance import by_definition, random_scores
from training_cases import ROUTERS, TINY, window

from dsv3 import ModelConfig, load_model, load_tokenizer, moe
from dsv3.book import held_out, mutated
from dsv3.checkpoint.layout import layout
from dsv3.config import QuantizationConfig
from dsv3.model import Transformer
from dsv3.moe import Experts, MoE, Router, sequence_balance
from dsv3.training import objective
from dsv3.training.balance import RouterWatch, update_bias
from dsv3.training.optimizer import make_optimizer
from dsv3.training.routing import expert_counts, specialisation
from dsv3.training.step import StepValues, train_step

pytestmark = pytest.mark.slow

# Larger than what a changed line must do to be called noticed; the oracle's bound is 2e-5.
NOTICED = 1e-3


@pytest.fixture(scope="module")
def departs(tmp_path_factory):
    """A function: how far our logits are from transformers'."""
    theirs, ours = random_pair(tmp_path_factory.mktemp("moe"), CASES["strongly negative bias"])
    text = tokens(ours, 2, 40)
    with torch.inference_mode():
        wanted = theirs(text).logits

    def measure() -> float:
        with torch.inference_mode():
            return gap(ours(text), wanted)

    assert measure() < BOUND
    yield measure
    assert measure() < BOUND


def test_misread_softmax_plus_bias(departs):
    with mutated(
        Router.forward,
        "weights = scores.gather(-1, chosen)",
        "weights = (scores.logit() + self.bias).softmax(-1).gather(-1, chosen)",
    ):
        assert departs() > NOTICED


def test_misread_bias_in_weights(departs):
    with mutated(
        Router.forward, "scores.gather(-1, chosen)", "(scores + self.bias).gather(-1, chosen)"
    ):
        assert departs() > NOTICED


def test_misread_group_score_max(departs):
    with mutated(
        Router.open_groups,
        "grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)",
        "grouped.amax(-1)",
    ):
        assert departs() > NOTICED


def test_misread_mask_zero(departs):
    with mutated(Router.choose, 'float("-inf")', "0.0"):
        assert departs() > NOTICED


@pytest.mark.parametrize(
    "function, old, new",
    [
        (Experts.swiglu, "F.silu(gate)", "F.gelu(gate)"),
        (Router.scores, "logits.sigmoid()", "logits.softmax(-1)"),
        (
            MoE.forward,
            "self.experts(flat, weights, chosen)",
            "flat + self.experts(flat, weights, chosen)",
        ),
        (MoE.forward, "weights, chosen) + shared", "weights, chosen)"),
        (ModelConfig.is_moe, "layer >= self.first_k_dense_replace", "layer >= 0"),
    ],
)
def test_misread_experts_form(departs, tmp_path, function, old, new):
    """GELU, a softmax gate, a residual inside, no shared expert; and experts in every layer."""
    if function is ModelConfig.is_moe:  # another model altogether: its weights do not load
        random_pair(tmp_path, {})
        with mutated(function, old, new), pytest.raises(Exception, match="layers.0"):
            load_model(tmp_path, precision="fp32")
        return
    with mutated(function, old, new):
        assert departs() > NOTICED


def follows_the_rule() -> bool:
    """Whether a training step moves every bias by gamma, up or down by the sign of its load."""
    model = Transformer(TINY).init_weights(0)
    optimizer, watch = make_optimizer(model), RouterWatch(model)
    train_step(model, optimizer, window(), StepValues(learning_rate=1e-3, bias_speed=0.01), watch)
    return all(
        torch.allclose(
            watch.routers[name].bias, 0.01 * torch.sign(16 - watch.load[name]), atol=1e-7
        )
        for name in ROUTERS
    )


def test_misread_bias_by_gradient(as_in_use):
    """No gradient reaches it even if it is asked for; and without the rule it would not move."""
    model = Transformer(TINY).init_weights(0)
    routers = [model.get_submodule(name) for name in ROUTERS]
    for router in routers:
        router.bias.requires_grad_()
    main, extra = objective.losses(model, window())
    objective.objective(main, extra, 0.3).backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers)
    assert all(router.bias.grad is None for router in routers)

    assert follows_the_rule()
    for wrong in ("0.0 * load", "speed * (load.mean() - load) / load.mean()"):
        with mutated(update_bias, "speed * torch.sign(load.mean() - load)", wrong):
            assert not follows_the_rule()


def test_misread_no_auxiliary_loss():
    """Without it, or over the batch instead of the sequence, eq. 17-20 would not come out."""
    scores = random_scores(3, 10, 16)
    wanted = pytest.approx(by_definition(scores, 4), rel=1e-5)
    assert float(sequence_balance(scores, 4)) == wanted
    for old, new in (
        ("(f * p).sum(-1).mean()", "0.0 * (f * p).sum()"),
        ("chosen.mean(-2)", "chosen.mean((0, -2))"),
    ):
        with mutated(sequence_balance, old, new):
            assert float(moe.sequence_balance(scores, 4)) != wanted


def test_misread_memory_of_experts():
    """All experts are in memory, of the files and of a model that is made."""
    large = ModelConfig.deepseek_v3()
    assert sum(t.nbytes for t in layout(large)) == 688_574_839_360  # fact 6
    small = TINY.but(quantization_config=QuantizationConfig())

    def held(config) -> int:
        return sum(value.numel() for value in Transformer(config).state_dict().values())

    made = held(small)

    def listed() -> int:
        return sum(t.numel for t in layout(small, mtp_copies=False) if not t.scale_of)

    assert made == listed()
    few = small.but(n_routed_experts=small.num_experts_per_tok, n_group=1, topk_group=1)
    assert held(few) < made


@torch.inference_mode()
def test_misread_experts_are_topics():
    """Three plays cannot be told by the shipped model's experts, three domains can; with labels
    shuffled the second is gone too, so the measure does not see patterns everywhere."""
    model, tokenizer = load_model("assets/dsv3-mini", "fp32"), load_tokenizer("assets/dsv3-mini")
    windows, domain = held_out.read(tokenizer, 130)
    counts = expert_counts(model, windows)["layers.3.ffn.gate"]
    by_domain = specialisation(counts, domain)
    assert by_domain.bits > 0.3 and by_domain.p_value < 0.01
    by_play = specialisation(counts[domain == 0], held_out.play_labels())
    assert by_play.bits < 0.05 * by_domain.bits and by_play.p_value > 0.05
    mixed = domain[torch.randperm(len(domain), generator=torch.Generator().manual_seed(0))]
    assert specialisation(counts, mixed).bits < 0.2 * by_domain.bits
