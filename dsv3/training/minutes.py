"""A run that fits a time: how many tokens ``--max-minutes`` leaves.

The schedules need to know the length of a run from its first step, and no clock may decide a later
one (a run that is resumed must repeat). So the speed is measured over the first few steps, fewer
where they are slow, the length is fixed once, and the checkpoint remembers it. The minutes are of
everything: what came before the first step, the steps, validation and export.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3.training.recipe import Recipe

_TIMED_STEPS = 20  # steps watched before the length is fixed,
_TIMED_SHARE = 0.05  # or as many as take this share of the minutes
_VALIDATION_SHARE = 0.15
_EXPORT_SECONDS = 3.0
_KEPT_BACK = 0.05  # of what is left: checkpoints, validation on the way
_FORWARD_SPEED = 2.5  # of a forward pass, in steps: a step is a forward pass and two backward


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do: its recipe, and what --max-minutes has decided about it.

    fitted: whether --max-minutes has fixed the length; a run is fitted once. last_windows: windows
    of each domain that the last validation reads; None: all.
    """

    recipe: Recipe
    fitted: bool = False
    last_windows: int | None = None


def knows_its_speed(step: int, seconds: float, minutes: float) -> bool:
    """Whether enough steps were made, or enough time has gone, to fix the length."""
    return step >= _TIMED_STEPS or seconds > _TIMED_SHARE * 60 * minutes


def fit_minutes(
    recipe: Recipe,
    minutes: float,
    *,
    tokens: int,
    total: int,
    speed: float,
    spent: float,
    cutting: float,
    held_out: int,
) -> tuple[dict[str, int], int | None]:
    """(tokens and extension_tokens of a run that takes ``minutes``, windows of each domain that
    the last validation reads, None for all).

    tokens: read so far, which stay read; total: of the whole run as it was meant; speed: tokens a
    second of a step; spent: seconds since it was started; cutting: seconds that the text of the
    second phase takes to be cut into tokens; held_out: tokens there are to validate.
    """
    validation, most = held_out / (_FORWARD_SPEED * speed), None
    if validation > _VALIDATION_SHARE * 60 * minutes:
        validation = _VALIDATION_SHARE * 60 * minutes
        length = recipe.extension_seq_len if recipe.extension_tokens else recipe.seq_len
        most = max(1, int(validation * _FORWARD_SPEED * speed / (3 * length)))
    left = (60 * minutes - spent - cutting - validation - _EXPORT_SECONDS) * (1 - _KEPT_BACK)
    share = min((tokens + max(left, 0.0) * speed) / total, 1.0)
    if tokens >= recipe.tokens:  # too late: phase one has its length, and the second is short
        return {}, most
    return {
        "tokens": max(int(recipe.tokens * share), tokens),
        "extension_tokens": math.ceil(recipe.extension_tokens * share),
    }, most
