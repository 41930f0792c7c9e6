"""Three domains to one stream whose position is its whole state."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from dsv3 import data
from dsv3.errors import DSV3Error

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def domains():
    """Small domains of distinct documents: words, functions, sums."""

    def wrap(texts):
        return [data.BOS + text + data.EOS for text in texts]

    return [
        data.Domain("plays", wrap(f"Speech {n}. " + "word " * (n % 40) for n in range(60)), []),
        data.Domain("code", wrap(f"def f{n}(x):\n    return x + {n}\n" for n in range(300)), []),
        data.Domain("arithmetic", wrap(f"{n} + 1 = {n + 1}\n" for n in range(80)), []),
    ]


@pytest.fixture(scope="module")
def tokenizer(domains):
    return data.train_tokenizer(data.tokenizer_texts(domains), 280)


SHARES = {"plays": 0.5, "code": 0.3, "arithmetic": 0.2}


def make(tokenizer, domains, shares=SHARES, length=16, targets=2, seed=1, **options):
    return data.Stream(
        tokenizer, domains, shares, length=length, targets=targets, seed=seed, **options
    )


def read(tokenizer, domains, tokens: int, shares=SHARES, **options) -> list[int]:
    """The stream in its own order: a window so long that there is nothing to shuffle."""
    stream = make(tokenizer, domains, shares, length=max(tokens, 1 << 18), targets=0, **options)
    return stream.draw(1)[0, :tokens].tolist()


def documents(tokenizer, ids: list[int]) -> list[str]:
    """The whole documents of a stream, without what is cut at its end."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return [data.BOS + part for part in text.split(data.BOS)[1:-1]]


def test_stream_is_whole_documents_end_to_end(tokenizer, domains):
    known = {document for domain in domains for document in domain.train}
    ids = read(tokenizer, domains, 200_000, fim_rate=0.0)
    found = documents(tokenizer, ids)
    assert set(found) == known and len(found) > 1000


@pytest.mark.parametrize("length", [16, 64, 1024])
def test_each_token_is_read_once_in_a_shuffled_order(tokenizer, domains, length):
    """Over 2^18 tokens the windows are those of the stream in a row, each once, in no order."""
    whole = torch.tensor(read(tokenizer, domains, 3 << 17))
    windows = make(tokenizer, domains, length=length, targets=2).draw((1 << 18) // length)
    assert windows.dtype == torch.int64 and windows.shape[1] == length + 2
    in_a_row = whole[: (1 << 18) + 2].unfold(0, length + 2, length)
    assert Counter(map(tuple, windows.tolist())) == Counter(map(tuple, in_a_row.tolist()))
    same = (windows == in_a_row).all(dim=1).float().mean()
    assert same < 0.1


def test_parts_follow_each_other_in_other_orders(tokenizer, domains):
    length = 1 << 12
    stream = make(tokenizer, domains, length=length, targets=0)
    whole = torch.tensor(read(tokenizer, domains, 1 << 19)).view(2, -1, length).tolist()
    orders = [[part.index(window) for window in stream.draw(64).tolist()] for part in whole]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(64)) and orders[0] != orders[1]


def test_the_position_is_the_whole_state(tokenizer, domains):
    stream = make(tokenizer, domains, length=64)
    stream.draw(4093)
    assert stream.position == 4093 * 64
    ahead = stream.draw(8)  # from one shuffled part into the next
    resumed = make(tokenizer, domains, length=64, position=4093 * 64)
    assert torch.equal(resumed.draw(8), ahead)
    assert resumed.position == stream.position == 4101 * 64
    for other in (dict(seed=2), dict(seed=1, position=64)):
        assert not torch.equal(make(tokenizer, domains, length=64, **other).draw(8), ahead)


def test_how_many_are_drawn_at_once_changes_nothing(tokenizer, domains):
    one, other = make(tokenizer, domains), make(tokenizer, domains)
    parts = torch.cat([one.draw(count) for count in (1, 3, 5, 2)])
    assert torch.equal(parts, other.draw(11))
    parts[:] = -1  # what was drawn is the caller's
    assert torch.equal(make(tokenizer, domains).draw(11), make(tokenizer, domains).draw(11))
    assert one.draw(3).min() >= 0


def test_a_position_within_a_window_is_refused(tokenizer, domains):
    with pytest.raises(DSV3Error, match="multiple of 64"):
        make(tokenizer, domains, length=64, position=100)


