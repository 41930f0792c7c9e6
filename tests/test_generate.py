"""The generation loop, with a model small enough to be predicted by hand.

``Oracle`` answers with logits that are a fixed function of the row's whole history, as it was fed
through the cache. A token fed twice, in the wrong row or from the padding gives other text.
"""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.generation.loop import complete, generate, prefill, stream
from dsv3.generation.sampling import Sampling, draw, probabilities, row_generators, sample
from dsv3.generation.session import Session
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup

VOCAB, CONTEXT = 50, 64


def next_logits(history: list[int]) -> torch.Tensor:
    """Logits after a history, a function of all of it in order."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(history))))


def greedy_text(prompt: list[int], count: int, valid: int = VOCAB) -> list[int]:
    """What greedy decoding must give, without cache or batch."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(next_logits(text)[:valid].argmax()))
    return text[len(prompt) :]


class OracleCache:
    def __init__(self, rows: int, room: int):
        self.rows, self.max_seq_len = [[] for _ in range(rows)], room
        self.nbytes = rows * room

    @property
    def lengths(self):
        return [len(row) for row in self.rows]

    def tokens(self, row):
        return list(self.rows[row])

    def copies(self, n, max_seq_len):
        other = OracleCache(n * len(self.rows), max_seq_len)
        other.rows = [list(row) for row in self.rows for _ in range(n)]
        return other

    def keep(self, rows):
        self.rows = [self.rows[row] for row in rows]

    def truncate(self, lengths):
        assert all(new <= old for new, old in zip(lengths, self.lengths, strict=True))
        self.rows = [row[:length] for row, length in zip(self.rows, lengths)]


class Oracle:
    """The interface of ``Transformer`` that generation uses."""

    def __init__(self):
        self.config = SimpleNamespace(vocab_size=VOCAB, max_position_embeddings=CONTEXT)
        self.group, self.device, self.eos_ids = TensorGroup.single(), torch.device("cpu"), ()
        self.fed = []  # true new tokens of each row, pass by pass

    def new_cache(self, batch_size, max_seq_len):
        return OracleCache(batch_size, max_seq_len)

    def fitting_rows(self, texts):
        return texts

    def __call__(self, tokens, cache=None, lengths=None, last_only=False):
        assert last_only and tokens.dtype == torch.int64 and len(tokens) == len(lengths)
        self.fed.append(lengths)
        for row, (ids, length) in enumerate(zip(tokens.tolist(), lengths)):
            assert 0 <= length <= len(ids)
            cache.rows[row] += ids[:length]
            assert len(cache.rows[row]) <= cache.max_seq_len
        nothing = torch.zeros(VOCAB)  # a row that fed no token has no answer
        return torch.stack(
            [next_logits(row) if length else nothing for row, length in zip(cache.rows, lengths)]
        )


PROMPTS = [[3], [7, 8, 9, 10, 11, 12, 13], [1, 2, 3], [5, 6]]


@pytest.mark.parametrize("chunk", [None, 1, 2, 3, 7, 100])
def test_ragged_batch_equals_rows_alone(chunk):
    out = generate(Oracle(), PROMPTS, max_new_tokens=9, prefill_chunk=chunk)
    assert out == [greedy_text(prompt, 9) for prompt in PROMPTS]


def test_prefill_in_chunks_feeds_each_token_once():
    model = Oracle()
    cache = model.new_cache(4, 16)
    prefill(model, cache, PROMPTS, chunk=3)
    assert cache.rows == PROMPTS
    assert model.fed == [[1, 3, 3, 2], [0, 3, 0, 0], [0, 1, 0, 0]]


def test_rows_stop_at_their_own_eos():
    """A row that has ended leaves the batch; its neighbours go on to the same text as alone."""
    texts = [greedy_text(prompt, 12) for prompt in PROMPTS]
    eos = texts[0][4]
    model = Oracle()
    run = complete(model, PROMPTS, max_new_tokens=12, eos_ids=[eos])
    for text, ids, reason in zip(texts, run.ids, run.stopped_by):
        end = text.index(eos) if eos in text else None
        assert ids == text[:end] and reason == ("length" if end is None else "eos")
    assert run.stopped_by[0] == "eos" and "length" in run.stopped_by
    assert len(model.fed) == 12
    for number, fed in enumerate(model.fed[1:], 1):  # an end token is chosen and never fed
        assert fed == [1] * sum(len(ids) >= number for ids in run.ids)


