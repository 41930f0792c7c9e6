"""What of a model the ranks of a training hold in common, and what each holds alone."""

from __future__ import annotations

from torch import nn

from dsv3.parallel.data import Shards
from dsv3.parallel.tensor import TensorGroup


def cut(model: nn.Module, group: TensorGroup) -> tuple[Shards, ...]:
    """The trained weights of a model that every rank of the group has whole, cut over them."""
    return (Shards([value for value in model.parameters() if value.requires_grad], group),)
