"""Chapter 6: pre-training a small DeepSeek-V3 by the report's recipe.

``schedules`` (what changes when), ``objective`` and ``balance`` (what is minimised, and what keeps
the experts busy), ``optimizer``, ``step`` (one update), ``evaluation``, ``state`` (checkpoints)
and ``run``, which puts them together.
"""

from dsv3.training.recipe import Recipe
from dsv3.training.run import LOG_FILE, Run, train

__all__ = ["LOG_FILE", "Recipe", "Run", "train"]
