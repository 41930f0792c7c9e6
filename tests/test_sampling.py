"""What may be asked of a generation: top-k, stop strings, samples, log-probabilities, streams.

Everything runs on a small random model; what is expected is computed from its logits alone.
"""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch
from ranks import run_ranks

from dsv3 import ModelConfig, Transformer, generate, load_model, load_tokenizer
from dsv3.checkpoint.generation_config import FILE, GenerationConfig
from dsv3.checkpoint.saving import save_model
from dsv3.errors import DSV3Error
from dsv3.generation.loop import complete, stream
from dsv3.generation.sampling import Choice, Chooser, Sampling, probabilities
from dsv3.generation.session import Session
from dsv3.generation.stops import RowText
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow

CONFIG = ModelConfig.mini().but(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    max_position_embeddings=96,
    eos_token_id=None,
    initializer_range=0.2,
    quantization_config=None,
)
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG).init_weights(1).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def words(tiny_checkpoint):
    """A model with a tokenizer, and text of it that is drawn, so that it does not repeat itself."""
    return load_model(tiny_checkpoint, "fp32"), load_tokenizer(tiny_checkpoint)


# Prompts and options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda p: torch.tensor(p),
        lambda p: np.array(p),
        lambda p: [torch.tensor(row) for row in p],
        lambda p: [np.array(row) for row in p],
        lambda p: tuple(tuple(row) for row in p),
        lambda p: [[np.int64(id) for id in row] for row in p],
        lambda p: [[torch.tensor(id) for id in row] for row in p],
    ],
)
def test_prompts_in_every_form(model, form):
    prompts = [[5, 6], [7, 8]]
    assert generate(model, form(prompts), 4) == generate(model, prompts, 4)


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([1, 2]),
        np.array([1.5]),
        "text",
        3,
        [torch.tensor(3)],
        torch.tensor([[1.5, 2.0]]),
        [[True]],
        [b"bytes"],
    ],
)
def test_other_prompts_are_refused(as_in_use, model, prompts):
    with pytest.raises(DSV3Error, match="not a list of (token ids|prompts)|token id out of range"):
        generate(model, prompts)


def test_a_text_ends_at_the_models_end_tokens(model):
    whole = generate(model, PROMPTS, 12)
    ends = Transformer(CONFIG.but(eos_token_id=whole[0][4])).init_weights(1)
    run = complete(ends, PROMPTS, max_new_tokens=12)
    assert run.ids[0] == whole[0][: whole[0].index(whole[0][4])] and run.stopped_by[0] == "eos"
    assert generate(ends, PROMPTS, 12, eos_ids=()) == whole
    other = whole[1][2]
    assert generate(ends, PROMPTS, 12, eos_ids=[other])[1] == whole[1][: whole[1].index(other)]


def test_top_k_by_hand(model):
    logits = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]]))
    assert torch.allclose(
        probabilities(logits, 1.0, top_k=2) * 7, torch.tensor([[0.0, 4, 3, 0]]).double()
    )
    # Top-p looks at what top-k left: 4/7 < 0.6 <= 1, where 0.4 + 0.3 of all would do as well.
    assert (probabilities(logits, 1.0, 0.57, 2) > 0).sum() == 1
    assert (probabilities(logits, 1.0, 0.58, 2) > 0).sum() == 2
    assert (probabilities(torch.zeros(1, 4), 1.0, top_k=3) > 0).sum() == 3  # ties
    assert torch.equal(probabilities(logits, 1.0, top_k=4), probabilities(logits, 1.0))
    assert generate(model, PROMPTS, 8, temperature=2.0, top_k=1) == generate(model, PROMPTS, 8)


