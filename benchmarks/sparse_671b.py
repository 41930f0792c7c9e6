"""A rehearsal with the 671B checkpoint at its full size, on a disk that could never hold it.

The 163 files get exact headers and exact lengths, but no content: a file that was only given
a length is *sparse*, reads as zeros and takes no space. All that depends on names, shapes and
places runs as it would on the real files: opening and checking 91,991 tensors, the report, the
plans of convert and cast, and the loading of one MoE layer by one of 16 ranks.

    python benchmarks/sparse_671b.py [--folder DIR]

Takes about half a minute on two cores, 2 GB of memory, and some megabytes of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from dsv3.block import Block
from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.contents import open_checkpoint
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.index import INDEX_FILE, index_text
from dsv3.checkpoint.inspect import report
from dsv3.checkpoint.layout import layout
from dsv3.checkpoint.loading import rank_pieces
from dsv3.checkpoint.safetensors_io import Planned, build_header
from dsv3.config import CONFIG_FILE, ModelConfig
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision


def write_sparse(folder: Path, config: ModelConfig, shards: int) -> None:
    """A checkpoint of ``config`` in ``shards`` files of equal size, without content."""
    specs = layout(config)
    total = sum(spec.nbytes for spec in specs)
    files: dict[str, list[Planned]] = {}
    at = 0
    for spec in specs:
        name = f"model-{at * shards // total + 1:05d}-of-{shards:06d}.safetensors"
        files.setdefault(name, []).append((spec.hf_name, spec.dtype, spec.shape))
        at += spec.nbytes
    for name, tensors in files.items():
        header, entries = build_header(tensors)
        (folder / name).write_bytes(header)
        os.truncate(folder / name, len(header) + max(e.end for e in entries.values()))
    (folder / INDEX_FILE).write_text(index_text(files))
    (folder / CONFIG_FILE).write_text(config.to_json())


def load_layer(folder: Path, layer: int, group: TensorGroup) -> tuple[Block, int]:
    """One layer of the main model as one rank holds it, and the bytes read for it."""
    config, reader, specs = open_checkpoint(folder)
    block = Block(config, layer, Precision.of("fp8", config), group)
    prefix = f"layers.{layer}."
    with reader:  # values are not checked: scales of 0 are what a file of holes has
        block.load_state_dict(
            {
                piece.name.removeprefix(prefix): reader.read(piece.stored, *piece.ranges)
                for piece in rank_pieces(specs, config, group)
                if piece.name.startswith(prefix)
            }
        )
        return block, reader.bytes_read


def rehearse(folder: Path, config: ModelConfig, shards: int, ranks: int, layer: int) -> dict:
    """All steps; returns what they found, with their seconds going to stderr."""
    result: dict = {}

    def step(name, action):
        start = time.perf_counter()
        result[name] = action()
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)

    step("write", lambda: write_sparse(folder, config, shards))
    step("inspect", lambda: report(folder, ranks=ranks))
    step("convert", lambda: convert(folder, folder / "converted", ranks, dry_run=True))
    step("cast", lambda: cast(folder, folder / "bf16", "bf16", dry_run=True))
    step("layer", lambda: load_layer(folder, layer, TensorGroup(ranks - 1, ranks)))
    block, bytes_read = result.pop("layer")
    result["layer_bytes_read"] = bytes_read
    result["layer_bytes_held"] = sum(p.nbytes for p in block.parameters())
    result["bytes_on_disk"] = sum(f.stat().st_blocks * 512 for f in folder.iterdir())
    del result["write"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="parent of the files (default: temporary)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        result = rehearse(Path(folder), ModelConfig.deepseek_v3(), shards=163, ranks=16, layer=3)
    found = result["inspect"]
    print(
        json.dumps(
            {
                "parameters": found["parameters"],
                "bytes": found["bytes"],
                "tensors": found["tensors"],
                "bytes_on_disk": result["bytes_on_disk"],
                "convert_files": len(result["convert"]["files"]),
                "convert_bytes": result["convert"]["bytes"],
                "cast_files": len(result["cast"]["files"]),
                "cast_bytes": result["cast"]["bytes"],
                "layer_3_of_rank_15_of_16": {
                    "bytes_read": result["layer_bytes_read"],
                    "bytes_held": result["layer_bytes_held"],
                },
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
