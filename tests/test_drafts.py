"""Several drafts a pass, by one module that reads its own state: still the text of plain decoding.

Models and helpers are those of ``test_speculative``. Drafts are compared with the module run over
whole texts without any cache, sampled text with the exact distribution of five tokens.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from ranks import run_ranks
from test_speculative import (
    CASES,
    CONFIG,
    accept_all,
    chi_square,
    drafting_model,
    greedy_text,
    prompts,
    replace_by_p,
)

from dsv3 import load_tokenizer
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.saving import save_model
from dsv3.config import QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.generation import speculative
from dsv3.generation.loop import Stream, complete, stream
from dsv3.generation.sampling import draw, probabilities
from dsv3.generation.session import Session
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow

ROWS = prompts(8)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return drafting_model()


@pytest.fixture(scope="module")
def texts(model) -> list[list[int]]:
    return [greedy_text(model, prompt, 24) for prompt in ROWS]


def prophet(texts: list[list[int]], wrong_at: int = 0, model: Transformer | None = None):
    """A model whose module drafts the plain text, and something else at every ``wrong_at``-th
    place of a text."""
    copy = model or drafting_model()

    def new_draft_cache(batch_size, max_seq_len):
        """One that knows which rows are still in the batch."""
        cache = Transformer.new_draft_cache(copy, batch_size, max_seq_len)
        cache.rows, keep = list(range(batch_size)), cache.keep

        def keep_rows(places):
            keep(places)
            cache.rows = [cache.rows[place] for place in places]

        cache.keep = keep_rows
        return cache

    def mtp_logits(hidden, tokens, cache, lengths, last_only):
        cache.advance(lengths)
        rows = torch.zeros(len(lengths), copy.config.vocab_size)
        for at, row in enumerate(cache.rows):
            ids, place = texts[row], cache.lengths[at] + 1 - len(ROWS[row])
            if 0 <= place < len(ids):
                missed = wrong_at and place % wrong_at == 0
                rows[at, (ids[place] + bool(missed)) % copy.config.vocab_size] = 1.0
        return rows, hidden

    copy.new_draft_cache, copy.mtp_logits = new_draft_cache, mtp_logits
    return copy


def records(run: Stream) -> list[list[tuple]]:
    """For each row: (its number of tokens before the pass, the pass), of all its passes."""
    seen: list[list[tuple]] = [[] for _ in run.last_pass]
    counts, last = [0] * len(seen), [None] * len(seen)
    for token in run:
        row = token.row
        if run.last_pass[row] is not None and run.last_pass[row] is not last[row]:
            last[row] = run.last_pass[row]
            seen[row].append((counts[row], last[row]))
        counts[row] += 1
    return seen


# Greedy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3, 4, 30])
def test_greedy_text_is_that_of_plain_decoding(model, texts, k):
    run = complete(model, ROWS, max_new_tokens=24, speculative=True, num_draft_tokens=k)
    assert run.ids == texts and run.stopped_by == ["length"] * len(ROWS)
    assert run.chosen == [24] * len(ROWS)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_drafts_are_those_of_the_module_over_the_whole_text(model, k):
    """Entry i of the module's text is made of the state of i and token i + 1; behind the last
    state come its own. No cache, so none of an earlier guess."""
    run = stream(model, ROWS, max_new_tokens=14, speculative=True, num_draft_tokens=k)
    deepest = 0
    for row, seen in enumerate(records(run)):
        whole = ROWS[row] + run.result.ids[row]
        for count, done in seen:
            text = torch.tensor([whole[: len(ROWS[row]) + count]])
            with torch.inference_mode():
                _, hidden = model(text, return_hidden=True)
                hidden, tokens, drafts = hidden[:, :-1], text[:, 1:], []
                for _ in done.drafts:
                    logits, own = model.mtp_logits(hidden, tokens)
                    guess = logits[:, -1].argmax(-1)
                    drafts.append(int(guess))
                    hidden = torch.cat([hidden, own[:, -1:]], 1)
                    tokens = torch.cat([tokens, guess[None]], 1)
            assert list(done.drafts) == drafts
            assert len(drafts) == min(k, 14 - count - 1)
            deepest = max(deepest, done.accepted)
    assert deepest == k, "a pass with all drafts accepted must be among them"


@pytest.mark.parametrize("wrong_at, per_pass", [(0, 4.0), (1, 1.0), (2, 2.0)])
def test_tokens_a_pass(texts, wrong_at, per_pass):
    """Always right: k + 1 tokens a pass. Always wrong: 1. Every second place wrong: the first
    draft, then a replacement, or a replacement at once."""
    text = [ids[:9] for ids in texts]
    run = complete(
        prophet(text, wrong_at), ROWS, max_new_tokens=9, speculative=True, num_draft_tokens=3
    )
    assert run.ids == text
    if wrong_at == 2:  # places 1, 2 | 3, 4 | ...: one of two accepted drafts and its replacement
        assert [depth.accepted for depth in run.accepted_by_depth][1:] == [0, 0]
    assert run.tokens_per_pass == per_pass
    if wrong_at < 2:
        assert run.acceptance == 1 - wrong_at


@pytest.mark.parametrize("k", [2, 5])
def test_ends_in_the_middle_of_accepted_drafts(texts, k):
    """An end token is an accepted draft with others behind it; nothing behind it is kept."""
    sure = prophet(texts)
    for seed in range(3):
        eos = random.Random(seed).sample(sorted({id for ids in texts for id in ids}), 4)
        options = dict(max_new_tokens=24, eos_ids=eos)
        wanted = complete(sure, ROWS, **options)
        run = complete(sure, ROWS, speculative=True, num_draft_tokens=k, **options)
        assert (run.ids, run.stopped_by) == (wanted.ids, wanted.stopped_by)
        assert run.chosen == wanted.chosen
        assert "eos" in run.stopped_by


def test_stop_strings_in_the_middle_of_accepted_drafts(tiny_checkpoint):
    words = load_tokenizer(tiny_checkpoint)
    base = Transformer(CONFIG.but(vocab_size=words.vocab_size)).init_weights(3).eval()
    options = dict(max_new_tokens=20, tokenizer=words)
    plain = complete(base, ROWS, **options)
    base = prophet(plain.ids, model=base)
    options["stop"] = [text[5:8] for text in plain.texts if text[5:8].strip()]
    wanted = complete(base, ROWS, **options)
    run = complete(base, ROWS, speculative=True, num_draft_tokens=4, **options)
    assert "stop" in wanted.stopped_by
    assert (run.ids, run.texts, run.stopped_by) == (wanted.ids, wanted.texts, wanted.stopped_by)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 12])
def test_up_to_the_context(model, new):
    context, chance = CONFIG.max_position_embeddings, random.Random(1)
    rows = [
        [chance.randrange(CONFIG.vocab_size) for _ in range(length)]
        for length in (context - 1, 1, context - 2, context - 3, context - 4, 9, context - 9)
    ]
    wanted = complete(model, rows, max_new_tokens=new)
    run = complete(model, rows, max_new_tokens=new, speculative=True, num_draft_tokens=3)
    assert (run.ids, run.stopped_by) == (wanted.ids, wanted.stopped_by)


@pytest.mark.parametrize("k", [13, 14])
def test_no_more_drafts_than_the_context_has_room_for(k):
    """Context 16: a prompt of one token, the one that is fed, the drafts, one more."""
    model = drafting_model(CONFIG.but(max_position_embeddings=16))
    options = dict(max_new_tokens=64, speculative=True, num_draft_tokens=k)
    if k == 13:
        assert len(records(stream(model, [[3]], **options))[0][0][1].drafts) == 13
        return
    with pytest.raises(DSV3Error, match="num_draft_tokens.*found 14, expected at most 13"):
        stream(model, [[3]], **options)


def test_log_probabilities_and_bans(model):
    options = dict(max_new_tokens=12, logprobs=True, banned_ids=range(0, 64, 3))
    plain = complete(model, ROWS, **options)
    run = complete(model, ROWS, speculative=True, num_draft_tokens=3, **options)
    assert run.ids == plain.ids
    for mine, theirs in zip(run.logprobs, plain.logprobs):
        assert mine == pytest.approx(theirs, abs=1e-4)
    passes = records(
        stream(model, ROWS, speculative=True, num_draft_tokens=3, temperature=1.0, **options)
    )
    assert all(id % 3 for seen in passes for _, done in seen for id in done.drafts)


def test_interrupt_keeps_a_beginning(model, texts):
    answers = iter([False] * 9 + [True])
    run = complete(
        model,
        ROWS,
        max_new_tokens=24,
        speculative=True,
        num_draft_tokens=3,
        should_stop=lambda: next(answers),
    )
    assert run.stopped_by == ["interrupt"] * len(ROWS)
    assert all(0 < len(ids) < 24 and ids == whole[: len(ids)] for ids, whole in zip(run.ids, texts))


def test_a_conversation_keeps_both_caches():
    """Sampled text depends on the exact drafts, so it shows that no guess stays in a cache."""
    model = Transformer(CONFIG).init_weights(0)
    options = dict(max_new_tokens=9, temperature=1.0, seed=2, speculative=True, num_draft_tokens=3)
    session, text = Session(model), [5, 9, 33]
    for words in [6, 7], [8], [9, 10, 11, 12]:
        run = session.complete(text, **options)
        assert run.ids == complete(model, [text], **options).ids
        held = session._draft_cache.tokens(0)
        assert held == (text + run.ids[0])[1 : len(held) + 1]
        text = [*text, *run.ids[0], *words]
    early = session.stream(text, **options)
    next(early), next(early)
    early.close()
    assert session.complete(text, **options).ids == complete(model, [text], **options).ids


# Low precision: the text does not depend on drafts -----------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    model = load_model("dsv3-mini", "fp8")
    words = load_tokenizer("dsv3-mini")
    lines = "def add(self, x):\n", "58 + 67 ="
    rows = [words.encode(text) for text in lines]
    return model, rows, complete(model, rows, max_new_tokens=12, logprobs=True)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_fp8_on_the_shipped_model(shipped, k):
    """The pass over t_n and k drafts is computed as decoding is, in the absorbed form, and each
    token as if it were alone: the same logits to the last bit of float64, nearly."""
    model, rows, plain = shipped
    assert not any(layer.attn.prefers_expanded(k + 1) for layer in model.layers)
    run = complete(
        model, rows, max_new_tokens=12, logprobs=True, speculative=True, num_draft_tokens=k
    )
    assert run.ids == plain.ids
    assert (
        max(
            abs(a - b)
            for mine, theirs in zip(run.logprobs, plain.logprobs)
            for a, b in zip(mine, theirs)
        )
        < 1e-9
    )
    assert run.accepted_by_depth[0].accepted > 5


def test_fp8_where_a_pass_takes_the_other_form(tmp_path, texts):
    """More than 16 queries are cheaper expanded in this small model. With drafts that are right,
    so many are fed at once."""
    save_model(drafting_model(CONFIG.but(quantization_config=QuantizationConfig())), tmp_path)
    low = load_model(tmp_path, "fp8")
    assert low.layers[0].attn.prefers_expanded(21)
    plain = complete(low, ROWS, max_new_tokens=32)
    run = complete(
        prophet(plain.ids, model=low),
        ROWS,
        max_new_tokens=32,
        speculative=True,
        num_draft_tokens=20,
    )
    assert run.ids == plain.ids and run.accepted_by_depth[19].accepted > 0


# Sampling ----------------------------------------------------------------------------------------

VOCAB, RUNS, PROMPT, NEW = 3, 4000, [2, 0, 1], 5


@pytest.fixture(scope="module")
def small() -> Transformer:
    return drafting_model(CONFIG.but(vocab_size=VOCAB), seed=2)


@torch.inference_mode()
def exact_joint(model: Transformer, **options) -> torch.Tensor:
    """Probability of every five-token continuation of PROMPT, from plain logits."""
    texts = torch.tensor(
        [PROMPT + list(tail) for tail in itertools.product(range(VOCAB), repeat=NEW)]
    )
    p = probabilities(model(texts), **options)[:, len(PROMPT) - 1 : -1]
    return p.gather(-1, texts[:, len(PROMPT) :, None])[..., 0].prod(-1)


def statistic(model: Transformer, k: int, seed: int = 5, **options) -> tuple[float, float]:
    run = complete(
        model,
        [PROMPT],
        n=RUNS,
        max_new_tokens=NEW,
        seed=seed,
        speculative=True,
        num_draft_tokens=k,
        **options,
    )
    counts = torch.zeros(VOCAB**NEW)
    for ids in run.ids:
        counts[sum(id * VOCAB ** (NEW - 1 - place) for place, id in enumerate(ids))] += 1
    exact = exact_joint(model, **options)
    assert not counts[exact == 0].any(), "a token outside top_p was chosen"
    return chi_square(counts, RUNS * exact)


CUTS = [dict(temperature=1.0), dict(temperature=0.8, top_p=0.85), dict(temperature=1.3, top_k=2)]


@pytest.mark.parametrize("k, options", [(1, CUTS[0]), (2, CUTS[1]), (3, CUTS[0]), (3, CUTS[2])])
def test_sampled_text_has_the_distribution_of_plain_logits(small, k, options):
    value, bound = statistic(small, k, **options)
    assert value < bound


@pytest.mark.parametrize(
    "k, bad",
    [
        (1, lambda x: 4 * x.roll(1, -1)),
        (2, torch.zeros_like),
        (3, lambda x: -2 * x),
        (3, lambda x: 4 * x.roll(1, -1)),
    ],
)
def test_bad_drafts_cost_time_alone(small, monkeypatch, k, bad):
    drafts = small.mtp_logits
    monkeypatch.setattr(
        small,
        "mtp_logits",
        lambda *args, **kwargs: (lambda logits, states: (bad(logits), states))(
            *drafts(*args, **kwargs)
        ),
    )
    value, bound = statistic(small, k, temperature=1.0)
    assert value < bound


def judge_by(rules):
    """``judge`` with a rule for each place in the place of ``verify``."""

    def judge(p, q, drafts, generator):
        for place, guess in enumerate(drafts):
            follows = rules[place](p[place], q[place], guess, generator)
            if follows != guess:
                return (*drafts[:place], follows)
        return (*drafts, draw(p[len(drafts)], generator))

    return judge


RIGHT, TIMES = speculative.verify, 3000


@pytest.mark.parametrize(
    "judge, right",
    [
        (lambda *args: speculative.judge(*args).chosen, True),
        (judge_by([RIGHT, RIGHT]), True),
        (judge_by([RIGHT, replace_by_p]), False),
        (judge_by([RIGHT, accept_all]), False),
    ],
)
def test_the_rule_at_each_place_alone(judge, right):
    """Three tokens after two drafts, against the product of the p; what a pass leaves open is drawn
    from p. Whole texts see a wrong rule behind the first draft only in some 20,000 of them."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.4, 0.2, 0.4], [0.7, 0.2, 0.1]], dtype=torch.float64)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(3, 3, 3)
    for _ in range(TIMES):
        chosen = judge(p, q, [draw(row, generator) for row in q], generator)
        rest = [draw(row, generator) for row in p[len(chosen) :]]
        counts[(*chosen, *rest)] += 1
    exact = TIMES * torch.einsum("i,j,k->ijk", *p).flatten()
    value, bound = chi_square(counts.flatten(), exact)
    assert (value < bound) == right


