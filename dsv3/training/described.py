"""A run described by a file: ``dsv3 train --config FILE``, in TOML.

A command line of thirty options is not written down anywhere, and nobody can say next week what
was trained. A file can be kept beside the model. It says of which sizes the model is, by what
recipe it is trained, on what and where to; ``mini.toml`` beside this module is one, and it *is*
the preset: ``--preset mini`` reads it by the same way.

A key that is not known is refused. A misspelt ``learning_rat`` would otherwise train for hours
with a rate that nobody chose.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dsv3.config import PRESETS, ModelConfig
from dsv3.data.vocabulary import BOS, EOS, SPECIAL_TOKENS
from dsv3.errors import DSV3Error
from dsv3.families import FIXED
from dsv3.fields import bad, quoted
from dsv3.files import read_text
from dsv3.training.phases import check_phases, phases_of
from dsv3.training.recipe import Recipe

MINI = Path(__file__).with_name("mini.toml")

# Where each field of the recipe stands in the file: section -> key -> field.
_PHASES = {
    "recipe.pretraining": {
        "tokens": "tokens",
        "seq_len": "seq_len",
        "batch_first": "batch_first",
        "batch_last": "batch_last",
        "learning_rate": "learning_rate",
        "warmup": "warmup",
        "shares": "shares",
    },
    "recipe.extension": {
        "tokens": "extension_tokens",
        "seq_len": "extension_seq_len",
        "batch": "extension_batch",
        "learning_rate": "extension_rate",
        "shares": "extension_shares",
    },
}
_OF_A_PHASE = {field for keys in _PHASES.values() for field in keys.values()}
_RECIPE: Mapping[str, Mapping[str, str]] = {
    "recipe": {f.name: f.name for f in fields(Recipe) if f.name not in _OF_A_PHASE},
    **_PHASES,
}
# Keys of a model besides preset and path: fields, and what else a config.json of a family has.
_FIELDS = {field.name for field in fields(ModelConfig)}.union(
    FIXED, *(preset().to_dict() for preset in PRESETS.values())
)
# What a model must agree on with the tokenizer that a run learns.
_TOKENS = {"bos_token_id": SPECIAL_TOKENS.index(BOS), "eos_token_id": SPECIAL_TOKENS.index(EOS)}
_LEAST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_MOST = 1 << 20  # bytes of a file that a person has written


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a file says: the model, the fields of the recipe that it names, and places."""

    config: ModelConfig
    choices: Mapping[str, Any]
    out: Path | None
    plays: Path | None
    code: Path | None


def read_description(file: str | Path) -> Description:
    """Read and check a file; DSV3Error, in one line with its name and the key, for what is wrong.

    Paths in it are seen from its own folder.
    """
    file = Path(file)
    data = _parse(file)
    try:
        _check_keys(data, "", ("out", "model", "data", "recipe"))
        places = _table(data, "data")
        _check_keys(places, "data", ("plays", "code"))
        choices = _recipe(_table(data, "recipe"))
        config = _model(_table(data, "model"), file.parent)
        check_phases(phases_of(config, Recipe(**choices)), ranks=1)
        return Description(
            config=config,
            choices=choices,
            out=_path(data, "out", "out", file.parent),
            plays=_path(places, "plays", "data.plays", file.parent),
            code=_path(places, "code", "data.code", file.parent),
        )
    except DSV3Error as error:
        raise _retold(
            error,
            f"{_key_of(error.where)}: {error.what}",
            where=file,
            fix=error.fix or "Change it in the file",
        ) from None


def _parse(file: Path) -> dict:
    """The tables of a TOML file."""
    try:
        return tomllib.loads(read_text(file, most=_MOST))
    except DSV3Error as error:
        fix = f"Give --config a text in TOML; {MINI} is one"
        raise _retold(error, error.what, where=file, fix=fix) from None
    except (ValueError, RecursionError) as error:
        found: object = error
        if isinstance(error, RecursionError):
            found = "it is nested too deeply"
        elif "digits" in str(error):  # Python's words tell programmers how to lift its limit
            found = "a number in it has thousands of digits"
        fix = f"{MINI} shows how it is written"
        raise DSV3Error("is not TOML", where=file, found=found, fix=fix) from None


def _recipe(table: dict) -> dict[str, Any]:
    """Fields of ``Recipe`` that the section [recipe] names, with their values."""
    _check_keys(table, "recipe", (*_RECIPE["recipe"], "pretraining", "extension"))
    choices = {}
    for section, keys in _RECIPE.items():
        name = section.removeprefix("recipe").removeprefix(".")
        values = _table(table, name, "recipe.") if name else table
        if name:
            _check_keys(values, section, keys)
        choices |= {field: values[key] for key, field in keys.items() if key in values}
    return choices


