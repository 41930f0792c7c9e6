"""The bias rule at work, without a model: one router, many steps (TR 2.1.2, eq. 16).

Each step draws new tokens. The affinity of token t to expert i is

    s_i,t = Sigmoid(skew * z_i + x_i,t),      z_i, x_i,t ~ N(0, 1),

where z_i is how popular expert i is with everybody and x_i,t is the token's own taste. z_i never
changes, so without a bias the same few experts stay crowded. Choice and bias are those of the
model: ``Router.choose`` and ``update_bias``. What is left out: here the scores do not learn from
who was chosen, as they do in training, where crowding feeds itself.

Even a perfectly balanced router is not even in one batch: with n tokens the mean load is n K_r /
N_r, an expert's load scatters by about the square root of that, and MaxVio reports the unluckiest
of N_r experts. For 256 experts, 8 of them chosen, and 4096 tokens this floor is about 0.26. It
holds where tokens choose independently of each other; fixed room for each expert, or experts that
choose their tokens, reach 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.moe import Router
from dsv3.precision import Precision
from dsv3.training.balance import max_violation, update_bias


@dataclass(frozen=True)
class BalanceRun:
    """What happened in each step, before its update of the bias.

    loads: tokens each expert got; bias: the bias they were chosen with; max_violation: of the
    loads (0: balanced; N_r / K_r - 1: all tokens on the same K_r experts).
    """

    loads: Float32[Tensor, "steps experts"]
    bias: Float32[Tensor, "steps experts"]
    max_violation: Float32[Tensor, " steps"]


@torch.no_grad()
def simulate(
    *,
    experts: int = 64,
    k: int = 8,
    tokens: int = 4096,
    gamma: float = 0.001,
    steps: int = 500,
    skew: float = 1.0,
    n_group: int = 1,
    topk_group: int = 1,
    seed: int = 0,
) -> BalanceRun:
    """Route ``tokens`` new tokens in each of ``steps`` steps and move the bias by ``gamma``.

    experts, k: N_r and K_r. gamma: 0 leaves the bias alone. skew: how much popularity differs
    between experts, measured by how much taste differs between tokens; 0 for equal experts. 0.7
    with 256 experts, 8 chosen, starts at a MaxVio of about 11 (8.6 to 17 over five seeds).
    n_group, topk_group: groups of experts, and how many of them a token may reach. Raises
    DSV3Error for sizes that do not go together.
    """
    for name, value in (("tokens", tokens), ("steps", steps)):
        if value < 1:
            raise DSV3Error("bad value", where=name, found=value, expected="1 or more")
    config = ModelConfig.mini().but(
        n_routed_experts=experts, num_experts_per_tok=k, n_group=n_group, topk_group=topk_group
    )
    router = Router(config, Precision.training("fp32"))
    bias = router.bias
    assert bias is not None  # the mini config's routers have one
    bias.zero_()
    random = torch.Generator().manual_seed(seed)
    popularity = skew * torch.randn(experts, generator=random)
    loads, biases = torch.empty(steps, experts), torch.empty(steps, experts)
    for step in range(steps):
        scores = torch.randn(tokens, experts, generator=random).add_(popularity).sigmoid_()
        load = torch.bincount(router.choose(scores).flatten(), minlength=experts).float()
        loads[step], biases[step] = load, bias
        update_bias(bias, load, gamma)
    return BalanceRun(loads, biases, torch.tensor([max_violation(load) for load in loads]))