def test_rows_of_a_given_cache_stay():
    """Its owner goes on with it: a row that has ended is fed nothing and keeps its place."""
    texts = [greedy_text(prompt, 12) for prompt in PROMPTS]
    model, eos = Oracle(), texts[0][4]
    cache = model.new_cache(4, 64)
    run = complete(model, PROMPTS, max_new_tokens=12, eos_ids=[eos], cache=cache)
    assert run.ids == complete(Oracle(), PROMPTS, max_new_tokens=12, eos_ids=[eos]).ids
    assert all(len(fed) == 4 for fed in model.fed) and [fed[0] for fed in model.fed[5:]] == [0] * 7
    for row, prompt, ids, reason in zip(cache.rows, PROMPTS, run.ids, run.stopped_by):
        assert row == prompt + (ids if reason == "eos" else ids[:-1])


def test_on_token_sees_every_token_in_order():
    seen = [[] for _ in PROMPTS]
    out = generate(
        Oracle(), PROMPTS, max_new_tokens=5, on_token=lambda row, id: seen[row].append(id)
    )
    assert seen == out


def test_interrupt_ends_all_rows():
    answers = iter([False, False, True])
    run = complete(Oracle(), PROMPTS, max_new_tokens=9, should_stop=lambda: next(answers))
    assert run.ids == [greedy_text(prompt, 3) for prompt in PROMPTS]
    assert run.stopped_by == ["interrupt"] * 4


def test_context_is_filled_to_the_last_token():
    long = [random.Random(0).randrange(VOCAB) for _ in range(CONTEXT - 2)]
    run = complete(Oracle(), [long, [4]], max_new_tokens=5)
    assert run.ids == [greedy_text(long, 2), greedy_text([4], 5)]
    assert run.stopped_by == ["context", "length"]


def test_cache_is_no_longer_than_needed():
    assert complete(Oracle(), [[1, 2], [3]], max_new_tokens=5).cache_bytes == 2 * (2 + 5)
    assert complete(Oracle(), [[1, 2]], max_new_tokens=500).cache_bytes == CONTEXT


def test_no_new_tokens_and_no_prompts():
    assert generate(Oracle(), [[1], [2]], max_new_tokens=0) == [[], []]
    assert generate(Oracle(), []) == []


def test_banned_ids_are_never_chosen():
    free = generate(Oracle(), PROMPTS, max_new_tokens=20)
    assert max(map(max, free)) >= 10  # else the test shows nothing
    prompts = [[3], [7, 8, 9], [1, 2, 3], [5, 6]]
    masked = generate(Oracle(), prompts, max_new_tokens=20, banned_ids=range(10, VOCAB))
    assert masked == [greedy_text(prompt, 20, valid=10) for prompt in prompts]
    drawn = generate(
        Oracle(), prompts, max_new_tokens=20, temperature=5.0, banned_ids=range(10, VOCAB)
    )
    assert max(map(max, drawn)) < 10


def test_sampling_is_reproducible_and_independent_of_neighbours():
    options = dict(max_new_tokens=10, temperature=1.0, top_p=0.9)
    together = generate(Oracle(), PROMPTS, seed=3, **options)
    assert together == generate(Oracle(), PROMPTS, seed=3, **options)
    assert together != generate(Oracle(), PROMPTS, seed=4, **options)
    # The same rows beside other neighbours, and a batch cut short.
    assert generate(Oracle(), [PROMPTS[0], [9, 9]], seed=3, **options)[0] == together[0]
    assert generate(Oracle(), PROMPTS[:2], seed=3, **options) == together[:2]
    twins = generate(Oracle(), [[5], [5]], seed=3, **options)
    assert twins[0] != twins[1]  # one prompt twice gives two samples


