"""The scoreboard: what is checked, what is timed, what is told. No speed is asserted here."""

import json
import re
import time
import types

import pytest
import torch
from checkpoints import tiny_config

from dsv3 import fp8, mla
from dsv3.bench import (
    attention,
    chapters,
    decoding,
    drafting,
    experts,
    footprint,
    machine,
    make_run,
    memory,
    models,
    plain,
    products,
    quantization,
    rounds,
    row,
    suite,
    training,
)
from dsv3.bench.rounds import Clock, Spread
from dsv3.bench.row import Check, Goal, Line, Missing, Row, Trial, Workbench
from dsv3.checkpoint.layout import layout
from dsv3.cli import main
from dsv3.model import Transformer
from dsv3.precision import Precision

CPU = torch.device("cpu")
SMALL = models.CONFIG.but(
    vocab_size=96, hidden_size=128, num_hidden_layers=2, intermediate_size=128,
    moe_intermediate_size=128, n_routed_experts=8, num_experts_per_tok=2, kv_lora_rank=32,
    q_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    num_attention_heads=2, initializer_range=0.03,
)  # fmt: skip
ONE_LAYER = SMALL.but(num_hidden_layers=1, first_k_dense_replace=1)
GPU_LIKE = types.SimpleNamespace(name="made up", memory=1e12, fp8=1e15)


@pytest.fixture(scope="module")
def bench():
    return Workbench(CPU, Clock(CPU), models.Models(CPU, SMALL))


def lines_of(prepare, bench, allowed=0.0):
    """Of a timed row, with one round."""
    return list(row.timed(prepare)(Row(1, "name", "case", None), bench, allowed))


# Rounds -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the calls advance."""

    class Hands:
        now = 0.0

        def takes(self, duration):
            def call():
                self.now += duration

            return call

    hands = Hands()
    monkeypatch.setattr(rounds.time, "perf_counter", lambda: hands.now)
    monkeypatch.setattr(rounds.time, "monotonic", lambda: hands.now)
    return hands


@pytest.mark.parametrize(
    "allowed, expected", [(0, 1), (29, 1), (30, 2), (59, 4), (1e9, rounds.ENOUGH)]
)
def test_rounds_follow_from_the_time(clock, allowed, expected):
    calls = {"ours": clock.takes(4), "theirs": clock.takes(6)}
    assert rounds.in_turn(calls, Clock(CPU), allowed) == {
        "ours": [4] * expected,
        "theirs": [6] * expected,
    }


def test_short_calls_get_more_rounds(clock):
    found = rounds.in_turn({"ours": clock.takes(0.01)}, Clock(CPU), 1e9)
    assert rounds.ENOUGH < len(found["ours"]) <= rounds.MOST
    assert sum(found["ours"]) <= rounds.SHORT


def test_calls_take_turns_and_what_comes_before_is_not_timed(clock):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}

    def before(name):
        order.append(f"before {name}")
        clock.now += 100

    found = rounds.in_turn(calls, Clock(CPU), 500, before)  # which takes time, though
    assert order == ["before a", "a", "before b", "b"] * 2 and found == {"a": [0], "b": [0]}


def test_quartiles_and_ratios_within_a_round():
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(2, 3, 4)
    assert Spread.of([7.0]) == Spread(7, 7, 7)
    assert Spread(1, 2, 4).each(lambda x: 8 / x) == Spread(2, 4, 8)
    # One slow minute for both changes no ratio.
    assert rounds.ratio([6, 60, 6], [2, 20, 2]) == Spread(3, 3, 3)


# Rows -------------------------------------------------------------------------------------------


def test_goals_at_least_and_at_most():
    assert Goal(2).met(2) and not Goal(2).met(1.9) and str(Goal(2)) == ">= 2"
    assert Goal(3, most=True).met(3) and not Goal(3, most=True).met(3.1)
    assert row.state_of(None, 0.1) == "shown" and row.state_of(Goal(1), float("nan")) == "short"


def test_checks_see_one_bit_and_nan():
    a = torch.tensor([1.0, float("nan"), 0.0])
    assert row.bit_equal(a, a.clone()).passed
    assert not row.bit_equal(a, torch.tensor([1.0, float("nan"), -0.0])).passed
    assert not row.bit_equal(a, a.double()).passed
    assert row.gap(torch.ones(2), torch.tensor([1.0, 1.01]), 0.01).passed
    assert not row.gap(torch.ones(2), torch.tensor([1.0, 1.02]), 0.01).passed
    assert not row.gap(torch.tensor([float("nan")]), torch.ones(1), 1e9).passed


