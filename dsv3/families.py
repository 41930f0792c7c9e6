"""Who else is a DeepSeek-V3: other names in ``config.json`` for the same computation.

A good architecture is used again. Kimi K2 and GLM-4.7-Flash are DeepSeek-V3 with other sizes, and
Moonlight does not even change the name; what differs is in the files' *fields*, not in the
model. So there is one model here, and this table in front of it: ``translate`` reads a config.json
of any family as DeepSeek-V3's own file would say it, ``spell`` writes one back.

Where is the line? Three kinds of fields are told apart.

* Fields that this model reads. Where tools take different values for an absent one (``n_group``
  is 8 here and 1 there), it must be there.
* Fields that change what is computed and that this model does not follow (``FIXED``): refused by
  their name, unless they say what this model does anyway.
* All others are ignored. A list of everything harmless would have to refuse every bookkeeping
  field that is invented next year, and they are invented every year. What a list of the harmful
  cannot know, a new kind of layer, comes with tensors of its own or without some of ours, and
  those are refused by name; or it comes under a ``model_type`` that is not in the table.

``rope_scaling`` and ``quantization_config`` are small and closed vocabularies in which every word
changes numbers. There an unknown word is refused, unless it says that something is off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3.errors import DSV3Error


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
_OTHERS: Mapping[str, str] = {
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
_DISTILLED = ("qwen2", "llama")

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
# transformers' second names.
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
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

_YARN = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
)
# Also met in rope_scaling, with the only value that changes nothing (None: absent).
_ROPE_FIXED = {"attention_factor": None, "truncate": True, "partial_rotary_factor": 1}
_QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "expert_dtype": "fp8",
}


def translate(data: dict) -> dict:
    """A config.json of any family, as DeepSeek-V3's own file would say it.

    rope_scaling becomes the arguments of ``YarnScaling`` or None, quantization_config those of
    ``QuantizationConfig`` or None; values themselves are checked there and in ``ModelConfig``.
    Raises DSV3Error, naming the field, for another architecture and for what this model does not
    do.
    """
    if not isinstance(data, dict):
        raise DSV3Error("is not a JSON object", where="config", found=type(data).__name__)
    _check_model(data)
    quantization = _quantization(data.get("quantization_config"))
    for name, values in FIXED.items():
        if data.get(name) is not None and not _one_of(data[name], values):
            raise _unsupported(name, data[name], values[0] if values else None)
    _check_layer_types(data.get("layer_types"))
    heads, kv_heads = data.get("num_attention_heads"), data.get("num_key_value_heads")
    if kv_heads is not None and kv_heads != heads:
        raise DSV3Error(
            "unsupported value",
            where="num_key_value_heads",
            found=quoted(kv_heads),
            expected=f"num_attention_heads ({quoted(heads)}); all heads read one latent",
        )
    values = {name: value for name, value in data.items() if value is not None}
    for name, ours in _ALIASES.items():
        if name in values:
            _set(values, ours, values[name], name)
    if "mlp_layer_types" in values:
        _set(values, "first_k_dense_replace", _dense_layers(values), "mlp_layer_types")
    values.update(_rope(data))
    values["quantization_config"] = quantization
    return values


def spell(data: dict) -> dict:
    """DeepSeek-V3's own fields, as the file of the family ``data["model_type"]`` has them."""
    family = FAMILIES[data["model_type"]]
    data = {**data, "architectures": [family.architecture]}
    if family.layer_types:
        layers, dense = data["num_hidden_layers"], data["first_k_dense_replace"]
        data["mlp_layer_types"] = ["dense" if n < dense else "sparse" for n in range(layers)]
    return data


# Which model -------------------------------------------------------------------------------------


