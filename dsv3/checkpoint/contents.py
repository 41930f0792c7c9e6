"""What a checkpoint's files hold, against what its config.json calls for.

Two things are told apart. What the model needs must be there, in the right shape and in a form
that is read here; anything else would show up as noise in some layer. What says nothing new may be
there: other tools write buffers that follow from the config (``rotary_emb.inv_freq``), a tied head
that repeats the embedding, an MTP layer that config.json does not mention. A tensor of a name that
nobody here knows is refused all the same: it may be a part of another model.

The config speaks of the checkpoint as a whole, the files of each tensor. Where they differ in
form only, the files are believed: in an FP8 checkpoint some weights may be plain numbers, and of
an MTP layer that config.json promises (transformers writes so and saves none) nothing may be there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from dsv3.checkpoint.layout import TensorSpec, layout
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import Entry
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error, Notice

PLAIN = ("BF16", "F32", "F16")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
# What config.json says of a checkpoint in FP8, for who has to write it.
_SAID = (
    '"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}'
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTARY = re.compile(
    r"(?:.+\.)?rotary_(?:pos_)?emb\.(?:original_)?(inv_freq|cos_cached|sin_cached)"
)
# Endings of names that other formats give to their tensors, and whose they are.
_FORMATS = (
    (
        ("_scale", "_packed", ".weight_shape", ".weight_zero_point", ".input_scale"),
        "quantised by compressed-tensors",
    ),
    ((".qweight", ".qzeros", ".g_idx"), "quantised by GPTQ or AWQ"),
    (
        (
            ".absmax",
            ".quant_map",
            ".nested_absmax",
            ".SCB",
            "bitsandbytes__nf4",
            "bitsandbytes__fp4",
        ),
        "quantised by bitsandbytes",
    ),
    ((".scales", ".biases"), "a checkpoint of MLX"),
    ((".lora_A.weight", ".lora_B.weight"), "a LoRA adapter, which is no model by itself"),
    (
        ("experts.gate_up_proj", "switch_mlp.gate_proj.weight"),
        "experts packed into one tensor a layer",
    ),
)


def open_checkpoint(folder: str | Path) -> tuple[ModelConfig, CheckpointReader, list[TensorSpec]]:
    """Open a checkpoint in the released layout and hold it to its config.json.

    Returns the config as the files bear it out (no MTP modules where none are stored), the reader,
    and the tensors that are there, scales and copies included; an FP8 weight that is stored in
    plain numbers has dtype "BF16" and no scale. A ``Notice`` is given for an MTP layer that is
    missing as a whole or left out. Raises DSV3Error for whatever the model needs and is missing
    or of the wrong shape or dtype, and for what does not belong to it; only headers are read, and
    a tied head that is stored once more.
    """
    config = ModelConfig.from_pretrained(folder)
    reader = CheckpointReader(folder)
    try:
        config, missing = _mtp_as_stored(config, reader)
        redundant, left_out = _redundant(config, reader)
        specs = check_tensors(
            reader, {spec.hf_name: (spec, spec.shape) for spec in layout(config)}, also=redundant
        )
    except BaseException:
        reader.close()
        raise
    for notice in filter(None, (missing, left_out)):
        warnings.warn(Notice(f"{folder}: {notice}"), stacklevel=2)
    return config, reader, specs


def true_config(data: dict, config: ModelConfig) -> dict:
    """The contents of a config.json, with the number of MTP modules that ``config`` has."""
    names = [
        name
        for name in ("num_nextn_predict_layers", "num_mtp_layers")
        if data.get(name) not in (None, config.num_nextn_predict_layers)
    ]
    return {**data, **dict.fromkeys(names, config.num_nextn_predict_layers)}


def check_tensors(
    reader: CheckpointReader,
    expected: dict[str, tuple[TensorSpec, tuple[int, ...]]],
    also: frozenset[str] = frozenset(),
) -> list[TensorSpec]:
    """The tensors that are there, as they are stored; DSV3Error unless all expected ones are.

    expected: name in the files -> spec and shape. also: names that may be there besides. The MTP
    modules' copies of embedding and head may be there or not.
    """
    entries = reader.entries
    stored, missing = [], []
    plain = {
        spec.hf_name
        for name, (spec, _) in expected.items()
        if spec.dtype == "F8_E4M3" and name in entries and entries[name].dtype in PLAIN
    }
    any_fp8 = any(entry.dtype == "F8_E4M3" for entry in entries.values())
    for name, (spec, shape) in expected.items():
        if spec.scale_of in plain:
            if name in entries:
                raise DSV3Error(
                    "scales beside a weight that is not FP8",
                    where=name,
                    found="a wrong dtype of the weight or a grid too many",
                )
            continue
        if name not in entries:
            if not spec.copy_of:
                missing.append((name, spec))
            continue
        entry = entries[name]
        if spec.hf_name in plain and not any_fp8:
            raise _wrong_dtype(entries, name, spec)
        if spec.hf_name not in plain and entry.dtype not in _accepted(spec):
            raise _wrong_dtype(entries, name, spec)
        if entry.shape != shape:
            raise DSV3Error(
                "wrong shape",
                where=name,
                found=list(entry.shape),
                expected=list(shape),
                fix="Scales are read for blocks of 128x128 of their weight"
                if spec.scale_of
                else "config.json describes another model",
            )
        stored.append(replace(spec, dtype="BF16") if spec.hf_name in plain else spec)
    if missing:
        raise _missing(reader, missing)
    unexpected = [name for name in entries if name not in expected and name not in also]
    if unexpected:
        raise DSV3Error(
            "unexpected tensor" + (f", one of {len(unexpected)}" if len(unexpected) > 1 else ""),
            where=f"{reader.folder}: {unexpected[0]}",
            expected="only tensors that config.json calls for",
            fix=_another_format(entries),
        )
    return stored


def _mtp_as_stored(config: ModelConfig, reader: CheckpointReader) -> tuple[ModelConfig, str | None]:
    """The config, without MTP modules where it promises some and not one tensor is there, which
    the second value then says."""
    promised, first = config.num_nextn_predict_layers, config.num_hidden_layers
    if not promised or any(layer >= first for layer, _ in _layers(reader.entries)):
        return config, None
    return config.but(num_nextn_predict_layers=0), (
        f"config.json promises {promised} MTP module"
        + "s" * (promised > 1)
        + " and the files hold none: drafting is off"
    )


def _layers(names: Iterable[str]) -> set[tuple[int, str]]:
    """(number, rest of the name) of every tensor that belongs to a layer."""
    return {
        (int(match[1]), match[2])
        for name in names
        if (match := _LAYER.fullmatch(name)) and len(match[1]) < 10
    }


def _redundant(config: ModelConfig, reader: CheckpointReader) -> tuple[frozenset[str], str | None]:
    """Names of stored tensors that say nothing new, each checked as far as it can be; and which
    MTP layer is among them, if one is."""
    notice = None
    found = {
        name
        for name, entry in reader.entries.items()
        if _is_rotary(name, entry.shape, config.qk_rope_head_dim)
    }
    if config.tie_word_embeddings and "lm_head.weight" in reader:
        _check_tied(reader, "lm_head.weight", "model.embed_tokens.weight")
        found.add("lm_head.weight")
    layers = _layers(reader.entries)
    known = config.num_hidden_layers + config.num_nextn_predict_layers
    beyond = {layer for layer, _ in layers if layer >= known}
    if beyond and all(
        (layer, f"{part}.weight") in layers
        for layer in beyond
        for part in ("enorm", "hnorm", "eh_proj")
    ):
        notice = (
            f"MTP layer {min(beyond)} is left out, since num_nextn_predict_layers in "
            f"config.json is {config.num_nextn_predict_layers}; "
            f"{known + len(beyond) - config.num_hidden_layers} would draft with it"
        )
        found |= {
            name
            for name in reader.entries
            if (match := _LAYER.fullmatch(name)) and int(match[1]) in beyond
        }
    return frozenset(found), notice


def _is_rotary(name: str, shape: tuple[int, ...], width: int) -> bool:
    """Whether a tensor is a table of RoPE, which follows from the config, by name and by shape.

    Frequencies may be of any number. Nobody reads them, and what lies in the released files of
    Kimi K2 (56 a layer) and Moonlight (64) are leftovers of other models: they turn by 32.
    """
    match = _ROTARY.fullmatch(name)
    if not match:
        return False
    if match[1] == "inv_freq":
        return len(shape) == 1
    return len(shape) >= 2 and shape[-1] in (width, width // 2)


def _check_tied(reader: CheckpointReader, head: str, embedding: str) -> None:
    """Raise DSV3Error unless a stored head equals the embedding; both pass in bands."""
    a, b = reader.entry(head), reader.entry(embedding)
    same = a.shape == b.shape and {a.dtype, b.dtype} <= set(PLAIN)
    for rows in a.bands(a.shape[0]) if same else ():
        same &= torch.equal(reader.read(head, rows).float(), reader.read(embedding, rows).float())
    if not same:
        raise DSV3Error(
            "two tensors that config.json calls one differ",
            where=f"{reader.folder}: {head} and {embedding}",
            found="tie_word_embeddings true",
            fix="Set tie_word_embeddings to false if the head is one of its own",
        )


def _accepted(spec: TensorSpec) -> tuple[str, ...]:
    if spec.dtype == "F8_E4M3":
        return ("F8_E4M3",)
    return _SCALES if spec.scale_of else PLAIN  # another tool may have kept more bits


def _wrong_dtype(entries: Mapping[str, Entry], name: str, spec: TensorSpec) -> DSV3Error:
    found = entries[name].dtype
    fix = _another_format(entries)
    if fix is None and found == "F8_E4M3":
        fix = (
            f"An FP8 checkpoint needs {_SAID} in its config.json"
            if f"{name}_scale_inv" in entries
            else "FP8 weights without a grid of scales for blocks of 128x128 are not supported"
        )
    elif fix is None and found in PLAIN and spec.dtype == "F8_E4M3":
        fix = (
            "No tensor here is FP8: for a checkpoint that is not quantised, remove "
            "quantization_config from config.json"
        )
    return DSV3Error(
        "wrong dtype", where=name, found=found, fix=fix, expected=" or ".join(_accepted(spec))
    )


def _missing(reader: CheckpointReader, missing: list[tuple[str, TensorSpec]]) -> DSV3Error:
    for name, _ in missing:
        if name in reader.astray:  # the index knows it: say what became of it
            return reader.absent(name)
    name, spec = missing[0]
    return DSV3Error(
        f"missing {'scale' if spec.scale_of else 'tensor'}"
        + (f", one of {len(missing)} missing tensors" if len(missing) > 1 else ""),
        where=f"{reader.folder}: {name}",
        fix=_another_format(reader.entries),
    )


def _another_format(names: Iterable[str]) -> str | None:
    """What the files are by the names of their tensors, where that is another format."""
    for endings, what in _FORMATS:
        sign = next((name for name in names if name.endswith(endings)), None)
        if sign:
            return (
                f"By the name {sign} this is {what}. Take the checkpoint as released, in FP8 "
                "or BF16"
            )
    return None