def trial(check=0.0, peers=(), timed=None):
    return Trial(timed or (lambda: None), peers, lambda: Check("gap", check, 0.5))


def test_what_is_wrong_is_reported_and_not_timed(bench):
    def never():
        raise AssertionError("timed")

    (line,) = lines_of(lambda _: trial(check=0.6, timed=never), bench)
    assert line.state == "failed" and "0.5" not in line.peer and line.ratio is None
    assert "6.0e-01 (over 5e-01)" in line.check


def test_peers_that_are_missing_wrong_or_broken_leave_the_others_in_peace(bench):
    def missing():
        raise Missing("pip install it")

    def broken():
        raise RuntimeError("no such kernel\nat line 3")

    def of(name, make, **more):
        return row.peer(name, make, 1e9, **more)

    found = lines_of(
        lambda _: trial(
            peers=[
                of("a", missing),
                of("b", lambda: broken),
                of("c", lambda: int, check=lambda call: Check("gap", 1.0, 0.5)),
                of("d", lambda: int),
                row.limit("a limit", 1.0, 0.1),
            ]
        ),
        bench,
    )
    assert [line.state for line in found] == ["missing", "failed", "failed", "short", "met"]
    assert found[0].note == "pip install it"
    assert found[1].note == "the peer: RuntimeError: no such kernel"
    assert "is wrong" in found[2].note
    assert found[3].rounds >= 1 and found[3].ratio.low <= found[3].ratio.high
    assert found[4].theirs.middle == pytest.approx(1000)


def test_a_limit_is_a_share_of_what_can_be(clock, bench):
    half_as_fast = lambda _: trial(peers=[row.limit("4 TB/s", 2.0, 0.5)], timed=clock.takes(4))  # noqa: E731
    (line,) = lines_of(half_as_fast, bench)
    assert line.ratio == Spread(0.5, 0.5, 0.5) and line.state == "met"


def test_the_suites_have_the_rows_of_the_scoreboard():
    cpu, gpu = ({each.number for each in suite.rows(name)} for name in ("cpu", "gpu"))
    assert cpu == {*range(1, 19)} - {5} and gpu == {*range(1, 17)}
    assert [each.number for each in suite.rows("cpu", {8, 3})] == [3, 8, 8, 8]
    cases = [(each.number, each.case) for each in suite.rows("gpu")]
    assert len(set(cases)) == len(cases)


def test_what_a_row_prepares_is_in_its_time(clock, bench):
    """Of 10 seconds the check took 8: what is left holds no second round."""

    def prepare(_):
        ours = clock.takes(2)
        slow = clock.takes(8)
        return Trial(ours, [row.peer("a", lambda: ours)], lambda: slow() or Check("gap", 0, 1))

    (line,) = lines_of(prepare, bench, 10.0)
    assert line.rounds == 1 and line.hurried
    (line,) = lines_of(prepare, bench, 1000.0)
    assert line.rounds == rounds.ENOUGH and not line.hurried


def test_time_left_is_shared_and_what_gets_none_is_left_out(clock, bench):
    given = []

    def takes(seconds):
        def measure(row, bench, allowed):
            given.append(round(allowed))
            clock.takes(seconds)()
            yield Line(row.number, row.name, row.case, "", "shown")

        return measure

    rows = [
        Row(1, "a", "", takes(60)),
        Row(2, "b", "", takes(30)),
        Row(3, "c", "", takes(1), least=120),
        Row(4, "d", "", takes(1000)),
        Row(5, "e", "", takes(1)),
    ]
    found = list(suite.measure(rows, bench, 4.0))
    # 240 s: (240 - 120) / 5; (180 - 120) / 4; (150 - 0) / 3; ...
    assert given == [24, 15, 50, 74]
    assert [line.state for line in found] == ["shown"] * 4 + ["left out"]
    assert "--minutes" in found[-1].note
    given.clear()
    list(
        suite.measure([Row(1, "a", "", takes(0), weight=3), Row(2, "b", "", takes(0))], bench, 2.0)
    )
    assert given == [90, 120]
    (line,) = suite.measure([Row(9, "f", "", takes(1), least=300)], bench, 4.0)
    assert line.state == "left out" and "takes 5 or more" in line.note


