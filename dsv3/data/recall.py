"""The fourth domain: text that can only be foretold by looking back, made by rule without end.

A model of a few million weights writes passable verse and code from the last few words alone, and
nothing makes it look further. Its content keys then stay as they were at the start: dead weight.
Here most of what is to be foretold has stood before, at a distance that varies, so that no count
of places helps and what a token *is* must be searched for:

* **passages twice**: lines of a play, of code, made-up words or numbers, once more after nothing,
  after a line, or after a page; words in a new order each time;
* **look-ups**: names that nobody has met before are given horses, colours, numbers and meanings,
  and are asked for later, in English, as a dictionary, in Python and as ``let`` and ``get``.

Names are made of syllables, so that they are new in every document and nothing of it can be known
by heart. ``reach`` bounds a document's length in tokens. It grows during a run, from a line or two
to a whole window (``dsv3.data.stream``); lengths below it are drawn evenly by doubling, so that
what was learned at short distance stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dsv3.data.arithmetic import NAMES, SHORT_LINES, choose, task
from dsv3.data.vocabulary import BOS, EOS, USER

# Characters that a token of such text has, at least: lengths are asked for in tokens.
_CHARACTERS = 2.2
_SHORTEST = 24  # tokens of the shortest document

PEOPLE = (
    "Adam Alice Amelia Anna Arthur Beatrice Ben Bianca Celia Clara Daniel David Diana Edgar "
    "Edith Ellen Emma Eric Flora Frank George Grace Hamlet Hanna Helen Henry Hugo Ida Jane John "
    "Julia Karl Kate Laura Leo Lisa Lucy Mark Martha Mary Max Nora Oliver Olivia Orlando Oscar "
    "Paul Peter Portia Robert Rosa Ruth Sarah Simon Sophie Thomas Tom Victor Viola Walter"
).split()
THINGS = (
    "bag bed bird boat book box bread cat chair clock coat crown cup dog door drum flag garden "
    "hat horse house key knife lamp letter mirror pen plate ring roof rope shoe ship song sword "
    "table tent tree wall window"
).split()
QUALITIES = (
    "black blue brown green grey red white yellow golden silver big small old new broken clean "
    "cold dark dry empty fine full heavy light long lost round sharp short soft strange warm "
    "wet"
).split()
PLACES = (
    "Athens, Belmont, Cyprus, Dover, Egypt, Ephesus, Florence, London, Mantua, Messina, Milan, "
    "Naples, Padua, Paris, Rome, Sicily, Troy, Tyre, Venice, Vienna, York, the city, the "
    "forest, the hills, the north, the south, the tower"
).split(", ")
_ONSETS = [*"b br c d dr f fl g gr h j k l m n p pl r s st t tr v w z".split(), ""]
_VOWELS = "a e i o u ai ea oo".split()
_CODAS = ["", "", *"b d g k l m n nd p r rt s st t x".split()]

# Kind of document -> share.
_KINDS = {"passage": 0.4, "words": 0.15, "look_up": 0.45}
_SOURCES = {"plays": 0.4, "code": 0.3, "words": 0.2, "numbers": 0.1}
_FORMS = {"english": 0.45, "dictionary": 0.2, "code": 0.15, "let": 0.2}
# What stands between a passage and its second copy, when that is not a page of other text.
_JOINTS = ("", "", " ", "\n", "\n", "\n\n", "\n\n", "\nAgain:\n", "\n---\n", EOS + BOS)


class Recall:
    """Makes the documents. plays, code: training documents to take passages from, if any."""

    def __init__(self, plays: Sequence[str], code: Sequence[str]):
        self.sources = {
            name: [
                document.removeprefix(BOS).removesuffix(EOS)
                for document in documents
                if USER not in document
            ]
            for name, documents in (("plays", plays), ("code", code))
        }
        self.shares = {
            name: share for name, share in _SOURCES.items() if self.sources.get(name, True)
        }

    def __call__(self, rng: np.random.Generator, reach: int) -> str:
        """One document of ``_SHORTEST`` to about ``reach`` tokens, with begin and end token."""
        tokens = _SHORTEST * (max(reach, _SHORTEST) / _SHORTEST) ** rng.random()
        room = int(tokens * _CHARACTERS)
        make: Callable[[np.random.Generator, int], str] = getattr(self, choose(rng, _KINDS))
        return BOS + make(rng, room) + EOS

    def passage(self, rng: np.random.Generator, room: int) -> str:
        """A text of about ``room`` characters in which a passage stands twice or more often."""
        source = choose(rng, self.shares)
        shape = rng.random()
        # Before and between the copies: nothing, for two documents in three.
        rest = room * rng.random() if shape > 0.67 else 0.0
        before = self.text(rng, source, int(rest * rng.random())) if rest else ""
        between = self.text(rng, source, int(rest) - len(before)) if rest else ""
        size = max(8, (room - len(before) - len(between)) // 2)
        if rng.random() < 0.4:  # shorter, and more often
            size = max(8, int(size * rng.random()))
        passage = self.text(rng, source, size)
        if len(passage.split()) < 2:  # an indent, one long word
            passage = self.text(rng, "words", size)
        joint = _JOINTS[rng.integers(len(_JOINTS))]
        copies = max(2, min(5, (room - len(before) - len(between)) // (len(passage) + 1)))
        first, *others = [passage] * copies
        return (
            before
            + first
            + (joint + between if between else "")
            + "".join(joint + other for other in others)
            + ("\n" if rng.random() < 0.5 else "")
        )

    def words(self, rng: np.random.Generator, room: int) -> str:
        """A few made-up words, again and again in random order."""
        few = [made_up(rng) for _ in range(rng.integers(2, 3 + room // 40))]
        joint = (" ", " ", "\n", ", ")[rng.integers(4)]
        result = few[:]
        while sum(map(len, result)) + len(result) * len(joint) < room:
            result.append(few[rng.integers(len(few))])
        return joint.join(result) + "\n"

    def look_up(self, rng: np.random.Generator, room: int) -> str:
        """Facts, other lines, and questions about the facts, with their answers."""
        form = choose(rng, _FORMS)
        size, most = {
            "english": (48, 12),
            "dictionary": (30, 16),
            "code": (26, 16),
            "let": (22, 24),
        }[form]
        count = int(rng.integers(1, 2 + min(most, room // size // 2)))
        facts = _FACTS[form](rng, count)
        asks = [fact for _ in range(2) for fact in rng.permutation(len(facts)).tolist()]
        asks = asks[: max(count, int(rng.integers(count, 2 * count + 1)))]
        used = sum(len(said) for said, _ in facts) + sum(len(facts[n][1]) for n in asks)
        filler = self.filler(rng, form, room - used)
        lines = [said for said, _ in facts]
        if rng.random() < 0.6:  # all facts, a page of something else, the questions
            lines += filler + [facts[number][1] for number in asks]
        else:  # as they come; a question after its fact
            for line in filler:
                lines.insert(int(rng.integers(len(lines) + 1)), line)
            for number in asks:
                after = lines.index(facts[number][0]) + 1
                lines.insert(int(rng.integers(after, len(lines) + 1)), facts[number][1])
        return "".join(lines)

    def filler(self, rng: np.random.Generator, form: str, room: int) -> list[str]:
        """Lines of other text, ``room`` characters or none."""
        lines: list[str] = []
        while room > 12:
            if form in ("code", "let") and rng.random() < 0.7:
                line = " ".join(task(rng, False, SHORT_LINES)) + "\n"
                line = "# " + line if form == "code" else line
                some = [line]
            else:
                source = "plays" if self.sources["plays"] else "words"
                some = self.text(rng, source, min(room, 200)).strip().splitlines(keepends=True)
                some = [line.rstrip("\n") + "\n" for line in some if line.strip()]
            if not some:
                break
            lines += some
            room -= sum(map(len, some))
        return lines

    def text(self, rng: np.random.Generator, source: str, size: int) -> str:
        """About ``size`` characters of a source, cut between words."""
        if size < 1:
            return ""
        if source == "words":
            return _fill(size, lambda: made_up(rng) + (" ", " ", " ", "\n", ", ")[rng.integers(5)])
        if source == "numbers":
            return _fill(
                size,
                lambda: (
                    str(rng.integers(10 ** rng.integers(1, 5))) + (" ", " ", "\n")[rng.integers(3)]
                ),
            )
        documents = self.sources[source]
        document = documents[rng.integers(len(documents))]
        start = int(rng.integers(max(1, len(document) - size)))
        if rng.random() < 0.5:  # at the beginning of a line
            start = document.rfind("\n", 0, start) + 1
        else:
            start = max(document.rfind(" ", 0, start), 0)
        end = start + size
        space = max(
            document.rfind(" ", start + size // 2, end),
            document.rfind("\n", start + size // 2, end),
        )
        return document[start : space if space > start else end]


def made_up(rng: np.random.Generator) -> str:
    """A word of one to three syllables that means nothing."""
    syllables = 1 + int(rng.random() < 0.7) + int(rng.random() < 0.2)
    return "".join(
        _ONSETS[rng.integers(len(_ONSETS))]
        + _VOWELS[rng.integers(len(_VOWELS))]
        + _CODAS[rng.integers(len(_CODAS))]
        for _ in range(syllables)
    )


def new_names(rng: np.random.Generator, count: int) -> list[str]:
    """``count`` different names of people, half of them made up."""
    names: list[str] = []
    while len(names) < count:
        name = (
            PEOPLE[rng.integers(len(PEOPLE))] if rng.random() < 0.5 else made_up(rng).capitalize()
        )
        if len(name) > 1 and name not in names:
            names.append(name)
    return names


def english_facts(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """(fact, question with its answer), a line each, about ``count`` people or things."""
    facts, kinds = (
        [],
        rng.integers(0, 5, count) if rng.random() < 0.3 else [rng.integers(5)] * count,
    )
    things = rng.permutation(len(THINGS))
    for number, (name, kind) in enumerate(zip(new_names(rng, count), kinds)):
        thing, quality = (
            THINGS[things[number % len(THINGS)]],
            QUALITIES[rng.integers(len(QUALITIES))],
        )
        place, age = PLACES[rng.integers(len(PLACES))], int(rng.integers(10, 100))
        facts.append(
            (
                (f"{name}'s {thing} is {quality}.\n", f"What is {name}'s {thing}? {quality}.\n"),
                (f"{name} lives in {place}.\n", f"Where does {name} live? In {place}.\n"),
                (f"{name} has the {thing}.\n", f"Who has the {thing}? {name}.\n"),
                (f"{name} is {age} years old.\n", f"How old is {name}? {age}.\n"),
                (f"{name}'s {thing} is in {place}.\n", f"Where is {name}'s {thing}? In {place}.\n"),
            )[int(kind)]
        )
    return facts


def _dictionary_facts(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    words = list(dict.fromkeys(made_up(rng) for _ in range(count)))
    meanings = [
        THINGS[rng.integers(len(THINGS))]
        if rng.random() < 0.5
        else f"{QUALITIES[rng.integers(len(QUALITIES))]} {THINGS[rng.integers(len(THINGS))]}"
        if rng.random() < 0.5
        else made_up(rng)
        for _ in words
    ]
    if rng.random() < 0.5:
        return [
            (f"{word}: {meaning}\n", f"{word}: {meaning}\n")
            for word, meaning in zip(words, meanings)
        ]
    return [
        (f"{word} means {meaning}.\n", f"What does {word} mean? {meaning}.\n")
        for word, meaning in zip(words, meanings)
    ]


def _code_facts(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    names = list(dict.fromkeys(made_up(rng) for _ in range(count)))
    values = [
        str(rng.integers(10, 1000)) if rng.random() < 0.6 else repr(made_up(rng)) for _ in names
    ]
    told, asked = (
        ("{n} = {v}\n", "assert {n} == {v}\n"),
        ("d['{n}'] = {v}\n", "d['{n}'] # {v}\n"),
        ("{n} = {v}\n", "print({n}) # {v}\n"),
    )[rng.integers(3)]
    return [
        (told.format(n=name, v=value), asked.format(n=name, v=value))
        for name, value in zip(names, values)
    ]


def _let_facts(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """The lines that the needle test asks for (``dsv3.training.needle``)."""
    names = rng.permutation(list(NAMES)).tolist()[:count]
    values = [int(rng.integers(10, 100)) for _ in names]
    return [
        (f"let {name} = {value}\n", f"get {name} = {value}\n") for name, value in zip(names, values)
    ]


_FACTS = {
    "english": english_facts,
    "dictionary": _dictionary_facts,
    "code": _code_facts,
    "let": _let_facts,
}


def _fill(size: int, piece: Callable[[], str]) -> str:
    text = ""
    while len(text) < size:
        text += piece()
    return text.rstrip()