def _check_model(data: dict) -> None:
    model_type = data.get("model_type")
    known = ", ".join(FAMILIES)
    if model_type is None:
        raise DSV3Error("missing field", where="model_type", expected=f"one of {known}")
    if isinstance(data.get("text_config"), dict):
        raise DSV3Error(
            "unsupported model",
            where="text_config",
            found=f"a model inside another, of type {quoted(model_type)}",
            expected=f"a language model by itself, of type {known.replace(', ', ' or ')}",
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise DSV3Error(
            "unsupported model",
            where="model_type",
            found=quoted(model_type),
            expected=f"one of {known}",
            fix=_hint(model_type),
        )
    names = data.get("architectures")
    if names is None or names == []:
        return
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise DSV3Error(
            "bad value", where="architectures", found=quoted(names), expected="a list of names"
        )
    if not any(name.endswith("ForCausalLM") for name in names):
        raise DSV3Error(
            "unsupported value",
            where="architectures",
            found=quoted(names[0]),
            expected=f"{FAMILIES[model_type].architecture}, a model with a head for the next token",
        )


def _hint(model_type) -> str:
    if model_type in _DISTILLED:
        return (
            f"Models distilled from R1 have the architecture of {model_type}, not "
            f"DeepSeek-V3's; load them with a tool for {model_type}"
        )
    if isinstance(model_type, str) and model_type.lower() in _OTHERS:
        return f"What it has and this package does not: {_OTHERS[model_type.lower()]}"
    return "This name is not in the package's table of families (dsv3/families.py)"


def _dense_layers(data: dict) -> int:
    """How many first layers ``mlp_layer_types`` calls dense."""
    types, layers = data["mlp_layer_types"], data.get("num_hidden_layers")
    dense = 0
    if isinstance(types, list):
        dense = next((n for n, kind in enumerate(types) if kind != "dense"), len(types))
    if (
        not isinstance(types, list)
        or len(types) != layers
        or any(kind != "sparse" for kind in types[dense:])
    ):
        raise DSV3Error(
            "unsupported value",
            where="mlp_layer_types",
            found=quoted(types),
            expected=f'"dense", then "sparse", {quoted(layers)} in all (num_hidden_layers)',
        )
    return dense


def _check_layer_types(types) -> None:
    if types is not None and not (
        isinstance(types, list) and all(kind == "full_attention" for kind in types)
    ):
        raise DSV3Error(
            "unsupported value",
            where="layer_types",
            found=quoted(types),
            expected="full_attention in every layer",
        )


# Positions ---------------------------------------------------------------------------------------


def _rope(data: dict) -> dict:
    """rope_theta and rope_scaling, from the released spelling (``rope_scaling`` beside
    ``rope_theta``) and from the newer one (``rope_parameters``); both may be there if they agree."""
    found: dict = {}
    if data.get("rope_theta") is not None:
        found["rope_theta"] = data["rope_theta"]
    for name in ("rope_scaling", "rope_parameters"):
        rope = data.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise DSV3Error(
                "bad value", where=name, found=quoted(rope), expected="an object or null"
            )
        if rope.get("rope_theta") is not None:
            _set(found, "rope_theta", rope["rope_theta"], f"{name}.rope_theta")
        if rope:
            yarn = _yarn(rope, name)
            if found.setdefault("rope_scaling", yarn) != yarn:
                raise DSV3Error("contradicts rope_scaling", where=name, found=quoted(rope))
    return {"rope_scaling": None, **found}


def _yarn(rope: dict, name: str) -> dict | None:
    """The arguments of ``YarnScaling``; None for plain RoPE."""
    spelling = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(spelling)
    given = {key: rope[key] for key in _YARN if rope.get(key) is not None}
    for other in ("rope_type", "type"):
        if rope.get(other) not in (None, kind):
            raise DSV3Error(
                "two fields contradict each other",
                where=f"{name}.{other}",
                found=quoted(rope[other]),
                expected=f"{quoted(kind)}, as {spelling} says",
            )
    for key, value in rope.items():
        off = value is None or (value is False and key not in _ROPE_FIXED)
        if off or key in (*_YARN, "type", "rope_type", "rope_theta"):
            continue
        if key not in _ROPE_FIXED or value != _ROPE_FIXED[key]:
            raise _unsupported(f"{name}.{key}", value, _ROPE_FIXED.get(key))
    if kind is None and given:
        raise DSV3Error(
            "missing field",
            where=f"{name}.type",
            expected="yarn or default",
            found=f"{', '.join(given)} without it",
        )
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise DSV3Error(
            "unsupported value",
            where=f"{name}.{spelling}",
            found=quoted(kind),
            expected="yarn or default",
        )
    for key in ("factor", "original_max_position_embeddings"):
        if key not in given:
            raise DSV3Error("missing field", where=f"{name}.{key}")
    return given


# Bits --------------------------------------------------------------------------------------------


def _quantization(data) -> dict | None:
    """The arguments of ``QuantizationConfig``; None for weights in plain numbers."""
    name = "quantization_config"
    if data is None:
        return None
    if not isinstance(data, dict):
        raise DSV3Error("bad value", where=name, found=quoted(data), expected="an object or null")
    method = data.get("quant_method")
    if method != "fp8":
        missing = method is None
        there = f"only {', '.join(map(quoted, data))}" if data else "an empty object"
        raise DSV3Error(
            "missing field" if missing else "unsupported value",
            where=f"{name}.quant_method",
            expected="fp8",
            found=there if missing else quoted(method),
            fix="This package reads fp8, which is E4M3 in blocks of "
            "128x128, and weights that are not quantised",
        )
    for key, value in data.items():
        off = value is None or (value is False and key not in _QUANTIZATION)
        if off or key in ("scale_fmt", "modules_to_not_convert", "ignored_layers", "dequantize"):
            continue
        only = _QUANTIZATION.get(key)
        if not _one_of(value, (only,)):
            raise _unsupported(f"{name}.{key}", value, only)
    result = {}
    if data.get("scale_fmt") is not None:  # "float" is transformers' word
        result["scale_fmt"] = "float32" if data["scale_fmt"] == "float" else data["scale_fmt"]
        if not _one_of(result["scale_fmt"], ("float32", "ue8m0")):
            raise DSV3Error(
                "unsupported value",
                where=f"{name}.scale_fmt",
                found=quoted(data["scale_fmt"]),
                expected="float32 or ue8m0",
            )
    if data.get("weight_block_size") is None:
        raise DSV3Error(
            "missing field",
            where=f"{name}.weight_block_size",
            expected=[128, 128],
            fix="Without it FP8 weights have one scale each, which is another format",
        )
    for key in ("modules_to_not_convert", "ignored_layers"):
        if data.get(key) is not None:
            _set(result, "modules_to_not_convert", data[key], f"{name}.{key}")
    return result


# Helpers -----------------------------------------------------------------------------------------


def quoted(value) -> str:
    """A value as Python writes it, so that "1" is not taken for 1; at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a deep nest
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:52]} ... {text[-22:]}"


def _set(values: dict, name: str, value, source: str) -> None:
    """Enter a value that may stand under two names; they must agree."""
    if name in values and values[name] != value:
        raise DSV3Error(
            "two fields contradict each other",
            where=source,
            found=quoted(value),
            expected=f"{quoted(values[name])}, as {name} says",
        )
    values[name] = value


def _one_of(value, values: tuple) -> bool:
    """Like ``in``, but 1 is not true and "1" is not 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def _unsupported(name: str, found, only) -> DSV3Error:
    return DSV3Error(
        "unsupported value",
        where=name,
        found=quoted(found),
        expected="no such field" if only is None else quoted(only),
    )
