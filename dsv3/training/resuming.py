"""Stopping and going on: what a checkpoint says besides its tensors, and when it is gone on from.

``dsv3.training.state`` writes and reads checkpoints and holds them to what was written. Here is
what the facts in them mean. A run goes on only from what it would have come to itself: the same
model, the same recipe, the same text.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.training.minutes import Plan
from dsv3.training.position import Position
from dsv3.training.recipe import Recipe
from dsv3.training.state import check_sum, latest_state, read_facts

CHECKPOINTS = "checkpoints"  # the folder of them in that of a run
BEFORE = "before-extension"  # in it: the model of the first phase, kept to compare with


def facts_of(
    position: Position,
    plan: Plan,
    config: ModelConfig,
    *,
    text: str,
    tokenizer: str,
    log_bytes: int,
) -> dict:
    """What a checkpoint says of its moment, for ``save_state``.

    text, tokenizer: digests of what is read. log_bytes: length of the log.
    """
    return {
        **asdict(position),
        "recipe": asdict(plan.recipe),
        "config": config.to_dict(),
        "text": text,
        "tokenizer": tokenizer,
        "fitted": plan.fitted,
        "last_windows": plan.last_windows or 0,
        "log_bytes": log_bytes,
    }


@dataclass(frozen=True)
class Stored:
    """The checkpoint that a run goes on from: its folder, and its facts as they were read."""

    path: Path
    facts: dict

    @classmethod
    def newest(cls, folder: Path) -> Stored | None:
        """The newest complete checkpoint in a run's folder of them."""
        path = latest_state(folder)
        return cls(path, read_facts(path)) if path else None

    def plan(self, config: ModelConfig, recipe: Recipe, *, minutes: float | None) -> Plan:
        """The plan to go on with; DSV3Error for a checkpoint of another model or recipe.

        Where --max-minutes has fixed the length and is given again, the stored length is taken.
        """
        if self.facts["config"] != json.loads(json.dumps(config.to_dict())):
            raise DSV3Error(
                "another model was trained here", where=self.path, fix="Give a new --out folder"
            )
        stored, fitted = Recipe.from_dict(self.facts["recipe"]), self.facts["fitted"]
        if fitted and minutes is not None:
            recipe = replace(recipe, tokens=stored.tokens, extension_tokens=stored.extension_tokens)
        changed = recipe.differences(stored)
        if changed:
            raise DSV3Error(
                "another recipe was used here",
                where=self.path,
                found="; ".join(
                    f"{name} was {old}, is now {new}" for name, (old, new) in changed.items()
                ),
                fix=(
                    "--max-minutes has fixed its length: give --max-minutes again"
                    if fitted and set(changed) <= {"tokens", "extension_tokens"}
                    else "Give the same options as before"
                )
                + ", or a new --out folder",
            )
        return Plan(recipe=recipe, fitted=fitted, last_windows=self.facts["last_windows"] or None)

    def check_text(self, text: str) -> None:
        """Raise DSV3Error where another text was read: the place in it would be another."""
        if self.facts["text"] != text:
            raise DSV3Error(
                "another text was read here",
                where=self.path,
                fix="Give the same --plays and --code, or a new --out folder",
            )

    def position(self) -> Position:
        """Where the run stood; DSV3Error when these are not the facts that were written."""
        check_sum(self.path)
        return Position(**{name: self.facts[name] for name in asdict(Position())})
