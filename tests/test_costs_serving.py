"""Experts' traffic, serving, budget: recomputed, against what was published."""

import pytest

from dsv3 import costs
from dsv3.checkpoint.layout import layout
from dsv3.config import PRESETS, ModelConfig
from dsv3.parallel.traffic import all_reduce_bytes

LARGE = ModelConfig.deepseek_v3()
PREFILL, DECODING, PREFILL_LATER, DECODING_LATER = costs.DEPLOYMENTS


# --- tokens on their way ----------------------------------------------------------------------


def test_bytes_to_an_expert_and_back():
    assert costs.dispatch_bytes(LARGE) == 7168 + 4 * 56 == 7392
    assert costs.combine_bytes(LARGE) == 14_336
    assert costs.expert_bytes(LARGE) == (4 * 21_728, 8 * 21_728)
    ragged = LARGE.but(hidden_size=7168 + 64)
    assert costs.dispatch_bytes(ragged) == 7232 + 4 * 57  # a scale for the last half tile too


def test_thirteen_experts_cost_what_eight_do():
    # fact 26
    assert costs.REPORT_LINKS.ratio == 3.2
    room = costs.experts_at_no_cost(LARGE)
    assert room == pytest.approx(4 * 3.2) and round(room) == 13
    for experts in (8, room):
        between, inside = costs.expert_seconds(LARGE, experts=experts)
        assert between == pytest.approx(4 * 21_728 / 50e9) and inside <= between * (1 + 1e-12)
    for links in (costs.NOMINAL_LINKS, costs.EFFECTIVE_LINKS):
        assert links.ratio == 4 and costs.experts_at_no_cost(LARGE, links) == 16


def test_fewer_nodes_mean_less_on_the_slow_links():
    # fact 25
    free = costs.expected_groups(LARGE)
    limited, everywhere = costs.expert_bytes(LARGE)[0], costs.expert_bytes(LARGE, nodes=free)[0]
    assert everywhere / limited == pytest.approx(5.2947 / 4, abs=1e-4)
    assert costs.expert_bytes(LARGE, nodes=8)[0] == 2 * limited  # one copy per expert


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_tensor_parallelism_sends_two_sums_a_layer(ranks):
    state = 2 * LARGE.hidden_size
    assert costs.tensor_bytes(LARGE, ranks) == 2 * all_reduce_bytes(state, ranks)
    assert costs.tensor_seconds(LARGE, ranks) == pytest.approx(
        ranks * 2 * all_reduce_bytes(state, ranks) / 160e9
    )


def test_over_a_node_sums_keep_links_busy_for_longer_than_experts():
    microseconds = [1e6 * costs.tensor_seconds(LARGE, ranks) for ranks in (4, 8)]
    assert microseconds == pytest.approx([1.0752, 2.5088])
    assert 1e6 * max(costs.expert_seconds(LARGE)) == pytest.approx(1.73824)


# --- serving ----------------------------------------------------------------------------------


def test_experts_fill_the_gpus():
    # fact 57
    assert 32 + 256 == 32 * 9 == PREFILL.gpus * PREFILL.slots
    assert 320 == 256 + 64 == DECODING.gpus * DECODING.slots
    assert [d.spare(LARGE) for d in costs.DEPLOYMENTS] == [32, 64, 32, 32]
    assert [d.dp for d in costs.DEPLOYMENTS] == [8, 80, 32, 144]
    assert [d.nodes for d in costs.DEPLOYMENTS] == [4, 40, 4, 18]


def test_weights_of_a_serving_gpu_are_those_of_the_checkpoint():
    """Counted in the released files: one expert of 288, a quarter of attention, the rest whole."""
    tensors = layout(LARGE, mtp=False)
    routed = sum(t.nbytes for t in tensors if t.expert is not None) / 256
    shared = sum(t.nbytes for t in tensors if "shared_experts" in t.name)
    heads = sum(t.nbytes for t in tensors if ".attn." in t.name and t.shard_dim is not None)
    rest = sum(t.nbytes for t in tensors if t.expert is None) - shared - heads
    for deployment, experts in zip(costs.DEPLOYMENTS, (9, 1, 9, 2)):
        expected = experts * routed + heads / deployment.tp + rest
        expected += shared if deployment.shared else 0
        assert costs.serving_bytes(LARGE, deployment) == pytest.approx(expected, rel=1e-5)


def test_what_is_served_fits_and_leaves_room():
    for deployment in costs.DEPLOYMENTS:
        nbytes = costs.serving_bytes(LARGE, deployment)
        tokens = costs.cache_tokens(LARGE, deployment)
        assert nbytes < 0.5 * costs.H800_MEMORY
        assert nbytes + tokens * 70_272 == pytest.approx(costs.H800_MEMORY)
    # The texts of the published day, at their mean length, need about half of what is left.
    texts = costs.DAY.texts_per_gpu[1]
    used = texts * costs.DAY.cached / costs.cache_tokens(LARGE, DECODING_LATER)
    assert 84 < texts < 93 and 0.45 < used < 0.6
    one = costs.Deployment("all on one", "nobody", 1, 1, 256, True)
    assert costs.cache_tokens(LARGE, one) < 0


