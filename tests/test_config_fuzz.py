"""config.json damaged with fixed seeds: what comes out is a config that works or one clear line."""

import json
import math
import random

import pytest
import torch
from fuzz import bytes_of, json_of, survives
from test_config import GLM, KIMI_K2, RELEASED

from dsv3 import ModelConfig
from dsv3.checkpoint.layout import layout, valid_sizes
from dsv3.config import QuantizationConfig, YarnScaling
from dsv3.costs import break_even_queries, expected_groups
from dsv3.errors import DSV3Error
from dsv3.rope import inverse_frequencies, rotation_scale, softmax_scale

pytestmark = pytest.mark.slow


def use(config: ModelConfig) -> ModelConfig:
    """What is computed from a config before any weight is read: all of it finite and positive."""
    assert ModelConfig.from_dict(json.loads(config.to_json())) == config
    assert 1 in valid_sizes(config)
    frequencies = inverse_frequencies(config)
    assert frequencies.isfinite().all() and (frequencies > 0).all()
    for number in (rotation_scale(config), softmax_scale(config), expected_groups(config)):
        assert math.isfinite(number) and number > 0
    assert break_even_queries(config) > 0
    return config


@pytest.mark.parametrize(
    "seed, published",
    [(0, RELEASED), (1, KIMI_K2), (2, GLM)],
    ids=["deepseek_v3", "kimi_k2", "glm4_moe_lite"],
)
def test_damaged_values(tmp_path, seed, published):
    refused = []
    for text in json_of(published, 500, seed):
        (tmp_path / "config.json").write_text(text)
        refused.append(survives(lambda: use(ModelConfig.from_pretrained(tmp_path))))
    lines = [line for line in refused if line]
    assert 0.4 < len(lines) / len(refused) < 0.95
    assert all(str(tmp_path) in line for line in lines)


def test_damaged_bytes(tmp_path):
    for data in bytes_of(json.dumps(KIMI_K2, indent=1).encode(), 500, seed=1):
        (tmp_path / "config.json").write_bytes(data)
        survives(lambda: use(ModelConfig.from_pretrained(tmp_path)))


def test_sizes_of_every_magnitude():
    """Each field by itself, and several together, from 1 to 2^40 and beyond what float holds."""
    choose = random.Random(5)
    whole = [name for name, value in RELEASED.items() if type(value) is int]
    real = ["rms_norm_eps", "rope_theta", "routed_scaling_factor", "initializer_range"]
    works = 0
    for _ in range(600):
        fields = dict(RELEASED, rope_scaling=dict(RELEASED["rope_scaling"]))
        for _ in range(choose.choice((1, 1, 2, 4))):
            exponent = choose.uniform(0, 40)
            fields[choose.choice(whole)] = int(2**exponent)
            fields[choose.choice(real)] = choose.choice((2.0**-exponent, 2.0**exponent, 1e308))
            key = choose.choice(
                [
                    "factor",
                    "beta_fast",
                    "beta_slow",
                    "mscale",
                    "mscale_all_dim",
                    "original_max_position_embeddings",
                ]
            )
            fields["rope_scaling"][key] = choose.choice((int(2**exponent), 2.0**-exponent, 1e308))
            works += survives(lambda fields=fields: use(ModelConfig.from_dict(fields))) is None
    assert works > 20


def test_the_largest_config_that_is_believed_is_counted():
    """1,023 dense layers of 20 tensors, and one with as many experts as there may be."""
    config = ModelConfig(
        vocab_size=2**24,
        hidden_size=2**17,
        intermediate_size=2**20,
        moe_intermediate_size=2**20,
        num_hidden_layers=1024,
        num_attention_heads=4096,
        n_routed_experts=2**14,
        num_experts_per_tok=2**14,
        kv_lora_rank=2**16,
        q_lora_rank=2**16,
        qk_nope_head_dim=2**13,
        qk_rope_head_dim=2**13,
        v_head_dim=2**13,
        n_shared_experts=1024,
        first_k_dense_replace=1023,
        max_position_embeddings=2**24,
        quantization_config=QuantizationConfig(),
    )
    assert len(layout(use(config))) == 1023 * 20 + 14 + 2 + 6 * 2**14 + 6 + 3
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "n_routed_experts"):
        with pytest.raises(DSV3Error, match=name):
            config.but(**{name: 2 * getattr(config, name)})
    with pytest.raises(DSV3Error, match="n_routed_experts.*65,536"):
        config.but(first_k_dense_replace=1019)


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), 10**400, 10**5000, True, "1", [], {}],
    ids=lambda value: str(value)[:9] if value != 10**5000 else "5000 digits",
)
def test_arguments_are_checked_as_fields_are(value):
    for name in (
        "hidden_size",
        "rope_theta",
        "q_lora_rank",
        "model_type",
        "rope_scaling",
        "quantization_config",
        "eos_token_id",
        "norm_topk_prob",
        "scoring_func",
    ):
        if (name, value) not in [("norm_topk_prob", True), ("eos_token_id", [])]:
            assert name in survives(lambda name=name: ModelConfig.mini().but(**{name: value}))
    for name in ("factor", "original_max_position_embeddings", "beta_fast", "mscale"):
        assert name in survives(
            lambda name=name: YarnScaling(
                **{"factor": 2.0, "original_max_position_embeddings": 16, name: value}
            )
        )


def test_a_ramp_of_no_width_slows_the_pairs_above_it():
    """Kimi K2's equal betas: pairs that turn at least once in 4,096 tokens are left alone."""
    config = ModelConfig.kimi_k2()
    plain = inverse_frequencies(config.but(rope_scaling=None))
    slowed = plain / inverse_frequencies(config)
    turns = plain * 4096 / (2 * torch.pi)
    torch.testing.assert_close(slowed[turns > 1.5], torch.ones(int((turns > 1.5).sum())))
    torch.testing.assert_close(slowed[turns < 0.9], torch.full((int((turns < 0.9).sum()),), 32.0))
