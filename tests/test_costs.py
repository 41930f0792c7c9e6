"""Arithmetic of costs, against the papers' figures, against counted FLOPs and against counting."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3 import ModelConfig, costs
from dsv3.cache import LatentCache, Step
from dsv3.model import Transformer

LARGE = ModelConfig.deepseek_v3()
META = torch.device("meta")


def test_cache_of_one_token_as_the_paper_prints_it():
    # fact 7, 8, 9
    mla = costs.latent_bytes_per_token(LARGE)
    assert mla == 70_272
    assert costs.PEERS["Qwen2.5-72B"].bytes_per_token() == 327_680
    assert costs.PEERS["LLaMA-3.1-405B"].bytes_per_token() == 516_096
    assert 327_680 / mla == pytest.approx(4.66, abs=5e-3)
    assert 516_096 / mla == pytest.approx(7.344, abs=5e-4)  # printed as 7.28
    assert costs.as_mha(LARGE).bytes_per_token() == 3_997_696
    assert costs.as_mha(LARGE, with_position=True).bytes_per_token() == 4_997_120
    assert costs.as_gqa(LARGE, 8).bytes_per_token() == 249_856
    assert costs.as_gqa(LARGE, 1).bytes_per_token() == 31_232
    assert mla / costs.as_gqa(LARGE, 1).bytes_per_token() == 2.25


def test_an_actual_cache_holds_as_many_bytes():
    # fact 7
    cache = LatentCache(LARGE, LARGE.num_hidden_layers, 1, 10, torch.bfloat16, META)
    assert cache.data.nbytes == 10 * costs.latent_bytes_per_token(LARGE)


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("queries, keys", [(1, 40), (7, 40), (40, 40)])
def test_flops_of_the_core_are_those_that_torch_counts(form, queries, keys):
    config = ModelConfig.mini().but(
        qk_nope_head_dim=48,
        v_head_dim=80,
        kv_lora_rank=96,
        qk_rope_head_dim=64,
        num_hidden_layers=1,
    )
    attention = Transformer(config, device=META).layers[0].attn
    heads = config.num_attention_heads
    step = Step.make(config, [keys - queries], [queries], queries, torch.device("cpu"))
    q_nope = torch.empty(1, queries, heads, 48, device=META)
    q_rope = torch.empty(1, queries, heads, 64, device=META)
    seen = torch.empty(1, keys, config.latent_dim, device=META)
    mask = None if step.mask is None else step.mask.to(META)
    step = replace(step, mask=mask)
    with FlopCounterMode(display=False) as counter:
        getattr(attention, form)(q_nope, q_rope, seen, step)
    expected = costs.latent_core(config, queries, keys, form).flops
    if form == "expanded":  # values are padded to the keys' width, see LatentUpProjection
        expected += 2 * queries * keys * heads * (config.qk_head_dim - config.v_head_dim)
    assert counter.get_total_flops() == expected


def test_the_forms_do_equal_work_at_the_break_even():
    assert costs.break_even_queries(LARGE) == pytest.approx(170.67, abs=5e-3)
    assert costs.break_even_queries(ModelConfig.mini()) == 128
    for keys in (1000, 100_000):
        meet = costs.break_even_queries(LARGE, keys)
        expanded, absorbed = (
            costs.latent_core(LARGE, meet, keys, form).flops for form in ("expanded", "absorbed")
        )
        assert expanded == pytest.approx(absorbed, rel=1e-12)
    narrow = LARGE.but(kv_lora_rank=64)
    assert costs.break_even_queries(narrow) == float("inf")
    with pytest.raises(ValueError, match="naive"):
        costs.latent_core(LARGE, 1, 1, "naive")


def test_decoding_reads_the_cache_once_in_the_absorbed_form_and_far_more_expanded():
    keys = 4096
    absorbed, expanded = (
        costs.latent_core(LARGE, 1, keys, form) for form in ("absorbed", "expanded")
    )
    weights = 128 * 256 * 512
    by_hand = 2 * (keys * 576 + weights + 128 * 320)
    assert absorbed.bytes == by_hand
    assert expanded.bytes - by_hand == 2 * 2 * keys * 128 * 320


def test_few_rows_wait_for_memory_and_many_for_arithmetic():
    assert costs.ridge_point() == pytest.approx(295.2, abs=0.1)
    one, many = costs.linear(1, 7168, 7168), costs.linear(4096, 7168, 7168)
    assert one.intensity == pytest.approx(1, abs=1e-3) and many.intensity > costs.ridge_point()
    assert one.seconds() == one.bytes / costs.H800_BYTES
    assert many.seconds() == many.flops / costs.H800_FLOPS
    both = one + many
    assert (both.flops, both.bytes) == (one.flops + many.flops, one.bytes + many.bytes)


def test_plain_attention_does_the_same_work_with_fewer_key_heads_and_reads_less():
    mha, gqa = costs.as_mha(LARGE), costs.as_gqa(LARGE, 8)
    one, other = costs.plain_core(mha, 1, 4096), costs.plain_core(gqa, 1, 4096)
    assert one.flops == other.flops == 2 * 4096 * 128 * 256
    assert one.bytes > 15 * other.bytes


def test_expected_groups_equal_counting_every_choice():
    # fact 25
    assert costs.expected_groups(LARGE) == pytest.approx(5.2947, abs=5e-5)
    small = ModelConfig.mini().but(n_routed_experts=12, n_group=4, num_experts_per_tok=3)
    visited = [
        len({expert // 3 for expert in choice}) for choice in itertools.combinations(range(12), 3)
    ]
    assert costs.expected_groups(small) == pytest.approx(sum(visited) / len(visited), rel=1e-12)