def test_the_least_time_of_a_token():
    """ISCA 2.3.2; its 7K is 7,000."""
    # fact 21
    assert costs.exchange_seconds(LARGE, width=7000) == pytest.approx(120.96e-6, rel=1e-12)
    slow = costs.token_seconds(LARGE, width=7000)
    assert slow == pytest.approx(14.76e-3, rel=1e-3) and int(1 / slow) == 67
    fast = costs.token_seconds(LARGE, width=7000, bandwidth=900e9)
    assert fast == pytest.approx(0.82e-3, rel=1e-3) and 1 / fast == pytest.approx(1200, rel=0.02)
    assert costs.exchange_seconds(LARGE, width=7000, bandwidth=900e9) == pytest.approx(6.72e-6)
    assert costs.exchange_seconds(LARGE) == pytest.approx(123.86e-6, rel=1e-4)
    assert costs.token_seconds(LARGE) == pytest.approx(15.11e-3, rel=1e-3)


def test_two_micro_batches_hide_the_shorter_half():
    assert costs.layer_seconds(3, 2) == costs.layer_seconds(3, 3) == 6
    assert costs.layer_seconds(2, 3) == 6
    assert costs.layer_seconds(3, 2, overlap=False) == 10


# --- what it took -----------------------------------------------------------------------------


def test_the_budget_adds_up():
    # fact 19, 20
    budget = costs.V3_BUDGET
    assert sum(budget.hours.values()) == 2_788_000
    assert sum(budget.dollars.values()) == 5_576_000
    assert [round(d / 1e6, 3) for d in budget.dollars.values()] == [5.328, 0.238, 0.010]
    trillions = costs.PRETRAINING_TOKENS / 1e12
    assert costs.HOURS_PER_TRILLION * trillions == budget.hours["pre-training"]
    days = costs.HOURS_PER_TRILLION / budget.gpus / 24
    assert days == pytest.approx(3.7, rel=0.02)
    assert budget.days["pre-training"] == pytest.approx(54, rel=0.02)
    by_rate = costs.PRETRAINING_TOKENS / costs.V3_STEP.tokens_per_day
    assert by_rate == pytest.approx(budget.days["pre-training"], rel=2e-3)


def test_flops_of_a_token():
    # fact 16
    causal, whole = (costs.training_flops(LARGE, causal=flag) for flag in (True, False))
    assert causal == pytest.approx(250.46e9, rel=1e-4)
    assert whole == pytest.approx(281.16e9, rel=1e-4)
    weights = 6 * costs.activated_parameters(LARGE, embedding=False)
    assert whole - weights == 2 * (causal - weights)
    scores = costs.plain_core(costs.as_mha(LARGE, with_position=True), 1, 2048).flops
    assert causal - weights == 3 * 61 * scores


def test_a_measured_step_agrees_with_itself():
    # fact 17, 18
    step = costs.V3_STEP
    assert costs.TOKENS_PER_STEP == 62_914_560
    assert step.tokens == pytest.approx(costs.TOKENS_PER_STEP, rel=1e-5)
    assert sum(step.parts.values()) == pytest.approx(19.90, abs=1e-9)
    assert 0 < step.seconds - sum(step.parts.values()) < 0.03  # each is rounded to 0.01
    rate = step.tokens_per_day / 86_400
    for counted, flag in (("causal", True), ("non-causal", False)):
        share = step.tflops[counted] * 1e12 / costs.H800_FLOPS
        assert share == pytest.approx(step.mfu[counted], rel=0.002)
        ours = costs.mfu(costs.training_flops(LARGE, causal=flag), rate, step.gpus)
        assert ours == pytest.approx(step.mfu[counted], rel=0.003)
    assert step.flops_per_token("causal") == pytest.approx(249.7e9, rel=1e-3)
    assert step.flops_per_token("non-causal") == pytest.approx(280.2e9, rel=1e-3)


def test_the_budget_and_the_measured_step_are_of_one_cluster():
    # fact 17
    flops = costs.training_flops(LARGE) * 1e12
    tflops = flops / (costs.HOURS_PER_TRILLION * 3600) / 1e12
    assert tflops == pytest.approx(costs.V3_STEP.tflops["causal"], rel=5e-3)


def test_a_day_of_serving():
    # fact 60
    day = costs.DAY
    assert day.cost == 87_072
    assert day.income == pytest.approx(costs.PRINTED_INCOME, rel=1e-3)
    assert costs.PRINTED_INCOME / day.cost - 1 == pytest.approx(costs.PRINTED_MARGIN, rel=1e-3)
    assert day.margin == pytest.approx(costs.PRINTED_MARGIN, rel=1.1e-3)
    assert sum(day.busy_nodes.values()) == pytest.approx(day.nodes, rel=1e-3)


def test_the_day_was_slower_than_the_networks_limit():
    """20 to 22 tokens a second, where InfiniBand alone would allow 67."""
    assert 1 / costs.token_seconds(LARGE) > 3 * costs.DAY.speed[1]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_counted(name):
    config = PRESETS[name]()
    assert costs.training_flops(config) > 6 * costs.activated_parameters(config, embedding=False)
    assert costs.token_seconds(config) > 0 and costs.expert_seconds(config)[0] > 0