# Ids that are no token ---------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_ids_that_are_no_token_are_never_chosen(model, temperature, speculative):
    options = dict(max_new_tokens=20, temperature=temperature, speculative=speculative, seed=1)
    free = {id for ids in generate(model, PROMPTS, **options) for id in ids}
    banned = random.Random(0).sample(sorted(free - set(sum(PROMPTS, []))), len(free) // 3)
    run = complete(model, PROMPTS, banned_ids=banned, **options)
    assert banned and not {id for ids in run.ids for id in ids} & set(banned)
    if speculative:  # drafts are banned alike, so that some are accepted
        assert run.acceptance >= 0
        if temperature == 0:
            plain = complete(model, PROMPTS, banned_ids=banned, **options | dict(speculative=False))
            assert run.ids == plain.ids


def test_holes_of_a_tokenizer(tiny_checkpoint, tmp_path):
    """Holes in the middle and the rows behind the last token; the text decodes."""
    for file in tiny_checkpoint.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    gone = {word for word, id in vocab.items() if 270 <= id < 299}
    data["model"]["vocab"] = {word: id for word, id in vocab.items() if word not in gone}
    pair = [
        merge if isinstance(merge, list) else merge.split(" ") for merge in data["model"]["merges"]
    ]
    data["model"]["merges"] = [merge for merge in pair if not gone & {*merge, "".join(merge)}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = load_tokenizer(tmp_path)
    absent = tokenizer.ids_without_token(384)
    assert {*range(270, 299), *range(300, 384)} == set(absent)
    model = load_model(tiny_checkpoint, "fp32")
    free = generate(model, [[5]], 60, temperature=5.0, eos_ids=())
    assert {*free[0]} & {*range(270, 299)} and {*free[0]} & {*range(300, 384)}
    for speculative in (False, True):
        run = complete(
            model,
            [[5]],
            max_new_tokens=40,
            temperature=5.0,
            tokenizer=tokenizer,
            eos_ids=(),
            speculative=speculative,
        )
        assert not {*run.ids[0]} & set(absent) and run.texts == [tokenizer.decode(run.ids[0])]


def test_all_ids_banned(model):
    with pytest.raises(DSV3Error, match="banned_ids: no token is left"):
        generate(model, [], banned_ids=range(96))


# Log-probabilities -------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [False, True])
def test_logprobs_are_the_models_own(model, speculative):
    """Of the whole distribution, though the draw is from a narrower one."""
    run = complete(
        model,
        PROMPTS,
        max_new_tokens=10,
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        seed=4,
        logprobs=True,
        banned_ids=[8],
        speculative=speculative,
    )
    for prompt, ids, logprobs in zip(PROMPTS, run.ids, run.logprobs, strict=True):
        text = torch.tensor([prompt + ids])
        wanted = model(text)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
        assert torch.allclose(
            torch.tensor(logprobs).double(),
            wanted.gather(-1, torch.tensor(ids)[:, None])[:, 0],
            atol=1e-5,
        )
    assert complete(model, PROMPTS, max_new_tokens=2).logprobs is None


# Samples -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [False, True])
def test_samples_over_one_prefill_are_those_of_the_prompt_repeated(model, monkeypatch, speculative):
    options = dict(
        max_new_tokens=9, temperature=1.0, seed=3, speculative=speculative, prefill_chunk=2
    )
    repeated = complete(model, [prompt for prompt in PROMPTS for _ in range(3)], **options)
    fed, forward = [], model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda tokens, **named: (fed.append(sum(named["lengths"])), forward(tokens, **named))[1],
    )
    run = complete(model, PROMPTS, n=3, **options)
    assert run.ids == repeated.ids and len({tuple(ids) for ids in run.ids}) == 9
    assert sum(fed[:3]) == sum(map(len, PROMPTS))  # three chunks, of the prompts alone
    cache = model.new_cache(3, 6)  # room for the prompts
    assert speculative or complete(model, PROMPTS, n=3, cache=cache, **options).ids == run.ids


# Several ranks -----------------------------------------------------------------------------------


def account(model) -> tuple:
    runs = [
        complete(
            model,
            PROMPTS,
            max_new_tokens=8,
            temperature=1.0,
            seed=3 + model.group.rank,
            n=2,
            logprobs=True,
            top_k=50,
            speculative=speculative,
        )
        for speculative in (False, True)
    ]
    return [run.ids for run in runs], [np.array(sum(run.logprobs, [])) for run in runs]


def account_of_a_rank(group, folder):
    return account(load_model(folder, "fp32", group=group))


def test_two_ranks_draw_what_one_draws(model, tmp_path):
    """Rank 1 has another seed: only rank 0's draws may count, and its log-probabilities."""
    save_model(model, tmp_path)
    ids, logprobs = account(load_model(tmp_path, "fp32"))
    both = run_ranks(account_of_a_rank, 2, tmp_path)
    for found, values in both:
        assert found == ids
        for mine, first, alone in zip(values, both[0][1], logprobs):
            assert (mine == first).all() and np.allclose(mine, alone, atol=1e-4)


# Caches that hold something already --------------------------------------------------------------


@pytest.mark.parametrize("speculative", [False, True])
def test_rows_that_are_cached_in_part_or_whole(model, speculative):
    wanted = generate(model, PROMPTS, 6)
    for held in ([3, 1, 6], [2, 0, 6], [3, 1, 2], [0, 0, 0]):
        cache, drafts = model.new_cache(3, 20), model.new_draft_cache(3, 20)
        if any(held):
            padded = torch.tensor([(prompt + [0] * 6)[:6] for prompt in PROMPTS])
            _, hidden = model(padded, cache=cache, lengths=held, return_hidden=True)
            # An entry about the token behind the prompt is a guess, and is not kept.
            model.mtp_logits(hidden, padded.roll(-1, 1), cache=drafts, lengths=held)
        out = complete(
            model,
            PROMPTS,
            max_new_tokens=6,
            cache=cache,
            speculative=speculative,
            draft_cache=drafts if speculative else None,
        )
        assert out.ids == wanted


def test_caches_of_another_text_are_refused(model):
    def cached(*tokens):
        cache = model.new_cache(1, 20)
        model(torch.tensor([tokens]), cache=cache)
        return cache

    for cache, prompts, message in (
        (cached(5, 6, 7, 8), [[5, 6, 7]], "cache, row 0: the cache holds more than the prompt"),
        (cached(5, 9), [[5, 6, 7]], "holds another text.*found token 9 at 1, expected 6"),
        (cached(5), [[5, 6], [7]], "for another batch.*found 1 rows, expected 2"),
        (model.new_cache(1, 6), [[5, 6]], "too short.*room for 6 tokens, expected 7 or more"),
    ):
        with pytest.raises(DSV3Error, match=message):
            complete(model, prompts, max_new_tokens=6, cache=cache)


def test_what_is_no_cache_of_the_prompts_is_refused(as_in_use, model):
    drafts = dict(speculative=True, cache=model.new_cache(1, 20))
    for options, message in (
        (dict(cache=[5]), "cache: not a cache.*found list"),
        (dict(drafts, draft_cache="x"), "draft_cache: not a cache.*found str"),
        (
            dict(drafts, draft_cache=model.new_draft_cache(2, 20)),
            "draft_cache: the cache is for another batch.*found 2 rows, expected 1",
        ),
        (
            dict(speculative=True, draft_cache=model.new_draft_cache(1, 3)),
            "draft_cache, row 0: the cache is too short",
        ),
    ):
        with pytest.raises(DSV3Error, match=message):
            complete(model, [[5, 6]], max_new_tokens=6, **options)


def test_caches_of_a_speculative_run_are_cut_back_as_the_message_says(model):
    cache, drafts = model.new_cache(1, 60), model.new_draft_cache(1, 60)
    options = dict(max_new_tokens=6, speculative=True, cache=cache, draft_cache=drafts)
    text = PROMPTS[0] + complete(model, [PROMPTS[0]], **options).ids[0]
    with pytest.raises(DSV3Error, match=r"Cut both back with truncate, at most to \[\d+\]") as told:
        complete(model, [text], **options)
    advice = json.loads(told.value.fix.rpartition(" to ")[2])
    cache.truncate(advice)
    drafts.truncate(advice)
    assert complete(model, [text], **options).ids == generate(model, [text], 6)


# Streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculative", [False, True])
def test_a_stream_gives_what_complete_gives(words, speculative):
    model, tokenizer = words
    options = dict(
        max_new_tokens=24,
        temperature=1.5,
        seed=2,
        tokenizer=tokenizer,
        logprobs=True,
        speculative=speculative,
    )
    prompts = [tokenizer.encode("In byte"), [5]]
    run = complete(model, prompts, **options)
    tokens = list(stream(model, prompts, **options))
    for row in range(2):
        mine = [token for token in tokens if token.row == row]
        assert [token.id for token in mine] == run.ids[row]
        assert "".join(token.text for token in mine) == run.texts[row]
        assert [token.logprob for token in mine] == run.logprobs[row]
        assert run.texts[row] == tokenizer.decode(run.ids[row])


def test_a_stream_is_checked_at_once_and_can_be_closed(model):
    with pytest.raises(DSV3Error, match="empty prompt"):
        stream(model, [[]])
    with pytest.raises(DSV3Error, match="cannot draft"):
        stream(Transformer(CONFIG.but(num_nextn_predict_layers=0)), [[1]], speculative=True)
    wanted = generate(model, [PROMPTS[0]], 9)[0]
    cache = model.new_cache(1, 30)
    run = stream(model, [PROMPTS[0]], max_new_tokens=20, cache=cache)
    first = [next(run).id for _ in range(4)]
    run.close()
    assert first == wanted[:4] == run.result.ids[0] and run.result.stopped_by == [""]
    assert cache.tokens(0) == PROMPTS[0] + first[:3] and torch.is_inference_mode_enabled() is False
    assert next(run, None) is None
    assert complete(model, [PROMPTS[0] + first], max_new_tokens=5, cache=cache).ids == [wanted[4:]]


def test_a_session_goes_on_after_a_stream_that_was_closed(model):
    session = Session(model)
    run = session.stream(PROMPTS[0], max_new_tokens=20)
    answer = [next(run).id for _ in range(4)]
    run.close()
    text = [*PROMPTS[0], *answer, 8]
    assert session.complete(text, max_new_tokens=5).ids == generate(model, [text], 5)
    assert session.prefilled == 2
    with pytest.raises(DSV3Error, match="n: a conversation goes on from one answer"):
        session.complete(text, n=2, temperature=1.0)


def test_two_texts_never_share_a_cache_in_silence(model):
    session = Session(model)
    old = session.stream(PROMPTS[0], max_new_tokens=20)
    next(old)
    other = [*PROMPTS[1], *PROMPTS[2]]
    assert session.complete(other, max_new_tokens=5).ids == generate(model, [other], 5)
    assert list(old) == []  # a conversation has one answer at a time
    cache = model.new_cache(1, 40)
    old = stream(model, [PROMPTS[0]], max_new_tokens=20, cache=cache)
    next(old)
    cache.truncate([0])
    complete(model, [other], max_new_tokens=5, cache=cache)
    with pytest.raises(DSV3Error, match="cache was used elsewhere while this stream was open"):
        next(old)


# Stop strings ------------------------------------------------------------------------------------


def released(parts: list[bytes], stop: list[str]) -> tuple[list[str], bool]:
    """The texts that come out, one for each token pushed and one for the end."""
    row = RowText(lambda id: parts[id], stop)
    texts = []
    for id in range(len(parts)):
        texts.append("".join(text for _, text in row.push(Choice(id))))
        if row.stopped:
            return texts, True
    return [*texts, "".join(text for _, text in row.flush())], False


@pytest.mark.parametrize(
    "parts, stop, texts",
    [
        ([b"ab", b"c", b"d"], ["bcd"], ["", "", "a"]),  # across three tokens
        ([b"ab", b"c", b"x", b"d"], ["bcd"], ["", "", "abcx", "d", ""]),  # begun and not ended
        ([b"a", b"\n", b"\nb"], ["\n\n"], ["a", "", ""]),
        ([b"one STOP two"], ["STOP", "one S"], [""]),  # what is whole first
        (
            [b"x", b"\xe2\x82", b"\xac", b"y"],
            ["y"],
            ["x", "", "€", ""],
        ),  # a character over two tokens
        ([b"x", b"\xe2\x82", b"y"], ["y"], ["x", "", "\ufffd"]),
        ([b"\xe2"], ["y"], ["", "\ufffd"]),
        ([b"\xe2\x82", b"a", b"b"], ["ab"], ["", "", "\ufffd"]),  # bytes that are no character
        ([b"aa", b"", b"ab"], ["aab"], ["", "", "a"]),  # a token without a text
        ([b"ends", b" here"], ["never"], ["ends", " here", ""]),
    ],
)
def test_stop_strings_by_hand(parts, stop, texts):
    assert released(parts, stop)[0] == texts


def test_stop_strings_at_random():
    """Against a search in the whole text: what comes out is all before the stop string that is
    whole first, however the tokens cut it, and at no time a piece of it."""
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choices("ab€\n", k=chance.randint(1, 12))).encode()
        cuts = sorted(chance.choices(range(len(text) + 1), k=4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        stop = [
            "".join(chance.choices("ab€\n", k=chance.randint(1, 3)))
            for _ in range(chance.randint(1, 2))
        ]
        whole = text.decode()
        found = [(place + len(word), place) for word in stop if (place := whole.find(word)) >= 0]
        texts, stopped = released(parts, stop)
        assert stopped == bool(found)
        assert "".join(texts) == whole[: min(found)[1] if found else None]


@pytest.mark.parametrize("speculative", [False, True])
def test_a_text_ends_before_its_stop_string(words, speculative):
    model, tokenizer = words
    options = dict(
        max_new_tokens=30,
        temperature=1.5,
        seed=6,
        tokenizer=tokenizer,
        eos_ids=(),
        speculative=speculative,
    )
    prompts = [[5], [9, 9]]
    whole = complete(model, prompts, **options)
    chance = random.Random(1)
    for _ in range(4):
        text = whole.texts[chance.randrange(2)]
        runs = re.findall("[^\ufffd]+", text)  # U+FFFD stands for bytes
        some = chance.choice(runs)
        start = chance.randrange(len(some))
        stop = some[start : start + chance.randint(1, 3)]
        run = complete(model, prompts, stop=[stop], **options)
        for row in range(2):
            place = whole.texts[row].find(stop)
            assert run.texts[row] == whole.texts[row][: place if place >= 0 else None]
            assert run.stopped_by[row] == ("stop" if place >= 0 else "length")
            assert whole.ids[row][: len(run.ids[row])] == run.ids[row]
            assert tokenizer.decode(run.ids[row]).startswith(run.texts[row].rstrip("\ufffd"))
            assert len(tokenizer.decode(run.ids[row][:-1])) <= len(run.texts[row])


def test_stop_strings_need_a_tokenizer(model):
    with pytest.raises(DSV3Error, match="stop strings need a tokenizer"):
        generate(model, [[1]], stop="x")


# generation_config.json --------------------------------------------------------------------------


def written(tmp_path, content) -> GenerationConfig:
    (tmp_path / FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return GenerationConfig.beside(tmp_path, 100)


def test_generation_config_says(tmp_path):
    assert GenerationConfig.beside(tmp_path, 100) == GenerationConfig()
    assert written(tmp_path, {"transformers_version": "4", "bos_token_id": 0}) == GenerationConfig()
    made = written(
        tmp_path,
        {
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.95,
            "top_k": 50,
            "eos_token_id": [1, 7],
            "repetition_penalty": 1.1,
            "min_p": 0.0,
        },
    )
    assert made.defaults == {"temperature": 0.6, "top_p": 0.95, "top_k": 50}
    assert (made.eos_ids, made.ignored) == ((1, 7), ("repetition_penalty",))
    assert written(tmp_path, {"do_sample": False, "temperature": 0.6}).temperature == 0
    assert written(tmp_path, {"do_sample": True}).temperature == 1
    assert written(tmp_path, {"temperature": 0.9}).temperature == 0.9
    assert written(tmp_path, {"eos_token_id": 3}).eos_ids == (3,)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[1]", "is not a JSON object"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ('{"temperature": NaN}', "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 2.5}, "top_k"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id"),
        ({"eos_token_id": 100}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"do_sample": "yes"}, "do_sample"),
    ],
)
def test_a_damaged_generation_config_gives_one_line(tmp_path, content, message):
    with pytest.raises(DSV3Error, match=f"{FILE}.*{message}|{message}.*{FILE}"):
        written(tmp_path, content)


