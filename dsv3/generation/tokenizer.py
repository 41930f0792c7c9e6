"""Text to token ids and back, and conversations to text.

The model knows no letters. It reads ids in [0, vocab_size) and writes ids; this module owns the
map between them and text. Three things are worth knowing.

**A token is a string of bytes, not of characters.** DeepSeek's tokenizer is a byte-level BPE: text
is written as UTF-8, each of the 256 byte values is given a printable stand-in letter, and frequent
byte sequences are merged. So any text can be encoded, and there is no unknown token. The price:
one character may be cut over several tokens (an emoji has four bytes). Whoever prints token by
token must hold back an unfinished character until its last byte has arrived, as
``dsv3.generation.stops`` does; printing ``decode([id])`` for each id shows replacement marks
instead.

**The beginning-of-sequence token (bos) is part of the input.** The model has never seen a text
without it, and it was trained to rest attention there. A rendered conversation must be encoded
with ``add_bos=False``, or it starts twice.

**The chat template writes bos itself**, and every other mark of a conversation. What it is, and why
it runs in a process of its own, stands in ``dsv3.generation.template``.

The tokenizer has fewer entries than the model has rows in its embedding (128815 against 129280,
a multiple of 128 that cuts well over ranks), and some files have holes between. Such ids are never
text; ``generate`` bans them when it is given the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
import tokenizers.decoders

from dsv3.errors import DSV3Error
from dsv3.files import read_json, read_text
from dsv3.generation.foreign_tokenizers import no_tokenizer
from dsv3.generation.template import Renderer, choose, template_messages
from dsv3.shipped import model_folder

Message = Mapping[str, Any]

# Names under which a template finds special tokens, as transformers gives them.
_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read ``tokenizer.json`` and ``tokenizer_config.json`` from a checkpoint folder."""
    folder = model_folder(path)
    file = folder / "tokenizer.json"
    if folder.is_file():
        raise DSV3Error(
            "not a folder",
            where=folder,
            found="a file",
            fix="Name the folder that holds the checkpoint",
        )
    if not os.path.lexists(file):
        raise no_tokenizer(folder)
    settings = _read_settings(folder / "tokenizer_config.json")
    description = read_text(file)
    with (
        _library_failures(
            "not a readable tokenizer", file, "Copy the file again from the checkpoint"
        ),
        _panics_unprinted(),
    ):
        engine = tokenizers.Tokenizer.from_str(description)
    if not isinstance(engine.decoder, tokenizers.decoders.ByteLevel):
        raise DSV3Error(
            "not a byte-level tokenizer",
            where=f"{file}: decoder",
            found=type(engine.decoder).__name__,
            expected="ByteLevel",
            fix="Use the tokenizer.json that belongs to the checkpoint",
        )
    if templates := _template_files(folder):
        settings["chat_template"] = templates
    return Tokenizer(engine, settings, source=str(folder))


