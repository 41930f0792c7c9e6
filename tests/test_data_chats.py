"""Conversations: the template's own form, right answers, nothing that is held out."""

import ast
import re

import jinja2
import numpy as np
import pytest

from dsv3 import data
from dsv3.data.chats import Chats

PLAY = (
    data.BOS
    + "SCENE I. Here.\n\n"
    + "".join(
        f"ROGUE:\nThe {n} moons of night, good sir, are {n * 7} in all.\n\n" for n in range(60)
    )
    + data.EOS
)
CODE = (
    data.BOS
    + (
        'def twice(x):\n    """Return x and once more x.\n\n    No more."""\n'
        "    return x + x\n\ndef undescribed(x):\n    return x\n"
    )
    + data.EOS
)


@pytest.fixture(scope="module")
def chats():
    return Chats([PLAY], [CODE])


def rng(number: int) -> np.random.Generator:
    return np.random.default_rng([4, number])


def test_the_form_is_that_of_the_chat_template(chats):
    template = jinja2.Template(data.CHAT_TEMPLATE)
    several = 0
    for number in range(60):
        text = chats(rng(number), 200)
        turns = text.removeprefix(data.BOS).split(data.EOS)[:-1]
        messages = []
        for turn in turns:
            asked, answer = turn.removeprefix(data.USER).split(data.ASSISTANT)
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": answer},
            ]
        assert text == template.render(
            messages=messages, bos_token=data.BOS, eos_token=data.EOS, add_generation_prompt=False
        )
        several += len(turns) > 1
    assert 10 < several < 60


@pytest.mark.parametrize("held_out", [False, True])
def test_sums_are_right_and_of_their_side(chats, held_out):
    for number in range(300):
        asked, answer = chats.sum(rng(number), held_out)
        a, b = map(int, re.findall(r"\d+", asked))
        assert data.final_answer(answer) == str(a + b)
        assert data.is_held_out(a, b) == held_out


def test_answers_stand_in_the_turn_that_asks(chats):
    for number in range(100):
        asked, answer = chats.question(rng(number))
        *facts, question = re.split(r"(?<=\.)\s", asked)
        name = re.search(r"(\w+)('s|\?| live)", question.removeprefix("Who has the "))[1]
        about = [fact for fact in facts if re.search(rf"\b{name}\b", fact)]
        assert len(about) == 1 and answer.removeprefix("In ").rstrip(".") in about[0], asked


def test_scenes_go_on_as_the_play_does(chats):
    for number in range(20):
        asked, answer = chats.scene(rng(number))
        said = asked.partition("\n")[2]
        assert f"{said}\n\n{answer}" in PLAY and len(said) > 80 and len(answer) > 100


def test_functions_are_plain_and_asked_for_by_their_description(chats):
    assert [name for name, _, _ in chats.functions] == ["twice"]
    asked, answer = chats.function(rng(0))
    assert "twice" in asked and "Return x and once more x." in asked
    assert ast.unparse(ast.parse(answer)) == answer == "def twice(x):\n    return x + x"
