"""From files to a model.

A rank of N needs 1/N of most tensors. It reads those rows and columns straight from the released
shards, so there is no conversion to wait for and no second copy of 689 GB on the disk; a folder
made by ``dsv3 convert`` loads too. FP8 weights arrive as they are stored, codes and scales, and
the model's precision decides what becomes of them.

What would otherwise show up as strange text is refused here, with the tensor's name: a missing
scale, a wrong shape or dtype, NaN codes, a scale or a router bias that is not finite.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from dsv3.checkpoint.contents import check_tensors, open_checkpoint
from dsv3.checkpoint.generation_config import GenerationConfig
from dsv3.checkpoint.layout import TensorSpec, check_sharding, layout
from dsv3.checkpoint.reader import CheckpointReader, converted_ranks
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error, Notice
from dsv3.fp8 import BLOCK, QuantizedTensor, decode_scale
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.placement import agree
from dsv3.shipped import model_folder


def load_model(
    folder: str | Path,
    precision: str = "fp8",
    device: torch.device | str | None = None,
    group: TensorGroup | None = None,
) -> Transformer:
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
        check_sharding(
            config, group.size, blocks=precision == "fp8" or config.quantization_config is not None
        )
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
        raise DSV3Error(
            "converted for another number of ranks",
            where=folder,
            found=ranks,
            expected=group.size,
            fix=f"Run with --tp {ranks}, or use the released "
            "layout, which loads on any number of ranks",
        )
    config = ModelConfig.from_pretrained(folder)
    files = [f"model{group.rank}-mp{ranks}.safetensors", f"mtp{group.rank}-mp{ranks}.safetensors"]
    if not (folder / files[1]).exists():
        # The released converter leaves the MTP layer out, on every rank.
        files.pop()
        if config.num_nextn_predict_layers:
            warnings.warn(
                Notice(f"{folder}: converted without MTP modules: drafting is off"), stacklevel=3
            )
            config = config.but(num_nextn_predict_layers=0)
    reader = CheckpointReader(folder, files)
    try:
        specs = check_tensors(
            reader,
            {
                spec.name: (spec, tuple(len(r) for r in part))
                for spec in layout(config, mtp_copies=False)
                if (part := spec.slice_for(group.rank, ranks, config.n_routed_experts)) is not None
            },
        )
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
        raise DSV3Error(
            "the router bias is not finite",
            where=name,
            found=f"{int((~value.isfinite()).sum())} NaN or infinite values",
            fix="The file is damaged or its training had diverged",
        )