def test_probabilities_by_hand():
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    assert torch.allclose(probabilities(logits, 1.0), torch.tensor([[0.1, 0.4, 0.3, 0.2]]).double())
    # T = 1/2 squares: 1, 16, 9, 4 over 30.
    assert torch.allclose(probabilities(logits, 0.5) * 30, torch.tensor([[1.0, 16, 9, 4]]).double())
    # 0.4 + 0.3 = 0.7 reaches 0.6, so two tokens stay: 4/7, 3/7.
    kept = probabilities(logits, 1.0, 0.6) * 7
    assert torch.allclose(kept, torch.tensor([[0.0, 4, 3, 0]]).double())
    # The most probable token always stays.
    assert probabilities(logits, 1.0, 1e-9).tolist() == [[0, 1, 0, 0]]
    assert probabilities(logits, 0.0).tolist() == [[0, 1, 0, 0]]


def test_top_p_boundary_and_ties():
    """Reaching top_p exactly is enough, and of equal tokens no more stay than are needed."""
    quarter = torch.zeros(1, 4)
    kept = probabilities(quarter, 1.0, 0.5)
    assert (kept > 0).sum() == 2 and kept.max() == 0.5
    assert (probabilities(quarter, 1.0, 0.51) > 0).sum() == 3


@pytest.mark.parametrize("logits", [[1e30, 0.0, -1e30], [3e38, 3e38, 0.0], [-math.inf, 0.0, 1.0]])
@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1.0, 1e300])
def test_extreme_logits_and_temperatures(logits, temperature):
    p = probabilities(torch.tensor([logits]), temperature, 0.99)
    assert torch.isfinite(p).all() and math.isclose(p.sum(), 1.0, rel_tol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(bad):
    with pytest.raises(DSV3Error, match="logits are not finite"):
        sample(torch.tensor([[0.0, bad, 1.0]]), 0.0, 1.0, row_generators(0, 1))


def test_drawn_tokens_follow_the_distribution():
    """Pearson's chi-square over 20000 draws; 27.88 is the 0.999 point for 9 degrees of freedom."""
    p = torch.arange(1.0, 11.0) / 55
    generator, draws = torch.Generator().manual_seed(0), 20000
    counts = torch.zeros(12)
    padded = torch.cat([torch.zeros(1), p, torch.zeros(1)])  # weight 0 at both ends
    for _ in range(draws):
        counts[draw(padded, generator)] += 1
    assert counts[0] == counts[-1] == 0
    assert (((counts[1:-1] - draws * p) ** 2) / (draws * p)).sum() < 27.88


def test_draw_at_the_ends_of_the_unit_interval(monkeypatch):
    p = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0])
    for u, index in [(0.0, 1), (0.25, 3), (1 - 2**-53, 3)]:
        drawn = torch.tensor(u, dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, drawn=drawn, **__: drawn)
        assert draw(p, torch.Generator()) == index


def test_session_computes_only_what_is_new():
    model, session_model = Oracle(), Oracle()
    session = Session(session_model)
    text = [1, 2, 3, 4, 5]
    for new_words in ([6, 7], [8], [9, 10, 11]):
        before = len(session.ids)
        run = session.complete(text, max_new_tokens=4)
        assert run.ids == generate(model, [text], max_new_tokens=4)
        assert session.prefilled == len(text) - before
        text = [*text, *run.ids[0], *new_words]
    assert session.prefilled == 2  # one new word, and the last answer's unfed last token


def test_session_survives_a_changed_history_and_growth():
    session = Session(Oracle(), room=4)
    session.complete([1, 2, 3, 4, 5], max_new_tokens=4)
    for text in ([1, 2, 9], [1, 2, 9], [8], list(range(40))):
        assert session.complete(text, max_new_tokens=3).ids == [greedy_text(text, 3)]
    session.clear()
    assert session.complete([1], max_new_tokens=2).ids == [greedy_text([1], 2)]


