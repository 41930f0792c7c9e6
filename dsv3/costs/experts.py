"""Where tokens go."""

from __future__ import annotations

from math import comb

from dsv3.config import ModelConfig


def expected_groups(config: ModelConfig) -> float:
    """Groups that a token's K_r experts lie in, on average, if any K_r are equally likely and
    no limit is set: 5.29 of 8 for the released sizes. With the limit it is at most topk_group.

    A group is missed when all K_r experts come from the others.
    """
    c = config
    others = c.n_routed_experts - c.n_routed_experts // c.n_group
    missed = comb(others, c.num_experts_per_tok) / comb(c.n_routed_experts, c.num_experts_per_tok)
    return c.n_group * (1 - missed)
