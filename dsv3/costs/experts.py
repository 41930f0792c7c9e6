"""What it costs to bring tokens to their experts, and why not to cut matrices instead.

Two networks join the GPUs, and a byte has a price on each. The report (TR 3.2.2, December 2024)
gives 160 GB/s inside a node and 50 between nodes, 3.2 to 1; the later paper (ISCA 4.3, May 2025)
says 200 and 50 on the label, 160 and 40 in use, both 4 to 1.

*Expert parallelism* in training and prefill sends a token once to each node where it has experts,
to the GPU with the same number as its own, and that one forwards it inside the node. (In decoding
a token goes straight to each expert's GPU, TR 3.4.2.) Both networks work at the same time,
so while the slow one carries a copy to each of 4 nodes, the fast one has time for 3.2 forwards per
copy, 13 in all. DeepSeek-V3 uses 8 of them.

*Tensor parallelism* needs the sum of all ranks' outputs twice in every layer, and each of N ranks
sends for every token of the group. In the forward pass of a layer, eight ranks of a node keep
NVLink busy for 2.5 microseconds for each token that a GPU is worth (four ranks: 1.1), experts the
slower network for 1.7. And the next product cannot begin before the sum is there, while DualPipe
hides the way to the experts behind another micro-batch. DeepSeek-V3 was trained without: the
memory that it would save is saved elsewhere (TR 3.2), and the H800's NVLink is slow (ISCA 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, comb

from dsv3.config import ModelConfig
from dsv3.costs.roofline import BF16_BYTES
from dsv3.fields import BLOCK


@dataclass(frozen=True)
class Links:
    """Bytes a second that one GPU sends inside its node and between nodes, and who says so."""

    inside: float
    between: float
    source: str

    @property
    def ratio(self) -> float:
        """How many times faster the links inside a node are."""
        return self.inside / self.between


REPORT_LINKS = Links(160e9, 50e9, "TR 3.2.2, December 2024")
NOMINAL_LINKS = Links(200e9, 50e9, "ISCA 4.3, May 2025, on the label")
EFFECTIVE_LINKS = Links(160e9, 40e9, "ISCA 4.3, May 2025, in use")


def expected_groups(config: ModelConfig) -> float:
    """Groups that a token's K_r experts lie in, on average, if any K_r are equally likely and
    no limit is set: 5.29 of 8 for the released sizes. With the limit it is at most topk_group.

    A group is missed when all K_r experts come from the others.
    """
    c = config
    others = c.n_routed_experts - c.n_routed_experts // c.n_group
    missed = comb(others, c.num_experts_per_tok) / comb(c.n_routed_experts, c.num_experts_per_tok)
    return c.n_group * (1 - missed)


def experts_at_no_cost(config: ModelConfig, links: Links = REPORT_LINKS) -> float:
    """Experts a token could have while the links between nodes are what it waits for: 12.8 by the
    report, which says 13; 16 at 4 to 1."""
    return config.topk_group * links.ratio


def dispatch_bytes(config: ModelConfig) -> int:
    """A token on its way to an expert: E4M3 codes and an FP32 scale for every 128; 7,392."""
    return config.hidden_size + 4 * ceil(config.hidden_size / BLOCK)


def combine_bytes(config: ModelConfig) -> int:
    """An expert's answer on its way back, in BF16: 14,336."""
    return BF16_BYTES * config.hidden_size


def expert_bytes(
    config: ModelConfig, nodes: float | None = None, experts: float | None = None
) -> tuple[float, float]:
    """(between nodes, inside nodes): bytes for a token and layer, there and back.

    nodes, experts: how many it goes to; by default as many as it may, topk_group and K_r. No node
    counts as the token's own, so this is an upper bound. Answers are added up inside a node before
    they go back.
    """
    nodes = config.topk_group if nodes is None else nodes
    experts = config.num_experts_per_tok if experts is None else experts
    once = dispatch_bytes(config) + combine_bytes(config)
    return nodes * once, experts * once


def expert_seconds(
    config: ModelConfig,
    links: Links = REPORT_LINKS,
    nodes: float | None = None,
    experts: float | None = None,
) -> tuple[float, float]:
    """(between nodes, inside nodes): how long a token's bytes keep the links of one GPU busy in one
    layer, there and back. The two overlap, so the longer counts."""
    between, inside = expert_bytes(config, nodes, experts)
    return between / links.between, inside / links.inside


def tensor_bytes(config: ModelConfig, ranks: int) -> float:
    """What each of N tensor-parallel ranks sends for one token in the forward pass of one layer:
    the sum after attention and the one after the feed-forward, each of d values in BF16 by a ring,
    2 (N - 1) / N of it."""
    return 2 * 2 * (ranks - 1) / ranks * BF16_BYTES * config.hidden_size


def tensor_seconds(config: ModelConfig, ranks: int, links: Links = REPORT_LINKS) -> float:
    """How long that keeps the links of one GPU busy, inside a node, for each token that the GPU is
    worth: N ranks work on N tokens where each would have worked on its own."""
    return ranks * tensor_bytes(config, ranks) / links.inside
