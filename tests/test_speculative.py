"""Speculative decoding: the tokens of plain decoding, or at least their distribution.

The models are random, and small enough that every case runs in fp32 in a moment. Left to chance,
their drafts would hardly ever be right; ``drafting_model`` lets words mostly follow from the word
before, for the model and for its MTP module, so that both outcomes of a draft are common.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from ranks import run_ranks

from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.saving import save_model
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.generation import speculative
from dsv3.generation.loop import complete
from dsv3.generation.sampling import draw, probabilities
from dsv3.generation.session import Session
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    initializer_range=0.2,
    eos_token_id=None,
)


def drafting_model(config: ModelConfig = CONFIG, seed: int = 0) -> Transformer:
    """A random model whose words depend mostly on the word before; so do its MTP module's."""
    model = Transformer(config).init_weights(seed)
    size = config.hidden_size
    with torch.no_grad():
        model.embed.weight.mul_(15.0)
        for module in model.mtp:
            module.eh_proj.weight.copy_(
                torch.cat([5 * torch.eye(size), torch.eye(size).flip(0)], dim=1)
            )
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return drafting_model()


def prompts(count: int = 20, longest: int = 20) -> list[list[int]]:
    chance = random.Random(7)
    return [
        [chance.randrange(CONFIG.vocab_size) for _ in range(chance.randint(1, longest))]
        for _ in range(count)
    ]


