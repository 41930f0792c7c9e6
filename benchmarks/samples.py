"""What a model wrote at each checkpoint of its training run.

    python benchmarks/samples.py RUN_DIR OUT.json [--kept FOLDER]

RUN_DIR is the folder that ``dsv3 train --out`` was given. The model of each checkpoint in
RUN_DIR/checkpoints, or in FOLDER, goes on with four fixed beginnings (dsv3/training/samples.py),
with a fixed seed, in float32 on the CPU. What OUT.json holds of other steps stays there.

A run keeps its newest two checkpoints only. To have a text of each, keep them while it trains, in
another terminal (the links cost no space until the run removes its own):

    dsv3 train --preset mini --out runs/mini          # save_minutes in its recipe: how often
    python benchmarks/samples.py runs/mini OUT.json --keep runs/kept
    python benchmarks/samples.py runs/mini OUT.json --kept runs/kept

``--keep FOLDER`` only links each new checkpoint into FOLDER, until the run has written its model.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from dsv3.config import CONFIG_FILE
from dsv3.errors import DSV3Error
from dsv3.generation.tokenizer import load_tokenizer
from dsv3.training.resuming import CHECKPOINTS
from dsv3.training.samples import read_samples, samples_of, save_samples
from dsv3.training.state import all_states


def sample(run: Path, out: Path, kept: Path | None = None) -> None:
    """Write the samples of all checkpoints of a run, or of those that were kept of it."""
    folder = kept or run / CHECKPOINTS
    checkpoints = all_states(folder)
    if not checkpoints:
        raise DSV3Error("no checkpoints of a training run", where=folder)
    tokenizer = load_tokenizer(run)
    samples = read_samples(out) if out.exists() else []
    for checkpoint in checkpoints:
        began = time.perf_counter()
        new = samples_of(checkpoint, tokenizer)
        done = {each.step for each in new}
        samples = [old for old in samples if old.step not in done] + new
        save_samples(out, samples)
        print(f"{checkpoint.name}: {time.perf_counter() - began:.1f} s", flush=True)
        for each in new:
            print(f"    {each.prompt.splitlines()[-1]}{each.text[:60]!r}", flush=True)


def link(run: Path, kept: Path) -> list[str]:
    """Link the checkpoints of a run that are not kept yet; returns their names.

    A checkpoint is never changed once it has its name, so its files may have two. One that the run
    removes in this moment is left out.
    """
    kept.mkdir(parents=True, exist_ok=True)
    linked = []
    for checkpoint in all_states(run / CHECKPOINTS):
        final = kept / checkpoint.name
        if final.exists():
            continue
        beside = final.with_name(final.name + ".partial")
        try:
            shutil.copytree(checkpoint, beside, copy_function=os.link)
        except (FileNotFoundError, shutil.Error):
            shutil.rmtree(beside, ignore_errors=True)
            continue
        beside.rename(final)
        linked.append(final.name)
    return linked


def keep(run: Path, kept: Path, seconds: float) -> None:
    """Link every new checkpoint, until the run has written its model."""
    ended = False
    while not ended:
        ended = (run / CONFIG_FILE).exists()  # before the last look: nothing is missed
        for name in link(run, kept):
            print(f"kept {name}", flush=True)
        time.sleep(0 if ended else seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of the training run")
    parser.add_argument("out", type=Path, help="JSON file of the samples")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kept", type=Path, help="folder of checkpoints that were kept")
    what.add_argument("--keep", type=Path, help="only link new checkpoints into this folder")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two looks")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        if args.keep:
            keep(args.run, args.keep, args.every)
        else:
            sample(args.run, args.out, args.kept)
    except DSV3Error as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
