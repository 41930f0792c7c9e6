"""From a model to files, in the released layout.

Weights become FP8 with scales where the released ones are, or stay bfloat16, as the config says. A
folder is a checkpoint from the moment that its config.json is there, which is written last.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from dsv3.checkpoint.companions import copy_companions
from dsv3.checkpoint.folder import claim
from dsv3.checkpoint.index import INDEX_FILE, SINGLE_FILE, index_text
from dsv3.checkpoint.layout import TensorSpec, layout
from dsv3.checkpoint.safetensors_io import DTYPES, PARTIAL, StreamWriter, remove, write_text
from dsv3.config import CONFIG_FILE
from dsv3.errors import DSV3Error
from dsv3.fp8 import quantize_weight
from dsv3.model import Transformer


def save_model(
    model: Transformer,
    folder: str | Path,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a model as a checkpoint in the released layout: weights, index, config.json.

    Weights become FP8 with scales where the released ones are, if the config has a
    quantization_config, and bfloat16 otherwise. The MTP modules leave out their copies of
    embedding and head. tokenizer_dir: where to copy the tokenizer's files from. config.json comes
    last, so that an unfinished folder is not taken for a checkpoint. Raises DSV3Error when the
    model cannot be saved, and when another job writes into the folder or it holds another
    checkpoint.
    """
    with claim(folder, "saving a model"):
        write_model(model, folder, tokenizer_dir, max_shard_bytes)


def write_model(
    model: Transformer,
    folder: str | Path,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """``save_model`` for a caller that holds the folder already (``checkpoint.folder.claim``)."""
    folder = Path(folder)
    if model.group.everyone.size > 1:
        raise DSV3Error(
            "a model cut over several ranks cannot be saved",
            found=model.group.everyone.size,
            expected="one rank",
        )
    if model.precision.quantized:
        raise DSV3Error(
            "an FP8 model is not saved again",
            expected="a model in bf16 or fp32",
            fix="Use the checkpoint that it was loaded from",
        )
    shards = split_shards(layout(model.config, mtp_copies=False), max_shard_bytes)
    others = {
        path.name.removesuffix(PARTIAL)  # what a kill left of these very files is ours
        for path in folder.glob("*.safetensors*")
    } - {*shards, INDEX_FILE}
    if others:
        raise DSV3Error(
            "the folder holds another checkpoint",
            where=folder,
            found=min(others),
            fix="Name an empty or new folder",
        )
    files = {name: [(s.hf_name, s.dtype, s.shape) for s in specs] for name, specs in shards.items()}
    remove(folder / CONFIG_FILE)  # from here on the folder is unfinished
    weights = model.state_dict()
    for file_name, specs in shards.items():
        with StreamWriter(folder / file_name, files[file_name]) as out:
            for name, value in _stored_forms(weights, specs, model.config.scale_fmt):
                out.write(name, value)
    if len(shards) > 1:
        write_text(folder / INDEX_FILE, index_text(files))
    else:
        remove(folder / INDEX_FILE)
    if tokenizer_dir is not None:
        copy_companions(Path(tokenizer_dir), folder)
    write_text(folder / CONFIG_FILE, model.config.to_json())


def _stored_forms(
    weights: dict[str, torch.Tensor], specs: list[TensorSpec], scale_format: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in specs:
        if spec.scale_of:
            continue  # comes with its weight
        value = weights[spec.name].cpu()
        if spec.scale:
            stored = quantize_weight(value.float(), scale_format)
            yield spec.hf_name, stored.data
            yield spec.scale.hf_name, stored.scale
        else:
            yield spec.hf_name, value.to(DTYPES[spec.dtype])


def split_shards(specs: list[TensorSpec], max_bytes: int) -> dict[str, list[TensorSpec]]:
    """Distribute tensors over files of at most ``max_bytes``, a weight's scales beside it."""
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        together = spec.nbytes + (spec.scale.nbytes if spec.scale else 0)
        if groups[-1] and not spec.scale_of and size + together > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, 1)
    }