@torch.inference_mode()
def greedy_text(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens without cache or batch: the whole text again for each one."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.fixture(scope="module")
def texts(model) -> list[list[int]]:
    """24 greedy tokens for each of ``prompts()``."""
    return [greedy_text(model, prompt, 24) for prompt in prompts()]


# Greedy ------------------------------------------------------------------------------------------


def test_one_prompt_at_a_time(model, texts):
    # fact 46
    rates = []
    for prompt, text in zip(prompts(), texts):
        run = complete(model, [prompt], max_new_tokens=24, speculative=True)
        assert run.ids == [text]
        rates.append(run.acceptance)
    assert 0.2 < sum(rates) / len(rates) < 0.8, "both outcomes of a draft must be tested"


@pytest.mark.parametrize("chunk", [None, 1, 3, 7])
def test_ragged_batch(model, texts, chunk):
    run = complete(model, prompts(), max_new_tokens=24, speculative=True, prefill_chunk=chunk)
    assert run.ids == texts
    assert run.stopped_by == ["length"] * 20


def test_drafts_that_are_never_right_and_always_right(model, texts):
    """The tokens do not depend on the drafts; how many passes are needed does."""
    text = [ids[:9] for ids in texts]
    copy = drafting_model()

    def guess(offset: int):
        """Draft what plain decoding gives, moved by ``offset`` ids."""

        def mtp_logits(hidden, tokens, cache, lengths, last_only):
            cache.advance(lengths)
            rows = torch.zeros(len(lengths), CONFIG.vocab_size)
            for row, (prompt, ids) in enumerate(zip(prompts(), text)):
                place = cache.lengths[row] + 1 - len(prompt)  # of t_{i+2} among the new tokens
                if 0 <= place < len(ids):
                    rows[row, (ids[place] + offset) % CONFIG.vocab_size] = 1.0
            return rows, hidden

        return mtp_logits

    for offset, acceptance, per_pass in (0, 1.0, 2.0), (1, 0.0, 1.0):
        copy.mtp_logits = guess(offset)
        run = complete(copy, prompts(), max_new_tokens=9, speculative=True)
        assert run.ids == text
        assert (run.acceptance, run.tokens_per_pass) == (acceptance, per_pass)
    assert complete(model, prompts(), max_new_tokens=9).tokens_per_pass == 1.0


@pytest.mark.parametrize("chunk", [None, 4])
def test_acceptance_is_that_of_the_whole_text_seen_at_once(model, texts, chunk):
    """Drafts come from a cache fed in pieces; here the module sees each finished text in one go."""
    drafts = accepted = 0
    for prompt, ids in zip(prompts(), texts):
        text = torch.tensor([prompt + ids])
        with torch.inference_mode():
            _, hidden = model(text, return_hidden=True)
            logits, _ = model.mtp_logits(hidden[:, :-1], text[:, 1:])
        guesses = logits[0].argmax(-1).tolist()  # entry i is a guess at token i + 2
        last = len(prompt)  # the newest token that has been chosen
        while last + 2 < text.shape[1]:  # room for two more
            right = guesses[last - 1] == text[0, last + 1]
            drafts, accepted = drafts + 1, accepted + int(right)
            last += 2 if right else 1
    run = complete(model, prompts(), max_new_tokens=24, speculative=True, prefill_chunk=chunk)
    assert drafts > 200
    assert run.acceptance == accepted / drafts


@pytest.mark.parametrize("seed", range(4))
def test_rows_end_at_their_own_eos(model, texts, seed):
    """Ends fall on accepted drafts and on the tokens behind them; others go on undisturbed."""
    eos = random.Random(seed).sample(sorted({id for ids in texts for id in ids}), 5)
    wanted = complete(model, prompts(), max_new_tokens=24, eos_ids=eos)
    seen = [[] for _ in prompts()]
    run = complete(
        model,
        prompts(),
        max_new_tokens=24,
        eos_ids=eos,
        speculative=True,
        on_token=lambda row, id: seen[row].append(id),
    )
    assert run.ids == wanted.ids == seen
    assert run.stopped_by == wanted.stopped_by
    assert {"eos", "length"} == set(run.stopped_by)
    assert len({len(ids) for ids in run.ids}) > 4


@pytest.mark.parametrize("new", [1, 2, 3, 10])
def test_up_to_the_context(model, new):
    """Prompts that leave room for 1, 2, 3 ... tokens, side by side with short ones."""
    context = CONFIG.max_position_embeddings
    chance = random.Random(1)
    rows = [
        [chance.randrange(CONFIG.vocab_size) for _ in range(length)]
        for length in (context - 1, 1, context - 2, context - 3, context - 4, 9, context - 9)
    ]
    wanted = complete(model, rows, max_new_tokens=new)
    run = complete(model, rows, max_new_tokens=new, speculative=True)
    assert (run.ids, run.stopped_by) == (wanted.ids, wanted.stopped_by)
    for row in rows:
        alone = complete(model, [row], max_new_tokens=new, speculative=True)
        assert alone.ids[0] == wanted.ids[rows.index(row)]


def test_interrupt_keeps_a_beginning(model, texts):
    answers = iter([False] * 5 + [True])
    run = complete(
        model, prompts(4), max_new_tokens=24, speculative=True, should_stop=lambda: next(answers)
    )
    assert run.stopped_by == ["interrupt"] * 4
    assert all(0 < len(ids) < 24 and ids == whole[: len(ids)] for ids, whole in zip(run.ids, texts))


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
def test_low_precision(tmp_path, precision):
    """A pass over two tokens rounds as two passes over one: the same tokens here too."""
    save_model(drafting_model(CONFIG.but(quantization_config=QuantizationConfig())), tmp_path)
    low = load_model(tmp_path, precision)
    run = complete(low, prompts(8), max_new_tokens=16, speculative=True)
    assert run.ids == complete(low, prompts(8), max_new_tokens=16).ids
    assert 0.1 < run.acceptance < 0.9


def test_several_modules_draft_with_the_first():
    model = drafting_model(CONFIG.but(num_nextn_predict_layers=2))
    run = complete(model, prompts(), max_new_tokens=24, speculative=True)
    assert run.ids == complete(model, prompts(), max_new_tokens=24).ids
    assert run.acceptance > 0


def test_a_conversation_keeps_both_caches():
    """Each turn computes the new words and a few tokens. Sampled text depends on the drafts'
    exact probabilities, so it shows that the draft cache holds this text and no other, after an
    edit of the history and after turns without drafts, too."""
    model = Transformer(CONFIG).init_weights(0)
    options = dict(max_new_tokens=9, temperature=1.0, seed=2)
    session, text, added = Session(model), [5, 9, 33], 3
    for words in [6, 7], [8], [9, 10, 11, 12]:
        run = session.complete(text, speculative=True, **options)
        assert run.ids == complete(model, [text], speculative=True, **options).ids
        assert session.prefilled <= added + 3
        text, added = [*text, *run.ids[0], *words], len(words)
    for changed in (text[:7] + [1] + text[8:], text[:2], text):
        for drafts in (False, True):
            run = session.complete(changed, speculative=drafts, **options)
            assert run.ids == complete(model, [changed], speculative=drafts, **options).ids


def test_caches_that_do_not_belong_together_are_refused(model):
    cache = model.new_cache(1, 16)
    model(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(DSV3Error, match="draft cache does not go with"):
        complete(model, [[1, 2, 3]], max_new_tokens=4, speculative=True, cache=cache)


def test_a_model_without_the_module_is_refused():
    model = drafting_model(CONFIG.but(num_nextn_predict_layers=0))
    with pytest.raises(DSV3Error, match="cannot draft.*num_nextn_predict_layers"):
        complete(model, [[1]], speculative=True)


# Sampling ----------------------------------------------------------------------------------------


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Pearson's statistic, and its 0.999 point (Wilson and Hilferty's approximation).

    Cells that expect fewer than 5 are counted together.
    """
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((counts - expected) ** 2 / expected).sum()), bound


def replace_by_p(p, q, draft, generator):
    """The wrong rule: a rejected draft is replaced by a token from p."""
    u = torch.rand((), dtype=torch.float64, generator=generator).item()
    return draft if u * q[draft] < p[draft] else draw(p, generator)


def accept_all(p, q, draft, generator):
    """Another one: trust the draft."""
    return draft


VOCAB, RUNS, PROMPT = 6, 3000, [3, 1, 4]


@torch.inference_mode()
def exact_joint(model: Transformer, temperature: float, top_p: float) -> torch.Tensor:
    """Probability of every three-token continuation of PROMPT, (v, v, v), from plain logits."""
    texts = torch.tensor(
        [PROMPT + list(tail) for tail in itertools.product(range(VOCAB), repeat=3)]
    )
    p = probabilities(model(texts), temperature, top_p)[:, len(PROMPT) - 1 : -1]
    steps = p.gather(-1, texts[:, len(PROMPT) :, None])[..., 0]
    return steps.prod(-1).view(VOCAB, VOCAB, VOCAB)


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.8)])
def test_sampled_text_has_the_distribution_of_plain_logits(monkeypatch, temperature, top_p):
    """Joint distribution of the first three tokens. The second is always drafted; the third is
    the one behind an accepted draft, or drafted itself. Wrong rules must be noticed."""
    model = drafting_model(CONFIG.but(vocab_size=VOCAB), seed=2)
    exact = exact_joint(model, temperature, top_p)

    def statistic(speculate: bool = True) -> tuple[float, float]:
        run = complete(
            model,
            [PROMPT] * RUNS,
            max_new_tokens=4,
            temperature=temperature,
            top_p=top_p,
            seed=5,
            speculative=speculate,
        )
        assert not speculate or 0.3 < run.acceptance < 0.9
        counts = torch.zeros(VOCAB, VOCAB, VOCAB)
        for ids in run.ids:
            counts[tuple(ids[:3])] += 1
        assert not counts[exact == 0].any(), "a token outside top_p was chosen"
        return chi_square(counts.flatten(), RUNS * exact.flatten())

    value, bound = statistic(speculate=False)
    assert value < bound, "plain sampling"
    value, bound = statistic()
    assert value < bound
    monkeypatch.setattr(speculative, "verify", replace_by_p)
    value, bound = statistic()
    assert value > bound, "the test does not see a wrong replacement"


@pytest.mark.parametrize(
    "rule, right", [(speculative.verify, True), (replace_by_p, False), (accept_all, False)]
)
def test_rejection_rule_alone(rule, right):
    p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
    q = torch.tensor([0.1, 0.6, 0.1, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[rule(p, q, draw(q, generator), generator)] += 1
    value, bound = chi_square(counts, 4000 * p)
    assert (value < bound and counts[3] == 0) == right


def test_a_row_keeps_its_text_beside_other_neighbours(model):
    options = dict(max_new_tokens=16, temperature=1.0, top_p=0.9, seed=3, speculative=True)
    together = complete(model, prompts(), **options).ids
    assert complete(model, prompts(), **options).ids == together
    assert complete(model, prompts()[:3], **options).ids == together[:3]
    assert complete(model, [prompts()[0], [5]], **options).ids[0] == together[0]
    assert complete(model, prompts(), **options | dict(seed=4)).ids != together


# Several ranks -----------------------------------------------------------------------------------

CASES = [dict(temperature=0.0), dict(temperature=1.0, top_p=0.9)]


def draft_on_a_rank(group: TensorGroup, folder: str) -> list:
    """One of two ranks. Rank 1 has another seed: only rank 0's draws may count."""
    model = load_model(folder, "fp32", group=group)
    return account(model, seed=3 + group.rank)


def account(model, seed: int) -> list:
    runs = [
        complete(
            model, prompts(), max_new_tokens=16, seed=seed, eos_ids=[11], speculative=True, **case
        )
        for case in CASES
    ]
    return [(run.ids, run.stopped_by, run.acceptance) for run in runs]


def test_two_ranks_equal_one(model, tmp_path):
    save_model(model, tmp_path)
    wanted = account(load_model(tmp_path, "fp32"), seed=3)
    assert run_ranks(draft_on_a_rank, 2, str(tmp_path)) == [wanted, wanted]
