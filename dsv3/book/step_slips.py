"""A training step with the mistakes that are made in writing one, for exercises of chapter 6."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from dsv3.book import nursery
from dsv3.training.learner import Learner
from dsv3.training.step import StepValues

VALUES = StepValues(
    learning_rate=3e-3, mtp_weight=0.3, bias_speed=0.01, sequence_weight=0.01, clip=1.0
)


def step(
    learner: Learner,
    batch: Tensor,
    values: StepValues,
    *,
    weight: float | None = None,
    balance: bool = True,
    clip: bool = True,
    way: int = 1,
    sign: bool = True,
    leak: bool = False,
    asked_once: bool = False,
    zero: bool = True,
    reset: bool = True,
    rate: bool = True,
) -> dict[str, Tensor]:
    """A step of a learner, with the mistakes that are asked for: loss, mtp_loss and grad_norm."""
    model, optimizer, watch = learner.model, learner.optimizer, learner.watch
    if reset:
        watch.reset()
    scores, states = model(batch[:, :-2], return_hidden=True)
    ahead, _ = model.mtp_logits(states, batch[:, 2:] if leak else batch[:, 1:-1])
    targets = batch[:, 1:-1], batch[:, 1:-1] if asked_once else batch[:, 2:]
    main, extra = (
        F.cross_entropy(said.flatten(0, 1), asked.flatten())
        for said, asked in zip((scores, ahead), targets)
    )
    loss = main + (values.mtp_weight if weight is None else weight) * extra
    if balance:
        loss = loss + values.sequence_weight * watch.sequence_loss()
    loss.backward()
    bound = values.clip if clip else float("inf")
    norm = clip_grad_norm_(model.parameters(), bound)
    if rate:
        for group in optimizer.param_groups:
            group["lr"] = values.learning_rate
    optimizer.step()
    with torch.no_grad():
        for name, router in watch.routers.items():
            load = watch.load[name]
            short = load.mean() - load
            router.bias += way * values.bias_speed * (short.sign() if sign else short)
    if zero:
        optimizer.zero_grad()
    return {"loss": main.detach(), "mtp_loss": extra.detach(), "grad_norm": norm}


def after(step: Callable) -> tuple[list[float], Tensor]:
    """The losses that four steps return, and all weights and biases after them."""
    learner, random = nursery.new_learner(), torch.Generator().manual_seed(2)
    batches = [torch.randint(2048, (4, 18), generator=random) for _ in range(3)]
    # A batch of one token, as in the chapter: its gradient is long.
    batches.insert(1, torch.full((4, 18), nursery.ONE_TOKEN))
    with torch.enable_grad():
        said = [step(learner, batch, VALUES) for batch in batches]
    state = learner.model.state_dict().values()
    return said, torch.cat([value.flatten().float() for value in state])


SLIPS: dict[str, dict] = {
    "the bias goes the wrong way: it should grow for an expert that got less": dict(way=-1),
    "the bias does not move": dict(way=0),
    "the bias moves by the sign of the load's distance to the mean, not by the distance": dict(
        sign=False
    ),
    "gradients are not set to zero after the step, and pile up": dict(zero=False),
    "the gradient is not clipped": dict(clip=False),
    "the MTP loss has no weight: it is lambda times as large": dict(weight=1.0),
    "the MTP loss is missing": dict(weight=0.0),
    "the balance loss is missing": dict(balance=False),
    "the module is fed the token that it is asked for": dict(leak=True),
    "the module is asked for the token that it was just fed": dict(asked_once=True),
    "watch is not reset: loads of earlier batches count as well": dict(reset=False),
    "the optimizer's rate is never set, and is 0": dict(rate=False),
}


@cache
def mistaken(slip: str) -> tuple[list[float], Tensor]:
    """What comes of a slip, "" for none."""
    how = SLIPS.get(slip, {})
    return after(lambda *given: float(step(*given, **how)["loss"]))


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two ways came to the same weights; an update moves each by some 0.003."""
    return bool((a - b).abs().mean() < 2e-5)
