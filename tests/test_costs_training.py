"""Parameters and bytes of training layouts: against the checkpoint's tensors, against invariants,
against the simulated pipeline and against the report's figures."""

from collections import Counter
from dataclasses import replace

import pytest

from dsv3 import costs
from dsv3.checkpoint.layout import F8, layout
from dsv3.config import PRESETS, ModelConfig
from dsv3.costs import Layout
from dsv3.errors import DSV3Error
from dsv3.parallel.schedules import dualpipe, one_f_one_b
from dsv3.parallel.timeline import activation_formula, simulate
from dsv3.parallel.traffic import all_reduce_bytes

LARGE = ModelConfig.deepseek_v3()
V3 = costs.V3_LAYOUT


@pytest.mark.parametrize("name", PRESETS)
def test_weights_are_those_of_the_checkpoint(name):
    """Counted tensor by tensor, of each kind and in each layer."""
    config = PRESETS[name]()
    tensors = [t for t in layout(config, mtp_copies=False) if not t.scale_of]
    ours = costs.model_weights(config, mtp=True)
    assert sum(w.numel for w in ours if w.routed) == sum(
        t.numel for t in tensors if t.expert is not None
    )
    for cut in (True, False):
        assert sum(w.numel for w in ours if w.cut == cut and not w.routed) == sum(
            t.numel for t in tensors if (t.shard_dim is not None) == cut and t.expert is None
        )
    if config.quantization_config:
        assert sum(w.numel for w in ours if w.fp8) == sum(t.numel for t in tensors if t.dtype == F8)
    by_layer = Counter()
    for t in tensors:
        if t.name.startswith("layers."):
            by_layer[int(t.name.split(".")[1])] += t.numel
    for layer in range(config.num_hidden_layers):
        assert sum(w.numel for w in costs.layer_weights(config, layer)) == by_layer[layer]
    main = sum(t.numel for t in tensors if t.part == "main")
    assert costs.parameter_count(config) == main
    assert costs.parameter_count(config, mtp=True) == sum(t.numel for t in tensors)


def test_parameters_as_the_report_counts_them():
    # fact 1, 2, 3
    assert costs.parameter_count(LARGE) == 671_026_419_200
    assert costs.activated_parameters(LARGE) == 37_552_297_472
    assert costs.activated_parameters(LARGE, embedding=False) == 36_625_618_432
    mtp = costs.parameter_count(LARGE, mtp=True) - costs.parameter_count(LARGE)
    assert mtp == 11_610_068_224 == 11_507_307_776 + 2 * 7168**2


def test_plain_training_takes_16_bytes_a_parameter_and_134_gpus_by_their_label():
    nbytes = costs.PLAIN.bytes_per_parameter * costs.parameter_count(LARGE)
    assert nbytes == 16 * 671_026_419_200
    assert nbytes / 80e9 == pytest.approx(134.2, abs=0.01)
    assert costs.gpus_needed(nbytes, 80e9) == 135
    assert costs.gpus_needed(nbytes, 80 * 2**30) == 125
    assert costs.gpus_needed(nbytes) == 126  # the 81,559 MiB that the driver reports
    assert costs.REPORT.bytes_per_parameter == 14


SMALL = ModelConfig.mini()
LAYOUTS = [
    (LARGE, V3),
    (LARGE, Layout(pp=8, dp=32, ep=32)),
    (LARGE, Layout(pp=1, dp=64, ep=16)),
    (LARGE, Layout(pp=61, dp=4, ep=2)),
    (SMALL, Layout(pp=4, dp=4, ep=2, dualpipe=True)),
    (SMALL, Layout(pp=5, dp=16, ep=16)),
]


@pytest.mark.parametrize("config, layout", LAYOUTS)
def test_fully_sharded_nothing_is_held_twice(config, layout):
    """With ZeRO-3 the ranks together have each number once, however they share it out."""
    ranks = costs.training_memory(config, replace(layout, zero=3))
    everything = costs.parameter_count(config, mtp=True)
    first = config.vocab_size * config.hidden_size
    if layout.pp > 1 and not layout.dualpipe:
        everything += first  # the MTP module's own embedding, far from the first stage
    for name, nbytes in (("weights", 2), ("gradients", 4), ("master", 4), ("moments", 2 + 2)):
        held = layout.dp * sum(getattr(memory, name) for memory in ranks)
        assert held == pytest.approx(nbytes * everything, rel=1e-12), name


