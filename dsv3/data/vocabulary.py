"""Text to tokens: special tokens, the chat form, and a byte-level BPE learned from the text.

The alphabet of a byte-level BPE is the 256 bytes, so no text is ever unknown. Before pairs are
merged, text is cut into pieces that no token crosses. Words take their leading space, so that
``king`` within a sentence is one token. Punctuation takes the line break after it, since most
lines of verse end in both. Each digit is a piece of its own: a model that reads 37 as the tokens
3 and 7 can add in columns, one that reads it as a word must learn each sum by heart.

The special tokens bear the released tokenizer's names, and its first three ids.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dsv3.checkpoint.safetensors_io import write_text
from dsv3.errors import DSV3Error

# The released tokenizer's names (fullwidth bars, U+2581 for the gaps) and its first three ids.
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
# Fill in the middle (TR 4.1): before the text ahead of a hole, the hole, the text to fill in.
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, FIM_BEGIN, FIM_HOLE, FIM_END)

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
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "' }}{% endif %}"
)

# Words take their leading space or apostrophe; punctuation takes the line break after it, since
# most lines of verse end in both.
_PIECES = r" ?'?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly ``vocab_size`` tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if tokenizer.get_vocab_size() != vocab_size:
        raise DSV3Error(
            "too little text for the vocabulary",
            where="tokenizer",
            found=f"{tokenizer.get_vocab_size()} tokens",
            expected=vocab_size,
            fix="Give more text or choose a smaller vocab_size",
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json, as transformers and dsv3 read them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    save_tokenizer_settings(folder, max_length)


def save_tokenizer_settings(folder: Path, max_length: int) -> None:
    """Write tokenizer_config.json alone: it is the same for every tokenizer of ours."""
    settings = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    write_text(
        folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    )


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text behind each token id; 0 for special tokens. The base of bits per byte."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, number in tokenizer.get_vocab().items():
        # The byte-level alphabet writes each byte as one character.
        lengths[number] = 0 if token in SPECIAL_TOKENS else len(token)
    return lengths


def pack(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """Token ids of all documents end to end, as int32."""
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.asarray(item.ids, dtype=np.int32) for item in encoded])
