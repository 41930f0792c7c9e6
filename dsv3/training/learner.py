"""What a step changes: a model, the moments of its optimizer, and the loads of its routers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.optimizer import AdamW, make_optimizer
from dsv3.training.recipe import Recipe
from dsv3.training.sharing import Sharing, cut


@dataclass(frozen=True)
class Learner:
    """A model, its optimizer, and what watches its routers; they belong together."""

    model: Transformer
    optimizer: AdamW
    watch: RouterWatch


def check_memory(
    config: ModelConfig, recipe: Recipe, device: torch.device, sharing: Sharing | None = None
) -> None:
    """Raise DSV3Error for a model that this machine cannot hold, its gradients and moments too.

    Weights and gradients take 4 bytes a parameter each, the two moments 4 or 2 each. What a step
    holds besides is not counted: this says that a model is hopeless, not that another one fits.
    What is shared out over ranks counts as this rank's part.
    """
    specs = layout(config, scales=False, mtp_copies=False)
    parameters = sum(spec.numel for spec in specs)
    weights = moments = parameters
    if sharing is not None and sharing.experts is not None:
        routed = sum(spec.numel for spec in specs if ".ffn.experts." in spec.name)
        weights = moments = parameters - routed + routed // sharing.group.size
    if sharing is not None and sharing.zero:
        moments = parameters // sharing.group.size
    needed = 8 * weights + (8 if recipe.moments == "fp32" else 4) * moments
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise DSV3Error(
            "too large to be trained here",
            where="model",
            found=f"{parameters:,} parameters, {needed / 1e9:,.0f} GB with gradients and moments",
            expected=f"at most the {there / 1e9:,.0f} GB of memory",
            fix="Choose smaller sizes, or a larger machine",
        )


def first_learner(config: ModelConfig, recipe: Recipe, sharing: Sharing) -> Learner:
    """The learner of a new run: weights follow from the recipe's seed, there are no moments."""
    learner = _learner(config, recipe, sharing)
    learner.model.init_weights(recipe.seed, recipe.embedding_std, by_width=recipe.init_by_width)
    return learner


def next_learner(before: Learner, config: ModelConfig, recipe: Recipe, sharing: Sharing) -> Learner:
    """The learner of a phase with another config: weights and moments of ``before`` go on in it,
    and ``before`` is not used again."""
    before.watch.close()
    learner = _learner(config, recipe, sharing)
    learner.model.load_state_dict(before.model.state_dict())
    groups = zip(before.optimizer.param_groups, learner.optimizer.param_groups, strict=True)
    for old, new in groups:
        for was, weight in zip(old["params"], new["params"], strict=True):
            if was in before.optimizer.state:
                learner.optimizer.state[weight] = before.optimizer.state[was]
    return learner


def _learner(config: ModelConfig, recipe: Recipe, sharing: Sharing) -> Learner:
    precision = Precision.training(recipe.precision, recompute=recipe.recompute)
    model = Transformer(config, precision, sharing.for_model)
    optimizer = make_optimizer(
        model,
        betas=recipe.betas,
        moments=recipe.moments,
        weight_decay=recipe.weight_decay,
        shards=cut(model, sharing.group) if sharing.zero else (),
    )
    return Learner(model, optimizer, RouterWatch(model))
