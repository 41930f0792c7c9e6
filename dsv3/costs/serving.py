"""What an answer costs when many are served: layouts for serving, what fits, the least time.

Reading a prompt (*prefill*) takes many tokens at once and waits for arithmetic; writing an answer
(*decoding*) takes one token per text and waits for memory and the network. So they run on
different GPUs, and each kind has its layout. The report's are of December 2024 (TR 3.4); what was
in use two months later was published with a day's figures (day 6 of open-infra-index, ``DAY`` in
``dsv3.costs.budget``). Both are in ``DEPLOYMENTS``, with their dates.

Experts are placed by arithmetic: 256 routed ones and 32 copies of the busiest are 32 x 9. With one
expert on each of 320 GPUs, 64 are left for copies and for the shared expert, which then counts as
a routed one that everybody chooses.

Two micro-batches take turns: while the tokens of one are under way to their experts and back, the
GPU works on the other. A layer then takes, for both, twice the longer of the two times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.costs.attention import latent_bytes_per_token
from dsv3.costs.parameters import Weight, activated_parameters, model_weights
from dsv3.costs.roofline import H800_BYTES, H800_FLOPS, H800_MEMORY
from dsv3.costs.training import ITEM_BYTES


@dataclass(frozen=True)
class Deployment:
    """The smallest unit that serves.

    tp: ranks that share the heads of attention; gpus / tp such groups have texts of their own.
    slots: experts on each GPU, in every layer; shared: whether the shared expert is on each
    besides, or in a slot like the others.
    """

    name: str
    source: str
    gpus: int
    tp: int
    slots: int
    shared: bool

    @property
    def nodes(self) -> int:
        """Of eight GPUs."""
        return self.gpus // 8

    @property
    def dp(self) -> int:
        """Groups that have texts of their own."""
        return self.gpus // self.tp

    def spare(self, config: ModelConfig) -> int:
        """Slots that are left for copies when each routed expert has one."""
        return self.gpus * self.slots - config.n_routed_experts


DEPLOYMENTS = (
    # The report does not say where the shared expert is in prefill; as two months later, on each.
    Deployment("prefill", "TR 3.4.1, December 2024", 32, 4, 9, True),
    Deployment("decoding", "TR 3.4.2, December 2024", 320, 4, 1, False),
    Deployment("prefill", "day 6, February 2025", 32, 1, 9, True),
    Deployment("decoding", "day 6, February 2025", 144, 1, 2, True),
)


def serving_bytes(config: ModelConfig, deployment: Deployment) -> float:
    """Weights on one GPU, in FP8 and what FP8 leaves in BF16.

    Attention is cut over tp ranks; dense layers, embedding and head are whole on every GPU (of the
    dense layers the report says so). Without MTP modules.
    """
    c = config
    experts = deployment.slots + (c.n_shared_experts if deployment.shared else 0)

    def held(weight: Weight) -> float:
        if weight.name == "routed experts":
            return weight.numel / c.n_routed_experts * experts
        if weight.name == "shared experts":
            return 0  # among the others
        cut = weight.cut and weight.name not in ("dense", "embedding", "head")
        return weight.numel / deployment.tp if cut else weight.numel

    return sum(
        held(weight) * ITEM_BYTES["fp8" if weight.fp8 else "bf16"] for weight in model_weights(c)
    )


def cache_tokens(config: ModelConfig, deployment: Deployment, memory: float = H800_MEMORY) -> float:
    """Tokens whose cache, in BF16, fits beside the weights on a GPU.

    Each rank of a tensor group needs the whole latent of every token, for its own heads; so with
    tp ranks this is for the group, not for the GPU. Negative where not even the weights fit.
    """
    return (memory - serving_bytes(config, deployment)) / latent_bytes_per_token(config)


def exchange_seconds(
    config: ModelConfig, *, bandwidth: float = 50e9, tokens: int = 32, width: int | None = None
) -> float:
    """Least time of dispatch and combine in one layer of decoding (ISCA 2.3.2).

    tokens of each GPU, a byte a value on the way there and two back, to K_r + N_s experts;
    bandwidth: bytes a second of a GPU. width: of a token, hidden_size by default; the paper's
    120.96 microseconds are those of 7,000, which its "7K" stands for; 7,168 makes them 123.86.
    """
    experts = config.num_experts_per_tok + config.n_shared_experts
    return (1 + 2) * tokens * experts * (width or config.hidden_size) / bandwidth


def layer_seconds(compute: float, exchange: float, *, overlap: bool = True) -> float:
    """Time of one layer for two micro-batches, each of which computes and exchanges so long: one
    after the other, or in turns."""
    return 2 * max(compute, exchange) if overlap else 2 * (compute + exchange)


def token_seconds(
    config: ModelConfig, *, bandwidth: float = 50e9, tokens: int = 32, width: int | None = None
) -> float:
    """Least time between two tokens of a text, if nothing but the exchange takes time: 14.76 ms or
    67 tokens a second at InfiniBand's 50 GB/s, 0.82 ms at the 900 GB/s of 72 GPUs under one NVLink
    (ISCA 2.3.2, with its width of 7,000)."""
    exchange = exchange_seconds(config, bandwidth=bandwidth, tokens=tokens, width=width)
    return config.num_hidden_layers * layer_seconds(0, exchange)


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
