"""What a step changes: a model, the moments of its optimizer, and the loads of its routers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.optimizer import AdamW, make_optimizer
from dsv3.training.recipe import Recipe


@dataclass(frozen=True)
class Learner:
    """A model, its optimizer, and what watches its routers; they belong together."""

    model: Transformer
    optimizer: AdamW
    watch: RouterWatch


def first_learner(config: ModelConfig, recipe: Recipe, device: torch.device) -> Learner:
    """The learner of a new run: weights follow from the recipe's seed, there are no moments."""
    learner = _learner(config, recipe, device)
    learner.model.init_weights(recipe.seed, recipe.embedding_std)
    return learner


def next_learner(
    before: Learner, config: ModelConfig, recipe: Recipe, device: torch.device
) -> Learner:
    """The learner of a phase with another config: weights and moments of ``before`` go on in it,
    and ``before`` is not used again."""
    before.watch.close()
    learner = _learner(config, recipe, device)
    learner.model.load_state_dict(before.model.state_dict())
    old = dict(before.model.named_parameters())
    for name, weight in learner.model.named_parameters():
        if old[name] in before.optimizer.state:
            learner.optimizer.state[weight] = before.optimizer.state[old[name]]
    return learner


def _learner(config: ModelConfig, recipe: Recipe, device: torch.device) -> Learner:
    precision = Precision.training(recipe.precision, recompute=recipe.recompute)
    model = Transformer(config, precision, device=device)
    optimizer = make_optimizer(
        model, betas=recipe.betas, moments=recipe.moments, weight_decay=recipe.weight_decay
    )
    return Learner(model, optimizer, RouterWatch(model))
