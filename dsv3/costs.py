"""What a model costs, by arithmetic: bytes remembered, multiplications done, groups visited.

No tensor is made here, so the 671B model is counted as quickly as the small one. Two rules hold
everywhere. A multiplication with its addition counts as two floating-point operations (FLOPs).
Bytes are those that have to come from or go to a GPU's memory if everything else stays on chip.

Time follows from both. A processor that does F FLOPs and moves B bytes a second needs at least
max(flops / F, bytes / B). Work with fewer than F / B FLOPs a byte waits for memory, work with
more waits for arithmetic; F / B is the ``ridge_point``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from dsv3.config import ModelConfig

BF16_BYTES = 2
# Dense BF16 FLOPs and bytes of memory traffic a second of one H800 (NVIDIA's data sheet).
H800_FLOPS, H800_BYTES = 989e12, 3.35e12
# Bytes of its memory: "80 GB" on the label are 81,559 MiB in the driver's report.
H800_MEMORY = 81_559 * 2**20


@dataclass(frozen=True)
class Cost:
    """FLOPs done and bytes moved; costs add up."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte moved."""
        return self.flops / self.bytes

    def seconds(
        self, flops_per_second: float = H800_FLOPS, bytes_per_second: float = H800_BYTES
    ) -> float:
        """The least time, with arithmetic and memory fully overlapped."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def ridge_point(
    flops_per_second: float = H800_FLOPS, bytes_per_second: float = H800_BYTES
) -> float:
    """FLOPs a byte at which arithmetic and memory take equally long: 295 for an H800 in BF16."""
    return flops_per_second / bytes_per_second


def linear(rows: int, inputs: int, outputs: int, itemsize: float = BF16_BYTES) -> Cost:
    """A product (rows, inputs) x (inputs, outputs): the weight is read once for all rows."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return Cost(2 * rows * inputs * outputs, moved * itemsize)


# What attention remembers ---------------------------------------------------------------------


@dataclass(frozen=True)
class CacheShape:
    """A model whose cache holds keys and values: MHA (kv_heads = heads), GQA, MQA (1).

    heads: of queries; key_dim, value_dim: of one head.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def values_per_token_and_layer(self) -> int:
        """Numbers stored for one token in one layer, keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim)

    def bytes_per_token(self, itemsize: float = BF16_BYTES) -> float:
        """Bytes stored for one token in all layers."""
        return self.values_per_token_and_layer * self.layers * itemsize


# ISCA table 1; sizes from the models' own config files.
PEERS = {
    "Qwen2.5-72B": CacheShape("Qwen2.5-72B", 80, 64, 8, 128, 128),
    "LLaMA-3.1-405B": CacheShape("LLaMA-3.1-405B", 126, 128, 8, 128, 128),
}


def as_gqa(config: ModelConfig, kv_heads: int) -> CacheShape:
    """The model as it would be with kv_heads plain key and value heads of d_h (1: MQA)."""
    return CacheShape(
        f"GQA-{kv_heads}" if kv_heads > 1 else "MQA",
        config.num_hidden_layers,
        config.num_attention_heads,
        kv_heads,
        config.qk_nope_head_dim,
        config.v_head_dim,
    )


def as_mha(config: ModelConfig, with_position: bool = False) -> CacheShape:
    """The model with all its heads' keys and values stored.

    Keys are d_h wide, as they would be in plain attention; with_position: d_h + d_h^R, as this
    model's expanded keys are.
    """
    key = config.qk_head_dim if with_position else config.qk_nope_head_dim
    return CacheShape(
        "MHA",
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_attention_heads,
        key,
        config.v_head_dim,
    )


def latent_bytes_per_token(config: ModelConfig, itemsize: float = BF16_BYTES) -> float:
    """Bytes of the latent cache for one token in all layers: 70,272 for 671B (TR 2.1.1)."""
    return config.latent_dim * config.num_hidden_layers * itemsize


# What attention does --------------------------------------------------------------------------


def plain_core(shape: CacheShape, queries: int, keys: int, itemsize: float = BF16_BYTES) -> Cost:
    """Scores and weighted sums of one layer (eq. 10), every query against every key.

    The causal half is not taken off: decoding has none, and in prefill the full square is an
    upper bound of twice the work. Scores stay on chip.
    """
    width = shape.key_dim + shape.value_dim
    flops = 2 * queries * keys * shape.heads * width
    moved = keys * shape.values_per_token_and_layer + queries * shape.heads * width
    return Cost(flops, moved * itemsize)


def latent_core(
    config: ModelConfig, queries: int, keys: int, form: str, itemsize: float = BF16_BYTES
) -> Cost:
    """The same for MLA, from the cached latents to the heads' outputs, with W^UK and W^UV.

    form: "expanded" makes every head's keys and values first, writes and reads them once;
    "absorbed" carries the queries into the latent space and attends there.
    """
    c, heads = config, config.num_attention_heads
    up = heads * (c.qk_nope_head_dim + c.v_head_dim) * c.kv_lora_rank  # W^UK and W^UV
    outside = queries * heads * (c.qk_head_dim + c.v_head_dim)  # queries, outputs
    moved = keys * c.latent_dim + up + outside
    if form == "expanded":
        wide = c.qk_head_dim + c.v_head_dim
        flops = 2 * keys * up + 2 * queries * keys * heads * wide
        moved += 2 * keys * heads * wide
    elif form == "absorbed":
        flops = 2 * queries * up + 2 * queries * keys * heads * (c.latent_dim + c.kv_lora_rank)
    else:
        raise ValueError(f'form is "expanded" or "absorbed", not {form!r}')
    return Cost(flops, moved * itemsize)


def break_even_queries(config: ModelConfig, keys: int | None = None) -> float:
    """Queries above which the expanded form does fewer FLOPs: 170.7 for the released sizes.

    Expanding costs d_c (d_h + d_v) multiplications a head and key, once for all queries; the
    absorbed form costs 2 d_c - d_h - d_v more a head, key and query, and d_c (d_h + d_v) a head
    and query for the way into the latent space and out. keys: how many there are; None for so
    many that this last part does not count. Infinite where the absorbed form is always cheaper.
    """
    c = config
    up = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
    wider = 2 * c.kv_lora_rank - c.qk_nope_head_dim - c.v_head_dim
    denominator = wider if keys is None else wider + up / keys
    return up / denominator if denominator > 0 else float("inf")


# Where tokens go ------------------------------------------------------------------------------


def expected_groups(config: ModelConfig) -> float:
    """Groups that a token's K_r experts lie in, on average, if any K_r are equally likely and
    no limit is set: 5.29 of 8 for the released sizes. With the limit it is at most topk_group.

    A group is missed when all K_r experts come from the others.
    """
    c = config
    others = c.n_routed_experts - c.n_routed_experts // c.n_group
    missed = comb(others, c.num_experts_per_tok) / comb(c.n_routed_experts, c.num_experts_per_tok)
    return c.n_group * (1 - missed)