def test_a_loaded_model_ends_where_its_generation_config_says(tiny_checkpoint, tmp_path):
    for file in tiny_checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / FILE).write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert load_model(tmp_path, "fp32").eos_ids == (7, 9)


def test_sampling_keeps_lists_as_tuples():
    sampling = Sampling(eos_ids=[1, 2], stop="end", banned_ids=torch.tensor([3]))
    assert (sampling.eos_ids, sampling.stop, sampling.banned_ids) == ((1, 2), ("end",), (3,))


def test_numbers_of_numpy_are_numbers(as_in_use):
    given = Sampling(
        max_new_tokens=np.int64(5),
        seed=np.uint8(3),
        temperature=np.float32(0.5),
        top_k=np.int32(4),
        eos_ids=[np.int64(2)],
    )
    assert given == Sampling(max_new_tokens=5, seed=3, temperature=0.5, top_k=4, eos_ids=[2])
    assert [type(value) for value in (given.seed, given.temperature, given.eos_ids[0])] == [
        int,
        float,
        int,
    ]


class SecondRank(TensorGroup):
    """Rank 1 of two, to whom rank 0 says: 5 and 9, and no end; 1 and 2 would be best."""

    def broadcast(self, numbers: torch.Tensor) -> torch.Tensor:
        assert not numbers.any(), "another rank than 0 has something to say"
        return torch.tensor([0, 1, 2, 5, 9], dtype=numbers.dtype)  # no end; the best; the drawn


def test_only_rank_0_draws_and_asks_whether_to_stop():
    chooser = Chooser(
        SecondRank(1, 2),
        2,
        Sampling(temperature=1.0),
        96,
        should_stop=lambda: pytest.fail("rank 1 was asked"),
    )
    before = [generator.get_state() for generator in chooser.generators]
    chosen = chooser(torch.zeros(2, 96))
    assert [[choice.id for choice in row] for row in chosen] == [[5], [9]]
    after = [generator.get_state() for generator in chooser.generators]
    assert all(map(torch.equal, before, after))