def test_the_stream_grows_beyond_its_first_chunk(tokenizer, domains):
    far = (1 << 20) + (1 << 18)
    ahead = make(tokenizer, domains, length=1 << 18, position=far).draw(1)
    whole = make(tokenizer, domains, length=far + (1 << 18), targets=2).draw(1)
    assert torch.equal(whole[0, far:], ahead[0])


def test_shares_are_met_in_tokens_all_along(tokenizer, domains):
    ids = read(tokenizer, domains, 80_000)
    for start in range(0, 80_000, 20_000):
        counts = Counter()
        for text in documents(tokenizer, ids[start : start + 20_000]):
            size = len(tokenizer.encode(text, add_special_tokens=False).ids)
            counts["plays" if "Speech" in text else "code" if "def" in text else "arithmetic"] += (
                size
            )
        for name, share in SHARES.items():
            assert abs(counts[name] / counts.total() - share) < 0.01
    only = documents(
        tokenizer, read(tokenizer, domains, 5000, {"code": 2, "plays": 0}, fim_rate=0.0)
    )
    assert all("def" in text for text in only)


def test_each_epoch_has_all_documents_in_a_new_order(tokenizer, domains):
    found = documents(tokenizer, read(tokenizer, domains, 5000, {"arithmetic": 1}))
    epochs = [found[start : start + 80] for start in range(0, 240, 80)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(domains[2].train) and epoch != domains[2].train
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_tenth_of_the_code_has_a_hole_to_fill_in(tokenizer, domains):
    found = documents(tokenizer, read(tokenizer, domains, 60_000))
    form = re.compile(
        re.escape(data.BOS)
        + re.escape(data.FIM_BEGIN)
        + "(.*)"
        + re.escape(data.FIM_HOLE)
        + "(.*)"
        + re.escape(data.FIM_END)
        + "(.*)"
        + re.escape(data.EOS),
        re.DOTALL,
    )
    code = [text for text in found if "Speech" not in text and " = " not in text]
    holes = [text for text in code if data.FIM_BEGIN in text]
    assert 0.07 < len(holes) / len(code) < 0.13
    assert not [text for text in found if text not in code and "fim" in text]
    known, parts = set(domains[1].train), [form.fullmatch(text).groups() for text in holes]
    for prefix, suffix, middle in parts:
        assert data.BOS + prefix + middle + suffix + data.EOS in known
    # Cuts fall at characters, anywhere; another epoch draws others.
    assert len({len(prefix) for prefix, _, _ in parts}) > 15
    assert len(set(holes)) > 0.9 * len(holes) and len({p + m + s for p, s, m in parts}) > 60


def test_cuts_reach_both_ends():
    rng = np.random.default_rng(0)
    cut = {data.fill_in_middle(data.BOS + "ab" + data.EOS, rng) for _ in range(200)}
    b, h, e = data.BOS + data.FIM_BEGIN, data.FIM_HOLE, data.FIM_END
    assert cut == {
        b + text + data.EOS
        for text in (
            h + e + "ab",
            h + "b" + e + "a",
            h + "ab" + e,
            "a" + h + e + "b",
            "a" + h + "b" + e,
            "ab" + h + e,
        )
    }


@pytest.mark.parametrize("shares", [{}, {"music": 1}, {"plays": 0}, {"plays": 1, "code": -1}])
def test_wrong_shares_are_refused(tokenizer, domains, shares):
    with pytest.raises(DSV3Error, match="wrong shares"):
        make(tokenizer, domains, shares)


def test_a_domain_without_documents_is_refused(tokenizer):
    with pytest.raises(DSV3Error, match="no documents"):
        make(tokenizer, [data.Domain("code", [], [])], {"code": 1})


def test_a_domain_made_by_rule_never_ends_and_never_repeats(tokenizer, domains):
    """A tenth of the tokens; numbered documents, each with a generator of its own."""
    drawn = []

    def number(rng, reach):
        drawn.append(int(rng.integers(1 << 40)))
        return f"{data.BOS}#{len(drawn)}!{data.EOS}"

    made = data.Domain("made", [], [], number)
    found = documents(
        tokenizer, read(tokenizer, [*domains, made], 40_000, {"plays": 0.9, "made": 0.1})
    )
    numbers = [int(text.split("#")[1].split("!")[0]) for text in found if "Speech" not in text]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 300
    assert len(set(drawn)) == len(drawn)


def test_how_far_made_text_reaches_follows_from_the_tokens_read(tokenizer, domains):
    asked, reaches = [], []

    def reach(tokens):
        asked.append(tokens)
        return 10 + tokens // 1000

    def make_one(rng, most):
        reaches.append(most)
        return f"{data.BOS}{most} {rng.integers(1000)}{data.EOS}"

    mixed = [*domains, data.Domain("made", [], [], make_one)]
    shares = {"plays": 0.5, "made": 0.5}
    stream = make(tokenizer, mixed, shares, length=64, reach=reach)
    stream.draw(4000)
    ahead = stream.draw(8)
    assert asked[0] < 1000 and asked == sorted(asked) and asked[-1] > 250_000
    assert reaches == [10 + tokens // 1000 for tokens in asked]
    resumed = make(tokenizer, mixed, shares, length=64, reach=reach, position=4000 * 64)
    assert torch.equal(resumed.draw(8), ahead)
    reaches.clear()
    make(tokenizer, mixed, shares, length=64).draw(2)
    assert set(reaches) == {64}, "without a rule it reaches over a window"


def test_in_order_predicts_every_token_once():
    windows = data.in_order(np.arange(50), 12, 2)  # reads 10 tokens, targets 1 and 2 further
    targets = windows[:, 1:11].flatten().tolist()
    assert targets == list(range(1, len(targets) + 1)) and windows.max() <= 49


def test_domains_come_from_folders_and_know_what_is_held_out(tmp_path):
    scene = "### SCENE I. X\n\n**A**  \nOne.\n\n**B**  \nTwo.\n"
    for name in (*data.HELD_OUT, "hamlet"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n\n{scene}")
    (tmp_path / "a.py").write_text("def f():\n    pass\n")
    (tmp_path / "heapq.py").write_text("def g():\n    pass\n")
    plays, code, arithmetic = domains = data.load_domains(tmp_path, tmp_path, seed=3)
    assert tuple(domain.name for domain in domains) == data.DOMAINS
    assert len(plays.train) == 2 and len(plays.held_out) == 3  # one play, also as a conversation
    assert "hamlet" in plays.train[0] and data.USER in plays.train[1]
    assert not any(data.USER in text for text in plays.held_out)
    assert code.train == [data.BOS + "def f():\n    pass\n" + data.EOS]
    assert code.held_out == [data.BOS + "def g():\n    pass\n" + data.EOS]
    assert arithmetic.train == data.arithmetic_documents(3)
    for domain in domains:
        for text in (*domain.train, *domain.held_out):
            assert text.startswith(data.BOS) and text.endswith(data.EOS)


def test_other_domains_are_made_of_training_text_alone():
    def play(word):
        return data.BOS + f"ROGUE:\n{word} and {word}, my lord, is {word}.\n\n" * 40 + data.EOS

    domains = [
        data.Domain("plays", [play("good")], [play("held")]),
        data.Domain(
            "code",
            [data.BOS + "def f(x):\n    return 1\n" + data.EOS] * 9,
            [data.BOS + "def held(x):\n    return 1\n" + data.EOS],
        ),
        data.Domain("arithmetic", ["1"], ["2"]),
    ]
    assert data.with_others(domains, ["plays"]) == domains
    *same, functions, recall, chats = data.with_others(domains, {"functions", "recall", "chats"})
    assert same == domains and len(functions.train) == 9 and not functions.make
    assert (functions.name, recall.name, chats.name) == ("functions", "recall", "chats")
    made = "".join(recall.make(np.random.default_rng(n), 200) for n in range(200))
    assert "good" in made and "def f" in made and "held" not in made


def test_tokenizer_learns_from_training_text_of_all_domains_alone():
    domains = [
        data.Domain("plays", [data.BOS + data.USER + "x" * 400 + data.EOS], ["secret"]),
        data.Domain("code", [data.BOS + "y" * 100 + data.EOS] * 40, ["secret"]),
        data.Domain("arithmetic", ["1", "2"], ["secret"]),
    ]
    texts = data.tokenizer_texts(domains)
    assert texts[0] == "x" * 400 and texts[-2:] == ["1", "2"]
    assert 2 <= texts.count("y" * 100) <= 5 and len(texts) == 3 + texts.count("y" * 100)
