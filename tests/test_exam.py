"""The examination of a trained model: routing by domain, needles, answers, samples, drafts."""

import math
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_cases import ROUTERS, TINY, window

from dsv3 import data
from dsv3.errors import DSV3Error
from dsv3.generation.loop import Generation
from dsv3.model import Transformer
from dsv3.training import exam, needle, routing
from dsv3.training.balance import RouterWatch, max_violation

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.exam import Line

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(3)
    lines = [" ".join(data.task(rng)) + "\n" for _ in range(100)]
    return data.train_tokenizer([*lines, "let a = 12\nget b = 12\ndef f(x):\n    return x\n"], 300)


# Routing ----------------------------------------------------------------------------------------


def test_counts_of_each_window_are_those_of_a_pass_alone():
    model, windows = Transformer(TINY, "fp32").init_weights(0).eval(), window(5)
    counts = routing.expert_counts(model, windows, batch_size=2)
    assert sorted(counts) == sorted(ROUTERS)
    watch = RouterWatch(model)
    for number in range(len(windows)):
        watch.reset()
        with torch.inference_mode():
            _, hidden = model(windows[number : number + 1, :16], return_hidden=True)
            model.mtp_logits(hidden, windows[number : number + 1, 1:17], depth=0)
        for name in ROUTERS:
            assert counts[name][number].tolist() == watch.load[name].tolist()
            assert counts[name][number].sum() == 16 * TINY.num_experts_per_tok
    watch.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_information_of_tables_by_hand():
    def bits(*rows):
        return routing.mutual_information(torch.tensor(rows, dtype=torch.float64))

    assert bits([3, 1, 4], [6, 2, 8]) == pytest.approx(0, abs=1e-12)
    assert bits([5, 0, 0], [0, 5, 0], [0, 0, 5]) == pytest.approx(math.log2(3))
    # A binary symmetric channel with error 1/4: 1 - H(1/4).
    assert bits([3, 1], [1, 3]) == pytest.approx(
        1 + 0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)
    )


def test_windows_are_shuffled_and_not_tokens():
    """Each window keeps to one expert of its own, so any two labels share a bit with them."""
    counts, labels = 1000 * torch.eye(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1])
    found = routing.specialisation(counts, labels, permutations=50)
    assert found.bits == pytest.approx(1) and found.most == pytest.approx(1)
    assert found.shuffled_mean == pytest.approx(1) and found.p_value == 1
    assert found.beyond_chance == pytest.approx(0)


def test_domains_with_experts_of_their_own_are_beyond_chance():
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(10)
    likely = torch.full((3, 6), 0.1)
    likely[range(3), range(3)] = 0.5
    counts = torch.stack(
        [
            torch.bincount(
                torch.multinomial(likely[label], 200, replacement=True, generator=random),
                minlength=6,
            )
            for label in labels
        ]
    )
    found = routing.specialisation(counts, labels, permutations=99)
    p = likely.double() / 3
    exact = float((p * (p / (p.sum(1, keepdim=True) * p.sum(0, keepdim=True))).log2()).sum())
    assert found.bits == pytest.approx(exact, rel=0.15)
    assert found.shuffled_mean < found.shuffled_99 < 0.4 * found.bits
    assert found.p_value == pytest.approx(0.01)
    assert found == routing.specialisation(counts, labels, permutations=99)
    shuffled = routing.specialisation(
        counts, labels[torch.randperm(30, generator=random)], permutations=99
    )
    assert shuffled.p_value > 0.01 and abs(shuffled.beyond_chance) < 0.4 * found.bits


def test_one_window_of_a_domain_is_refused():
    with pytest.raises(DSV3Error, match="too few windows"):
        routing.specialisation(torch.ones(3, 4, dtype=torch.int64), torch.tensor([0, 0, 1]))


