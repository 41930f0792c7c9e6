"""What a training run must remember to go on as if it had never stopped.

Weights alone are not enough. AdamW's two moments, the router biases, the place in the text, the
place in the schedules and the state of the random generator all belong to the next step. All of
it is written into one folder per checkpoint: tensors as safetensors, the rest as JSON. Nothing is
pickled: opening a pickle runs whatever program it holds.

A checkpoint is written beside its final name, flushed to the disk and then renamed. A kill at any
moment leaves the last complete one in place.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from dsv3.errors import DSV3Error
from dsv3.training.optimizer import MOMENTS

_KEEP = 2


def save_state(folder: Path, step: int, facts: dict, model: nn.Module,
               optimizer: torch.optim.Optimizer) -> Path:
    """Write ``folder/step-NNNNNN`` whole or not at all; keep the newest two. Returns its path.

    facts: what else the next step needs, as JSON. Raises DSV3Error when it cannot be written.
    """
    tensors = {f"model.{name}": value for name, value in model.named_parameters()}
    for name, value in model.named_parameters():
        for key, moment in optimizer.state.get(value, {}).items():
            tensors[f"optimizer.{key}.{name}"] = moment
    tensors["random.torch"] = torch.get_rng_state()

    final = folder / f"step-{step:06d}"
    beside = folder / f"{final.name}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file({name: value.detach().contiguous() for name, value in tensors.items()},
                  beside / "state.safetensors")
        (beside / "state.json").write_text(json.dumps({"step": step, **facts}, indent=2) + "\n",
                                           encoding="utf-8")
        for path in (beside / "state.safetensors", beside / "state.json", beside):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise DSV3Error("training checkpoint cannot be written", where=final, found=error,
                        fix="Make room or give another --out folder") from None
    remove_old(folder)
    return final


def remove_old(folder: Path) -> None:
    """Remove all checkpoints but the newest two, and what a kill has left half-written."""
    for old in [*_complete(folder)[:-_KEEP], *folder.glob("*.partial")]:
        shutil.rmtree(old)


def latest_state(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def read_facts(path: Path) -> dict:
    """The JSON part of a checkpoint: its step and what ``save_state`` was given."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors back into model, optimizer and random state."""
    try:
        tensors = load_file(path / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    expected = {f"model.{name}" for name, _ in model.named_parameters()}
    found = {name for name in tensors if name.startswith("model.")}
    if expected != found:
        raise DSV3Error("training checkpoint of another model", where=path,
                        found=", ".join(sorted(expected ^ found)[:3]) + " on one side only",
                        fix="Give a new --out folder")
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(tensors[f"model.{name}"])
            moments = {key: tensors[f"optimizer.{key}.{name}"].to(value.device)
                       for key in ("step", *MOMENTS) if f"optimizer.{key}.{name}" in tensors}
            if moments:
                optimizer.state[value] = moments
    torch.set_rng_state(tensors["random.torch"])


def _unreadable(path: Path, error: Exception) -> DSV3Error:
    return DSV3Error("training checkpoint cannot be read", where=path, found=error,
                     fix="Remove this folder; the run goes on from the one before")


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".partial")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
