"""``dsv3 diff``: a planted fault is found in the part where it was planted."""

from __future__ import annotations

import sys

import pytest
import torch

from dsv3.checkpoint import comparison
from dsv3.checkpoint.comparison import TheirModel, compare
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.saving import save_model
from dsv3.cli import main
from dsv3.config import ModelConfig, QuantizationConfig, YarnScaling
from dsv3.errors import DSV3Error
from dsv3.families import FAMILIES
from dsv3.model import Transformer

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=24,
    q_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=2,
    max_position_embeddings=128,
    initializer_range=0.15,
    routed_scaling_factor=2.5,
)


def save_random(folder, config: ModelConfig = CONFIG, change=lambda model: None) -> None:
    """Random weights; norms and router biases are given values that matter; then ``change``."""
    model = Transformer(config).init_weights(0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if "norm" in name or name.endswith("gate.bias"):
                weight.add_(torch.randn(weight.shape, generator=random), alpha=0.2)
        change(model)
    save_model(model, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diff")
    save_random(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder) -> TheirModel:
    return TheirModel.from_folder(folder)


TOKENS = torch.randint(CONFIG.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))

CASES = {
    "two MTP modules": CONFIG,
    "no MTP, tied embeddings, plain queries": CONFIG.but(
        num_nextn_predict_layers=0, tie_word_embeddings=True, q_lora_rank=None
    ),
    "FP8 with ragged blocks": CONFIG.but(
        hidden_size=192, kv_lora_rank=160, quantization_config=QuantizationConfig()
    ),
    "YaRN, no router bias": CONFIG.but(
        gate_bias=False,
        n_group=1,
        topk_group=1,
        rope_scaling=YarnScaling(
            factor=4.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.0
        ),
    ),
    "Kimi K2's name and ramp": CONFIG.but(
        model_type="kimi_k2",
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
        rope_scaling=YarnScaling(
            factor=4.0,
            original_max_position_embeddings=32,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    "GLM-4.7-Flash's name and heads": CONFIG.but(
        model_type="glm4_moe_lite",
        n_group=1,
        topk_group=1,
        qk_nope_head_dim=24,
        v_head_dim=32,
        first_k_dense_replace=2,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_sound_checkpoint_agrees_in_every_part(tmp_path, capsys, case):
    save_random(tmp_path, CASES[case])
    assert main(["diff", str(tmp_path)]) == 0
    theirs = TheirModel.from_folder(tmp_path).main
    assert type(theirs).__name__ == FAMILIES[CASES[case].model_type].architecture
    shown = capsys.readouterr().out
    assert "layers.2.ffn.gate choices" in shown and "departs" not in shown
    assert ("mtp.0.head" in shown) == (CASES[case].num_nextn_predict_layers > 0)


def swap_halves(weight: torch.Tensor) -> None:
    weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


FAULTS = [
    ("embed.weight", lambda w: w.mul_(1.001), "embed"),
    ("layers.0.attn.wkv_a.weight", lambda w: w[-1].mul_(1.01), "layers.0.attn"),
    ("layers.0.ffn.w3.weight", lambda w: w.mul_(1.001), "layers.0.ffn"),
    ("layers.1.attn.wkv_b.weight", lambda w: w.copy_(w.roll(1, 0)), "layers.1.attn"),
    ("layers.1.attn.q_norm.weight", lambda w: w.fill_(1.0), "layers.1.attn"),
    ("layers.1.ffn.gate.bias", lambda w: w.mul_(-1), "layers.1.ffn.gate choices"),
    ("layers.2.ffn.gate.weight", lambda w: w.mul_(1.0005), "layers.2.ffn.gate weights"),
    ("layers.2.ffn.experts.3.w2.weight", lambda w: w.mul_(1.01), "layers.2.ffn"),
    ("layers.2.ffn.shared_experts.w1.weight", lambda w: w[0].zero_(), "layers.2.ffn"),
    ("norm.weight", lambda w: w.mul_(1.001), "norm"),
    ("head.weight", lambda w: w[5].fill_(float("nan")), "head"),
    ("mtp.0.eh_proj.weight", swap_halves, "mtp.0.eh_proj"),
    ("mtp.0.norm.weight", lambda w: w.fill_(1.0), "mtp.0.norm"),
    ("mtp.1.attn.wo.weight", lambda w: w.mul_(0.99), "mtp.1.attn"),
]


@pytest.mark.parametrize("name, break_it, part", FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_named_where_it_was_planted(folder, theirs, name, break_it, part):
    ours = load_model(folder, "fp32")
    with torch.no_grad():
        break_it(ours.state_dict()[name])
    report = compare(ours, theirs, TOKENS)
    assert report.first is not None and report.first.part == part
    marked = [line for line in str(report).splitlines() if line.endswith("<- departs first")]
    assert len(marked) == 1 and marked[0].startswith(part)


def test_exit_status_and_last_line(folder, capsys, monkeypatch):
    def faulty(*arguments, **options):
        model = load_model(*arguments, **options)
        with torch.no_grad():
            model.layers[1].attn.wo.weight.mul_(1.1)
        return model

    monkeypatch.setattr(comparison, "load_model", faulty)
    assert main(["diff", str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("layers.1.attn is the first")


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DSV3Error, match="without transformers.*pip install"):
        comparison.diff(folder)


@pytest.mark.parametrize(
    "changes, field",
    [(dict(scoring_func="softmax"), "scoring_func"), (dict(gate_bias=False), "gate_bias")],
)
def test_a_router_that_transformers_does_not_have(tmp_path, changes, field):
    save_random(tmp_path, CONFIG.but(**changes))
    with pytest.raises(DSV3Error, match=field):
        comparison.diff(tmp_path)
