"""How many parameters a model has, and what becomes of them when it is shared out.

A model is a list of weights, and four things about each are enough for every count of this
package: how many numbers it has; whether it is cut over the ranks of a tensor group or whole on
each (latent down-projections, norms, router); whether FP8 takes it (embedding, head, norms,
router and M_k stay in BF16); and whether it is of routed experts, of which a token uses K_r of
N_r. ``dsv3.checkpoint.layout`` has every tensor with its name and shape; the two are counted
against each other in the tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dsv3.config import ModelConfig


class Weight(NamedTuple):
    """Weights of one kind in one layer; all routed experts of a layer are one."""

    name: str
    numel: int
    cut: bool = True
    fp8: bool = True
    routed: bool = False


def total(weights: Iterable[Weight]) -> int:
    """Parameters in all."""
    return sum(weight.numel for weight in weights)


def embedding_weights(config: ModelConfig) -> list[Weight]:
    """Emb."""
    return [Weight("embedding", config.vocab_size * config.hidden_size, fp8=False)]


def head_weights(config: ModelConfig) -> list[Weight]:
    """The final norm, and OutHead unless the embedding serves as such."""
    norm = _norm("final norm", config.hidden_size)
    if config.tie_word_embeddings:
        return [norm]
    return [norm, Weight("head", config.vocab_size * config.hidden_size, fp8=False)]


def layer_weights(config: ModelConfig, layer: int) -> list[Weight]:
    """Those of one layer. MTP modules count on from num_hidden_layers and have, before their
    layer, three norms and M_k, which joins two states."""
    weights = [*_attention(config), *_feed_forward(config, layer)]
    if layer >= config.num_hidden_layers:
        join = Weight("M_k", 2 * config.hidden_size**2, cut=False, fp8=False)
        weights = [_norm("MTP norms", 3 * config.hidden_size), join, *weights]
    return weights


def model_weights(config: ModelConfig, *, mtp: bool = False) -> list[Weight]:
    """Those of the main model; mtp: and of its MTP modules, which share embedding and head."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return [
        *embedding_weights(config),
        *(weight for layer in range(layers) for weight in layer_weights(config, layer)),
        *head_weights(config),
    ]


def parameter_count(config: ModelConfig, *, mtp: bool = False) -> int:
    """Parameters of the main model: 671,026,419,200 (TR 4.2); mtp: with its MTP modules."""
    return total(model_weights(config, mtp=mtp))


def activated_parameters(config: ModelConfig, *, embedding: bool = True) -> int:
    """Those that work for one token: 37,552,297,472 (TR 4.2).

    embedding: count its table, of which a token reads one row; without, 36,625,618,432.
    """
    chosen = sum(
        weight.numel * config.num_experts_per_tok // config.n_routed_experts
        if weight.routed
        else weight.numel
        for weight in model_weights(config)
    )
    return chosen - (0 if embedding else total(embedding_weights(config)))


def _norm(name: str, numel: int) -> Weight:
    return Weight(name, numel, cut=False, fp8=False)


def _attention(c: ModelConfig) -> list[Weight]:
    queries = c.num_attention_heads * c.qk_head_dim
    latent = c.q_lora_rank
    if latent is None:
        query = [Weight("queries", queries * c.hidden_size)]
    else:
        query = [
            Weight("query latent", latent * c.hidden_size, cut=False),
            _norm("query norm", latent),
            Weight("queries", queries * latent),
        ]
    up = c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return [
        *query,
        Weight("latent", c.latent_dim * c.hidden_size, cut=False),
        _norm("latent norm", c.kv_lora_rank),
        Weight("keys and values", up * c.kv_lora_rank),
        Weight("attention output", c.num_attention_heads * c.v_head_dim * c.hidden_size),
        _norm("norms", 2 * c.hidden_size),
    ]


def _feed_forward(c: ModelConfig, layer: int) -> list[Weight]:
    if not c.is_moe(layer):
        return [Weight("dense", 3 * c.hidden_size * c.intermediate_size)]
    expert = 3 * c.hidden_size * c.moe_intermediate_size
    bias = c.n_routed_experts if c.gate_bias else 0
    return [
        Weight("router", c.n_routed_experts * c.hidden_size + bias, cut=False, fp8=False),
        Weight("routed experts", c.n_routed_experts * expert, routed=True),
        Weight("shared experts", c.n_shared_experts * expert),
    ]
