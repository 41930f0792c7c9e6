"""Who else is a DeepSeek-V3: other names in ``config.json`` for the same computation.

A good architecture is used again. Kimi K2 and GLM-4.7-Flash are DeepSeek-V3 with other sizes, and
Moonlight does not even change the name; what differs is in the files' *fields*, not in the
model. So there is one model here, and these tables in front of it, by which ``dsv3.translation``
reads a config.json of any family as DeepSeek-V3's own.

Where is the line? Three kinds of fields are told apart.

* Fields that this model reads. Where tools take different values for an absent one (``n_group``
  is 8 here and 1 there), it must be there.
* Fields that change what is computed and that this model does not follow (``FIXED``): refused by
  their name, unless they say what this model does anyway.
* All others are ignored. A list of everything harmless would have to refuse every bookkeeping
  field that is invented next year, and they are invented every year. What a list of the harmful
  cannot know, a new kind of layer, comes with tensors of its own or without some of ours, and
  those are refused by name; or it comes under a ``model_type`` that is not in the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Family:
    """models: who is published under this name; adds: what differs from DeepSeek-V3; architecture:
    transformers' class; layer_types: whether dense layers are told by ``mlp_layer_types``."""

    models: str
    adds: str
    architecture: str = "DeepseekV3ForCausalLM"
    layer_types: bool = False


FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": Family(
        models="DeepSeek-V3, V3-0324, V3.1, R1 and Moonlight",
        adds="the model itself; in Moonlight one group of experts, queries that are not compressed",
    ),
    "kimi_k2": Family(
        models="Kimi K2",
        adds="one group of 384 experts, half the heads, YaRN with a ramp of one step (equal betas)",
    ),
    "glm4_moe_lite": Family(
        models="GLM-4.7-Flash",
        architecture="Glm4MoeLiteForCausalLM",
        layer_types=True,
        adds="heads of 192 + 64 and 256 values, one group, dense layers told by mlp_layer_types",
    ),
}

# Relatives that compute something else, and what.
OTHERS: Mapping[str, str] = {
    "axk1": "post_mlp_layernorm, a norm after the experts",
    "axk2": "index_topk, an indexer that picks the tokens attention sees, and gated norms",
    "deepseek_v2": "its choice of experts (topk_method greedy or group_limited_greedy, with "
    "scoring_func softmax)",
    "deepseek_v32": "index_topk, an indexer that picks the tokens attention sees",
    "deepseek_v4": "hyper-connections and compressed attention (hc_mult, compress_rates)",
    "glm4_moe": "grouped-query attention (num_key_value_heads)",
    "glm_moe_dsa": "index_topk, an indexer that picks the tokens attention sees",
    "kimi_k25": "text_config, a language model inside one that sees images",
    "kimi_linear": "layers of linear attention (linear_attn_config)",
    "kimi_vl": "text_config, a language model inside one that sees images",
    "longcat_flash": "experts that compute nothing (zero_expert_num), two attentions a layer",
    "mistral4": "experts packed into one tensor a layer (mlp.experts.gate_up_proj)",
    "youtu": "a model without experts",
}
DISTILLED = ("qwen2", "llama")

# Fields that other models or tools write, and the values with which this model computes what they
# ask for; null always counts as absent. What the released file itself has comes first.
WRITTEN = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
}
FIXED: Mapping[str, tuple] = {
    **{name: (value,) for name, value in WRITTEN.items()},
    # attention
    "rope_interleave": (True,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "mla_use_nope": (False,),
    "mla_use_qk_norm": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attention_chunk_size": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (),
    "attn_temperature_tuning": (False,),
    "attention_sink": (False,),
    "learnable_sink": (False,),
    "gated_mla": (False,),
    "attn_output_gate": (False,),
    "index_topk": (),
    "index_n_heads": (),
    "index_head_dim": (),
    "indexer_types": (),
    "linear_attn_config": (),
    "o_groups": (),
    "o_lora_rank": (),
    "compress_rates": (),
    "compress_ratios": (),
    "add_cross_attention": (False,),
    # feed-forward and router
    "mlp_bias": (False,),
    "swiglu_limit": (),
    "zero_expert_num": (0,),
    "num_hash_layers": (0,),
    "expert_dtype": ("fp8",),
    "enable_ihc": (False,),
    "hc_mult": (1,),
    "gated_norm_rank": (),
    # the whole
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "logits_mup_width_multiplier": (1,),
    "final_logit_softcapping": (),
    "mtp_hidden_states_first": (False,),
    "chain_hidden_post_norm": (),
    "per_layer_config": (),
    "is_encoder_decoder": (False,),
    "text_config": (),
    "vision_config": (),
    "audio_config": (),
    # weights in other bits
    "quantization": (),
    "compression_config": (),
}
# Absent, they are one thing to one tool and another to the next.
NEVER_GUESSED = (
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "first_k_dense_replace",
    "rms_norm_eps",
    "rope_theta",
)
