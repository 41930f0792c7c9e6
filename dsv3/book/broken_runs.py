"""Logs of runs that went wrong, each by one fault, for an exercise of chapter 6.

They are real: ``python -m dsv3.book.broken_runs`` trains the nursery's model once for each fault
(about a minute) and writes ``chapters/data/broken_runs.json``, a line of the log for every second
step. The letters say nothing; ``NAMES`` keeps what belongs to which.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dsv3.book import nursery
from dsv3.training.balance import max_violation
from dsv3.training.optimizer import make_optimizer
from dsv3.training.phases import step_values
from dsv3.training.position import Position

PATH = nursery.ROOT / "chapters/data/broken_runs.json"
# Letter of the log -> its fault.
NAMES = {"A": "leak", "B": "moments", "C": "fine", "D": "sign", "E": "kept", "F": "batch"}
_AT = 40  # step of what happens once
_EVERY = 2


def train(fault: str) -> list[dict[str, float]]:
    """A run with one fault, "fine" for none: what its log has for every second step."""
    torch.set_num_threads(1)
    learner, stream, phase = nursery.new_learner(), nursery.new_stream(), nursery.phase_of()
    model, optimizer, watch = learner.model, learner.optimizer, learner.watch
    position, log = Position(), []
    while position.step < nursery.STEPS:
        values, windows = step_values(phase, nursery.RECIPE, position)
        batch = stream.draw(windows)
        if fault == "batch" and position.step == _AT:
            batch = torch.full_like(batch, nursery.ONE_TOKEN)
        if fault == "moments" and position.step == _AT:
            optimizer = make_optimizer(model)
        watch.reset()
        scores, states = model(batch[:, :-2], return_hidden=True)
        fed = batch[:, 2:] if fault == "leak" else batch[:, 1:-1]
        ahead, _ = model.mtp_logits(states, fed)
        main, extra = (
            F.cross_entropy(said.flatten(0, 1), asked.flatten())
            for said, asked in ((scores, batch[:, 1:-1]), (ahead, batch[:, 2:]))
        )
        balance = values.sequence_weight * watch.sequence_loss()
        (main + values.mtp_weight * extra + balance).backward()
        bound = 1e9 if fault == "batch" else values.clip
        norm = nn.utils.clip_grad_norm_(model.parameters(), bound)
        for group in optimizer.param_groups:
            group["lr"] = values.learning_rate
        optimizer.step()
        way = -1 if fault == "sign" else 1
        with torch.no_grad():
            for name, router in watch.routers.items():
                load = watch.load[name]
                router.bias += way * values.bias_speed * torch.sign(load.mean() - load)
        if fault != "kept":
            optimizer.zero_grad()
        position = position.after_step(windows * nursery.LENGTH, 0.0, 0.0)
        if position.step % _EVERY == 0 or position.step == _AT + 1:
            line = {
                "step": position.step,
                "loss": main.detach(),
                "mtp_loss": extra.detach(),
                "grad_norm": norm,
                "max_violation": max_violation(watch.load["layers.1.ffn.gate"]),
            }
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