def test_samples_of_one_prefill_and_neighbours(model):
    options = dict(max_new_tokens=12, temperature=1.0, seed=3, speculative=True, num_draft_tokens=3)
    together = complete(model, ROWS[:3], n=2, **options)
    repeated = complete(model, [row for row in ROWS[:3] for _ in range(2)], **options)
    assert together.ids == repeated.ids == complete(model, ROWS[:3], n=2, **options).ids
    assert complete(model, ROWS[:1], **options).ids[0] == together.ids[0]
    assert complete(model, ROWS, **options | dict(seed=4)).ids[:1] != together.ids[:1]


# The record and the account ----------------------------------------------------------------------


def test_the_record_of_a_pass(model):
    options = dict(max_new_tokens=16, temperature=1.0, top_p=0.9, seed=1)
    run = stream(model, ROWS, speculative=True, num_draft_tokens=3, **options)
    assert run.last_pass == [None] * len(ROWS)
    passes = records(run)
    result = run.result
    verified, accepted = [0] * 3, [0] * 3
    for row, seen in enumerate(passes):
        for count, done in seen:
            k = len(done.drafts)
            assert done.q.shape == (k, 64) and done.p.shape == (k + 1, 64)
            assert done.q.dtype == done.p.dtype == torch.float64
            assert all(done.q[j, id] > 0 for j, id in enumerate(done.drafts))
            assert done.chosen[:-1] == done.drafts[: done.accepted]
            assert len(done.chosen) == done.accepted + 1
            assert tuple(result.ids[row][count : count + len(done.chosen)]) == done.chosen
            if done.accepted < k:
                assert done.chosen[-1] != done.drafts[done.accepted]
            text = torch.tensor([[*ROWS[row], *result.ids[row][:count], *done.drafts]])
            with torch.inference_mode():
                p = probabilities(model(text)[0, -k - 1 :], temperature=1.0, top_p=0.9)
            assert torch.allclose(done.p, p, atol=1e-4)
            for depth in range(min(done.accepted + 1, k)):
                verified[depth] += 1
                accepted[depth] += depth < done.accepted
    assert result.accepted_by_depth == list(zip(verified, accepted))
    drafts = sum(len(done.drafts) for seen in passes for _, done in seen)
    assert result.acceptance == sum(accepted) / drafts
    assert verified[1] == accepted[0] - sum(  # those that had no second draft
        len(done.drafts) == 1 and done.accepted for seen in passes for _, done in seen
    )
    assert min(accepted) > 0


def test_nothing_is_recorded_without_drafts(model):
    run = stream(model, ROWS, max_new_tokens=3, num_draft_tokens=3)
    assert len(list(run)) == 3 * len(ROWS) and run.last_pass == [None] * len(ROWS)
    assert run.result.accepted_by_depth is None


# Several ranks -----------------------------------------------------------------------------------


def account(model, seed: int) -> list:
    runs = [
        complete(
            model,
            ROWS,
            max_new_tokens=16,
            seed=seed,
            eos_ids=[11],
            speculative=True,
            num_draft_tokens=3,
            **case,
        )
        for case in CASES
    ]
    return [(run.ids, run.stopped_by, run.acceptance, run.accepted_by_depth) for run in runs]


def draft_on_a_rank(group: TensorGroup, folder: str) -> list:
    """One of two ranks. Rank 1 has another seed: only rank 0's draws may count."""
    return account(load_model(folder, "fp32", group=group), seed=3 + group.rank)


def test_two_ranks_equal_one(model, tmp_path):
    save_model(model, tmp_path)
    wanted = account(load_model(tmp_path, "fp32"), seed=3)
    assert run_ranks(draft_on_a_rank, 2, str(tmp_path)) == [wanted, wanted]