def test_a_row_that_cannot_be_measured_is_a_line(bench):
    def fails(error):
        def measure(row, bench, allowed):
            raise error
            yield

        return Row(1, "name", "case", measure)

    found = list(suite.measure([fails(Missing("get it")), fails(ValueError("x"))], bench, 1.0))
    assert [(line.state, line.note) for line in found] == [
        ("missing", "get it"),
        ("failed", "ValueError: x"),
    ]


# Every row, small -------------------------------------------------------------------------------

CASES = {
    "1 to bfloat16": lambda b: quantization.dequantization(torch.bfloat16, (256, 128), b),
    "1 to float32": lambda b: quantization.dequantization(torch.float32, (192, 200), b),
    "2": lambda b: quantization.activations(3, 200, b),
    "2 behind a norm": lambda b: quantization.norm_and_quantization(3, 256, b),
    "3": lambda b: products.on_cpu(256, 1, (20, 0.5), b),
    "4": lambda b: products.on_cpu(256, 5, (6, None), b),
    "5": lambda b: products.on_gpu((256, 128), 5, {"DeepGEMM": 0.9}, products.tflops_ceiling, b),
    "6": lambda b: experts.grouped(40, b),
    "7 fp32": lambda b: experts.layer("fp32", b),
    "7 bf16": lambda b: experts.layer("bf16", b),
    "7 fp8": lambda b: experts.layer("fp8", b),
    "8 fp32": lambda b: attention.decode(ONE_LAYER, torch.float32, 70, b),
    "8 bf16": lambda b: attention.decode(ONE_LAYER, torch.bfloat16, 9, b),
    "9 fp32": lambda b: attention.prefill(ONE_LAYER, torch.float32, 33, b),
    "9 bf16": lambda b: attention.prefill(ONE_LAYER, torch.bfloat16, 33, b),
    "10": lambda b: decoding.prefill("fp32", 512, b),
    "11 fp8": lambda b: decoding.decode("fp8", 64, False, b),
    "16": lambda b: decoding.batch(3, b),
}


@pytest.mark.parametrize("name", CASES)
def test_each_row_is_right_and_gives_ratios(name, bench):
    found = lines_of(CASES[name], bench)
    assert found and {line.state for line in found} <= {"met", "short", "shown", "missing"}
    for line in found:
        assert (line.ratio is None) == (line.state == "missing")
        assert line.check and (
            line.state != "missing" or "install" in line.note or "Hopper" in line.note
        )


def test_on_a_gpu_decoding_is_captured(bench, monkeypatch):
    """By the same weights in a model of its own; it comes once before all that counts."""
    passes = []

    def compile(model):
        forward = model.forward
        monkeypatch.setattr(
            model, "forward", lambda *args, **options: passes.append(1) or forward(*args, **options)
        )
        return model

    monkeypatch.setattr(Transformer, "compile", compile)
    own = Workbench(CPU, Clock(CPU), models.Models(CPU, SMALL))
    with torch.inference_mode():
        found = decoding.decode("fp32", 64, True, own)
    assert len(passes) == 1 + decoding.STEPS
    assert [(each.name, each.goal and each.goal.bound) for each in found.peers] == [
        ("transformers, float32", 10.0), ("dsv3, neither compiled nor captured", None)
    ]  # fmt: skip
    with torch.inference_mode():
        found.peers[1].call()
        assert len(passes) == 1 + decoding.STEPS, "the other model is not the compiled one"
        assert found.check().passed and len(passes) > 1 + decoding.STEPS


def test_a_batch_in_fp8_is_checked_row_by_row(bench, monkeypatch):
    assert "bit-equal to those alone" in lines_of(CASES["16"], bench)[0].check
    forward = Transformer.forward

    def depends_on_others(model, tokens, *args, **options):
        return forward(model, tokens, *args, **options) + 1e-6 * len(tokens)

    monkeypatch.setattr(Transformer, "forward", depends_on_others)
    assert [line.state for line in lines_of(CASES["16"], bench)] == ["failed"]