@pytest.mark.parametrize("config, layout", LAYOUTS)
def test_each_stage_of_zero_shares_out_one_thing_more(config, layout):
    stages = [costs.training_memory(config, replace(layout, zero=zero)) for zero in range(4)]
    shared = [set(), {"master", "moments"}, {"gradients"}, {"weights"}]
    for zero in (1, 2, 3):
        for before, after in zip(stages[zero - 1], stages[zero]):
            for name in vars(after):
                less = getattr(after, name) < getattr(before, name)
                assert less == (name in shared[zero])


def test_a_rank_by_hand():
    """Two stages, two data-parallel ranks, of which each has half of the experts."""
    c = ModelConfig.mini().but(num_nextn_predict_layers=0)
    ranks = costs.training_memory(c, Layout(pp=2, dp=2, ep=2, zero=1))
    attention = (
        192 * 256 + 256 + 256 * 16 * 96 + 192 * 160 + 128 + 128 * 16 * 128 + 16 * 64 * 192 + 2 * 192
    )
    expert = 3 * 192 * 512
    dense = 2 * (attention + expert) + 2048 * 192
    others = 2 * (attention + 16 * 192 + 16 + expert) + 192 + 2048 * 192
    experts = 2 * 16 * expert / 2  # on this rank; nobody else of its stage has them
    assert [rank.weights for rank in ranks] == [2 * dense, 2 * (others + experts)]
    assert [rank.gradients for rank in ranks] == [4 * dense, 4 * (others + experts)]
    assert [rank.master for rank in ranks] == [2 * dense, 4 * (others / 2 + experts)]
    assert costs.worst(ranks) == ranks[1]
    assert costs.mean(ranks).total == (ranks[0].total + ranks[1].total) / 2


def test_tensor_parallelism_cuts_matrices_and_repeats_the_rest():
    one = costs.training_memory(LARGE, Layout(dp=8, ep=8))[0]
    two = costs.training_memory(LARGE, Layout(dp=4, ep=8, tp=2))[0]
    weights = costs.model_weights(LARGE, mtp=True)
    cut = sum(w.numel for w in weights if w.cut and not w.routed)
    assert one.weights - two.weights == cut  # half of their 2 bytes


def test_dualpipe_holds_two_stages_on_each_rank():
    single = costs.training_memory(LARGE, replace(V3, zero=0, dualpipe=False))
    double = costs.training_memory(LARGE, replace(V3, zero=0))
    embedding = 2 * LARGE.vocab_size * LARGE.hidden_size
    for rank in range(16):
        both = single[rank].weights + single[15 - rank].weights
        shared = embedding if rank in (0, 15) else 0  # one for the first stage and for the MTP
        assert double[rank].weights == both - shared
    assert double[3] == double[12]


def test_fp8_takes_weights_of_linear_layers_only():
    formats = costs.Formats("fp8", "fp32", "fp32", "bf16")
    memory = costs.training_memory(LARGE, Layout(), formats)[0]
    tensors = layout(LARGE, mtp_copies=False)
    assert memory.weights == pytest.approx(sum(t.nbytes for t in tensors), rel=1e-5)


def test_the_reports_cluster_needs_zero_and_recomputation():
    """One text of 4,096 tokens a micro-batch; the report gives neither its size nor these bytes."""
    assert V3.ranks == 2048 and V3.ep * 32 == 2048
    assert [len(layers) for layers in costs.stage_layers(LARGE, 16)] == [3, *[4] * 14, 3]
    fits = costs.worst(costs.training_memory(LARGE, V3, tokens=4096))
    assert 60e9 < fits.total < costs.H800_MEMORY
    without = costs.worst(costs.training_memory(LARGE, replace(V3, zero=0), tokens=4096))
    assert without.total > costs.H800_MEMORY
    kept = costs.worst(costs.training_memory(LARGE, V3, tokens=4096, recompute=False))
    assert kept.total > 2 * costs.H800_MEMORY


