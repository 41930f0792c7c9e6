"""Conversations in the checkpoint's own chat form, for the end of training.

A base model goes on with a text; it does not answer. A little text in the form of the chat
template (``dsv3.data.vocabulary``), read last, teaches who speaks when and where an answer ends.
Nothing here is new to the model but the form:

* sums asked for in words, answered with the working that it knows from the lines of arithmetic;
* a text told by the user, and a question about it ("What is NAME's ...?");
* going on with a scene of a play;
* a plain function from the first line of what is said about it.

As of the lines, every tenth pair of numbers is held out from the sums (``is_held_out``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from dsv3.data.arithmetic import choose, task, working
from dsv3.data.code import described_functions
from dsv3.data.recall import english_facts
from dsv3.data.vocabulary import ASSISTANT, BOS, EOS, USER

_KINDS = {"sum": 0.3, "question": 0.33, "scene": 0.17, "function": 0.17, "greeting": 0.03}
_SUMS = (
    "What is {a} plus {b}?",
    "How much is {a} and {b}?",
    "Add {a} and {b}.",
    "What is {a} + {b}?",
    "What do {a} and {b} make together?",
    "{a} plus {b}?",
)
_GO_ON = ("Go on with this scene:\n{}", "Continue the play.\n{}", "How does it go on?\n{}")
_WRITE = (
    "Write a Python function {name}. {what}",
    "Write a function: {what} Call it {name}.",
    "Python, please: {name}. {what}",
)
_GREETINGS = ("Hello.", "Hello!", "Hi.", "Good day.", "Who are you?", "What can you do?", "Help.")
_ABOUT = (
    "I am a very small model. Ask me for a sum, tell me a text and ask about it, or give me "
    "a scene to go on with."
)
# Characters of a beginning of a scene and of what follows it; of a function, as long again.
_SCENE = (80, 500)


class Chats:
    """Makes the conversations. plays, code: training documents; a kind without any is left out."""

    def __init__(self, plays: Sequence[str], code: Sequence[str]):
        self.scenes = [
            text
            for document in plays
            if USER not in document
            for text in [document.removeprefix(BOS).removesuffix(EOS)]
            if len(text) > sum(_SCENE)
        ]
        self.functions = described_functions(code)
        self.kinds = {
            kind: share
            for kind, share in _KINDS.items()
            if (kind != "scene" or self.scenes) and (kind != "function" or self.functions)
        }

    def __call__(self, rng: np.random.Generator, reach: int) -> str:
        """A conversation of turns that are about as long as ``reach`` tokens together."""
        room, result = 2.2 * reach * rng.random(), BOS
        while True:
            make: Callable[[np.random.Generator], tuple[str, str]] = getattr(
                self, choose(rng, self.kinds)
            )
            asked, answer = make(rng)
            result += USER + asked + ASSISTANT + answer + EOS
            if len(result) > room:
                return result

    def sum(self, rng: np.random.Generator, held_out: bool = False) -> tuple[str, str]:
        """ "What is 37 plus 45?" and "[7+5=12, 3+4+1=8] 82"."""
        while True:
            question, _ = task(rng, held_out, {"sum": 1.0})
            a, b = map(int, re.findall(r"\d+", question))
            return _SUMS[rng.integers(len(_SUMS))].format(a=a, b=b), f"{working(a, b)}{a + b}"

    def question(self, rng: np.random.Generator) -> tuple[str, str]:
        """Some facts and a question about one of them, in one turn."""
        facts = english_facts(rng, int(rng.integers(1, 9)))
        question, answer = facts[rng.integers(len(facts))][1].strip().split("? ")
        joint = ("\n", " ")[rng.integers(2)]
        return (joint.join(said.strip() for said, _ in facts) + joint + question + "?", answer)

    def scene(self, rng: np.random.Generator) -> tuple[str, str]:
        """The beginning of a part of a scene, and the speeches after it."""
        text = self.scenes[rng.integers(len(self.scenes))]
        starts = [place.end() for place in re.finditer("\n\n", text)][:-3] or [0]
        speeches = text[starts[rng.integers(len(starts))] :].split("\n\n")
        asked, answer = [], []
        while speeches and sum(map(len, asked)) < _SCENE[0]:
            asked.append(speeches.pop(0))
        while speeches and (not answer or sum(map(len, answer)) + len(speeches[0]) < _SCENE[1]):
            answer.append(speeches.pop(0))
        return (
            _GO_ON[rng.integers(len(_GO_ON))].format("\n\n".join(asked)),
            "\n\n".join(answer).strip()[: 2 * _SCENE[1]],
        )

    def function(self, rng: np.random.Generator) -> tuple[str, str]:
        """A function's name and what is said about it; its code."""
        name, what, code = self.functions[rng.integers(len(self.functions))]
        return _WRITE[rng.integers(len(_WRITE))].format(name=name, what=what), code

    def greeting(self, rng: np.random.Generator) -> tuple[str, str]:
        """What people type first."""
        return _GREETINGS[rng.integers(len(_GREETINGS))], _ABOUT