@pytest.mark.parametrize("precision", training.GAPS)
def test_both_learn_the_same(precision, bench, monkeypatch):
    pytest.importorskip("transformers")
    small = SMALL.but(quantization_config=None)
    measure = row.timed(lambda b: training.step(small, precision, 2, 12, b), learns=True)
    (line,) = measure(Row(15, "name", "case", None), bench, 0.0)
    assert line.ratio and line.unit == "tokens/s" and str(line.goal) == ">= 1.3"
    ours, theirs = training.pair(small, precision, CPU)
    text = torch.arange(26).view(2, 13)
    first = ours.step(text), theirs.step(text)
    assert row.gap(first[0], first[1], training.GAPS[precision]).passed
    for group in ours.optimizer.param_groups:
        group["lr"] *= 3  # an update that is another one is seen in the losses that follow
    mine, its = (torch.stack([one.step(text) for _ in range(3)]) for one in (ours, theirs))
    assert not row.gap(mine, its, training.GAPS[precision]).passed and its[-1] < its[0] < first[1]


def test_a_row_fails_where_ours_is_wrong(bench, monkeypatch):
    """The checks are not satisfied by anything."""
    wrong = {
        "1 to float32": (fp8.QuantizedTensor, "dequantize", lambda *_: torch.zeros(192, 200)),
        "2": (plain, "quantize", lambda x: plain_quantize(2 * x)),
        "3": (products, "exact", lambda x, w: 1.01 * exact(x, w)),
        "6": (experts, "specification", lambda e, x, *_: x.float()),
    }
    plain_quantize, exact = plain.quantize, products.exact
    for name, (module, function, other) in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, function, other)
            assert [line.state for line in lines_of(CASES[name], bench)] == ["failed"], name


def test_the_rows_of_a_gpu_compute_the_same_on_a_cpu(bench, monkeypatch):
    monkeypatch.setattr(attention, "chip", lambda device: GPU_LIKE)
    monkeypatch.setattr(experts, "chip", lambda device: GPU_LIKE)
    for prepare in (
        lambda b: experts.grouped_on_gpu(SMALL, 9, b),
        lambda b: experts.layer_on_gpu(SMALL, 9, b),
        lambda b: attention.absorbed(ONE_LAYER, 3, 64, b),
    ):
        found = lines_of(prepare, bench)
        assert {line.state for line in found} <= {"met", "short", "missing"} and len(found) < 3


