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

import json
from collections import Counter
from pathlib import Path

import torch

from dsv3.checkpoint.contents import open_checkpoint
from dsv3.checkpoint.layout import TensorSpec, check_sharding, layout, valid_sizes
from dsv3.checkpoint.safetensors_io import DTYPES
from dsv3.config import PRESETS, ModelConfig
from dsv3.errors import DSV3Error
from dsv3.families import FAMILIES
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup

# Memory of common GPUs in GB of 10^9 bytes, rounded down from what nvidia-smi and rocm-smi report:
# 81,559 MiB (H100; an A100 has 81,920), 97,871, 143,771, 183,359 and 196,592 MiB. The gigabytes in
# their names, 80, 96, 141, 180 and 192, are another unit, close to GiB. A tenth is left for
# activations and the libraries' own needs.
GPUS = {"A100, H100": 85.5, "H20": 102.6, "H200": 150.7, "B200": 192.2, "MI300X": 206.1}
_USABLE = 0.9


def inspect(
    model_dir: str | Path | None = None,
    *,
    preset: str | None = None,
    ranks: int | None = None,
    as_json: bool = False,
) -> dict:
    """Print a report on a checkpoint or a preset, as a table or as JSON, and return it.

    See ``report`` for the arguments and the keys.
    """
    config, tensors = _contents(model_dir, preset)
    result = _report(config, tensors, ranks)
    print(json.dumps(result, indent=2) if as_json else table(result, config))
    return result


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
    return _report(*_contents(model_dir, preset), ranks)


def _contents(
    model_dir: str | Path | None, preset: str | None
) -> tuple[ModelConfig, list[tuple[TensorSpec, str]]]:
    """The config and the tensors, each with the dtype it is stored in."""
    if (model_dir is None) == (preset is None):
        raise DSV3Error(
            "name either a model folder or a preset", found="neither" if preset is None else "both"
        )
    if model_dir is None:
        if preset not in PRESETS:
            raise DSV3Error("unknown preset", found=preset, expected=" or ".join(PRESETS))
        config = PRESETS[preset]()
        return config, [(spec, spec.dtype) for spec in layout(config)]
    config, reader, specs = open_checkpoint(model_dir)
    with reader:
        return config, [(spec, reader.entry(spec.hf_name).dtype) for spec in specs]


def _report(config: ModelConfig, tensors: list[tuple[TensorSpec, str]], ranks: int | None) -> dict:
    by_dtype: Counter[str] = Counter()
    for spec, dtype in tensors:
        by_dtype[dtype] += spec.numel
    return {
        "parameters": {
            "main": _count(tensors, "main"),
            "activated": activated_parameters(config),
            "mtp": _count(tensors, "mtp"),
            "by_dtype": dict(sorted(by_dtype.items())),
            "total": by_dtype.total(),
        },
        "bytes": sum(n * DTYPES[dtype].itemsize for dtype, n in by_dtype.items()),
        "tensors": len(tensors),
        "per_rank": _per_rank(config, tensors, ranks or 1),
    }


def activated_parameters(config: ModelConfig, *, embedding: bool = True) -> int:
    """Main-model weights that work for one token; without the embedding, which is a look-up."""
    total = idle = 0
    for spec in layout(config, scales=False, mtp=False):
        total += spec.numel
        if spec.expert is not None and spec.expert >= config.num_experts_per_tok:
            idle += spec.numel  # all experts have the same size
    return total - idle - (0 if embedding else config.vocab_size * config.hidden_size)


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


def table(result: dict, config: ModelConfig) -> str:
    """A report as text, with what fits on which GPUs."""
    p = result["parameters"]
    precision = "fp8" if config.quantization_config else "bf16"
    family = FAMILIES[config.model_type]
    lines = [
        f"{config.model_type}, the name of {family.models}:",
        f"  {family.adds}",
        "parameters",
        f"  main model             {p['main']:>19,}",
        f"  activated per token    {p['activated']:>19,}",
        f"    without embedding    {activated_parameters(config, embedding=False):>19,}",
        f"  MTP                    {p['mtp']:>19,}",
        "in the files",
    ]
    lines += [f"  {dtype + ' values':<23}{n:>19,}" for dtype, n in p["by_dtype"].items()]
    lines += [
        f"  all values             {p['total']:>19,}",
        f"  bytes                  {result['bytes']:>19,}",
        f"  tensors                {result['tensors']:>19,}",
        f"cache, bytes per token   {cache_bytes_per_token(config):>19,}",
        "",
        f"A rank's weights, and tokens of cache (thousands) that fit beside them in "
        f"{_USABLE:.0%} of a GPU",
        "(GB of 10^9 bytes, of GPUs too: more than their names say, which count in GiB)",
        f"{'ranks':>5} {'files GB':>9} {precision + ' GB':>9}"
        + "".join(f"{f'{name} {gb}':>16}" for name, gb in GPUS.items()),
    ]
    tensors = [(spec, spec.dtype) for spec in layout(config)]
    asked = len(result["per_rank"])
    held = held_bytes(Transformer(config, precision, TensorGroup(0, asked, device="meta")))
    lines[-4:-4] = ["", f"in the memory of GPU 0 of {asked}, {precision}"] + [
        f"  {kind + ', bytes':<23}{count:>19,}" for kind, count in held.items()
    ]
    for size in valid_sizes(config):
        if size != asked and size & (size - 1):
            continue  # powers of two are shown, and what was asked for
        stored = _per_rank(config, tensors, size)[0]["bytes"]
        memory = memory_per_rank(config, size, precision)
        cells = []
        for gb in GPUS.values():
            room = (gb * 1e9 * _USABLE - memory) / cache_bytes_per_token(config)
            cells.append(f"{room / 1e3:,.0f}" if room > 0 else "-")
        lines.append(
            f"{size:>5} {stored / 1e9:>9.3f} {memory / 1e9:>9.3f}"
            + "".join(f"{cell:>16}" for cell in cells)
        )
    return "\n".join(lines)


def _count(tensors: list[tuple[TensorSpec, str]], part: str) -> int:
    return sum(
        spec.numel
        for spec, _ in tensors
        if spec.part == part and not spec.scale_of and not spec.copy_of
    )


def _per_rank(config: ModelConfig, tensors: list[tuple[TensorSpec, str]], size: int) -> list[dict]:
    check_sharding(config, size)
    counts = [{"rank": rank, "tensors": 0, "bytes": 0} for rank in range(size)]
    for spec, dtype in tensors:
        if spec.copy_of:
            continue
        nbytes = spec.numel * DTYPES[dtype].itemsize
        if spec.expert is not None:
            holders = [counts[spec.expert // (config.n_routed_experts // size)]]
        else:
            holders = counts
            nbytes //= 1 if spec.shard_dim is None else size
        for holder in holders:
            holder["tensors"] += 1
            holder["bytes"] += nbytes
    return counts
