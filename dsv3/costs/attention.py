"""What attention remembers and what it does, in the forms of chapters 1 and 2."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.costs.roofline import BF16_BYTES, Cost

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