def test_attention_of_a_gpu_is_measured_in_its_kernels(bench, monkeypatch):
    """Rows 8 and 9 go through the form that the model takes there."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from dsv3.kernels.mla_decode import mla_decode_spec
    from dsv3.kernels.mla_prefill import mla_prefill_spec

    called = []

    def counted(spec):
        return lambda *args: called.append(spec.__name__) or spec(*args)

    monkeypatch.setattr(Precision, "in_kernels", lambda self, *_: self.dtype == torch.bfloat16)
    monkeypatch.setattr(mla, "mla_decode", counted(mla_decode_spec))
    monkeypatch.setattr(mla, "mla_prefill", counted(mla_prefill_spec))
    monkeypatch.setattr(attention, "chip", lambda device: GPU_LIKE)
    for prepare, form in (
        (lambda b: attention.absorbed(ONE_LAYER, 3, 64, b), "mla_decode_spec"),
        (lambda b: attention.decode(ONE_LAYER, torch.bfloat16, 9, b), "mla_decode_spec"),
        (lambda b: attention.prefill(ONE_LAYER, torch.bfloat16, 33, b), "mla_prefill_spec"),
    ):
        found = lines_of(prepare, bench)
        assert "failed" not in {line.state for line in found}, found
        assert set(called) == {form} and len(called) >= 3  # the check, a first call, a round
        called.clear()


@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_the_released_structure_gives_our_logits(q_lora_rank):
    """In float32, however the text is cut; in bfloat16 nearly so."""
    config = SMALL.but(q_lora_rank=q_lora_rank, num_hidden_layers=3)
    given, text = models.Models(CPU, config), torch.arange(20)[None]
    theirs = given.released(torch.float32)
    cache = theirs.new_cache(20)
    with torch.inference_mode():
        wanted = given.ours("fp32")(text)[0, [11, 19]]
        found = torch.cat([theirs(text[:, :12], cache, 0), theirs(text[:, 12:], cache, 12)])
        assert row.gap(found, wanted, 1e-5).passed
        half = given.released(torch.bfloat16)
        found = half(text, half.new_cache(20), 0)
        assert 1e-4 < row.gap(found, wanted[1:], 1).found < 0.1


def test_both_models_get_the_same_weights(bench):
    """Names come from the layout: experts, router, shared expert, dense layer and all."""
    pytest.importorskip("transformers")
    with torch.inference_mode():
        assert decoding.check_theirs(bench.models, "fp32").passed
        other = models.Models(CPU, SMALL)
        other.theirs(torch.float32).model.layers[1].mlp.experts.gate_up_proj[:] *= 1.5
        assert not decoding.check_theirs(other, "fp32").passed


# Rows that are no times -------------------------------------------------------------------------


@pytest.mark.skipif(not memory._STATUS.exists(), reason="reads /proc")
def test_memory_of_a_small_checkpoint(bench):
    small = tiny_config(
        num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, n_routed_experts=8
    )

    def here(kind, *told):
        return memory.job(kind, *map(str, told))

    told = Row(12, "memory", "small", None)
    found = list(memory.checkpoints(small, told, bench, 0.0, here))
    assert [line.peer.partition(":")[0] for line in found] == [
        "convert", "cast to bf16", "cast to fp8", "load in fp8, beyond the weights",
    ]  # fmt: skip
    largest = max(spec.nbytes for spec in layout(small)) / 1e6
    assert all(line.theirs.middle == largest and line.unit == "MB" for line in found[:1])
    assert found[-1].goal is None and str(found[0].goal) == "<= 3"

    def spoils(kind, *told):
        answer = here(kind, *told)
        if kind == "convert":
            spoil_last_byte(told[1] / "model1-mp2.safetensors")
        return answer

    (line,) = memory.checkpoints(small, told, bench, 0.0, spoils)
    assert line.state == "failed" and "other bytes" in line.note


@pytest.mark.skipif(not memory._STATUS.exists(), reason="reads /proc")
def test_memory_of_a_small_model_in_use(bench, monkeypatch):
    jobs = []

    def here(kind, *told):
        jobs.append((kind, *map(str, told[-2:])))
        return memory.job(kind, *map(str, told))

    told = Row(17, "memory", "small", None)
    found = list(footprint.in_use(SMALL, told, bench, 0.0, here))
    assert [kind for kind, *_ in jobs] == ["load"] * 2 + ["use"] * 2
    assert [str(line.goal) for line in found] == ["<= 0.333"] + ["None"] * 3
    weights = [line.theirs.middle for line in found[2:]]
    assert 0.2 < weights[0] / weights[1] < 0.6, "small, with a wide embedding"
    assert all(line.unit == "MB" and not line.rounds for line in found)
    monkeypatch.setattr(footprint, "bit_equal", lambda *_: Check("", 1.0, 0))
    (line,) = footprint.in_use(SMALL, told, bench, 0.0, here)
    assert line.state == "failed" and "differ" in line.check


def test_cache_and_workspace_beside_others(bench):
    pytest.importorskip("transformers")
    told = Row(17, "memory", "cache", None)
    packed, own = footprint.caches(told, bench, 0.0)
    assert (packed.ours.middle, packed.theirs.middle) == (656, 1152)
    c = SMALL
    assert own.ours.middle == 4 * c.num_hidden_layers * c.latent_dim <= own.theirs.middle
    sizes = {"fp32": 2e6, "fp8": 1e6, "transformers": 4e6}
    found = footprint.workspace(
        "read", told, bench, 0.0, lambda kind, n, form: {"peak": sizes[form]}
    )
    assert [line.ratio.middle for line in found] == [0.5, 0.5]


def test_make_run_is_what_make_runs():
    """The same options, the same prompt, on two ranks; and what is told is understood."""
    makefile = (chapters.FOLDER.parent / "Makefile").read_text()
    line = makefile[makefile.index("/bin/dsv3 generate") :].partition("\n\t@echo")[0]
    ours = make_run.command(2)
    options = re.sub(r"\$\(TOKENS\)", "150", line.replace("\\\n", " ")).split()[2:-2]
    assert options[0] == "assets/dsv3-mini" and sorted(options[1:]) == sorted(ours[5:-2])
    assert "TOKENS ?= 150" in makefile and make_run.PROMPT.strip() in makefile
    said = "speed       150 new tokens in 5.08 s, prefill included: 29.5 tokens/s"
    assert make_run._TOLD.search(f"model x\n{said}\n").groups() == ("150", "5.08")


def test_make_run_tells_rate_and_start_apart(clock, bench):
    ranks = []

    def start(count, text="a text"):
        ranks.append(count)
        clock.takes(9.0)()
        return text, 150, 5.0

    told = Row(18, "make run", "two ranks", None)
    rate, around = make_run.two_ranks(told, bench, 40.0, start)
    assert ranks == [1, 2, 2, 2] and rate.rounds == 2  # one rank; one run that is not counted
    assert (rate.ours.middle, rate.theirs.middle, rate.unit) == (30.0, 23, "tokens/s")
    assert rate.ratio.middle == pytest.approx(30 / 23) and "8 to 23 tokens/s" in rate.peer
    assert (around.ours.middle, around.theirs.middle, around.unit) == (4.0, 5.0, "s")
    (line,) = make_run.two_ranks(
        told, bench, 0.0, lambda count: start(count, text="another" if count > 1 else "a text")
    )
    assert line.state == "failed" and "not that of one rank" in line.note


def spoil_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.skipif(not memory._STATUS.exists(), reason="reads /proc")
def test_a_peak_is_seen_although_it_is_over():
    def work():
        torch.ones(64 << 20, dtype=torch.uint8)

    assert 60e6 < memory.peak_of(work) < 90e6


def test_memory_is_asked_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="read failed"):
        memory.apart("read", 1)
    monkeypatch.setattr(memory, "_STATUS", chapters.FOLDER / "no such file")
    with pytest.raises(Missing, match="Linux"):
        memory.apart("read", 1)


def test_drafting_counts_what_its_parts_cost(bench):
    config = SMALL.but(num_nextn_predict_layers=1)
    model = Transformer(config).init_weights(0).requires_grad_(False)
    found = drafting.by_batch(model, [[1, 2, 3], [4, 5, 6]], bench.clock, 0.0)
    assert found["batch"] == 2 and len(found["rates"]["plain"]) == len(found["rates"]["drafted"])
    ms = found["ms"]
    assert found["c"] == pytest.approx((ms["verify"] + ms["draft"]) / ms["plain"] - 1)
    assert found["expected"] == pytest.approx(found["tokens_per_pass"] / (1 + found["c"]))
    assert 1 <= found["tokens_per_pass"] <= 2


NBVAL = """
=========== seconds a notebook took ===========
  70.5  chapters/01_attention.ipynb
  10.1  chapters/02_mla.ipynb
  80.6  together
