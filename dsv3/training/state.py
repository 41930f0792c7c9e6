"""What a training run must remember to go on as if it had never stopped.

Weights alone are not enough. AdamW's two moments, the router biases, the place in the text, the
place in the schedules and the state of the random generator all belong to the next step. All of
it is written into one folder per checkpoint: tensors as safetensors, the rest as JSON. Nothing is
pickled: opening a pickle runs whatever program it holds.

A checkpoint is written beside its final name, flushed to the disk and then renamed. A kill at any
moment leaves the last complete one in place.

What is read back is not believed. torch's fused AdamW takes a moment for as long as its weight is
and reads on behind it, a counter that is off bends every later step, and one flipped bit makes a
model that nobody trained. So the header is held to the model's names, shapes and dtypes before a
byte is read, values must be finite, counters equal to the step, and ``SHA256SUMS`` (as the command
``sha256sum -c`` reads it) says of both files that they are what was written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dsv3.checkpoint.safetensors_io import DTYPE_NAMES, SafetensorsFile
from dsv3.errors import DSV3Error
from dsv3.files import open_plain, read_json, read_text
from dsv3.model import Transformer
from dsv3.training.optimizer import MOMENTS, AdamW
from dsv3.training.sharing import all_experts, held_alone, my_experts

_KEEP = 2
_TENSORS, _FACTS, _SUMS = "state.safetensors", "state.json", "SHA256SUMS"
_NAME = re.compile(r"step-([0-9]{6,15})")
_COUNTS = ("step", "tokens", "phase_start", "last_windows", "log_bytes")
_TIMES = ("seconds", "cpu_seconds")
_KINDS = {"recipe": dict, "config": dict, "text": str, "tokenizer": str, "fitted": bool}


def whole_state(
    model: Transformer, optimizer: AdamW, step: int, *, keep: bool = True
) -> dict[str, Tensor]:
    """Every tensor of a checkpoint after so many steps, on the CPU. Ranks that share something out
    call it together, and what comes is the same for any number of them. keep: False for those that
    only give; they get nothing."""
    names: dict[Tensor, str] = {value: name for name, value in model.named_parameters()}
    alone, tensors = held_alone(model), {}

    def parts() -> Iterator[tuple[str, str, Tensor]]:
        for name, value in _weights(model).items():
            yield "model", name, value.detach()
        for weight, key, moment in optimizer.whole_moments() if step else ():
            yield f"optimizer.{key}", names[weight], moment

    for kind, name, value in parts():
        if name in alone:
            value = all_experts(model, value)
        if keep:
            tensors[f"{kind}.{name}"] = value.cpu()
            if kind != "model":
                tensors[f"optimizer.step.{name}"] = torch.tensor(float(step))
    if keep:
        tensors["random.torch"] = torch.get_rng_state()
    return tensors


def save_state(folder: Path, step: int, facts: dict, tensors: dict[str, Tensor]) -> Path:
    """Write ``folder/step-NNNNNN`` whole or not at all; keep the newest two. Returns its path.

    facts: what else the next step needs, as JSON; tensors: as ``whole_state`` gives them. Raises
    DSV3Error when it cannot be written.
    """
    final = folder / f"step-{step:06d}"
    beside = folder / f"{final.name}.partial"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(
            {name: value.detach().contiguous() for name, value in tensors.items()},
            beside / _TENSORS,
        )
        (beside / _FACTS).write_text(
            json.dumps({"step": step, **facts}, indent=2) + "\n", encoding="utf-8"
        )
        (beside / _SUMS).write_text(
            "".join(f"{digest(beside / name)}  {name}\n" for name in (_FACTS, _TENSORS))
        )
        for path in (*beside.iterdir(), beside):
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise DSV3Error(
            "training checkpoint cannot be written",
            where=final,
            found=error,
            fix="Make room or give another --out folder",
        ) from None
    remove_old(folder)
    return final


def remove_old(folder: Path) -> None:
    """Remove all checkpoints but the newest two, and what a kill has left half-written."""
    half_written = [path for path in folder.glob("step-*.partial") if path.is_dir()]
    for old in [*all_states(folder)[:-_KEEP], *half_written]:
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise DSV3Error(
                "old training checkpoint cannot be removed",
                where=old,
                found=error.strerror or error,
            ) from None


def latest_state(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    complete = all_states(folder)
    return complete[-1] if complete else None


def all_states(folder: Path) -> list[Path]:
    """All complete checkpoints, by number: step-1000000 comes after step-999999."""
    found = [
        path
        for path in folder.glob("step-*")
        if _NAME.fullmatch(path.name) and path.name == f"step-{_number(path):06d}" and path.is_dir()
    ]
    return sorted(found, key=_number)


def read_facts(path: Path) -> dict:
    """The JSON part of a checkpoint: its step and what ``save_state`` was given.

    Every fact that a run goes by is there and of its kind; whether they are the ones that were
    written, ``check_sum`` says.
    """
    try:
        facts = read_json(path / _FACTS)
    except DSV3Error as error:
        raise _damaged(path, _FACTS, error) from None
    if not isinstance(facts, dict):
        raise _damaged(path, _FACTS, f"a JSON {type(facts).__name__} where an object should be")
    for name in (*_COUNTS, *_TIMES, *_KINDS):
        value = facts.get(name)
        if name in _COUNTS:
            good = type(value) is int and 0 <= value < 1 << 63
        elif name in _TIMES:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            good = number and 0 <= value < math.inf
        else:
            good = type(value) is _KINDS[name]
        if not good:
            raise _damaged(
                path, _FACTS, f"{name} = {value!r:.60}" if name in facts else f"no {name}"
            )
    if facts["step"] != _number(path):
        raise _damaged(path, _FACTS, f"step = {facts['step']} in a folder of another name")
    return facts


def check_sum(path: Path, name: str = _FACTS) -> None:
    """Raise DSV3Error unless a file of the checkpoint is, byte for byte, what was written."""
    fault = _fault(path, name)
    if fault is not None:
        raise _damaged(path, *fault)


def load_state(path: Path, model: Transformer, optimizer: AdamW) -> None:
    """Put a checkpoint's tensors, or of those that are shared out a rank's part, back into model,
    optimizer and random state.

    Raises DSV3Error, before anything is put back, for a tensor that is missing, foreign, of
    another shape or dtype or not finite, and for bytes that are not those written.
    """
    step = _number(path)
    expected = _expected(model, optimizer, step)
    try:
        file = SafetensorsFile(path / _TENSORS)
    except DSV3Error as error:
        raise _damaged(path, _TENSORS, error) from None
    with file:
        _compare(
            path,
            expected,
            {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()},
        )
        for name in expected:  # read twice, so that never more than one tensor is held besides
            _check_values(path, name, file.read(name), step)
        check_sum(path, _TENSORS)
        try:
            torch.set_rng_state(file.read("random.torch"))
        except RuntimeError as error:
            raise _damaged(path, _TENSORS, f"random.torch: {error}") from None
        alone = held_alone(model)

        def mine(kind: str, name: str) -> Tensor:
            value = file.read(f"{kind}.{name}")
            return my_experts(model, value).clone() if name in alone else value

        with torch.no_grad():
            for name, value in _weights(model).items():
                value.copy_(mine("model", name))
                if f"optimizer.step.{name}" in expected:
                    moments = {key: mine(f"optimizer.{key}", name) for key in MOMENTS}
                    optimizer.take_moments(value, step, moments)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """All that training changes, by its place in memory (experts in their stacks): parameters, and
    the router biases among the buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def digest(path: Path) -> str:
    """SHA-256 of a plain file, in hexadecimal."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expected(model: Transformer, optimizer: AdamW, step: int) -> dict[str, tuple]:
    """dtype and shape of every tensor of a checkpoint. Each step updates every trained weight, so
    behind the first one all of them have moments."""
    expected: dict[str, tuple] = {"random.torch": ("U8", tuple(torch.get_rng_state().shape))}
    alone = held_alone(model)
    for name, value in _weights(model).items():
        shape = tuple(value.shape)
        if name in alone:
            shape = (model.config.n_routed_experts, *shape[1:])
        expected[f"model.{name}"] = (DTYPE_NAMES[value.dtype], shape)
        if value.requires_grad and step:
            expected[f"optimizer.step.{name}"] = ("F32", ())
            for key in MOMENTS:
                expected[f"optimizer.{key}.{name}"] = (DTYPE_NAMES[optimizer.moments], shape)
    return expected


def _compare(path: Path, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    weights = [{name for name in names if name.startswith("model.")} for names in (expected, found)]
    if weights[0] != weights[1]:
        raise DSV3Error(
            "training checkpoint of another model",
            where=path,
            found=", ".join(sorted(weights[0] ^ weights[1])[:3]) + " on one side only",
            fix="Give a new --out folder",
        )
    for name in sorted({*expected, *found}):
        if name not in found:
            raise _damaged(path, _TENSORS, f"no {name}")
        if name not in expected:
            raise _damaged(path, _TENSORS, f"{name:.80}, which does not belong there")
        if found[name] != expected[name]:
            (dtype, shape), (wanted, size) = found[name], expected[name]
            raise _damaged(
                path, _TENSORS, f"{name}: {dtype} {list(shape)}", f"{wanted} {list(size)}"
            )


def _check_values(path: Path, name: str, value: Tensor, step: int) -> None:
    if value.is_floating_point() and not value.isfinite().all():
        raise _damaged(path, _TENSORS, f"{name}: NaN or infinite values")
    if name.startswith("optimizer.step.") and float(value) != step:
        raise _damaged(path, _TENSORS, f"{name}: {float(value):g} updates", f"{step}")
    if name.startswith("optimizer.exp_avg_sq.") and bool((value < 0).any()):
        raise _damaged(path, _TENSORS, f"{name}: a mean of squares below 0")


def _damaged(path: Path, file: str, found: object, expected: str | None = None) -> DSV3Error:
    """A checkpoint that no run of ours has written like this, and what can be done about it.

    The way out is looked for first: the newest checkpoint before it whose sums hold.
    """
    remove = [path.name]
    before = [old for old in all_states(path.parent) if _number(old) < _number(path)]
    while before and any(_fault(before[-1], name) for name in (_FACTS, _TENSORS)):
        remove.append(before.pop().name)
    names = " and ".join(remove)
    fix = (
        f"Remove {names}: the run then goes on from {before[-1].name}"
        if before
        else "No whole checkpoint is left before it: give a new --out folder, or remove "
        f"{path.parent} to begin anew"
    )
    if isinstance(found, DSV3Error):  # its own advice is about files from the net
        found = found.what if found.found is None else f"{found.what}: {found.found}"
    return DSV3Error(
        "training checkpoint cannot be read",
        where=path / file,
        found=found,
        expected=expected,
        fix=fix,
    )


def _fault(path: Path, name: str) -> tuple[str, object] | None:
    """(file, what is wrong) when a file of a checkpoint is not what was written."""
    try:
        lines = read_text(path / _SUMS).splitlines()
    except DSV3Error as error:
        return _SUMS, error
    sums = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    try:
        found = digest(path / name)
    except DSV3Error as error:
        return name, error
    return None if sums.get(name) == found else (name, f"other bytes than {_SUMS} says")


def _number(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if not match:
        raise DSV3Error("not a training checkpoint", where=path, expected="a folder step-NNNNNN")
    return int(match[1])


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