def test_session_survives_an_exception_in_the_middle():
    session = Session(Oracle())
    first = session.complete([1, 2, 3], max_new_tokens=4)

    def interrupted(row, id):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.complete([1, 2, 3, *first.ids[0], 6], max_new_tokens=4, on_token=interrupted)
    assert session.complete([1, 2, 3, 7], max_new_tokens=4).ids == [greedy_text([1, 2, 3, 7], 4)]


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([[1], []], "prompt 1: empty prompt"),
        ([[1] * CONTEXT], r"prompt 0: prompt longer than the context.*found 64 tokens.*at most 63"),
        ([[1, VOCAB]], r"token id out of range \(found 50, expected 0 to 49\)"),
        ([[-1]], "token id out of range"),
        ([[1.5]], "token id out of range"),
        ([1, 2], "prompt 0: not a list of token ids"),
        (["text"], "prompt 0: not a list of token ids"),
    ],
)
def test_bad_prompts(prompts, message):
    with pytest.raises(DSV3Error, match=message):
        generate(Oracle(), prompts)


@pytest.mark.parametrize(
    "option, value",
    [
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1.5),
        ("seed", 0.5),
        ("prefill_chunk", 0),
        ("top_k", -1),
        ("top_k", True),
        ("n", 0),
        ("num_draft_tokens", 0),
        ("num_draft_tokens", 1.5),
        ("eos_ids", ["x"]),
        ("eos_ids", 3),
        ("eos_ids", [-1]),
        ("stop", [""]),
        ("stop", 3),
        ("banned_ids", [0.5]),
        ("logprobs", 1),
        ("speculative", "yes"),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 10**400),
        ("stop", ["a\ud800"]),
    ],
)
def test_bad_options(as_in_use, option, value):
    with pytest.raises(DSV3Error, match=option):
        generate(Oracle(), [[1]], **{option: value})


def test_unknown_options_are_named():
    for call in (generate, complete, stream, Session(Oracle()).complete):
        with pytest.raises(DSV3Error, match="valid_vocab: no such option.*temperature, top_k"):
            call(Oracle(), [[1]], valid_vocab=3) if call in (generate, complete, stream) else call(
                [1], valid_vocab=3
            )


def test_options_change_a_sampling():
    sampling = Sampling(max_new_tokens=3, temperature=1.0, seed=2)
    out = generate(Oracle(), PROMPTS, sampling=sampling)
    assert out == generate(Oracle(), PROMPTS, 3, temperature=1.0, seed=2)
    assert generate(Oracle(), PROMPTS, sampling=sampling, temperature=0.0) == [
        greedy_text(prompt, 3) for prompt in PROMPTS
    ]


def test_a_prompt_with_an_id_that_is_no_token_is_refused():
    words = SimpleNamespace(
        ids_without_token=lambda vocab: range(10, vocab), text_bytes=lambda id: b"x"
    )
    with pytest.raises(DSV3Error, match="prompt 0: an id that is no token.*found 12"):
        generate(Oracle(), [[12]], tokenizer=words)


def test_a_prompt_may_hold_what_must_not_be_chosen():
    out = generate(Oracle(), [[12, 3]], 20, banned_ids=range(10, VOCAB))
    assert (
        out
        == Session(Oracle()).complete([12, 3], max_new_tokens=20, banned_ids=range(10, VOCAB)).ids
    )
    assert max(out[0]) < 10


@pytest.fixture(scope="module")
def small_model():
    """A random model with every mechanism, small enough for a test."""
    config = ModelConfig.mini().but(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        max_position_embeddings=96,
    )
    return Transformer(config).init_weights(0)


def greedy_without_cache(model, prompt: list[int], count: int) -> list[int]:
    """The slow and certain way: the whole text through the model for every token."""
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            text.append(int(model(torch.tensor([text]), last_only=True).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("chunk", [None, 3])
def test_model_in_a_ragged_batch_equals_full_passes(small_model, chunk):
    """With an early end in the first row: ended rows stay in the batch and change nothing."""
    texts = [greedy_without_cache(small_model, prompt, 10) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == 4
    eos = texts[0][3]
    out = generate(small_model, PROMPTS, max_new_tokens=10, eos_ids=[eos], prefill_chunk=chunk)
    assert out == [text[: text.index(eos)] if eos in text else text for text in texts]


def test_model_in_a_session_equals_full_passes(small_model):
    session, text = Session(small_model), [1, 2, 3, 4]
    for _ in range(3):
        answer = session.complete(text, max_new_tokens=5).ids[0]
        assert answer == greedy_without_cache(small_model, text, 5)
        text = [*text, *answer, 9, 8]
    assert session.prefilled == 3