class Tokenizer:
    """A byte-level BPE with its special tokens and its chat template.

    bos_token, eos_token: text of the special tokens, or None; bos_id, eos_id: their ids, or None.
    vocab_size: one more than the largest id, so every id is in range(vocab_size).
    """

    def __init__(self, engine: tokenizers.Tokenizer, settings: Mapping[str, Any], source: str):
        # A file saved after training may carry a length limit; a prompt is never cut in silence.
        engine.no_truncation()
        engine.no_padding()
        self._engine, self._settings, self.source = engine, settings, source
        self._renderer = Renderer()
        self.vocab_size = 1 + max(engine.get_vocab(with_added_tokens=True).values(), default=-1)
        if not self.vocab_size:
            raise DSV3Error(
                "a tokenizer without a single token",
                where=self._file,
                fix="Use the tokenizer.json that belongs to the checkpoint",
            )
        self.bos_token, self.bos_id = self._special("bos_token")
        self.eos_token, self.eos_id = self._special("eos_token")
        adds_bos = settings.get("add_bos_token")
        if adds_bos is not None and not isinstance(adds_bos, bool):
            raise DSV3Error(
                "not a switch",
                where=f"{self._where()}: add_bos_token",
                found=adds_bos,
                expected="true or false",
            )
        self.adds_bos = self.bos_id is not None if adds_bos is None else adds_bos
        if self.adds_bos and self.bos_id is None:
            raise DSV3Error(
                "add_bos_token is true but there is no bos_token",
                where=self._where(),
                fix="Name the bos_token, or set add_bos_token to false",
            )
        self._special_ids = {
            id for id, token in engine.get_added_tokens_decoder().items() if token.special
        }

    def encode(self, text: str, add_bos: bool | None = None) -> list[int]:
        """Ids of ``text``. ``add_bos``: put bos first; None does what the checkpoint's
        ``add_bos_token`` says. Special tokens written out in the text become their ids."""
        beginning: list[int] = []
        if self.adds_bos if add_bos is None else add_bos:
            if self.bos_id is None:
                raise DSV3Error(
                    "this tokenizer has no bos token",
                    where=self._where(),
                    fix="Encode with add_bos=False",
                )
            beginning = [self.bos_id]
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DSV3Error(
                "text is not valid Unicode",
                where=f"character {error.start}",
                found=repr(text[error.start]),
                fix="Write the prompt in UTF-8",
            ) from None
        with _library_failures("the tokenizer cannot encode this text", self._file):
            ids = self._engine.encode(text, add_special_tokens=False).ids
        return beginning + ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``. Bytes that are not UTF-8 become U+FFFD. ``skip_special`` leaves out
        the tokens that the file marks as special (bos and eos among them)."""
        self.check(ids)
        with _library_failures("the tokenizer cannot decode these ids", self._file):
            return self._engine.decode(list(ids), skip_special_tokens=skip_special)

    def check(self, ids: Iterable[int]) -> None:
        """Raise ``DSV3Error`` for the first id that this tokenizer does not have."""
        for id in ids:
            if not 0 <= id < self.vocab_size or self._engine.id_to_token(id) is None:
                raise DSV3Error(
                    "token id out of range",
                    where=self.source,
                    found=id,
                    expected=f"0 to {self.vocab_size - 1}",
                )

    @property
    def digest(self) -> str:
        """The same for the same tokens and settings."""
        content = self._engine.to_str() + json.dumps(self._settings, sort_keys=True, default=str)
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    def ids_without_token(self, vocab_size: int) -> list[int]:
        """The ids below ``vocab_size``, that of a model, which are none of these tokens: behind
        the last token, or in a hole between two."""
        known = set(self._engine.get_vocab(with_added_tokens=True).values())
        return [id for id in range(vocab_size) if id not in known]

    def token_bytes(self, id: int) -> bytes:
        """The bytes one token stands for: its part of the UTF-8 of the text."""
        self.check([id])
        token = self._engine.id_to_token(id)
        assert token is not None  # or check had refused it
        if all(letter in _BYTE_OF_LETTER for letter in token):
            return bytes(_BYTE_OF_LETTER[letter] for letter in token)
        # An added token is stored as plain text and may hold letters outside the byte alphabet.
        return token.encode("utf-8")

    def text_bytes(self, id: int) -> bytes:
        """The bytes that one token adds to a text as ``decode`` gives it: none if it is special."""
        return b"" if self.is_special(id) else self.token_bytes(id)

    def is_special(self, id: int) -> bool:
        return id in self._special_ids

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's template; None when it has none (a base model)."""
        return choose(self._settings.get("chat_template"), self._where())

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, ready for the model to answer.

        messages: {"role": "system" | "user" | "assistant" | "tool", "content": text} in order; a
        template may take more, such as contents that are lists of {"type": "text", "text": ...}.
        add_generation_prompt: end where the assistant's answer begins.
        tools: JSON schemas of the functions that the model may call; documents: texts it may
        quote, {"title", "text"}; variables: further names that the template may read.
        Raises DSV3Error, which tells a mistake in the template from one in the messages.
        """
        template = choose(self._settings.get("chat_template"), self._where(), tools is not None)
        if template is None:
            raise DSV3Error(
                "this checkpoint has no chat template",
                where=self._where(),
                fix="Give a plain prompt instead, or add a chat_template",
            )
        special = {name: _token_text(self._settings.get(name)) for name in _SPECIAL}
        special = {name: text for name, text in special.items() if isinstance(text, str)}
        return self._renderer.render(
            template,
            {
                **special,
                "messages": template_messages(messages),
                "tools": tools,
                "documents": documents,
                "add_generation_prompt": add_generation_prompt,
                **variables,
            },
            where=self.source,
        )

    def chat_ids(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation. The template writes bos itself, so none is added here."""
        text = self.apply_chat_template(messages, add_generation_prompt, **variables)
        if not text:
            raise DSV3Error(
                "the chat template makes no text of these messages",
                where=self.source,
                fix="Use the template of the original checkpoint",
            )
        return self.encode(text, add_bos=False)

    def _special(self, name: str) -> tuple[str | None, int | None]:
        text = _token_text(self._settings.get(name))
        if text is None:
            return None, None
        if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise DSV3Error(
                "not a token",
                where=f"{self._where()}: {name}",
                found=repr(text),
                expected='a text, or {"content": a text}',
            )
        id = self._engine.token_to_id(text)
        if id is None:
            raise DSV3Error(
                f"{name} is not in the vocabulary",
                where=self._where(),
                found=repr(text),
                fix="The two tokenizer files do not belong together",
            )
        return text, id

    @property
    def _file(self) -> str:
        return f"{self.source}/tokenizer.json"

    def _where(self) -> str:
        return f"{self.source}/tokenizer_config.json"


def _byte_letters() -> dict[str, int]:
    """The printable letter of each byte value in a byte-level vocabulary, inverted.

    Bytes that print in Latin-1 stand for themselves. The other 68 (control characters, the space,
    0x7F to 0xA0 and the soft hyphen 0xAD) take the letters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + order): byte for order, byte in enumerate(hidden)}


_BYTE_OF_LETTER: Mapping[str, int] = _byte_letters()


def _token_text(entry: Any) -> str | None:
    """A special token is written as plain text or as a dict with its text under "content"."""
    return entry.get("content") if isinstance(entry, Mapping) else entry


@contextmanager
def _library_failures(what: str, where: str | Path, fix: str | None = None) -> Iterator[None]:
    """Whatever the tokenizers library raises inside, as our error. It is written in Rust: where
    its own assumptions are broken it panics, which Python sees as no ordinary exception."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise DSV3Error(what, where=where, found=error, fix=fix) from None
        raise


@contextmanager
def _panics_unprinted() -> Iterator[None]:
    """What Rust prints of a panic goes nowhere: it writes past Python, to the stream's number."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _template_files(folder: Path) -> list[dict[str, str]]:
    """The templates that stand in files of their own, in the form of ``chat_template``."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {
        file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    return [
        {"name": name, "template": read_text(file)}
        for name, file in files.items()
        if os.path.lexists(file)
    ]


def _read_settings(file: Path) -> dict[str, Any]:
    content = read_json(file, absent="Copy the checkpoint's tokenizer files into the folder")
    if not isinstance(content, dict):
        raise DSV3Error(
            "not a JSON object", where=file, found=type(content).__name__, expected="{...}"
        )
    return content
