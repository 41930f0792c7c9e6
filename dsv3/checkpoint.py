"""From files to a model, and back.

A rank of N needs 1/N of most tensors. It reads those rows and columns straight from the released
shards, so there is no conversion to wait for and no second copy of 689 GB on the disk; a folder
made by ``dsv3 convert`` loads too. FP8 weights arrive as they are stored, codes and scales, and
the model's precision decides what becomes of them.

What would otherwise show up as strange text is refused here, with the tensor's name: a missing
scale, a wrong shape or dtype, NaN codes, a scale or a router bias that is not finite.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from dsv3.companions import copy_companions
from dsv3.config import CONFIG_FILE, ModelConfig
from dsv3.contents import check_tensors, open_checkpoint
from dsv3.errors import DSV3Error, Notice
from dsv3.folder import claim
from dsv3.fp8 import BLOCK, QuantizedTensor, decode_scale, quantize_weight
from dsv3.generation_config import GenerationConfig
from dsv3.layout import TensorSpec, check_sharding, layout
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.placement import agree
from dsv3.safetensors_io import DTYPES, PARTIAL, StreamWriter, remove, write_text
from dsv3.shards import INDEX_FILE, SINGLE_FILE, CheckpointReader, converted_ranks, index_text
from dsv3.shipped import model_folder


def load_model(folder: str | Path, precision: str = "fp8",
               device: torch.device | str | None = None,
               group: TensorGroup | None = None) -> Transformer:
    """Load this rank's part of a model, ready to use: its weights ask for no gradient.

    folder: a checkpoint in the released layout, or one converted for exactly this many ranks; or
    the name of the model that comes with the package, "dsv3-mini".
    precision: "fp8", "bf16" or "fp32"; any of them loads from FP8 and from plain checkpoints, and
    from those that are both: in fp8, a weight that is stored in plain numbers is quantised here.
    device: where the weights go; default: the group's device, or the CPU. group: the ranks that
    share the model, on the same device. The end tokens of a ``generation_config.json`` become the
    model's ``eos_ids``. Raises DSV3Error, naming the file or tensor, for anything that does not
    fit.
    """
    folder = model_folder(folder)
    group, device = agree(group, device)
    ranks = converted_ranks(folder)
    if ranks:
        config, reader, specs, pick = _open_converted(folder, group, ranks)
    else:
        config, reader, specs, pick = _open_released(folder, group)
    with reader:
        check_sharding(config, group.size,
                       blocks=precision == "fp8" or config.quantization_config is not None)
        own = GenerationConfig.beside(folder, config.vocab_size).eos_ids
        model = Transformer(config, precision, group, device)
        model.eos_ids = config.eos_ids if own is None else own
        for spec in specs:
            if spec.scale_of or spec.copy_of:
                continue
            value = pick(spec)
            if value is not None:
                scale = pick(spec.scale) if spec.scale else None
                check_values(spec.name, value, scale)
                model.load_weight(spec.name, value, scale)
    return model.eval().requires_grad_(False)


def _open_released(folder: Path, group: TensorGroup):
    config, reader, specs = open_checkpoint(folder)

    def pick(spec: TensorSpec) -> torch.Tensor | None:
        part = spec.slice_for(group.rank, group.size, config.n_routed_experts)
        return None if part is None else reader.read(spec.hf_name, *part)

    return config, reader, specs, pick


def _open_converted(folder: Path, group: TensorGroup, ranks: int):
    if ranks != group.size:
        raise DSV3Error("converted for another number of ranks", where=folder, found=ranks,
                        expected=group.size, fix=f"Run with --tp {ranks}, or use the released "
                        "layout, which loads on any number of ranks")
    config = ModelConfig.from_pretrained(folder)
    files = [f"model{group.rank}-mp{ranks}.safetensors", f"mtp{group.rank}-mp{ranks}.safetensors"]
    if not (folder / files[1]).exists():
        # The released converter leaves the MTP layer out, on every rank.
        files.pop()
        if config.num_nextn_predict_layers:
            warnings.warn(Notice(f"{folder}: converted without MTP modules: drafting is off"),
                          stacklevel=3)
            config = config.but(num_nextn_predict_layers=0)
    reader = CheckpointReader(folder, files)
    try:
        specs = check_tensors(reader, {
            spec.name: (spec, tuple(len(r) for r in part))
            for spec in layout(config, mtp_copies=False)
            if (part := spec.slice_for(group.rank, ranks, config.n_routed_experts)) is not None})
    except BaseException:
        reader.close()
        raise

    def pick(spec: TensorSpec) -> torch.Tensor | None:
        return reader.read(spec.name) if spec.name in reader else None

    return config, reader, specs, pick


def check_values(name: str, value: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Raise DSV3Error for values that no quantiser and no training leaves behind."""
    if scale is not None:
        QuantizedTensor(value, decode_scale(scale), (BLOCK, BLOCK)).check(name)
    elif name.endswith(("gate.bias", "e_score_correction_bias")) and not value.isfinite().all():
        raise DSV3Error("the router bias is not finite", where=name,
                        found=f"{int((~value.isfinite()).sum())} NaN or infinite values",
                        fix="The file is damaged or its training had diverged")


def save_model(model: Transformer, folder: str | Path, tokenizer_dir: str | Path | None = None,
               max_shard_bytes: int = 5 * 10**9) -> None:
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


def write_model(model: Transformer, folder: str | Path, tokenizer_dir: str | Path | None = None,
                max_shard_bytes: int = 5 * 10**9) -> None:
    """``save_model`` for a caller that holds the folder already (``dsv3.folder.claim``)."""
    folder = Path(folder)
    if model.group.size > 1:
        raise DSV3Error("a model cut over several ranks cannot be saved", found=model.group.size,
                        expected="one rank")
    if model.precision.quantized:
        raise DSV3Error("an FP8 model is not saved again", expected="a model in bf16 or fp32",
                        fix="Use the checkpoint that it was loaded from")
    shards = split_shards(layout(model.config, mtp_copies=False), max_shard_bytes)
    others = {path.name.removesuffix(PARTIAL)  # what a kill left of these very files is ours
              for path in folder.glob("*.safetensors*")} - {*shards, INDEX_FILE}
    if others:
        raise DSV3Error("the folder holds another checkpoint", where=folder,
                        found=sorted(others)[0], fix="Name an empty or new folder")
    files = {name: [(s.hf_name, s.dtype, s.shape) for s in specs]
             for name, specs in shards.items()}
    remove(folder / CONFIG_FILE)  # from here on the folder is unfinished
    for file_name, specs in shards.items():
        with StreamWriter(folder / file_name, files[file_name]) as out:
            for name, value in _stored_forms(model, specs):
                out.write(name, value)
    if len(shards) > 1:
        write_text(folder / INDEX_FILE, index_text(files))
    else:
        remove(folder / INDEX_FILE)
    if tokenizer_dir is not None:
        copy_companions(Path(tokenizer_dir), folder)
    write_text(folder / CONFIG_FILE, model.config.to_json())


def _stored_forms(model: Transformer,
                  specs: list[TensorSpec]) -> Iterator[tuple[str, torch.Tensor]]:
    for spec in specs:
        if spec.scale_of:
            continue  # comes with its weight
        value = model.weight(spec.name).detach().cpu()
        if spec.scale:
            stored = quantize_weight(value.float(), model.config.scale_fmt)
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
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
            for i, group in enumerate(groups, 1)}
