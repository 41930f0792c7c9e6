"""Keeping the experts busy (TR 2.1.2): a bias that is stepped, and a loss that hardly weighs.

*Bias.* After each step, over the whole batch: b_i += gamma for an expert that got fewer tokens
than the mean, b_i -= gamma for one that got more. The loss sends the bias no gradient, so
balancing does not bend the model's aim as a strong auxiliary loss does.

*Sequence-wise loss.* The router returns it with its choices (eq. 17-20, ``dsv3.moe``); here it is
collected over all routers of a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.moe import Router
from dsv3.recompute import in_backward


class RouterWatch:
    """Counts the tokens of each expert since ``reset``, and keeps the routers' losses (eq. 17).

    load: router name -> (N_r,) float32. Names are those of the modules, "layers.3.ffn.gate".
    """

    def __init__(self, model: nn.Module):
        self.routers = {
            name: module for name, module in model.named_modules() if isinstance(module, Router)
        }
        self.load: dict[str, Tensor] = {}
        self.reset()
        self._looks = True
        self._hooks = [
            router.register_forward_hook(self._watch(name)) for name, router in self.routers.items()
        ]

    def _watch(self, name: str):
        def hook(router, inputs, outputs):
            _, chosen, balance = outputs
            if in_backward() or not self._looks:
                return  # the same tokens again, recomputed step by step; or tokens that are none
            self.load[name] += torch.bincount(chosen.flatten(), minlength=len(self.load[name]))
            if balance is not None:
                self._balances.append(balance)

        return hook

    def reset(self) -> None:
        """Forget loads and losses."""
        device = next(iter(self.routers.values())).weight.device if self.routers else None
        self.load = {
            name: torch.zeros(router.config.n_routed_experts, device=device)
            for name, router in self.routers.items()
        }
        self._balances: list[Tensor] = []

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Within it nothing is counted."""
        self._looks = False
        try:
            yield
        finally:
            self._looks = True

    def sequence_loss(self) -> Float[Tensor, ""] | float:
        """L_Bal / alpha of the forward pass since the last call: the sum over all routers."""
        balances, self._balances = self._balances, []
        return sum(balances)

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def update_bias(
    bias: Float[Tensor, " experts"], load: Float[Tensor, " experts"], speed: float
) -> None:
    """b_i += gamma * sign(mean load - load_i), in place; an expert at the mean stays."""
    bias += speed * torch.sign(load.mean() - load)


def max_violation(load: Float[Tensor, " experts"]) -> float:
    """MaxVio = max load / mean load - 1: 0 when balanced, N_r/K_r - 1 when all go one way."""
    return float(load.max() / load.mean() - 1)
