"""The table of tensors against published totals and a list of names written by hand."""

from collections import Counter

import pytest
from checkpoints import released_shapes, tiny_config

from dsv3.checkpoint.layout import TABLE, check_sharding, layout, valid_sizes
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error


@pytest.fixture(scope="module")
def v3():
    return layout(ModelConfig.deepseek_v3())


def test_671b_dtype_totals_are_the_published_ones(v3):
    # fact 4, 5
    count = Counter()
    for spec in v3:
        count[spec.dtype] += spec.numel
    assert count == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert count.total() == 684_531_386_000


def test_671b_tensor_count_and_bytes(v3):
    # fact 6
    assert Counter(spec.part for spec in v3) == {"main": 90_427, "mtp": 1_564}
    assert sum(spec.nbytes for spec in v3) == 688_574_839_360
    assert len({spec.hf_name for spec in v3}) == len({spec.name for spec in v3}) == len(v3)


def test_671b_parameters(v3):
    # fact 1, 3
    weights = [spec for spec in v3 if not spec.scale_of]
    assert sum(s.numel for s in weights if s.part == "main") == 671_026_419_200
    assert sum(s.numel for s in weights if s.part == "mtp" and not s.copy_of) == 11_610_068_224
    assert 11_610_068_224 - 7168 * 2 * 7168 == 11_507_307_776  # without eh_proj, as printed
    assert len(layout(ModelConfig.deepseek_v3(), mtp_copies=False)) == len(v3) - 2


def test_ragged_scale_grid(v3):
    # fact 42
    by_name = {spec.hf_name: spec for spec in v3}
    weight = by_name["model.layers.7.self_attn.kv_a_proj_with_mqa.weight"]
    assert weight.shape == (576, 7168) and weight.scale.shape == (5, 56)
    assert by_name[weight.hf_name + "_scale_inv"] == weight.scale
    assert weight.scale.name == "layers.7.attn.wkv_a.scale"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"tie_word_embeddings": True},
        {"gate_bias": False},
        {"quantization_config": None},
        {"num_nextn_predict_layers": 2},
        {"n_shared_experts": 2},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 5},
    ],
)
@pytest.mark.parametrize("copies", [True, False])
def test_names_and_shapes_of_variants(changes, copies):
    config = tiny_config(**changes)
    quantized = config.quantization_config is not None
    dtype = {"F8": "F8_E4M3" if quantized else "BF16", "BF16": "BF16", "F32": "F32"}
    expected = {}
    for name, (kind, shape) in released_shapes(config, copies).items():
        expected[name] = (dtype[kind], shape)
        if kind == "F8" and quantized:
            expected[name + "_scale_inv"] = ("F32", tuple(-(-n // 128) for n in shape))
    found = {s.hf_name: (s.dtype, s.shape) for s in layout(config, mtp_copies=copies)}
    assert found == expected


def test_table_has_three_vocabularies_and_covers_the_layout(v3):
    assert all(row.hf and row.name and row.symbol for row in TABLE)
    rows = {(row.symbol, row.dtype) for row in TABLE}
    assert {(s.symbol, s.dtype) for s in v3 if not s.scale_of} <= rows


def test_671b_divides_by_1_2_4_8_16_only():
    # fact 43
    assert valid_sizes(ModelConfig.deepseek_v3()) == [1, 2, 4, 8, 16]
    with pytest.raises(DSV3Error) as error:
        check_sharding(ModelConfig.deepseek_v3(), 32)
    for part in ("mlp.gate_proj", "18432", "576", "128", "[1, 2, 4, 8, 16]"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "changes, size, field",
    [
        ({"num_attention_heads": 3}, 2, "num_attention_heads"),
        ({"n_routed_experts": 6}, 4, "n_routed_experts"),
        ({"vocab_size": 66}, 4, "vocab_size"),
        ({"intermediate_size": 640}, 2, "model.layers.0.mlp.gate_proj.weight"),
        ({"moe_intermediate_size": 320}, 2, "model.layers.1.mlp.shared_experts.gate_proj.weight"),
        (
            {"v_head_dim": 32, "qk_nope_head_dim": 224, "qk_rope_head_dim": 32},
            4,
            "model.layers.0.self_attn.o_proj.weight",
        ),
    ],
)
def test_what_cannot_be_cut_is_named(changes, size, field):
    with pytest.raises(DSV3Error, match=field):
        check_sharding(tiny_config(**changes), size)


def test_blocks_matter_only_where_there_are_some():
    config = tiny_config(intermediate_size=640, quantization_config=None)
    check_sharding(config, 2)
    with pytest.raises(DSV3Error, match="FP8 block"):
        check_sharding(config, 2, blocks=True)  # an unquantised checkpoint to be run in fp8


def test_slices_of_all_ranks_cover_every_tensor_once():
    config = tiny_config()
    for spec in layout(config):
        parts = [spec.slice_for(rank, 4, config.n_routed_experts) for rank in range(4)]
        if spec.expert is not None:
            assert [p is not None for p in parts].count(True) == 1
        elif spec.shard_dim is None:
            assert all(p == tuple(range(n) for n in spec.shape) for p in parts)
        else:
            cut = [i for p in parts for i in p[spec.shard_dim]]
            assert cut == list(range(spec.shape[spec.shard_dim]))
