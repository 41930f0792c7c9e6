"""One update of the weights, on one process or on several that share the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dsv3.model import Transformer
from dsv3.parallel.data import Shards
from dsv3.parallel.tensor import TensorGroup
from dsv3.training.balance import RouterWatch, update_bias
from dsv3.training.objective import losses, objective
from dsv3.training.optimizer import AdamW
from dsv3.training.sharing import cut


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
    optimizer: AdamW,
    batch: Int[Tensor, "n w"],
    values: StepValues,
    watch: RouterWatch,
    group: TensorGroup | None = None,
) -> dict[str, float]:
    """One update from the batch's n windows; returns loss, mtp_loss, sequence_loss, grad_norm.

    group: data-parallel ranks, each with a model of its own, whole or with its part of the experts.
    Rank r takes windows r, r + N, ...; gradients and loads are added up, so that all ranks make the
    step that one process would make (``dsv3.parallel.data`` says how nearly). Where the optimizer
    has shards, each rank updates its part of the weights and hears of the others'. When a value is
    not finite, weights, optimizer and biases are left as they were.
    """
    group = group or TensorGroup.single(batch.device)
    watch.reset()
    mine = batch[group.rank :: group.size]
    tokens = batch.shape[1] - 1 - model.config.num_nextn_predict_layers
    at_once = max(values.micro_batch // tokens, 1)
    sums = torch.zeros(3, device=batch.device)
    for part in mine.split(at_once) if len(mine) else ():
        main, extra = losses(model, part)
        balance = watch.sequence_loss()
        share = len(part) / len(batch)
        total = objective(main, extra, values.mtp_weight) + values.sequence_weight * balance
        (total * share).backward()
        ahead = sum(extra, main.new_zeros(())) / max(len(extra), 1)
        sums += share * torch.stack([main, ahead, torch.as_tensor(balance).to(main)]).detach()
    if model.group.experts is not None:
        most = len(batch[:: group.size])  # windows of rank 0, who has the most
        for _ in range(math.ceil(most / at_once) - math.ceil(len(mine) / at_once)):
            _serve(model, batch, watch)
    shards = optimizer.shards or (cut(model, group) if group.size > 1 else ())
    if shards:
        norm = _add_up(group, shards, sums, watch, values.clip)
    else:
        norm = nn.utils.clip_grad_norm_(model.parameters(), values.clip)
    result = dict(zip(("loss", "mtp_loss", "sequence_loss"), sums.tolist()), grad_norm=float(norm))
    take_step(optimizer, result, values, [watch], shards)
    model.zero_grad()
    return result


def take_step(
    optimizer: AdamW,
    result: dict[str, float],
    values: StepValues,
    watches: Sequence[RouterWatch],
    shards: Sequence[Shards] = (),
) -> None:
    """Step weights and biases, unless a value in ``result`` is not finite; drop the gradients."""
    if all(math.isfinite(value) for value in result.values()):
        for parameters in optimizer.param_groups:
            parameters["lr"] = values.learning_rate
        _update(optimizer, shards)
        for watch in watches:
            for name, router in watch.routers.items():
                if router.bias is not None:
                    update_bias(router.bias, watch.load[name], values.bias_speed)
    optimizer.zero_grad()


def _serve(model: Transformer, batch: Int[Tensor, "n w"], watch: RouterWatch) -> None:
    """Take part in the exchanges of a micro-batch, with my experts and without a window.

    All ranks that share experts out go through the model equally often. Who has no window left
    goes through it with one token, which nobody counts and whose loss weighs nothing.
    """
    shortest = batch[:1, : 2 + model.config.num_nextn_predict_layers]
    with watch.looking_away():
        main, extra = losses(model, shortest)
        (objective(main, extra, 1.0) * 0.0).backward()


def _add_up(
    group: TensorGroup, shards: Sequence[Shards], sums: Tensor, watch: RouterWatch, clip: float
) -> Tensor:
    """Add up gradients, losses and loads of all ranks; clip the gradients, each rank its pieces'.

    Returns the norm of all gradients. Everything but the gradients is small: one all-reduce.
    """
    for part in shards:
        part.reduce_gradients()
    square = sum(part.square() for part in shards)
    small = [torch.as_tensor(square), sums, *watch.load.values()]
    total = group.all_reduce(torch.cat([value.double().flatten() for value in small]))
    for value, whole in zip(small, total.split([value.numel() for value in small])):
        value.copy_(whole.view_as(value))
    norm = small[0].sqrt().float()
    pieces = [piece for part in shards for piece in part.pieces]
    nn.utils.clip_grads_with_norm_(pieces, clip, norm)
    return norm


def _update(optimizer: AdamW, shards: Sequence[Shards]) -> None:
    """The second half of what ranks send: sums before the update, or weights after it (ZeRO-1)."""
    if not optimizer.shards:
        for part in shards:
            part.gather_gradients()
    optimizer.step()
    for part in optimizer.shards:
        part.gather_weights()
