"""What an answer costs when many are served."""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.config import ModelConfig
from dsv3.costs.parameters import activated_parameters, model_weights
from dsv3.costs.roofline import H800_BYTES, H800_FLOPS


def pass_milliseconds(config: ModelConfig, tokens: Sequence[int]) -> list[tuple[float, float]]:
    """(reading the weights, multiplying) for each number of tokens: least times of a pass, H800.

    Weights in FP8, one byte each, of which all experts are read that at least one token chose;
    products at FP8's rate, twice that of BF16. Attention, its cache and all traffic are left out.
    """
    working = activated_parameters(config, embedding=False)
    routed = sum(weight.numel for weight in model_weights(config) if weight.routed)
    share = config.num_experts_per_tok / config.n_routed_experts
    times = []
    for n in tokens:
        awake = 1 - (1 - share) ** n
        read = (working + (awake - share) * routed) / H800_BYTES
        multiply = 2 * working * n / (2 * H800_FLOPS)
        times.append((1e3 * read, 1e3 * multiply))
    return times