def test_violation_in_the_training_mixture():
    """Each domain is weighed by its share, however many windows of it were read."""
    counts = torch.tensor([[4, 0], [4, 0], [4, 0], [0, 4], [0, 4]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    found = exam.routing_by_domain({"gate": counts}, labels, [0.75, 0.25], permutations=5)["gate"]
    assert found["max_violation"] == pytest.approx(max_violation(torch.tensor([3.0, 1.0])))
    assert found["by_domain"] == [1.0, 1.0]
    with pytest.raises(DSV3Error, match="wrong shares"):
        exam.routing_by_domain({"gate": counts}, labels, [1.0])


# The needle -------------------------------------------------------------------------------------


class Reader:
    """A stand-in model that reads the text and answers with the value of a name.

    It is no Transformer, so tests need ``as_in_use``.

    choose(lets, asked): which value to say, from the (name, value) pairs above the question.
    """

    def __init__(self, tokenizer, choose):
        self.tokenizer, self.choose = tokenizer, choose
        self.config = SimpleNamespace(max_position_embeddings=512)
        self.group = SimpleNamespace(device=torch.device("cpu"))

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, 300)
        for row, ids in enumerate(tokens.tolist()):
            lines = self.tokenizer.decode(ids).split("\n")
            lets = [line.split()[1::2] for line in lines if line.startswith("let")]
            asked = next(line for line in lines if line.startswith("get")).split()[1]
            said = exam.encode(self.tokenizer, f" {self.choose(lets, asked)}\n")
            before = exam.encode(self.tokenizer, f"get {asked} =")
            place = next(i for i in range(len(ids)) if ids[i : i + len(before)] == before)
            for offset, token in enumerate(said):
                logits[row, place + len(before) - 1 + offset, token] = 1.0
        return logits


def test_needle_found_and_not_found(tokenizer, as_in_use):
    def asked(lets, name):
        return dict(lets)[name]

    grid = needle.needle_test(
        Reader(tokenizer, asked), tokenizer, (128, 200), (0.1, 0.9), count=9, batch_size=4
    )
    assert grid == {128: {0.1: 1.0, 0.9: 1.0}, 200: {0.1: 1.0, 0.9: 1.0}}
    # A third digit, another let's value, or the right value without the line break are wrong.
    for wrong in (
        lambda lets, name: dict(lets)[name] + "0",
        lambda lets, name: next(value for other, value in lets if other != name),
        lambda lets, name: dict(lets)[name] + " ",
    ):
        grid = needle.needle_test(Reader(tokenizer, wrong), tokenizer, (128,), (0.5,), count=9)
        assert grid == {128: {0.5: 0.0}}


def test_last_value_is_no_answer(tokenizer, as_in_use):
    """With the needle far ahead of three other lets, the nearest let is nearly always wrong."""

    def last(lets, name):
        return lets[-1][1]

    grid = needle.needle_test(Reader(tokenizer, last), tokenizer, (256,), (0.0,), count=20)
    assert grid[256][0.0] == 0


@pytest.mark.parametrize("length, depth", [(64, 0.5), (256, 0.1), (256, 0.9), (400, 1.0)])
def test_haystack_has_its_length_and_depth(tokenizer, length, depth):
    prompt, answer = needle.haystack(tokenizer, length, depth, np.random.default_rng(5))
    assert length - 20 < len(prompt) + len(answer) <= length
    *lines, ask = tokenizer.decode(prompt).split("\n")
    name = ask.removeprefix("get ").removesuffix(" =")
    places = [i for i, line in enumerate(lines) if line.startswith(f"let {name} =")]
    assert places == [round(depth * (len(lines) - 1))]
    assert lines[places[0]] + "\n" == f"let {name} =" + tokenizer.decode(answer)
    assert sum(line.startswith("let") for line in lines) == 4


def test_values_of_one_haystack_differ(tokenizer):
    """Else the value of another let would be taken for the right one."""
    for seed in range(60):
        text = tokenizer.decode(needle.haystack(tokenizer, 64, 0.5, np.random.default_rng(seed))[0])
        values = [line.split()[-1] for line in text.split("\n") if line.startswith("let")]
        assert len(set(values)) == 4 and all(len(value) == 2 for value in values)


def test_needle_longer_than_the_context_is_refused(tokenizer, as_in_use):
    with pytest.raises(DSV3Error, match="longer than the context"):
        needle.needle_test(Reader(tokenizer, None), tokenizer, (600,))
    with pytest.raises(DSV3Error, match="does not fit"):
        needle.haystack(tokenizer, 20, 0.5, np.random.default_rng(0))


def test_loss_by_position_is_that_of_the_position(as_in_use):
    """A model that is sure of the right token up to place 8 and knows nothing behind it."""

    class Half:
        group = SimpleNamespace(device=torch.device("cpu"))

        def __call__(self, tokens):
            logits = torch.zeros(*tokens.shape, 300)
            following = (tokens + 1) % 300
            logits.scatter_(2, following[..., None], 50.0)
            logits[:, 8:] = 0
            return logits

    windows = torch.arange(20)[None] + 7 * torch.arange(3)[:, None]
    found = needle.loss_by_position(Half(), windows, edges=(0, 8, 16))
    assert found == {(0, 8): pytest.approx(0, abs=1e-6), (8, 16): pytest.approx(math.log(300))}
    with pytest.raises(DSV3Error, match="too short"):
        needle.loss_by_position(Half(), windows, edges=(0, 32))


# Answers, samples, drafts -----------------------------------------------------------------------


@pytest.fixture
def scripted(monkeypatch, tokenizer, as_in_use):
    """Let the model say given (text, stopped_by) pairs, in order; keeps the calls."""

    def play(*script, **figures):
        calls, script = [], list(script)

        def complete(model, prompts, **options):
            calls.append((prompts, options))
            said = [script.pop(0) for _ in prompts]
            ids = [
                text if isinstance(text, list) else exam.encode(tokenizer, text) for text, _ in said
            ]
            return Generation(ids, [reason for _, reason in said], 0.0, 0, **figures)

        monkeypatch.setattr(exam, "complete", complete)
        return calls

    return play


def test_sums_are_marked_strictly(tokenizer, scripted):
    calls = scripted(
        (" [7+5=12, 3+4+1=8] 82", "eos"),  # right
        (" 82", "eos"),  # right, without the working
        (" [7+5=12, 3+4+1=8] 83", "eos"),
        (" [7+5=12, 3+4+1=8] 82", "length"),  # the line does not end
        (" [7+5=12, 3+4+1=8] 182", "eos"),
        ("", "eos"),
    )
    found = exam.sums_right(None, tokenizer, [(37, 45)] * 6, batch_size=4)
    assert found["right"] == pytest.approx(2 / 6) and found["asked"] == 6
    assert found["working_right"] == pytest.approx(1 / 6)
    assert len(found["wrong"]) == 4 and found["wrong"][0] == "37 + 45 = [7+5=12, 3+4+1=8] 83"
    prompts, options = calls[0]
    assert tokenizer.decode(prompts[0], skip_special_tokens=False) == data.BOS + "37 + 45 ="
    assert options.get("temperature", 0) == 0
    newline = tokenizer.token_to_id("Ċ")
    assert newline in options["eos_ids"] and tokenizer.token_to_id(data.EOS) in options["eos_ids"]
    longest = max(
        len(exam.encode(tokenizer, f" {data.working(a, b)}{a + b}\n"))
        for a, b in [(99, 99), (89, 99), (55, 45)]
    )
    assert options["max_new_tokens"] >= longest


@pytest.mark.parametrize("held_out", [True, False])
def test_asked_sums_are_different_pairs_of_their_kind(held_out):
    pairs = exam.some_sums(held_out, 200)
    assert len(set(pairs)) == 200 and pairs == exam.some_sums(held_out, 200)
    assert all(data.is_held_out(a, b) == held_out for a, b in pairs)
    assert {a // 10 for a, _ in pairs} == set(range(1, 10))


def test_code_counts_when_it_ends_and_parses(tokenizer, scripted):
    scripted(
        ("    return 1\n", "eos"),
        ("    return 2\n", "length"),  # parses, but did not end
        ("    return (\n", "eos"),
        ("    return 3\n    return 4\n    return 5\n", "eos"),
        (f"    return 6\n{data.BOS}x = 1\n", "eos"),
    )
    found = exam.code_samples(
        None, tokenizer, ["def f():\n"] * 5, 0.8, trained=["def g():\n    return 1\n"], batch_size=3
    )
    assert found["parsed"] == 2 / 5 and found["ended"] == 4 / 5 and found["samples"] == 5
    assert found["lines"] == 3 and found["copied"] == 1 / 2
    assert len(found["broken"]) == 2 and "SyntaxError" in found["broken"][0]
    assert found["texts"][0] == "def f():\n    return 1\n"


def test_samples_of_later_batches_have_seeds_of_their_own(tokenizer, scripted):
    calls = scripted(*[("", "eos")] * 6)
    exam.code_samples(None, tokenizer, ["def "] * 6, 0.8, batch_size=3)
    seeds = {
        options["seed"] * 1_000_003 + row
        for prompts, options in calls
        for row in range(len(prompts))
    }
    assert len(seeds) == 6


def test_nothing_is_no_program():
    assert exam.syntax_error("# only a remark\n") and exam.syntax_error("x = '\0'\n")
    assert exam.syntax_error("x = '\\d'\n") is None


def test_first_lines_hold_a_whole_signature():
    documents = [
        data.BOS + text + data.EOS
        for text in (
            "def f(x):\n    pass\n",
            "class A:\n    pass\n",
            "def g(x,\n      y):\n    pass\n",
            "def h():\n    pass\n",
            "import os\n",
            "def k(z):\n    pass\n",
        )
    ]
    assert exam.first_lines(documents, 9) == ["def f(x):\n", "def h():\n", "def k(z):\n"]
    assert exam.first_lines(documents, 2) == ["def f(x):\n", "def h():\n"]


def test_drafts_of_batches_weigh_by_passes(tokenizer, scripted):
    eight = list(range(20, 28))
    calls = scripted((eight * 3, "length"), (list(range(20, 44)), "eos"), acceptance=0.5, passes=7)
    found = exam.draft_acceptance(None, tokenizer, [[0, 20], [0, 21]], batch_size=1)
    assert found["acceptance"] == 0.5 and found["passes"] == 14 and found["tokens"] == 48
    # 17 runs of eight in each row; the first row has 8 different ones.
    assert found["repeated"] == pytest.approx(9 / 34)
    assert all(
        options["speculative"]
        and options.get("temperature", 0) == 0
        and options["max_new_tokens"] == 256
        for _, options in calls
    )


def test_prompts_are_the_beginnings_of_documents(tokenizer):
    documents = [data.BOS + text + data.EOS for text in ("1 + 1 = 2\n" * 9, "2\n", "3 * 3\n" * 9)]
    prompts = exam.beginnings_of(tokenizer, documents, 5, length=16)
    assert [len(ids) for ids in prompts] == [16, 16]
    assert all(ids[0] == tokenizer.token_to_id(data.BOS) for ids in prompts)


def test_held_out_figures_know_nothing_of_uniform_text(tokenizer):
    """With zero weights in the head all tokens are equally likely: log2(vocab) bits a token."""
    model = Transformer(TINY, "fp32").init_weights(0)
    with torch.no_grad():
        model.head.weight.zero_()
    ids = {"sums": data.pack(tokenizer, ["12 * 3 = 36\n" * 40])}
    found = exam.held_out_figures(model, tokenizer, ids, 32, most=3)["sums"]
    assert found["windows"] == 3 and found["loss"] == pytest.approx(math.log(320), rel=1e-5)


def test_windows_are_spread_over_the_text(as_in_use):
    model = SimpleNamespace(config=TINY)
    windows = exam.held_out_windows(model, np.arange(1000), 32, most=4)
    starts = windows[:, 0].tolist()
    assert windows.shape == (4, 34) and starts[0] == 0 and starts[-1] > 600
    assert len({b - a for a, b in pairwise(starts)}) <= 2
    assert len(exam.held_out_windows(model, np.arange(1000), 32)) == (1000 - 2) // 32


def test_a_goal_is_met_or_missed_and_shown():
    assert Line("a", 0.9, "%", 0.9).met and not Line("a", 0.899, "%", 0.9).met
    assert Line("b", 2.0, "", 2.0, most=True).met and Line("c", 1.0).met is None
    assert "MISSED" in str(Line("b", 2.1, "", 2.0, most=True))
    assert "at least" in str(Line("a", 0.9, "%", 0.9)) and "90.0%" in str(Line("a", 0.9, "%"))
