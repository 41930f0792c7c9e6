"""What a checkpoint holds and where it fits, from headers or from the config alone.

Three sizes are often confused. *Total* parameters decide the memory; *activated* ones (of the
routed experts only num_experts_per_tok work for a token) decide the arithmetic per token; and the
MTP module counts for neither in most tables. For the 671B model they are 671.0, 37.6 and 11.6
billion. Beside the weights stands the cache: kv_lora_rank + qk_rope_head_dim values per token and
layer, 70,272 bytes in bfloat16 (TR 2.1.1), the same on every rank, since all heads share it.

Nothing is loaded. A model at its full size is measured on torch's "meta" device, where tensors
have a shape and no memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from dsv3.checkpoint.contents import open_checkpoint
from dsv3.checkpoint.layout import TensorSpec, check_sharding, layout, valid_sizes
from dsv3.checkpoint.safetensors_io import DTYPES
from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup

# Memory of common GPUs in GB of 10^9 bytes, rounded down from what nvidia-smi and rocm-smi report:
# 81,559 MiB (H100; an A100 has 81,920), 97,871, 143,771, 183,359 and 196,592 MiB. The gigabytes in
# their names, 80, 96, 141, 180 and 192, are another unit, close to GiB. A tenth is left for
# activations and the libraries' own needs.
GPUS = {"A100, H100": 85.5, "H20": 102.6, "H200": 150.7, "B200": 192.2, "MI300X": 206.1}
USABLE = 0.9


@dataclass(frozen=True)
class Contents:
    """What a checkpoint, or one of a preset, consists of.

    tensors: all that are stored, scales and the MTP layer's copies included, each with its dtype in
    the files; ranks: over how many it is to be cut.
    """

    config: ModelConfig
    tensors: list[tuple[TensorSpec, str]]
    ranks: int

    @property
    def precision(self) -> str:
        """In which it is measured in memory: as its weights are stored."""
        return "fp8" if self.config.quantization_config else "bf16"

    @property
    def held(self) -> dict[str, int]:
        """``held_bytes`` of rank 0."""
        group = TensorGroup(0, self.ranks, device="meta")
        return held_bytes(Transformer(self.config, self.precision, group))

    def report(self) -> dict:
        """See the function ``report``."""
        by_dtype: Counter[str] = Counter()
        for spec, dtype in self.tensors:
            by_dtype[dtype] += spec.numel
        main = self._weights("main")
        return {
            "parameters": {
                "main": sum(spec.numel for spec in main),
                "activated": _activated(self.config, main),
                "mtp": sum(spec.numel for spec in self._weights("mtp")),
                "by_dtype": dict(sorted(by_dtype.items())),
                "total": by_dtype.total(),
            },
            "bytes": sum(n * DTYPES[dtype].itemsize for dtype, n in by_dtype.items()),
            "tensors": len(self.tensors),
            "per_rank": self.cut(self.ranks),
        }

    def cut(self, size: int) -> list[dict]:
        """{"rank", "tensors", "bytes"} of each of ``size`` ranks, in the files. No copies."""
        check_sharding(self.config, size)
        counts = [{"rank": rank, "tensors": 0, "bytes": 0} for rank in range(size)]
        for spec, dtype in self.tensors:
            if spec.copy_of:
                continue
            nbytes = spec.numel * DTYPES[dtype].itemsize
            if spec.expert is not None:
                holders = [counts[spec.expert // (self.config.n_routed_experts // size)]]
            else:
                holders = counts
                nbytes //= 1 if spec.shard_dim is None else size
            for holder in holders:
                holder["tensors"] += 1
                holder["bytes"] += nbytes
        return counts

    def fits(self) -> Iterator[Fit]:
        """One line a number of ranks: the powers of two that are possible, and what was asked."""
        each = cache_bytes_per_token(self.config)
        for size in valid_sizes(self.config):
            if size != self.ranks and size & (size - 1):
                continue
            memory = memory_per_rank(self.config, size, self.precision)
            tokens = [(gb * 1e9 * USABLE - memory) / each for gb in GPUS.values()]
            yield Fit(size, self.cut(size)[0]["bytes"], memory, tokens)

    def _weights(self, part: str) -> list[TensorSpec]:
        return [
            spec
            for spec, _ in self.tensors
            if spec.part == part and not spec.scale_of and not spec.copy_of
        ]


class Fit(NamedTuple):
    """Rank 0 of ``ranks``: bytes it reads from the files, and keeps in memory; tokens of cache for
    which each of ``GPUS`` has room beside them, negative where not even the weights fit."""

    ranks: int
    stored: int
    memory: int
    tokens: list[float]


def contents(
    model_dir: str | Path | None = None, *, preset: str | None = None, ranks: int | None = None
) -> Contents:
    """Those of a checkpoint in the released layout, or of a preset; see ``report``."""
    if (model_dir is None) == (preset is None):
        raise DSV3Error(
            "name either a model folder or a preset", found="neither" if preset is None else "both"
        )
    if model_dir is None:
        if preset not in PRESETS:
            raise DSV3Error("unknown preset", found=preset, expected=" or ".join(PRESETS))
        config = PRESETS[preset]()
        return Contents(config, [(spec, spec.dtype) for spec in layout(config)], ranks or 1)
    config, reader, specs = open_checkpoint(model_dir)
    with reader:
        stored = [(spec, reader.entry(spec.hf_name).dtype) for spec in specs]
    return Contents(config, stored, ranks or 1)


def report(
    model_dir: str | Path | None = None, *, preset: str | None = None, ranks: int | None = None
) -> dict:
    """Sizes of a checkpoint in the released layout, or of a preset (a key of ``PRESETS``).

    ranks: cut over so many (default 1). Returns
    {"parameters": {"main", "activated", "mtp", "by_dtype": {dtype: values}, "total"}, "bytes",
    "tensors", "per_rank": [{"rank", "tensors", "bytes"}]}: main, activated and mtp count weights
    once; total, by_dtype, bytes and tensors are what the files hold, scales and the MTP layer's
    copies included; a rank holds no copies. Raises DSV3Error for a checkpoint that is not whole.
    """
    return contents(model_dir, preset=preset, ranks=ranks).report()


def activated_parameters(config: ModelConfig, *, embedding: bool = True) -> int:
    """Main-model weights that work for one token; without the embedding, which is a look-up."""
    total = _activated(config, layout(config, scales=False, mtp=False))
    return total - (0 if embedding else config.vocab_size * config.hidden_size)


def _activated(config: ModelConfig, weights: list[TensorSpec]) -> int:
    """Those of ``weights`` that work for one token: of the routed experts, which all have the same
    size, as many as a token has."""
    return sum(
        spec.numel
        for spec in weights
        if spec.expert is None or spec.expert < config.num_experts_per_tok
    )


def cache_bytes_per_token(config: ModelConfig, item_bytes: int = 2) -> int:
    """Bytes that one token leaves in the latent caches of all layers, on every rank."""
    return config.latent_dim * config.num_hidden_layers * item_bytes


def memory_per_rank(config: ModelConfig, size: int, precision: str = "fp8") -> int:
    """Bytes of the weights that one of ``size`` ranks keeps in a GPU's memory, MTP included.

    More than in the files: wkv_b is kept in float32, and so is the router.
    """
    return sum(
        held_bytes(Transformer(config, precision, TensorGroup(0, size, device="meta"))).values()
    )


def held_bytes(model: Transformer) -> dict[str, int]:
    """Bytes of a model's parameters and buffers, by kind, largest first.

    wkv_b has a line of its own: its dequantised copy, which both forms of attention read, is
    the one FP8 weight that does not stay in FP8.
    """
    kinds: Counter[str] = Counter()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dtype == torch.float8_e4m3fn:
            kinds["FP8 codes"] += tensor.nbytes
        elif name.endswith("scale"):
            kinds["block scales"] += tensor.nbytes
        elif ".wkv_b." in name:
            kinds["wkv_b, absorbed"] += tensor.nbytes
        elif tensor.dim() == 1 or ".gate." in name:
            kinds["norms and routers"] += tensor.nbytes
        else:
            kinds["other matrices"] += tensor.nbytes
    return dict(kinds.most_common())
