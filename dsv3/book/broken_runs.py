"""Logs of runs that went wrong, each by one fault, for an exercise of chapter 6.

They are real: ``python -m dsv3.book.broken_runs`` trains the nursery's model once for each fault
(about a minute) and writes ``chapters/data/broken_runs.json``, a line of the log for every second
step. The letters say nothing; ``NAMES`` keeps what belongs to which.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dsv3.book import nursery, step_slips
from dsv3.training.balance import max_violation
from dsv3.training.phases import step_values
from dsv3.training.position import Position

PATH = nursery.ROOT / "chapters/data/broken_runs.json"
# Letter of the log -> its fault.
NAMES = {"A": "leak", "B": "moments", "C": "fine", "D": "sign", "E": "kept", "F": "batch"}
_SLIP = {
    "leak": {"leak": True},
    "sign": {"way": -1},
    "kept": {"zero": False},
    "batch": {"clip": False},
}
_AT = 40  # step of what happens once
_EVERY = 2


def train(fault: str) -> list[dict[str, float]]:
    """A run with one fault, "fine" for none: what its log has for every second step."""
    torch.set_num_threads(1)
    learner, stream, phase = nursery.new_learner(), nursery.new_stream(), nursery.phase_of()
    position, log = Position(), []
    while position.step < nursery.STEPS:
        values, windows = step_values(phase, nursery.RECIPE, position)
        batch = stream.draw(windows)
        if fault == "batch" and position.step == _AT:
            batch = torch.full_like(batch, nursery.ONE_TOKEN)
        if fault == "moments" and position.step == _AT:
            learner.optimizer.state.clear()
        told = step_slips.step(learner, batch, values, **_SLIP.get(fault, {}))
        position = position.after_step(windows * nursery.LENGTH, 0.0, 0.0)
        if position.step % _EVERY == 0 or position.step == _AT + 1:
            violation = max_violation(learner.watch.load["layers.1.ffn.gate"])
            line = {"step": position.step, **told, "max_violation": violation}
            log.append({name: round(float(value), 3) for name, value in line.items()})
    return log


def read(path: Path = PATH) -> dict[str, list[dict[str, float]]]:
    """Letter -> lines of the log."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path = PATH) -> None:
    """Train them all, and write the file anew."""
    logs = {letter: train(fault) for letter, fault in NAMES.items()}
    lines = [f'"{letter}": {json.dumps(log)}' for letter, log in logs.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
