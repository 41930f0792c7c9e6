"""Released layout -> one file per rank, as the released converter makes them.

Each rank's file ``model{rank}-mp{N}.safetensors`` holds, under short names, the tensors that the
rank needs: its rows or columns of what is cut, whole copies of what is replicated, and those
experts that it owns (expert // (n_routed_experts / N) == rank). FP8 codes and scales are copied
bit for bit; the scales of a slice are the same slice of the scales, since cuts fall between
blocks.

Two things go beyond the released converter, which names layer 61 in its code and drops it: the
MTP modules get files of their own, ``mtp{rank}-mp{N}.safetensors``, without their copies of
embedding and head; and config.json comes along. The released inference code reads only the
first kind of file, so it can use the folder as well.

A conversion is no longer needed for loading (``load_model`` reads a rank's slices from the
released files); it pays where many starts share one slow disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dsv3.checkpoint.contents import open_checkpoint, true_config
from dsv3.checkpoint.jobs import Band, Output, row_bands, run_job
from dsv3.checkpoint.layout import TensorSpec, check_sharding
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.config import CONFIG_FILE, ModelConfig
from dsv3.files import read_text


def convert(
    in_dir: str | Path, out_dir: str | Path, tp: int, dry_run: bool = False, progress: bool = True
) -> dict:
    """Cut a checkpoint in the released layout into one set of files for each of ``tp`` ranks.

    in_dir: the checkpoint; out_dir: an empty or new folder, or one with this job unfinished.
    dry_run: make the plan (files, bytes, disk space) and stop. progress: show the plan and a bar
    on stderr. Returns the plan, see ``dsv3.checkpoint.jobs.run_job``. Raises DSV3Error for anything
    wrong with the input, for a ``tp`` that cannot be, and for a disk that is full.
    """
    config, reader, specs = open_checkpoint(in_dir)
    with reader:
        check_sharding(config, tp)
        specs = [spec for spec in specs if not spec.copy_of]
        outputs = []
        for rank in range(tp):
            for part, kind in (("main", "model"), ("mtp", "mtp")):
                mine = [
                    (spec, ranges)
                    for spec in specs
                    if spec.part == part
                    and (ranges := spec.slice_for(rank, tp, config.n_routed_experts)) is not None
                ]
                if mine:
                    outputs.append(_output(f"{kind}{rank}-mp{tp}.safetensors", reader, mine))
        return run_job(
            f"convert --tp {tp}",
            reader,
            out_dir,
            outputs,
            _config_text(reader, config),
            index=False,
            dry_run=dry_run,
            progress=progress,
        )


def _config_text(reader: CheckpointReader, config: ModelConfig) -> str:
    """config.json as it is, unless it promises MTP modules that are not there."""
    text = read_text(reader.folder / CONFIG_FILE)
    data = json.loads(text)
    true = true_config(data, config)
    return text if true == data else json.dumps(true, indent=2) + "\n"


def _output(
    name: str, reader: CheckpointReader, mine: list[tuple[TensorSpec, tuple[range, ...]]]
) -> Output:
    def bands() -> Iterator[Band]:
        for spec, ranges in mine:
            for values, first_row in row_bands(reader, spec.hf_name, ranges):
                yield spec.name, values, first_row

    return Output(
        name,
        [
            (spec.name, reader.entry(spec.hf_name).dtype, tuple(map(len, ranges)))
            for spec, ranges in mine
        ],
        bands,
    )
