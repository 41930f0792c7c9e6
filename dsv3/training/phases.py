"""The phases of a run, as values: what is read, by which model, how fast, and for how long.

Two phases as in the report: pre-training on short windows, then a short extension on longer ones
with YaRN switched on (TR 4.3). Between them the config changes, and the mixture of text; weights
and moments go on. The loop (``dsv3.training.run``) asks one question after each step: which phase
is it now? So one phase more is one entry more in ``phases_of``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.training.position import Position
from dsv3.training.recipe import Recipe
from dsv3.training.schedules import BatchRamp, Fall, Reach, Schedules
from dsv3.training.step import StepValues


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a run in which model and mixture of text stay the same.

    number: 0 for the first. begins: tokens planned before it; tokens: planned in it (a step is
    never cut, so it really begins with the first step after them). config: of the model in it.
    seq_len: tokens the model reads in a window. shares: of the domains, by tokens. schedules: the
    learning rate and the batch go by the tokens read in this phase, lambda and gamma by those of
    the whole run. reach: how far texts made by rule look back, by the phase's text so far.
    fields: the recipe's names of its length of windows and numbers of windows.
    """

    number: int
    begins: int
    tokens: int
    config: ModelConfig
    seq_len: int
    shares: Mapping[str, float]
    schedules: Schedules
    reach: Reach
    fields: tuple[str, ...]


def phases_of(config: ModelConfig, recipe: Recipe) -> list[Phase]:
    """The phases of a run, in order. config: of the model as it will be in the end.

    The extension is left out where the config has no YaRN or the recipe no tokens for it; the
    only phase then has the config as it is. Otherwise pre-training knows nothing of YaRN, and its
    context ends where YaRN's begins.
    """
    scaling, extends = config.rope_scaling, recipe.extension_tokens > 0
    first = Phase(
        number=0,
        begins=0,
        tokens=recipe.tokens,
        config=config,
        seq_len=recipe.seq_len,
        shares=recipe.shares,
        schedules=recipe.schedules,
        reach=Reach(
            first=min(recipe.reach_first, recipe.seq_len),
            last=recipe.seq_len,
            until=recipe.reach_until,
        ),
        fields=("seq_len", "batch_first", "batch_last"),
    )
    if scaling is None or not extends:
        return [first]
    short = config.but(
        rope_scaling=None, max_position_embeddings=scaling.original_max_position_embeddings
    )
    windows, longest = recipe.extension_batch, recipe.extension_seq_len
    extension = Phase(
        number=1,
        begins=recipe.tokens,
        tokens=recipe.extension_tokens,
        config=config,
        seq_len=longest,
        shares=recipe.extension_shares,
        schedules=replace(
            recipe.schedules,
            learning_rate=Fall(peak=recipe.extension_rate, until=recipe.extension_tokens),
            batch=BatchRamp(first=windows, last=windows, until=0),
        ),
        reach=Reach(first=longest, last=longest, until=0),
        fields=("extension_seq_len", "extension_batch"),
    )
    return [replace(first, config=short), extension]


def total_tokens(phases: Sequence[Phase]) -> int:
    """Tokens of all phases."""
    return phases[-1].begins + phases[-1].tokens


def phase_at(phases: Sequence[Phase], tokens: int) -> Phase:
    """The phase of the next step after so many tokens; a run that has ended stays in its last."""
    return [phase for phase in phases if phase.begins <= tokens][-1]


def step_values(phase: Phase, recipe: Recipe, position: Position) -> tuple[StepValues, int]:
    """What the schedules say about the next step, and its number of windows."""
    schedules, done = phase.schedules, position.tokens - position.phase_start
    values = StepValues(
        learning_rate=schedules.learning_rate.at(position.step, done),
        mtp_weight=schedules.mtp_weight.at(position.tokens),
        bias_speed=schedules.bias_speed.at(position.tokens),
        sequence_weight=recipe.sequence_weight,
        clip=recipe.clip,
        micro_batch=recipe.micro_batch,
    )
    return values, schedules.batch.at(done)


def check_phases(phases: Sequence[Phase], ranks: int) -> None:
    """Raise DSV3Error unless every rank gets a window of each step, and every window fits into
    the model's context."""
    for phase in phases:
        _, *batch = phase.fields
        for what, windows in zip(batch, (phase.schedules.batch.first, phase.schedules.batch.last)):
            if windows < ranks:
                raise DSV3Error(
                    "fewer windows in a step than ranks",
                    where=what,
                    found=windows,
                    expected=f"{ranks} or more",
                    fix="Start fewer ranks",
                )
    for phase in phases:
        if phase.seq_len > phase.config.max_position_embeddings:
            raise DSV3Error(
                "windows longer than the model's context",
                where=phase.fields[0],
                found=phase.seq_len,
                expected=f"at most {phase.config.max_position_embeddings}",
            )
