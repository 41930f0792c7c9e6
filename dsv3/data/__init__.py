"""Text for training: its domains, a tokenizer learned from them, and a packed stream.

``plays``, ``code`` and ``arithmetic`` make documents, ``recall`` and ``chats`` more of them from
the same text; ``domains`` holds them together with what is held out; ``vocabulary`` turns text
into tokens; ``stream`` packs documents and cuts windows.
"""

from dsv3.data.arithmetic import (
    arithmetic_documents,
    final_answer,
    is_held_out,
    recall_document,
    sums,
    task,
    working,
)
from dsv3.data.chats import Chats
from dsv3.data.code import (
    HELD_OUT_MODULES,
    clean_code,
    code_documents,
    described_functions,
    pieces,
    plain_functions,
    read_modules,
    split_modules,
)
from dsv3.data.domains import DOMAINS, Domain, load_domains, tokenizer_texts, with_others
from dsv3.data.plays import HELD_OUT, clean, conversation, documents, read_plays, scenes, split
from dsv3.data.recall import Recall
from dsv3.data.stream import Stream, fill_in_middle, in_order
from dsv3.data.vocabulary import (
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    PAD,
    SPECIAL_TOKENS,
    USER,
    pack,
    save_tokenizer,
    save_tokenizer_settings,
    token_bytes,
    train_tokenizer,
)

__all__ = [
    "ASSISTANT",
    "BOS",
    "CHAT_TEMPLATE",
    "DOMAINS",
    "EOS",
    "FIM_BEGIN",
    "FIM_END",
    "FIM_HOLE",
    "HELD_OUT",
    "HELD_OUT_MODULES",
    "PAD",
    "SPECIAL_TOKENS",
    "USER",
    "Chats",
    "Domain",
    "Recall",
    "Stream",
    "arithmetic_documents",
    "clean",
    "clean_code",
    "code_documents",
    "conversation",
    "described_functions",
    "documents",
    "fill_in_middle",
    "final_answer",
    "in_order",
    "is_held_out",
    "load_domains",
    "pack",
    "pieces",
    "plain_functions",
    "read_modules",
    "read_plays",
    "recall_document",
    "save_tokenizer",
    "save_tokenizer_settings",
    "scenes",
    "split",
    "split_modules",
    "sums",
    "task",
    "token_bytes",
    "tokenizer_texts",
    "train_tokenizer",
    "with_others",
    "working",
]
