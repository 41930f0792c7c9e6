"""The two forms of latent attention in float64, and the packed cache."""

from dataclasses import replace

import torch

from dsv3 import ModelConfig, costs
from dsv3.cache import Step
from dsv3.fp8 import quantize_activation
from dsv3.mla import MLA
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

CPU = torch.device("cpu")


@torch.no_grad()
def test_absorbed_equals_expanded_in_float64():
    # fact 11; eq. 2, 4, 5, 9, 10
    config = ModelConfig.mini().but(
        qk_nope_head_dim=48,
        v_head_dim=80,
        kv_lora_rank=96,
        qk_rope_head_dim=64,
        num_attention_heads=4,
    )
    precision = replace(Precision.of("fp32", config), exact=True)
    attention = MLA(config, precision, TensorGroup.single())
    draw = torch.Generator().manual_seed(0)
    for weight in attention.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[-1] ** 0.5)
    for queries, keys in ((1, 700), (9, 40), (300, 300)):
        step = Step.make(config, [keys - queries], [queries], queries, CPU)
        q_nope, q_rope, seen = (
            torch.randn(*shape, generator=draw, dtype=torch.float64)
            for shape in ((1, queries, 4, 48), (1, queries, 4, 64), (1, keys, 96 + 64))
        )
        expanded, absorbed = (
            form(q_nope, q_rope, seen, step) for form in (attention.expanded, attention.absorbed)
        )
        assert (expanded - absorbed).abs().max() < 1e-12 * expanded.abs().max()


def test_a_token_packs_into_656_bytes_a_layer():
    """FlashMLA's FP8 format: 512 E4M3 codes, 4 float32 scales, 64 bfloat16 of rotated key."""
    # fact 10
    draw = torch.Generator().manual_seed(0)
    latent = torch.randn(7, 512, generator=draw).bfloat16()
    key = torch.randn(7, 64, generator=draw).bfloat16()
    codes = quantize_activation(latent)
    rows = torch.cat(
        [part.contiguous().view(torch.uint8) for part in (codes.data, codes.scale, key)], 1
    )
    assert rows.shape == (7, 656) and rows.dtype == torch.uint8
    layers = ModelConfig.deepseek_v3().num_hidden_layers
    assert 656 * layers == 40_016 < costs.latent_bytes_per_token(ModelConfig.deepseek_v3())
    packed, scales, rotated = (part.contiguous() for part in rows.split([512, 16, 128], 1))
    assert torch.equal(rotated.view(torch.bfloat16), key)
    values = packed.view(torch.float8_e4m3fn).float().view(7, 4, 128)
    restored = (values * scales.view(torch.float32)[..., None]).flatten(1)
    assert float((restored - latent).norm() / latent.float().norm()) < 0.027
