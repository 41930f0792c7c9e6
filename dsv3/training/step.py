"""One update of the weights, on one process or on several that share the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.training.balance import RouterWatch, update_bias
from dsv3.training.objective import losses, objective


@dataclass(frozen=True, kw_only=True)
class StepValues:
    """What a schedule or a recipe says about one step: learning rate, lambda, gamma, alpha, the
    bound of the gradient's norm, and how many tokens go through the model at once.
    """

    learning_rate: float
    mtp_weight: float = 0.3
    bias_speed: float = 0.001
    sequence_weight: float = 1e-4
    clip: float = 1.0
    micro_batch: int = 4096


def train_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batch: Int[Tensor, "n w"],
    values: StepValues,
    watch: RouterWatch,
    group: TensorGroup | None = None,
) -> dict[str, float]:
    """One update from the batch's n windows; returns loss, mtp_loss, sequence_loss, grad_norm.

    group: data-parallel ranks, each with a whole model of its own. Rank r takes windows r, r + N,
    ...; gradients and loads are added up, so that all ranks make the step that one process would
    make. When a value is not finite, weights, optimizer and biases are left as they were.
    """
    group = group or TensorGroup.single(batch.device)
    watch.reset()
    mine = batch[group.rank :: group.size]
    tokens = batch.shape[1] - 1 - model.config.num_nextn_predict_layers
    sums = torch.zeros(3, device=batch.device)
    for part in mine.split(max(values.micro_batch // tokens, 1)):
        main, extra = losses(model, part)
        balance = watch.sequence_loss()
        share = len(part) / len(batch)
        total = objective(main, extra, values.mtp_weight) + values.sequence_weight * balance
        (total * share).backward()
        ahead = sum(extra, main.new_zeros(())) / max(len(extra), 1)
        sums += share * torch.stack([main, ahead, torch.as_tensor(balance).to(main)]).detach()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    _add_up(group, sums, trained, watch)
    norm = nn.utils.clip_grad_norm_(trained, values.clip)
    result = dict(zip(("loss", "mtp_loss", "sequence_loss"), sums.tolist()), grad_norm=float(norm))
    if all(math.isfinite(value) for value in result.values()):
        for parameters in optimizer.param_groups:
            parameters["lr"] = values.learning_rate
        optimizer.step()
        for name, router in watch.routers.items():
            if router.bias is not None:
                update_bias(router.bias, watch.load[name], values.bias_speed)
    optimizer.zero_grad()
    return result


def _add_up(
    group: TensorGroup, sums: Tensor, trained: list[nn.Parameter], watch: RouterWatch
) -> None:
    """Losses, gradients and loads of all ranks, in one collective."""
    if group.size == 1:
        return
    parts = [sums, *watch.load.values()]
    for weight in trained:
        if weight.grad is None:  # no window of this rank reached it
            weight.grad = torch.zeros_like(weight)
        parts.append(weight.grad)
    flat = group.all_reduce(torch.cat([part.flatten() for part in parts]))
    for part, total in zip(parts, flat.split([part.numel() for part in parts])):
        part.copy_(total.view_as(part))