"""


def test_times_of_chapters_are_read(bench, monkeypatch, tmp_path):
    done = types.SimpleNamespace(returncode=0, stdout=NBVAL)
    monkeypatch.setattr(chapters.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(chapters.importlib.util, "find_spec", lambda name: name)
    told = Row(14, "chapters", "", None)
    found = list(chapters.all_chapters(tmp_path, told, bench, 0.0))
    assert [line.state for line in found] == ["met", "short", "shown"]
    assert found[1].ours.middle == 70.5 and "01_attention" in found[1].peer
    assert found[2].ours.middle == pytest.approx(40.3)
    done.returncode = 1
    (line,) = chapters.all_chapters(tmp_path, told, bench, 0.0)
    assert line.state == "failed"
    monkeypatch.setattr(chapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="pip install"):
        list(chapters.all_chapters(tmp_path, told, bench, 0.0))
    with pytest.raises(Missing, match="checkout"):
        list(chapters.all_chapters(tmp_path / "none", told, bench, 0.0))


def test_the_book_is_run_as_make_test_runs_it():
    """The same options of pytest, and the same tools."""
    makefile = (chapters.FOLDER.parent / "Makefile").read_text()
    start = makefile.index("NBVAL :=")
    told = makefile[start : makefile.index("\n\n", start)]
    for word in chapters.command(chapters.FOLDER)[3:]:
        if word.startswith("--nbval") or word in ("dsv3.book.times", "loadscope"):
            assert word in told


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def few_rows(monkeypatch, bench):
    """The command on two rows, one of which has a peer that is missing."""

    def missing():
        raise Missing("pip install other")

    def prepare(_):
        return trial(peers=[row.peer("the formula", lambda: int, 1e-9), row.peer("other", missing)])

    rows = [Row(3, "first", "of two", row.timed(prepare)), Row(4, "second", "", row.timed(prepare))]

    def chosen(name, only=()):
        return [each for each in rows if not only or each.number in only]

    monkeypatch.setattr(suite, "rows", chosen)
    monkeypatch.setattr(suite, "workbench", lambda name: bench)
    return rows


def run(capsys, *arguments, code=0):
    assert main(["bench", "--minutes", "0.01", *arguments]) == code
    return capsys.readouterr()


def test_a_table_for_people(capsys, few_rows):
    out = run(capsys).out
    assert machine.cpu_model() in out and torch.__version__ in out
    missing, met = (line for line in out.splitlines() if "first" in line)
    assert ">= 1e-09" in met and "met" in met and float(met.split()[0]) > 0
    assert "the formula" in met and "rounds" in met and "gap 0.0e+00" in met
    assert "missing" in missing and "pip install other" in missing
    assert "2 missing, 2 met" in out.splitlines()[-1]


def test_json_for_machines(capsys, few_rows, tmp_path):
    told = json.loads(run(capsys, "--json").out)
    assert set(told) == {"suite", "minutes", "machine", "rows"}
    assert {"cpu", "threads", "instructions", "torch", "transformers"} <= set(told["machine"])
    second, first, *_ = told["rows"]
    assert (first["row"], first["state"], first["goal"]["bound"]) == (3, "met", 1e-09)
    assert first["ratio"]["low"] <= first["ratio"]["middle"] <= first["ratio"]["high"]
    assert first["rounds"] >= 1 and first["unit"] == "ms" and first["check"]
    assert second["state"] == "missing" and second["note"] == "pip install other"
    file = tmp_path / "new" / "found.json"
    out = run(capsys, "--json", str(file), "--only", "4").out
    assert "second" in out and "first" not in out
    assert {each["row"] for each in json.loads(file.read_text())["rows"]} == {4}
    assert [path.name for path in file.parent.iterdir()] == ["found.json"]


def test_what_is_told_in_json_is_what_was_found(capsys, few_rows, monkeypatch):
    """Every kind of line comes back from its JSON as it went in."""
    found = []
    measure = suite.measure

    def kept(*given):
        for line in measure(*given):
            found.append(line)
            yield line

    monkeypatch.setattr(suite, "measure", kept)
    once = Row(12, "bytes", "", lambda row_, *_: [
        row.quantity(row_, "half", 1.0, 3.0, "MB", Goal(0.5, most=True), "compared")
    ])  # fmt: skip
    few_rows.append(once)
    told = json.loads(run(capsys, "--json").out)
    assert len(found) == 5 and [Line.of(each) for each in told["rows"]] == found
    assert told["rows"][-1]["goal"] == {"bound": 0.5, "most": True}
    table = run(capsys, "--only", "12").out
    assert "measured once" in table and "fewer rounds" not in table


def test_too_few_rounds_are_told(capsys, few_rows):
    slow = Row(3, "slow", "", row.timed(lambda _: trial(
        peers=[row.peer("a", lambda: int)], timed=lambda: time.sleep(0.3)
    )))  # fmt: skip
    few_rows[:] = [slow]
    out = run(capsys).out
    assert "at most 0.01 minutes, 20 rounds a row" in out
    assert "1 round (its share of the time held no more)" in out
    assert "1 with fewer rounds than they should have: --minutes" in out.splitlines()[-1]


def test_a_failed_check_is_an_exit_code(capsys, monkeypatch, few_rows):
    few_rows[0] = Row(3, "wrong", "", row.timed(lambda _: trial(check=1.0)))
    assert "failed" in run(capsys, "--only", "3", code=1).out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "19"], "no such row (found 19, expected 1 to 18)"),
        (["--only", "5"], "the cpu suite has no such row"),
        (["--only", "one"], "'one' is not a whole number"),
        (["--only"], "expected at least one argument"),
        (["--minutes", "0"], "not a number of minutes above 0"),
        (["--suite", "tpu"], "invalid choice: 'tpu'"),
        (["--json", "."], "a folder, not a file"),
        (["--curves", "/proc/none/curves.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_measured_is_said_at_once(capsys, arguments, words):
    told = run(capsys, *arguments, code=2).err
    assert words in told and told.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said(capsys):
    assert "no GPU to measure" in run(capsys, "--suite", "gpu", code=2).err
