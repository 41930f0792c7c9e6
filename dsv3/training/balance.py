"""Keeping the experts busy (TR 2.1.2): a bias that is stepped, and a loss that hardly weighs.

*Bias.* After each step, over the whole batch: b_i += gamma for an expert that got fewer tokens
than the mean, b_i -= gamma for one that got more. The loss sends the bias no gradient, so
balancing does not bend the model's aim as a strong auxiliary loss does.

*Sequence-wise loss.* The bias balances the batch; one sequence may still crowd a few experts. So
a complementary loss remains, with a weight so small (1e-4) that it only guards against extremes:

    L_Bal = alpha * sum_i f_i P_i                                                 (17)
    f_i = N_r / (K_r T) * sum_t 1(s_i,t is among the K_r largest of s_t)          (18)
    s'_i,t = s_i,t / sum_j s_j,t                                                  (19)
    P_i = (1 / T) * sum_t s'_i,t                                                  (20)

T counts the tokens of ONE sequence. With all experts equal, f_i = 1 and P_i = 1 / N_r, and the
loss is alpha; when all tokens crowd the same K_r experts it nears alpha * N_r / K_r. f_i counts
and has no gradient; the gradient comes through P_i.

Paper and code disagree here: eq. 18 ranks the scores without bias and without node limit, while
Megatron and torchtitan count the experts that were actually selected. This is eq. 18.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.moe import Router
from dsv3.recompute import in_backward


class RouterWatch:
    """Counts the tokens of each expert since ``reset``, and keeps scores for eq. 17.

    load: router name -> (N_r,) float32. Names are those of the modules, "layers.3.ffn.gate".
    """

    def __init__(self, model: nn.Module):
        self.routers = {
            name: module for name, module in model.named_modules() if isinstance(module, Router)
        }
        self.load: dict[str, Tensor] = {}
        self.reset()
        self._hooks = [
            router.register_forward_hook(self._watch(name)) for name, router in self.routers.items()
        ]

    def _watch(self, name: str):
        def hook(router, inputs, outputs):
            scores = router.scores(inputs[0]) if torch.is_grad_enabled() else None
            if in_backward():
                return  # the same tokens again, recomputed step by step
            self.load[name] += torch.bincount(outputs[1].flatten(), minlength=len(self.load[name]))
            if scores is not None:
                self._scores.append(scores)

        return hook

    def reset(self) -> None:
        """Forget loads and scores."""
        device = next(iter(self.routers.values())).weight.device if self.routers else None
        self.load = {
            name: torch.zeros(router.config.n_routed_experts, device=device)
            for name, router in self.routers.items()
        }
        self._scores: list[Tensor] = []

    def sequence_loss(self, sequences: int) -> Float[Tensor, ""] | float:
        """L_Bal / alpha of the forward pass since the last call: the sum over all routers."""
        scores, self._scores = self._scores, []
        return sum(
            sequence_balance(s.unflatten(0, (sequences, -1)), router.config)
            for s, router in zip(scores, self.routers.values(), strict=True)
        )

    def close(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def sequence_balance(scores: Float[Tensor, "b t experts"], config) -> Float[Tensor, ""]:
    """sum_i f_i P_i (eq. 17-20 without alpha), the mean over b sequences; 1 when balanced.

    scores: affinities s_i,t (eq. 15), without bias.
    """
    experts, k = scores.shape[-1], config.num_experts_per_tok
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(k, dim=-1).indices, 1.0)
    f = chosen.mean(1) * (experts / k)  # eq. 18
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)  # eq. 19, 20
    return (f * p).sum(-1).mean()  # eq. 17


@torch.no_grad()
def update_bias(
    bias: Float[Tensor, "experts"], load: Float[Tensor, "experts"], speed: float
) -> None:
    """b_i += gamma * sign(mean load - load_i), in place; an expert at the mean stays."""
    bias += speed * torch.sign(load.mean() - load)


def max_violation(load: Float[Tensor, "experts"]) -> float:
    """MaxVio = max load / mean load - 1: 0 when balanced, N_r/K_r - 1 when all go one way."""
    return float(load.max() / load.mean() - 1)