def test_zero_finds_little_to_share_among_experts():
    """Four ranks have the same experts, 256 everything else."""
    expert = next(w for w in costs.model_weights(LARGE) if w.routed)
    other = next(w for w in costs.model_weights(LARGE) if not w.routed)
    assert (V3.replicas(expert), V3.replicas(other)) == (4, 256)
    assert V3.held(expert) == 4 * 3 * 7168 * 2048  # four experts of a layer


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_live_activations_are_those_of_the_simulation(pp):
    plain = simulate(one_f_one_b(pp, 2 * pp))
    for rank in range(pp):
        assert Layout(pp=pp).live(rank) == max(held for _, held in plain.live(rank))
    both = Layout(pp=pp, dualpipe=True)
    peak = simulate(dualpipe(pp, 2 * pp)).peak_activations
    assert {both.live(rank) for rank in range(pp)} == {peak} == {activation_formula("DualPipe", pp)}


def test_activations_of_a_layer_by_hand():
    kept = costs.activation_bytes(LARGE, 10)
    assert kept["states before the norms"] == 4 * 7168
    assert kept["latents"] == 2 * (512 + 64 + 1536)
    assert kept["attention output"] == 128 * 128 * 1.5 + 128 * 4  # one scale for every 128
    assert kept["tokens at experts"] == 8 * 7392  # as they are dispatched
    assert kept["SwiGLU inputs"] == 9 * (4096 + 4 * 32)
    everything = costs.activation_bytes(LARGE, 10, recompute=False)
    assert everything["queries, keys, values"] == 2 * 128 * (192 + 192 + 128)
    assert sum(everything.values()) > 3.5 * sum(kept.values())
    dense = costs.activation_bytes(LARGE, 0)
    assert "tokens at experts" not in dense
    assert dense["SwiGLU inputs"] == 2 * 18432 * (1 + 4 / 128)


def test_activations_grow_with_the_stages_layers_and_their_micro_batches():
    one = costs.training_memory(LARGE, replace(V3, dualpipe=False), tokens=4096)
    layer = sum(costs.activation_bytes(LARGE, 10).values())
    assert one[2].activations == pytest.approx((16 - 2) * 4 * 4096 * layer, rel=1e-12)
    both = costs.training_memory(LARGE, V3, tokens=4096)
    assert both[2].activations == pytest.approx(17 * 4 * 4096 * layer, rel=1e-12)


@pytest.mark.parametrize(
    "sizes, named",
    [
        ({"pp": 0}, "pp"),
        ({"pp": 63}, "pp"),
        ({"pp": 15, "dualpipe": True}, "pp"),
        ({"dp": 6, "ep": 4}, "ep"),
        ({"dp": 3, "ep": 3}, "n_routed_experts"),
        ({"tp": 3}, "num_attention_heads"),
        ({"zero": 4}, "zero"),
    ],
)
def test_layouts_that_cannot_be_are_named(sizes, named):
    with pytest.raises(DSV3Error) as error:
        costs.training_memory(LARGE, Layout(**sizes))
    assert error.value.where == named and error.value.expected


def test_unknown_formats_and_activations_of_cut_layers_are_refused():
    with pytest.raises(DSV3Error, match="fp4"):
        costs.Formats("fp4", "fp32", "fp32", "bf16")
    with pytest.raises(DSV3Error, match="tensor parallelism"):
        costs.training_memory(LARGE, Layout(tp=2), tokens=1)


def test_zero_1_sends_as_much_as_an_all_reduce_or_less():
    """Gradients in FP32, weights in BF16: 4 + 2 bytes a parameter instead of 4 + 4."""
    reduced = costs.data_parallel_bytes(LARGE, replace(V3, zero=0))
    sharded = costs.data_parallel_bytes(LARGE, V3)
    assert [s / r for s, r in zip(sharded, reduced)] == pytest.approx([0.75] * 16)
    c = ModelConfig.mini().but(num_nextn_predict_layers=0)
    one = costs.data_parallel_bytes(c, Layout(dp=4, ep=2))[0]
    weights = costs.model_weights(c)
    routed = sum(w.numel for w in weights if w.routed)
    others = sum(w.numel for w in weights) - routed
    assert one == all_reduce_bytes(4 * others, 4) + all_reduce_bytes(4 * routed / 2, 2)
    assert costs.data_parallel_bytes(c, Layout(ep=1)) == [0]
    with pytest.raises(DSV3Error, match="0 to 2"):
        costs.data_parallel_bytes(c, Layout(zero=3))
