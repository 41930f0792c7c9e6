"""The model that comes with the book, as it is shipped: size, layout, and what it says.

Everything that must hold on learned weights: it can do what it was trained for, transformers
computes the same from the BF16 cast, two and four ranks say what one says, drafts change nothing.

What it can do is asked here of a little text, with some slack; ``benchmarks/exam.py`` asks all.
"""

from pathlib import Path

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tokenizers import Tokenizer

from dsv3 import ModelConfig, data, load_model, load_tokenizer
from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.inspect import held_bytes, report
from dsv3.checkpoint.layout import layout
from dsv3.generation.loop import complete
from dsv3.parallel.tensor import TensorGroup
from dsv3.training import anatomy, exam
from dsv3.training.needle import loss_by_position, needle_test
from dsv3.training.routing import expert_counts

pytestmark = pytest.mark.slow

MODEL = Path(__file__).parents[1] / "assets" / "dsv3-mini"
NEW_TOKENS = 48
PROMPTS = [
    "HAMLET.\n",
    "O Romeo, ",
    "The king is dead, and",
    "Enter two Gentlemen",
    "My lord, I",
    "What ho!",
    "Good night, good night!",
    "ROMEO.\nBut soft,",
    "I have a wife whom",
    "Farewell",
    "To be, or not to be",
    "Now is the winter of",
    "The quality of mercy",
    "Friends, Romans,",
    "JULIET.\nO ",
    "If it were done",
    "Exeunt.\n",
    "def main(args):\n",
    "class Reader:\n",
    "Is this a dagger which I see before me, the handle toward my hand?",
]


