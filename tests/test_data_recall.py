"""Text to look back in: what is asked for was told, and what stands twice is the same."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from dsv3 import data
from dsv3.data import recall
from dsv3.data.recall import Recall

PLAY = (
    data.BOS
    + "SCENE I. Here.\n\n"
    + "".join(
        f"ROGUE:\nThe {n} moons of night, good sir, are {n * 7} in all.\n\n" for n in range(200)
    )
    + data.EOS
)
CODE = data.BOS + "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(200)) + data.EOS
CHAT = data.BOS + data.USER + "cue " * 400 + data.ASSISTANT + "answer " * 400 + data.EOS


@pytest.fixture(scope="module")
def maker():
    return Recall([PLAY, CHAT], [CODE])


def rng(number: int) -> np.random.Generator:
    return np.random.default_rng([3, number])


def test_a_document_follows_from_its_generator_alone(maker):
    texts = [maker(rng(n), 256) for n in range(60)]
    assert texts == [maker(rng(n), 256) for n in range(60)]
    assert len(set(texts)) == 60
    for text in texts:
        assert text.startswith(data.BOS) and text.endswith(data.EOS)
        assert data.USER not in text, "a conversation is no passage to repeat"


@pytest.mark.parametrize("reach, least, most", [(32, 24, 32), (256, 70, 120), (1024, 200, 400)])
def test_documents_reach_as_far_as_they_are_told(maker, reach, least, most):
    """In tokens of 2.2 characters, the mean of lengths drawn evenly by doubling."""
    sizes = [len(maker(rng(n), reach)) / 2.2 for n in range(400)]
    assert least < np.mean(sizes) - 20 < most
    assert np.quantile(sizes, 0.97) < 1.4 * reach + 40


def repeated(text: str) -> int:
    """Characters of the longest piece that stands twice in a text, without overlap."""
    best = 0
    for start in range(len(text)):
        while text.find(text[start : start + best + 1], start + best + 1) > 0:
            best += 1
    return best


def test_a_passage_stands_twice_and_comes_from_the_text_given(maker):
    sources = Counter()
    for number in range(120):
        text = maker.passage(rng(number), 400)
        size = repeated(text)
        assert size >= 8, text
        sources["plays"] += "moons" in text
        sources["code"] += "return" in text
    assert sources["plays"] > 20 and sources["code"] > 15
    sizes = [repeated(maker.passage(rng(n), 400)) for n in range(120)]
    assert max(sizes) > 150 and min(sizes) < 40


def test_words_come_again_in_other_orders(maker):
    orders = 0
    for number in range(40):
        words = re.findall(r"\w+", maker.words(rng(number), 300))
        assert len(set(words)) < len(words) / 2
        pairs = Counter(pairwise(words))
        orders += len(pairs) > len(set(words))
    assert orders > 30, "a fixed order could be told by counting places"


FORMS = {
    "let": [(r"let (\w) = (\d\d)", r"get (\w) = (\d\d)")],
    "dictionary": [
        (r"(\w+) means (.*)\.", r"What does (\w+) mean\? (.*)\."),
        (r"(\w+): (.*)", r"(\w+): (.*)"),
    ],
    "code": [
        (r"(\w+) = (.*)", r"assert (\w+) == (.*)"),
        (r"(\w+) = (.*)", r"print\((\w+)\) # (.*)"),
        (r"d\['(\w+)'\] = (.*)", r"d\['(\w+)'\] # (.*)"),
    ],
    "english": [
        (r"(\w+'s \w+) is (\w+)\.", r"What is (\w+'s \w+)\? (\w+)\."),
        (r"(\w+) lives in (.*)\.", r"Where does (\w+) live\? In (.*)\."),
        (r"(\w+) is (\d+) years old\.", r"How old is (\w+)\? (\d+)\."),
        (r"(\w+'s \w+) is in (.*)\.", r"Where is (\w+'s \w+)\? In (.*)\."),
        (
            r"(?P<answer>\w+) has the (?P<asked>\w+)\.",
            r"Who has the (?P<asked>\w+)\? (?P<answer>\w+)\.",
        ),
    ],
}


def pair(found: re.Match) -> tuple[str, str]:
    names = found.groupdict()
    return (names["asked"], names["answer"]) if names else found.groups()


@pytest.mark.parametrize("form", FORMS)
def test_what_is_asked_for_was_told_once_before(maker, form, monkeypatch):
    monkeypatch.setattr(recall, "_FORMS", {form: 1.0})
    distances, asked = [], 0
    for number in range(80):
        lines = maker.look_up(rng(number), 700).splitlines()
        told: dict[str, tuple[str, int]] = {}
        for place, line in enumerate(lines):
            for fact, question in FORMS[form]:
                answered, given = re.fullmatch(question, line), re.fullmatch(fact, line)
                if answered and pair(answered)[0] in told:
                    name, value = pair(answered)
                    assert told[name][0] == value, line
                    distances.append(place - told[name][1])
                    asked += 1
                    break
                assert not answered or given, f"asked for what was not told: {line}"
                if given:
                    name, value = pair(given)
                    assert name not in told
                    told[name] = value, place
                    break
        assert told
    assert asked > 200 and min(distances) <= 2 and max(distances) >= 12


def test_names_of_a_text_are_different_and_mostly_new():
    names = [name for n in range(100) for name in recall.new_names(rng(n), 8)]
    assert all(len(set(names[i : i + 8])) == 8 for i in range(0, 800, 8))
    made = [name for name in names if name not in recall.PEOPLE]
    assert 0.35 < len(made) / len(names) < 0.65 and len(set(made)) > 0.9 * len(made)
