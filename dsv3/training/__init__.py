"""Chapter 6: pre-training a small DeepSeek-V3 by the report's recipe.

``schedules`` (what changes when), ``objective`` and ``balance`` (what is minimised, and what keeps
the experts busy), ``optimizer``, ``step`` (one update), ``evaluation``, ``corpus`` (what is read),
``phases`` (short windows, then long ones), ``position`` and ``learner`` (where a run stands, and
what a step changes), ``sharing`` (what ranks have in common), ``state`` and ``resuming``
(checkpoints, and going on from them), ``log``, ``terminal``, ``minutes`` (a run that fits a time)
and ``run``, the loop that puts them together.
``described`` reads a run from a file; ``mini.toml`` is the one of the shipped model.
``exam``, ``anatomy`` and ``needle`` ask what came of it, ``samples`` what it wrote on the way.
"""

from dsv3.training.described import MINI, Description, read_description
from dsv3.training.log import LOG_FILE, RunLog, read_log
from dsv3.training.recipe import Recipe
from dsv3.training.run import Run, train
from dsv3.training.usual import usual_precision

__all__ = [
    "LOG_FILE",
    "MINI",
    "Description",
    "Recipe",
    "Run",
    "RunLog",
    "read_description",
    "read_log",
    "train",
    "usual_precision",
]
