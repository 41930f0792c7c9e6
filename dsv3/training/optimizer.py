"""AdamW with float32 master weights and, if wanted, its two moments in bfloat16 (TR 3.3.3).

For each weight Adam remembers two running means, of the gradient and of its square. In float32
they take twice the memory of the weights. DeepSeek-V3 keeps them in bfloat16 and found no loss;
the weights themselves and their gradients stay in float32, because a step changes a weight by
less than bfloat16 can hold.

Weight decay is for matrices only. Decay pulls towards 0: for a matrix that is a bias towards
simple maps, and for the router it keeps the sigmoids away from their flat ends. A norm's gain
belongs near 1. The routing bias has its own rule and is not trained at all.

With ``shards`` (ZeRO-1, ``dsv3.parallel.data``) a rank has the moments of its own part of the
weights and updates that part. Each number's update is the same wherever it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dsv3.errors import DSV3Error
from dsv3.parallel.data import Shards

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW whose moments rest in ``moments`` ("fp32" or "bf16") between steps.

    With "bf16" a weight's moments are widened for its own update only and then rounded to
    nearest, so a step needs room for one weight's moments in float32 and no more.

    shards: where ranks share the moments out, the cuts whose pieces ``groups`` are made of.
    """

    def __init__(self, groups, *, moments: str = "fp32", shards: Sequence[Shards] = (), **options):
        if moments not in _DTYPES:
            raise DSV3Error(
                "unknown format of the moments",
                where="moments",
                found=moments,
                expected=" or ".join(_DTYPES),
            )
        super().__init__(groups, fused=True, **options)
        self.moments, self.shards = _DTYPES[moments], tuple(shards)

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients that are there."""
        if self.moments == torch.float32:
            super().step()
            return
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: nn.Parameter, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            for name in MOMENTS:
                state[name] = torch.zeros_like(weight, dtype=self.moments)
        wide = [state[name].float() for name in MOMENTS]
        state["step"] += 1
        # pyrefly: ignore[no-matching-overload] - gradients are there: step() asks
        torch._fused_adamw_(
            [weight],
            [weight.grad],
            [wide[0]],
            [wide[1]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        for name, value in zip(MOMENTS, wide):
            state[name].copy_(value)

    def whole_moments(self) -> Iterator[tuple[Tensor, str, Tensor]]:
        """(weight, which, moment in the weight's shape), after the first step. Ranks that share the
        moments out take this walk together."""
        if not self.shards:
            for weight, state in self.state.items():
                yield from ((weight, name, state[name]) for name in MOMENTS)
        for shards in self.shards:
            for name in MOMENTS:
                parts = [self.state[piece][name] for piece in shards.pieces]
                whole = shards.gather(parts, self.moments)
                yield from zip(shards.weights, [name] * len(shards.weights), whole)

    def take_moments(self, weight: Tensor, step: int, moments: dict[str, Tensor]) -> None:
        """Go on from a weight's whole moments after so many steps; of them, my part is kept."""
        for own, flat_place in self._parts_of(weight):
            state = {"step": torch.tensor(float(step), device=weight.device)}
            for name, moment in moments.items():
                part = moment if flat_place is None else moment.view(-1)[flat_place].clone()
                state[name] = part.to(weight.device)
            self.state[own] = state

    def _parts_of(self, weight: Tensor) -> Iterator[tuple[Tensor, slice | None]]:
        """What of a weight is updated here: all of it, or pieces with their places."""
        if not self.shards:
            yield weight, None
        for shards in self.shards:
            for piece, (index, place) in zip(shards.pieces, shards.spans):
                if shards.weights[index] is weight:
                    yield piece, place


def make_optimizer(
    model: nn.Module,
    *,
    betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    moments: str = "fp32",
    shards: Sequence[Shards] = (),
) -> AdamW:
    """AdamW over a model's trained weights; decay on matrices only. Rates are set each step.

    shards: cuts of the trained weights of which this rank updates its part (ZeRO-1).
    """
    if shards:
        pairs = [
            (piece, cut.weights[index].dim())
            for cut in shards
            for piece, (index, _) in zip(cut.pieces, cut.spans)
        ]
    else:
        pairs = [(value, value.dim()) for value in model.parameters() if value.requires_grad]
    groups = [
        {"params": [v for v, dim in pairs if dim > 1], "weight_decay": weight_decay},
        {"params": [v for v, dim in pairs if dim == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.0, betas=tuple(betas), moments=moments, shards=shards)
