"""Between FP8 and bfloat16: the same checkpoint in other bits.

    to bf16:  weight = code * scale in float32, rounded once to bfloat16
    to fp8:   scale = max |weight| of a 128x128 block / 448, code = E4M3(weight / scale)

BF16 is what GPUs without FP8 units and most other tools want. What is stored wider than the
released layout has it, as in a float32 checkpoint, is rounded on the way, except the router bias;
weights that a tool kept plain in an FP8 checkpoint stay as they are, or become FP8 too. No detail
comes back that FP8 has dropped; the numbers only return to a wider format.

There and back. With power-of-two scales (ue8m0) code * scale needs 4 bits of mantissa, so bfloat16
holds it exactly: every value returns, and so do the bits of codes and scales, except in blocks
whose largest code is 224 or less; there half the scale and twice the codes say the same. With
float32 scales the codes return bit for bit, but a scale has 24 bits and leaves a trace of only 8
of them: it returns within 2^-8. Further round trips change nothing in either case.

The input's shards keep their names and order. A scale may lie in another shard than its weight;
the output has no scale entries in its index (to bf16), or puts them beside their weights (to
fp8), and config.json loses or gains ``quantization_config``. Left in place, it makes every loader
look for scales that are gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from dsv3.checkpoint.contents import open_checkpoint, true_config
from dsv3.checkpoint.jobs import Band, Output, row_bands, run_job
from dsv3.checkpoint.layout import TensorSpec, layout
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import Planned
from dsv3.config import CONFIG_FILE, ModelConfig, QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.files import read_text
from dsv3.fp8 import QuantizedTensor, decode_scale, quantize_weight


def cast(
    in_dir: str | Path,
    out_dir: str | Path,
    to: str = "bf16",
    scale_fmt: str = "float32",
    dry_run: bool = False,
    progress: bool = True,
) -> dict:
    """Write a checkpoint in the released layout with FP8 weights as bfloat16, or the reverse.

    in_dir: the checkpoint; out_dir: an empty or new folder, or one with this job unfinished.
    to: "bf16" or "fp8". scale_fmt: for "fp8", "float32" or "ue8m0" (powers of two). dry_run:
    make the plan and stop. progress: show the plan and a bar on stderr. Returns the plan, see
    ``dsv3.checkpoint.jobs.run_job``. Raises DSV3Error for anything wrong with the input or the
    disk.
    """
    if to not in ("bf16", "fp8"):
        raise DSV3Error("unknown target", where="to", found=to, expected="bf16 or fp8")
    config, reader, specs = open_checkpoint(in_dir)
    with reader:
        data = true_config(json.loads(read_text(reader.folder / CONFIG_FILE)), config)
        data.pop("quantization_config", None)
        for name in {"torch_dtype", "dtype"} & data.keys():
            data[name] = "bfloat16"
        if to == "bf16":
            files = {s.hf_name: _to_bf16(reader, s) for s in specs if not s.scale_of}
        else:
            _check_format(config, specs, scale_fmt)
            quantized = config.but(quantization_config=QuantizationConfig(scale_fmt=scale_fmt))
            weights = {s.hf_name for s in layout(quantized, scales=False) if s.scale}
            files = {
                s.hf_name: _Quantized(reader, s, scale_fmt)
                if s.hf_name in weights and not s.scale
                else _Copied(reader, s)
                if s.scale or s.scale_of
                else _to_bf16(reader, s)
                for s in specs
            }
            data["quantization_config"] = quantized.to_dict()["quantization_config"]
        if all(type(file) is _Copied for file in files.values()) and (
            to == "fp8" or config.quantization_config is None
        ):
            raise DSV3Error(f"the checkpoint is {to} already", where=in_dir)
        if to == "bf16" and not dry_run:  # a plan needs only headers
            _check_scales(reader, specs)
        outputs = []
        for file_name, file in reader.files.items():
            sources = [
                files[name] for name in file.entries if name in files and reader.home[name] is file
            ]
            if sources:  # a shard of scales alone leaves nothing
                outputs.append(_output(file_name, sources))
        return run_job(
            f"cast --to {to}" + (f" ({scale_fmt} scales)" if to == "fp8" else ""),
            reader,
            out_dir,
            outputs,
            json.dumps(data, indent=2) + "\n",
            index=reader.indexed,
            dry_run=dry_run,
            progress=progress,
        )


def _check_format(config: ModelConfig, specs: list[TensorSpec], scale_fmt: str) -> None:
    """FP8 weights that are there already stay; the new ones must have scales of the same kind."""
    if any(spec.scale for spec in specs) and config.scale_fmt != scale_fmt:
        raise DSV3Error(
            "the checkpoint's FP8 weights have scales of another format",
            where="scale_fmt",
            found=scale_fmt,
            expected=config.scale_fmt,
        )


def _to_bf16(reader: CheckpointReader, spec: TensorSpec) -> _Copied:
    """What makes bfloat16 of a tensor, unless the released layout keeps it wider."""
    if spec.scale:
        return _Dequantized(reader, spec)
    if spec.dtype == "BF16" and reader.entry(spec.hf_name).dtype != "BF16":
        return _Narrowed(reader, spec)
    return _Copied(reader, spec)


def _check_scales(reader: CheckpointReader, specs: list[TensorSpec]) -> None:
    """All scales before the first byte is written: they are few."""
    for spec in specs:
        if spec.scale_of:
            scale = decode_scale(reader.read(spec.hf_name))
            if not (scale.isfinite() & (scale > 0)).all():
                raise DSV3Error("a scale is not a positive finite number", where=spec.hf_name)


class _Copied:
    """A tensor that stays as it is."""

    def __init__(self, reader: CheckpointReader, spec: TensorSpec):
        self.reader, self.name = reader, spec.hf_name

    def planned(self) -> list[Planned]:
        entry = self.reader.entry(self.name)
        return [(self.name, entry.dtype, entry.shape)]

    def bands(self) -> Iterator[Band]:
        for values, first_row in row_bands(self.reader, self.name):
            yield self.name, values, first_row


class _Narrowed(_Copied):
    """Plain numbers of another tool, rounded to the released layout's bfloat16."""

    def planned(self) -> list[Planned]:
        return [(self.name, "BF16", self.reader.entry(self.name).shape)]

    def bands(self) -> Iterator[Band]:
        for name, values, first_row in super().bands():
            yield name, values.to(torch.bfloat16), first_row


