"""Runs described by a file, and the phases that follow from a description."""

import json
import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from training_cases import RECIPE, TINY

from dsv3 import cli
from dsv3.config import PRESETS, ModelConfig
from dsv3.data.domains import READABLE
from dsv3.errors import DSV3Error
from dsv3.training import MINI, Recipe, Run, read_description
from dsv3.training.learner import check_memory
from dsv3.training.phases import check_phases, phase_at, phases_of, step_values, total_tokens
from dsv3.training.position import Position

pytestmark = pytest.mark.usefixtures("as_in_use")  # values of wrong kinds are the subject


@pytest.fixture
def written(tmp_path):
    """Writes a file: the lines of a model, and whatever comes after them."""

    def write(rest: str = "", model: str = 'preset = "mini"') -> Path:
        file = tmp_path / "my.toml"
        file.write_text(f"[model]\n{model}\n{rest}\n", encoding="utf-8")
        return file

    return write


def as_toml(value) -> str:
    """A value of a config.json in TOML, whose tables may stand in one line."""
    if isinstance(value, dict):
        pairs = (f"{key} = {as_toml(item)}" for key, item in value.items() if item is not None)
        return "{ " + ", ".join(pairs) + " }"
    return json.dumps(value)


def lines(table: dict) -> str:
    return "\n".join(f"{k} = {as_toml(v)}" for k, v in table.items() if v is not None)


# What it says -----------------------------------------------------------------------------------


def test_the_file_of_the_preset_is_the_recipe_and_names_every_field():
    """Neither can change without the other; only the precision is left to the machine."""
    mini = read_description(MINI)
    assert mini.config == ModelConfig.mini() and Recipe(**mini.choices) == Recipe()
    assert set(mini.choices) == {field.name for field in fields(Recipe)} - {"precision"}
    assert (mini.out, mini.plays, mini.code) == (None, None, None)


