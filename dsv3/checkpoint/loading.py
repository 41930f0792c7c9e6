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
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3.checkpoint.contents import check_tensors, open_checkpoint
from dsv3.checkpoint.generation_config import GenerationConfig
from dsv3.checkpoint.index import converted_ranks
from dsv3.checkpoint.layout import TensorSpec, check_sharding, layout
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error, Notice
from dsv3.fp8 import QuantizedTensor, decode_scale
from dsv3.model import Transformer
from dsv3.parallel.experts import experts_of
from dsv3.parallel.tensor import TensorGroup
from dsv3.placement import agree
from dsv3.precision import Precision
from dsv3.shipped import model_folder


class Piece(NamedTuple):
    """What one rank reads of one stored tensor.

    name: in the model; stored: in the files; ranges: rows and columns, none for all of it.
    """

    name: str
    stored: str
    ranges: tuple[range, ...] = ()


def load_model(
    folder: str | Path,
    precision: str = "fp8",
    device: torch.device | str | None = None,
    group: TensorGroup | None = None,
    cache: str = "plain",
) -> Transformer:
    """Load this rank's part of a model, ready to use: its weights ask for no gradient.

    folder: a checkpoint in the released layout, or one converted for exactly this many ranks; or
    the name of the model that comes with the package, "dsv3-mini".
    precision: "fp8", "bf16" or "fp32"; any of them loads from FP8 and from plain checkpoints, and
    from those that are both: in fp8, a weight that is stored in plain numbers is quantised here.
    device: where the weights go; default: the group's device, or the CPU. group: the ranks that
    share the model, on the same device, each of which reads only what it holds. cache: how its
    caches keep latents, "plain" (in the model's own dtype) or "fp8". The end tokens of a
    ``generation_config.json`` become the model's ``eos_ids``. Raises DSV3Error, naming the file or
    tensor, for anything that does not fit.
    """
    folder = model_folder(folder)
    group, device = agree(group, device)
    ranks = converted_ranks(folder)
    config, reader, specs = (
        _open_converted(folder, group, ranks) if ranks else open_checkpoint(folder)
    )
    with reader:
        blocks = precision == "fp8" or config.quantization_config is not None
        check_sharding(config, group.size, blocks=blocks)
        own = GenerationConfig.beside(folder, config.vocab_size).eos_ids
        model = Transformer(config, Precision.of(precision, config, cache), group, device)
        model.eos_ids = config.eos_ids if own is None else own
        pieces = (
            [Piece(spec.name, spec.name) for spec in specs]
            if ranks
            else rank_pieces(specs, config, group)
        )
        for part, state in by_part(reader, pieces):
            model.get_submodule(part).load_state_dict(state)
    return model.eval().requires_grad_(False)


def rank_pieces(
    specs: list[TensorSpec], config: ModelConfig, group: TensorGroup
) -> Iterator[Piece]:
    """This rank's part of each released tensor; the MTP modules' copies are left out."""

    @cache
    def held(layer: int) -> Collection[int] | None:
        """Experts of a layer that are here, where they are shared out otherwise than all else."""
        experts = experts_of(group)
        if experts is None:
            return None
        return set(experts.holding(config.n_routed_experts, layer).held[experts.rank])

    for spec in specs:
        mine = None if spec.layer is None else held(spec.layer)
        part = spec.slice_for(group.rank, group.size, config.n_routed_experts, mine)
        if part is not None and not spec.copy_of:
            yield Piece(spec.name, spec.hf_name, part)


def _open_converted(
    folder: Path, group: TensorGroup, ranks: int
) -> tuple[ModelConfig, CheckpointReader, list[TensorSpec]]:
    """Like ``open_checkpoint``, of this rank's files; names there are the model's own."""
    if group.experts is not None:
        raise DSV3Error(
            "converted for tensor-parallel ranks, which hold a part of everything",
            where=folder,
            found=f"experts to be shared out over {group.everyone.size} ranks",
            fix=f"Run with --tp {ranks} and without --ep, or use the released layout",
        )
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
        slices = (
            (spec, spec.slice_for(group.rank, ranks, config.n_routed_experts))
            for spec in layout(config, mtp_copies=False)
        )
        expected = {
            spec.name: (spec, tuple(map(len, part))) for spec, part in slices if part is not None
        }
        specs = check_tensors(reader, expected)
    except BaseException:
        reader.close()
        raise
    return config, reader, specs


def by_part(
    reader: CheckpointReader, pieces: Iterable[Piece]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Parts of the model ("embed", "layers.3", "mtp.0") with the tensors of each, as read."""
    for part, some in groupby(pieces, key=lambda piece: _part(piece.name)):
        state = {
            piece.name.removeprefix(part + "."): reader.read(piece.stored, *piece.ranges)
            for piece in some
        }
        for name, value in state.items():
            if not name.endswith("scale"):
                scale = state.get(name.removesuffix("weight") + "scale")
                check_values(f"{part}.{name}", value, scale)
        yield part, state


def _part(name: str) -> str:
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first in ("layers", "mtp") else first


def check_values(name: str, value: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """Raise DSV3Error for values that no quantiser and no training leaves behind."""
    if scale is not None:
        QuantizedTensor(value, decode_scale(scale)).check(name)
    elif name.endswith(("gate.weight", "gate.bias")) and not value.isfinite().all():
        raise DSV3Error(
            f"the router {name.rpartition('.')[2]} is not finite",
            where=name,
            found=f"{int((~value.isfinite()).sum())} NaN or infinite values",
            fix="The file is damaged or its training had diverged",
        )