def _model(table: dict, folder: Path) -> ModelConfig:
    """The model of the section [model]: of a preset or a file, of fields, or fields beside one."""
    _check_keys(table, "model", ("preset", "path", *_FIELDS))
    named = {name for name in ("preset", "path") if name in table}
    if not table or len(named) > 1:
        raise DSV3Error(
            "more than one model" if table else "no model is named",
            where="model",
            expected="preset, path, or fields as in a config.json",
            fix=f"Remove one of {', '.join(sorted(named))}" if table else 'Say preset = "mini"',
        )
    given = {"model_type": "deepseek_v3", **_TOKENS}
    if named:
        base = _base(table, folder).to_dict()
        given = {
            field.name: base[field.name] for field in fields(ModelConfig) if field.name in base
        }
    given |= {name: value for name, value in table.items() if name not in named}
    try:
        config = ModelConfig.from_dict(given)
    except DSV3Error as error:
        raise _retold(error, error.what, where=f"model.{error.where}", fix=error.fix) from None
    if config.vocab_size < _LEAST_VOCABULARY:
        raise bad(
            "model.vocab_size",
            config.vocab_size,
            f"{_LEAST_VOCABULARY} or more: the bytes and the special tokens",
        )
    for name, number in _TOKENS.items():
        if getattr(config, name) != number:
            raise DSV3Error(
                "a token of another tokenizer",
                where=f"model.{name}",
                found=getattr(config, name),
                expected=f"{number}, that of the tokenizer which a run learns",
                fix=f"Say {name} = {number}",
            )
    return config


def _base(table: dict, folder: Path) -> ModelConfig:
    """The model that a section [model] names by preset or path."""
    if "preset" not in table:
        try:
            path = _path(table, "path", "model.path", folder)
            assert path is not None  # or a preset would be named
            return ModelConfig.from_pretrained(path)
        except DSV3Error as error:
            if error.where == "model.path":
                raise
            what = f"{error.where}: {error.what}"
            raise _retold(error, what, where="model.path", fix=error.fix) from None
    if table["preset"] not in list(PRESETS):  # compared one by one: a table has no hash
        raise bad("model.preset", table["preset"], "one of " + ", ".join(PRESETS))
    return PRESETS[table["preset"]]()


def _table(data: dict, key: str, section: str = "") -> dict:
    """A section of the file; one that is not there says nothing."""
    value = data.get(key, {})
    if not isinstance(value, dict):
        raise bad(section + key, value, f"a section [{section}{key}]")
    return value


def _path(table: dict, key: str, where: str, folder: Path) -> Path | None:
    """A path of the file, seen from its folder; None where it has none."""
    value = table.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value or not value.isprintable():
        raise bad(where, value, "the name of a file or folder, in quotes")
    return folder / value


def _check_keys(table: dict, section: str, known: Collection[str]) -> None:
    """Raise DSV3Error for a key that is not known in its section, and say where it belongs."""
    for key in table:
        if key not in known:
            raise DSV3Error(
                "unknown key",
                where=f"{section}.{key}" if section else key,
                found=quoted(table[key]),
                fix=_way_out(key, section, known),
            )


def _way_out(key: str, section: str, known: Collection[str]) -> str:
    """What may have been meant by a key: one of another section, or one of almost that name."""
    others = _RECIPE if section not in _PHASES else {"recipe": _RECIPE["recipe"]}
    homes = [
        f"{name} in [{other}]"
        for other, keys in others.items()
        for name, field in keys.items()
        if key in (name, field)
    ]
    near = get_close_matches(key, known, n=1)
    if homes:
        return f"Write {' or '.join(homes)}"
    if near:
        return f"Did you mean {near[0]}?"
    return f"Known here: {', '.join(known)}" if len(known) < 24 else "Remove it"


def _key_of(where: object) -> str:
    """Where the file has what an error calls by the name of the recipe's field."""
    field, *below = str(where).split(".")
    for section, keys in _RECIPE.items():
        for key, name in keys.items():
            if name == field:
                return ".".join([section, key, *below])
    return str(where)


def _retold(error: DSV3Error, what: str, *, where: object, fix: str | None) -> DSV3Error:
    """The same error, of another place and with another way out."""
    return DSV3Error(what, where=where, found=error.found, expected=error.expected, fix=fix)
