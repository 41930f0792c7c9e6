"""AdamW with float32 master weights and, if wanted, its two moments in bfloat16 (TR 3.3.3).

For each weight Adam remembers two running means, of the gradient and of its square. In float32
they take twice the memory of the weights. DeepSeek-V3 keeps them in bfloat16 and found no loss;
the weights themselves and their gradients stay in float32, because a step changes a weight by
less than bfloat16 can hold.

Weight decay is for matrices only. Decay pulls towards 0: for a matrix that is a bias towards
simple maps, and for the router it keeps the sigmoids away from their flat ends. A norm's gain
belongs near 1. The routing bias has its own rule and is not trained at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dsv3.errors import DSV3Error

MOMENTS = ("exp_avg", "exp_avg_sq")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW whose moments rest in ``moments`` ("fp32" or "bf16") between steps.

    With "bf16" a weight's moments are widened for its own update only and then rounded to
    nearest, so a step needs room for one weight's moments in float32 and no more.
    """

    def __init__(self, groups, *, moments: str = "fp32", **options):
        if moments not in _DTYPES:
            raise DSV3Error(
                "unknown format of the moments",
                where="moments",
                found=moments,
                expected=" or ".join(_DTYPES),
            )
        super().__init__(groups, fused=True, **options)
        self.moments = _DTYPES[moments]

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


def make_optimizer(
    model: nn.Module,
    *,
    betas: Sequence[float] = (0.9, 0.95),
    weight_decay: float = 0.1,
    moments: str = "fp32",
) -> AdamW:
    """AdamW over a model's trained weights; decay on matrices only. Rates are set each step."""
    trained = [value for value in model.parameters() if value.requires_grad]
    groups = [
        {"params": [v for v in trained if v.dim() > 1], "weight_decay": weight_decay},
        {"params": [v for v in trained if v.dim() == 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=0.0, betas=tuple(betas), moments=moments)