class _Dequantized(_Copied):
    """FP8 codes that become bfloat16; bands of whole blocks, each with its rows of scales."""

    def __init__(self, reader: CheckpointReader, spec: TensorSpec):
        super().__init__(reader, spec)
        assert spec.scale is not None  # codes without scales are none
        self.scale_name = spec.scale.hf_name

    def planned(self) -> list[Planned]:
        return [(self.name, "BF16", self.reader.entry(self.name).shape)]

    def bands(self) -> Iterator[Band]:
        scale = decode_scale(self.reader.read(self.scale_name))
        for codes, first_row in row_bands(self.reader, self.name, multiple=BLOCK):
            first, last = first_row // BLOCK, -(-(first_row + len(codes)) // BLOCK)
            band = QuantizedTensor(codes, scale[first:last]).check(self.name)
            yield self.name, band.dequantize(torch.bfloat16), first_row


class _Quantized(_Copied):
    """Plain numbers that become FP8 codes, and a grid of scales beside them."""

    def __init__(self, reader: CheckpointReader, spec: TensorSpec, scale_fmt: str):
        super().__init__(reader, spec)
        self.scale_fmt, self.scale_name = scale_fmt, spec.hf_name + "_scale_inv"

    def planned(self) -> list[Planned]:
        rows, columns = self.reader.entry(self.name).shape
        return [
            (self.name, "F8_E4M3", (rows, columns)),
            (self.scale_name, "F32", (-(-rows // BLOCK), -(-columns // BLOCK))),
        ]

    def bands(self) -> Iterator[Band]:
        for values, first_row in row_bands(self.reader, self.name, multiple=BLOCK):
            band = quantize_weight(values, self.scale_fmt).check(self.name)
            yield self.name, band.data, first_row
            yield self.scale_name, band.scale, first_row // BLOCK


def _output(file_name: str, sources: list[_Copied]) -> Output:
    def bands() -> Iterator[Band]:
        for source in sources:
            yield from source.bands()

    return Output(file_name, [tensor for source in sources for tensor in source.planned()], bands)