def test_what_is_commented_out_in_it_can_be_switched_on(tmp_path):
    """The examples in its comments are keys that a file may have."""
    text = re.sub(r'^# (\w+ = ".*?)(  +#.*)?$', r"\1", MINI.read_text(), flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(text)
    found = read_description(tmp_path / "all.toml")
    assert found.choices["precision"] == "bf16"
    assert (found.out, found.code) == (tmp_path / "runs/my", tmp_path / "a folder of *.py")


def test_what_a_file_leaves_out_is_as_in_the_preset(written):
    recipe = Recipe(**read_description(written("[recipe.extension]\ntokens = 7")).choices)
    assert recipe.differences(Recipe()) == {"extension_tokens": (3_000_000, 7)}


@pytest.mark.parametrize(
    "section, key, value, field",
    [
        ("recipe", "seed", 3, "seed"),
        ("recipe", "betas", [0.8, 0.9], "betas"),
        ("recipe", "recompute", True, "recompute"),
        ("recipe.pretraining", "tokens", 9, "tokens"),
        ("recipe.pretraining", "learning_rate", 1, "learning_rate"),
        ("recipe.pretraining", "batch_last", 9, "batch_last"),
        ("recipe.pretraining", "shares", {"code": 1.0}, "shares"),
        ("recipe.extension", "tokens", 0, "extension_tokens"),
        ("recipe.extension", "seq_len", 512, "extension_seq_len"),
        ("recipe.extension", "batch", 9, "extension_batch"),
        ("recipe.extension", "learning_rate", 1e-5, "extension_rate"),
        ("recipe.extension", "shares", {"functions": 1.0}, "extension_shares"),
    ],
)
def test_each_key_is_one_field(written, section, key, value, field):
    found = Recipe(**read_description(written(f"[{section}]\n{key} = {as_toml(value)}")).choices)
    expected = tuple(value) if isinstance(value, list) else value
    assert {name: now for name, (_, now) in found.differences(Recipe()).items()} == {
        field: expected
    }
    assert type(getattr(found, field)) is type(getattr(Recipe(), field))


def test_paths_are_seen_from_the_file(written, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = written('[data]\nplays = "my plays"\ncode = "/code"')
    file.write_text('out = "runs/my"\n' + file.read_text())
    found = read_description(Path("..") / file.name)
    assert found.out.resolve() == tmp_path / "runs/my"
    assert found.plays.resolve() == tmp_path / "my plays" and found.code == Path("/code")


# The model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_model_by_preset_by_path_and_by_fields(written, tmp_path, name):
    config = PRESETS[name]().but(bos_token_id=0, eos_token_id=1)
    tokens = "bos_token_id = 0\neos_token_id = 1\n"
    assert read_description(written(model=f'preset = "{name}"\n{tokens}')).config == config
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(config.to_json())
    for path in ("model", "model/config.json"):
        assert read_description(written(model=f'path = "{path}"')).config == config
    assert read_description(written(model=lines(config.to_dict()))).config == config


def test_fields_beside_a_preset_change_it(written):
    model = 'preset = "mini"\nnum_hidden_layers = 6\nnum_attention_heads = 8\nrope_scaling = {}'
    config = ModelConfig.mini().but(num_hidden_layers=6, num_attention_heads=8, rope_scaling=None)
    assert read_description(written(model=model)).config == config


# What is wrong with it --------------------------------------------------------------------------

SIZES = lines(
    {
        name: value
        for name, value in ModelConfig.mini().to_dict().items()
        if name not in ("rope_scaling", "quantization_config")
    }
)


@pytest.mark.parametrize(
    "model, rest, line",
    [
        # keys
        (None, "[recipe]\ncolour = 3", "recipe.colour: unknown key (found 3). Known here: "),
        (None, "[recipe]\nclipp = 3", "recipe.clipp: unknown key (found 3). Did you mean clip?"),
        (None, "[recipe]\ntokens = 3", "Write tokens in [recipe.pretraining] or tokens"),
        (None, "[recipe]\nextension_rate = 3", "Write learning_rate in [recipe.extension]"),
        (None, "[recipe.extension]\nseed = 3", "Write seed in [recipe]"),
        (None, "[recipe.extension]\nbatch_first = 3", "Did you mean batch?"),
        (None, "[data]\nprose = 3", "data.prose: unknown key (found 3). Known here: plays, code"),
        (None, "[colour]", "colour: unknown key (found {}). Known here: out, model, data, recipe"),
        ('preset = "mini"\nhiden_size = 3', "", "model.hiden_size: unknown key (found 3). Did you"),
        # kinds
        (None, "[recipe]\nseed = 1.0", "recipe.seed: bad value (found 1.0, expected a whole"),
        (None, "[recipe]\nseed = true", "recipe.seed: bad value (found True, expected a whole"),
        (None, "[recipe]\nseed = 1979-05-27", "recipe.seed: bad value (found datetime.date(1979"),
        (None, '[recipe]\nclip = "1"', "recipe.clip: bad value (found '1', expected a finite"),
        (None, "[recipe]\nrecompute = 1", "recipe.recompute: bad value (found 1, expected true"),
        (None, "[recipe]\nprecision = 16", "recipe.precision: bad value (found 16, expected one"),
        (None, "[recipe]\nextension = 3", "recipe.extension: bad value (found 3, expected a sec"),
        (None, "[[recipe.extension]]", "recipe.extension: bad value (found [{}], expected a sec"),
        (None, "[data]\nplays = 3", "data.plays: bad value (found 3, expected the name"),
        (None, '[data]\ncode = ""', "data.code: bad value (found '', expected the name"),
        ("preset = 3", "", "model.preset: bad value (found 3, expected one of deepseek-v3, "),
        ('preset = "mini"\nhidden_size = "256"', "", "model.hidden_size: bad value (found '256'"),
        # values
        (None, "[recipe.pretraining]\nlearning_rate = nan", "recipe.pretraining.learning_rate"),
        (None, "[recipe.extension]\nlearning_rate = -1", "recipe.extension.learning_rate: bad"),
        (None, "[recipe.extension]\ntokens = -1", "expected a whole number, 0 or more). Change it"),
        (None, "[recipe]\nbetas = [0.9, 1.0]", "recipe.betas: bad value (found [0.9, 1.0]"),
        (None, "[recipe]\nbetas = [0.9]", "recipe.betas: bad value (found [0.9], expected two"),
        (None, "[recipe]\nfim_rate = 1.5", "found 1.5, expected a finite number from 0 to 1)"),
        (None, "[recipe]\nseed = -1", "recipe.seed: bad value (found -1, expected a whole"),
        (None, f"[recipe]\nseed = {'1' * 400}", "expected at most 4294967296)"),
        (
            None,
            "[recipe.extension]\nshares = { poems = 1 }",
            "recipe.extension.shares: bad value (found 'poems', expected domains out of plays, ",
        ),
        (None, "[recipe.pretraining.shares]\nplays = -1", "recipe.pretraining.shares.plays: bad"),
        (None, "[recipe.pretraining.shares]\nplays = 0", "expected a share above 0"),
        (
            None,
            "[recipe.pretraining]\nseq_len = 257",
            "recipe.pretraining.seq_len: windows longer than the model's context (found 257, "
            "expected at most 256). Change it in the file",
        ),
        (None, "[recipe.extension]\nseq_len = 1025", "recipe.extension.seq_len: windows longer"),
        # models
        ("", "", 'model: no model is named (expected preset, path, or fields as in a config.json)'),
        ('preset = "mini"\npath = "x"', "", "model: more than one model"),
        ('preset = "maxi"', "", "model.preset: bad value (found 'maxi', expected one"),
        ('path = "x"', "", "model.path: "),
        ('preset = "mini"\nn_group = 3', "", "model.n_routed_experts: bad value (found 16"),
        ('preset = "mini"\nvocab_size = 100', "", "expected 264 or more: the bytes and"),
        ('preset = "kimi-k2"', "", "model.bos_token_id: a token of another tokenizer (found 16"),
        (SIZES.replace("n_group = 4", ""), "", "model.n_group: missing field"),
        ('preset = "mini"\nattention_bias = true', "", "model.attention_bias: unsupported value"),
        # TOML
        (None, "[recipe", "is not TOML (found "),
        (None, "[recipe]\nseed = 1\nseed = 2", "is not TOML (found Cannot overwrite a value"),
        (None, "a = " + "[" * 5000, "is not TOML (found it is nested too deeply)"),
        (None, "a = " + "1" * 5000, "is not TOML (found a number in it has thousands of digits)"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_with_file_and_key(written, model, rest, line):
    file = written(rest, 'preset = "mini"' if model is None else model)
    with pytest.raises(DSV3Error) as refused:
        read_description(file)
    text = str(refused.value)
    assert text.startswith(f"{file}: ") and line in text, text
    assert text.isprintable() and len(text) < 700 and refused.value.fix


@pytest.mark.parametrize(
    "content, line",
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"\xff\xfe", "not a text in UTF-8"),
        (b"a" * (1 << 21), "too large"),
    ],
)
def test_what_is_no_text_is_named_with_a_file_to_learn_from(tmp_path, content, line):
    if content is not None:
        (tmp_path / "my.toml").write_bytes(content)
    with pytest.raises(DSV3Error, match=f"my.toml: {line}.*Give --config a text in TOML; (.*) is"):
        read_description(tmp_path / "my.toml")
    with pytest.raises(DSV3Error, match="not a plain file.*a folder"):
        read_description(tmp_path)


def test_each_field_of_a_recipe_is_checked():
    """Whatever its value should be, an object of no kind is refused by the field's name."""
    for field in fields(Recipe):
        with pytest.raises(DSV3Error, match=f"^{field.name}: bad value"):
            Recipe(**{field.name: object()})
    assert Recipe(shares=dict.fromkeys(READABLE, 1)).shares["code"] == 1.0


def test_a_stored_recipe_that_no_recipe_could_be_names_the_way_out():
    for name, value in (("tokens", -1), ("precision", "x"), ("betas", [2, 3]), ("shares", [])):
        with pytest.raises(DSV3Error, match=f"{name}: bad value in a stored.*new --out folder"):
            Recipe.from_dict({**json.loads(json.dumps(asdict(Recipe()))), name: value})


# The command ------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs ``dsv3 train`` without the training; gives what it would train, or its one line."""
    calls = []
    monkeypatch.setattr(
        "dsv3.training.train", lambda *given, **options: calls.append((given, options))
    )
    monkeypatch.setattr("dsv3.bfloat16.slowdown", lambda: 1.0)

    def run(*words):
        code = cli.main(["train", "--device", "cpu", *map(str, words)])
        if calls:
            assert code == 0
            return calls.pop()
        assert code == 2
        return capsys.readouterr().err

    return run


def test_the_preset_is_its_file(command):
    for words in (["--preset", "mini"], ["--config", MINI]):
        (config, out, recipe), options = command(*words, "--out", "x")
        assert (config, str(out), recipe) == (ModelConfig.mini(), "x", Recipe())
        assert options["plays"] is options["code"] is options["max_minutes"] is None


def test_options_go_before_the_file(command, written, tmp_path):
    file = written(
        '[data]\nplays = "p"\ncode = "c"\n[recipe]\nseed = 3\nprecision = "fp8"\n'
        "[recipe.extension]\ntokens = 7"
    )
    file.write_text('out = "o"\n' + file.read_text())
    (_, out, recipe), options = command("--config", file)
    assert (out, options["plays"], options["code"]) == tuple(tmp_path / name for name in "opc")
    assert recipe == Recipe(seed=3, precision="fp8", extension_tokens=7)
    (_, out, recipe), options = command(
        "--config", file, "--out", "other", "--plays", "q", "--seed", 4, "--precision", "fp32",
        "--extension-tokens", 0, "--tokens", 9, "--moments", "bf16", "--recompute",
    )  # fmt: skip
    assert (out, options["plays"], options["code"]) == ("other", "q", tmp_path / "c")
    assert recipe == Recipe(
        seed=4, precision="fp32", extension_tokens=0, tokens=9, moments="bf16", recompute=True
    )


def test_what_the_command_refuses(command, written, tmp_path):
    file = written("[recipe]\nseed = 3")
    assert "--preset: not allowed with argument --config" in command(
        "--config", file, "--preset", "mini", "--out", "x"
    )
    assert "one of the arguments --preset --config is required" in command("--out", "x")
    assert "is kept. Give --out DIR\n" in command("--preset", "mini")
    assert f"is kept. Give --out DIR, or write out = ... into {file}" in command("--config", file)
    assert "not a plain file (found a folder)" in command("--config", "", "--out", "x")
    line = command("--config", file, "--out", "x", "--seed", -1)
    assert "seed: bad value (found -1" in line and line.count("\n") == 1
    line = command("--config", written("[recipe.extension]\nbatch = 1"), "--out", "x", "--ranks", 2)
    assert "extension_batch: fewer windows in a step than ranks (found 1, expected 2" in line


def test_a_model_too_large_to_train_is_refused_before_anything_is_made(written, tmp_path):
    config = read_description(
        written(model='preset = "deepseek-v3"\nbos_token_id = 0\neos_token_id = 1')
    ).config
    with pytest.raises(DSV3Error, match="model: too large to be trained here .*682,6.* 10,922 GB"):
        Run(config, tmp_path / "out", Recipe(seq_len=256))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DSV3Error, match=" 8,192 GB"):
        check_memory(config, Recipe(moments="bf16"), torch.device("cpu"))


# Phases -----------------------------------------------------------------------------------------


def test_phases_follow_from_config_and_recipe():
    first, second = phases_of(TINY, RECIPE)
    assert (first.begins, first.tokens, second.begins, second.tokens) == (0, 300, 300, 200)
    assert first.config == TINY.but(rope_scaling=None, max_position_embeddings=32)
    assert second.config == TINY and total_tokens([first, second]) == 500
    assert [phase.number for phase in (first, second)] == [0, 1]
    assert (first.shares, second.shares) == (RECIPE.shares, RECIPE.extension_shares)
    for config, recipe in (
        (TINY.but(rope_scaling=None), RECIPE),
        (TINY, replace(RECIPE, extension_tokens=0)),
    ):
        (only,) = phases_of(config, recipe)
        assert only.config == config and total_tokens([only]) == 300


@pytest.mark.parametrize("tokens, number", [(0, 0), (299, 0), (300, 1), (352, 1), (9999, 1)])
def test_the_phase_of_a_step_follows_from_the_tokens_read(tokens, number):
    assert phase_at(phases_of(TINY, RECIPE), tokens).number == number


def test_a_third_phase_is_one_more_value():
    """Nothing knows how many there are: it begins where the second ends."""
    plan = phases_of(TINY, RECIPE)
    plan.append(replace(plan[1], number=2, begins=500, tokens=100, seq_len=32))
    assert total_tokens(plan) == 600
    assert [phase_at(plan, tokens).number for tokens in (499, 500, 700)] == [1, 2, 2]
    at = Position(step=9, tokens=544, phase_start=544)
    values, windows = step_values(phase_at(plan, at.tokens), RECIPE, at)
    assert (values.learning_rate, windows) == (1e-3, 1)
    assert (values.mtp_weight, values.bias_speed) == (0.1, 0.0)
    check_phases(plan, 1)
    with pytest.raises(DSV3Error, match="extension_batch: fewer windows.*found 1, expected 2"):
        check_phases(plan, 2)