@pytest.fixture(scope="module", autouse=True)
def as_in_use():
    """No checks of annotations: thousands of tokens in FP8 take three times as long with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, precision="fp8")


@pytest.fixture(scope="module")
def prompts():
    tokenizer = load_tokenizer(MODEL)
    return [tokenizer.encode(text) for text in PROMPTS]


def say(model, prompts, batched: bool, **options):
    """Greedy ids of all prompts, together or one by one, and the share of accepted drafts."""
    options = dict(max_new_tokens=NEW_TOKENS, temperature=0.0, **options)
    if batched:
        result = complete(model, prompts, **options)
        return result.ids, result.acceptance
    results = [complete(model, [prompt], **options) for prompt in prompts]
    shares = [r.acceptance for r in results if r.acceptance is not None]
    return [r.ids[0] for r in results], sum(shares) / len(shares) if shares else None


@pytest.fixture(scope="module")
def plain(model, prompts):
    return say(model, prompts, batched=False)[0]


@pytest.fixture(scope="module")
def words():
    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def held_out():
    """Held-out documents by domain, without making those to train on."""
    modules = data.split_modules(data.read_modules())[1]
    return {
        "plays": data.documents(data.split(data.read_plays())[1], chats=False),
        "code": data.code_documents(modules),
        "arithmetic": data.arithmetic_documents(1, held_out=True),
    }


@pytest.fixture(scope="module")
def ids(words, held_out):
    return {name: data.pack(words, documents) for name, documents in held_out.items()}


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """The BF16 cast in transformers and here, both computing in float32."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bf16") / "model"
    cast(MODEL, folder, to="bf16", progress=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return theirs, load_model(folder, precision="fp32")


def test_size_and_architecture(model):
    config = model.config
    assert config == ModelConfig.mini()
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= 24e6
    assert config.n_shared_experts == 1 and config.n_routed_experts >= 16 and config.n_group == 4
    assert config.num_nextn_predict_layers == 1 and config.quantization_config is not None
    assert report(MODEL)["tensors"] == len(layout(config, mtp_copies=False))


def test_memory_is_near_the_file(model):
    """Parameters and buffers in fp8 take the weights' file, but for wkv_b: float64 on a CPU, which
    sixteen heads and a narrow stream make a third of all (a hundredth at 671B)."""
    kinds = held_bytes(model)
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert sum(kinds.values()) == held
    stored = sum(path.stat().st_size for path in MODEL.glob("*.safetensors"))
    assert held - kinds["wkv_b, absorbed"] * 7 / 8 <= 1.02 * stored


def test_the_text_is_not_one_word_again_and_again(plain):
    """Greedy text of a model that copies falls into loops, but most of it is not one word."""
    different = sorted(len(set(ids)) for ids in plain)
    assert different[len(different) // 2] > NEW_TOKENS // 4


def test_plays_of_three_unknown_casts(model, words, ids):
    """At most 1.95 bits a byte over all of them; the whole context helps, and drafts are good."""
    figures = exam.held_out_figures(model, words, {"plays": ids["plays"]}, 1024, most=6)["plays"]
    assert figures["bits_per_byte"] < 1.95 and figures["draft_agreement"] > 0.5
    losses = loss_by_position(model, exam.held_out_windows(model, ids["plays"], 1024, 6))
    assert losses[512, 1024] < losses[0, 256] + 0.1


def test_sums_of_pairs_never_trained(model, words):
    found = exam.sums_right(model, words, exam.some_sums(True, 40), batch_size=40)
    assert found["right"] >= 0.8, found["wrong"]


def test_functions_end_and_parse(model, words, held_out):
    found = exam.code_samples(
        model, words, exam.first_lines(held_out["code"], 12), 0.8, max_new_tokens=256
    )
    assert found["parsed"] >= 0.25, found["broken"]


def test_experts_are_busy_and_know_the_domain(model, ids):
    windows = torch.cat([exam.held_out_windows(model, tokens, 256, 8) for tokens in ids.values()])
    counts = expert_counts(model, windows)
    assert len(counts) == 3
    found = exam.routing_by_domain(counts, torch.arange(3).repeat_interleave(8), [0.45, 0.3, 0.25])
    for name, router in found.items():
        assert counts[name].sum(0).min() > 0, f"an expert of {name} is never chosen"
        assert router["max_violation"] < 1.5, name
        assert router["bits"] > router["shuffled_99"] and router["p_value"] < 0.01, name


def test_every_part_is_alive(model, ids):
    """Zeroed, each part costs 0.1 nats a token on two domains or more."""
    windows = {name: exam.held_out_windows(model, tokens, 256, 4) for name, tokens in ids.items()}
    for part, costs in anatomy.cost_without(model, windows).items():
        assert sorted(spread.mean for spread in costs.values())[1] > 0.1, part


@pytest.mark.parametrize("length", [60, 200])
def test_a_passage_that_comes_again_is_cheap(model, words, ids, length):
    """Of plays and code; the second copy costs at most half of the first."""
    for name in ("plays", "code"):
        twice = anatomy.passages_twice(words, ids[name], length, 6)
        found = anatomy.two_copies(model, twice)
        assert found["second"].mean < 0.5 * found["first"].mean, name


def test_a_value_is_found_over_the_whole_context(model, words):
    grid = needle_test(model, words, (250, 1000), (0.1, 0.5), count=4)
    assert sum(share for row in grid.values() for share in row.values()) >= 3.5


def test_drafts_are_accepted_in_each_domain(model, words, held_out):
    for name, documents in held_out.items():
        found = exam.draft_acceptance(model, words, exam.beginnings_of(words, documents, 6), 48)
        assert found["acceptance"] > 0.5, name


def test_transformers_computes_the_same_from_the_bf16_cast(bf16, prompts):
    theirs, ours = bf16
    with torch.inference_mode():
        for prompt in prompts[-4:]:
            text = torch.tensor([prompt])
            wanted = theirs(text).logits
            assert float((ours(text) - wanted).abs().max() / wanted.abs().max()) < 2e-5


def test_transformers_has_the_same_validation_loss(bf16, ids):
    """On windows of all domains; two are of the whole context, so that YaRN is in it."""
    theirs, ours = bf16
    short = [exam.held_out_windows(ours, tokens, 256, 2) for tokens in ids.values()]
    for windows in (torch.cat(short), exam.held_out_windows(ours, ids["plays"], 1024, 2)):
        with torch.inference_mode():
            losses = [
                float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:-1].flatten()))
                for logits in (theirs(windows[:, :-2]).logits, ours(windows[:, :-2]))
            ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_batch_says_what_each_row_says_alone(model, prompts, plain):
    assert say(model, prompts, batched=True)[0] == plain


def test_drafting_changes_nothing(model, prompts, plain, capsys):
    alone, acceptance = say(model, prompts, batched=False, speculative=True)
    assert alone == plain
    together, acceptance_together = say(model, prompts, batched=True, speculative=True)
    assert together == plain
    assert 0.1 < acceptance < 1.0
    with capsys.disabled():
        print(
            f"\ndrafts accepted, greedy: {acceptance:.0%} alone, {acceptance_together:.0%} "
            "in a batch"
        )


def say_on_ranks(group: TensorGroup, prompts):
    model = load_model(MODEL, precision="fp8", group=group)
    return (
        say(model, prompts, batched=True)[0],
        say(model, prompts, batched=True, speculative=True)[0],
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_say_what_one_says(ranks, prompts, plain):
    for found, drafted in run_ranks(say_on_ranks, ranks, prompts):
        assert found == plain
        assert drafted == plain


def test_bf16_and_fp8_are_near_fp32(prompts):
    """Log-probabilities of real continuations; what is lost is reported in the model card."""
    text = torch.tensor([prompts[-1]])
    with torch.inference_mode():
        exact, half, fp8 = (
            load_model(MODEL, precision=p)(text).log_softmax(-1) for p in ("fp32", "bf16", "fp8")
        )
    assert float((half - exact).abs().mean()) < 0.05
    assert 1e-3 < float((fp8 - exact).abs().mean()) < 0.3
