"""A ``config.json`` of any family, read as DeepSeek-V3's own file would say it, and written back.

``dsv3.families`` says who the families are and which fields are refused; here are the words that
need more than a table: two names for one field, dense layers told one by one, two spellings of
YaRN, and the ways to say E4M3 in blocks.

``rope_scaling`` and ``quantization_config`` are small and closed vocabularies in which every word
changes numbers. There an unknown word is refused, unless it says that something is off.
"""

from __future__ import annotations

from dsv3.errors import DSV3Error
from dsv3.families import DISTILLED, FAMILIES, FIXED, OTHERS
from dsv3.fields import BLOCK, quoted

# transformers' second names.
_ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
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
    "weight_block_size": [BLOCK, BLOCK],
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
    if model_type in DISTILLED:
        return (
            f"Models distilled from R1 have the architecture of {model_type}, not "
            f"DeepSeek-V3's; load them with a tool for {model_type}"
        )
    if isinstance(model_type, str) and model_type.lower() in OTHERS:
        return f"What it has and this package does not: {OTHERS[model_type.lower()]}"
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
    """rope_theta and rope_scaling, from the released spelling, ``rope_scaling`` beside
    ``rope_theta``, and from the newer one, ``rope_parameters``; both may be there if they agree."""
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
            expected=[BLOCK, BLOCK],
            fix="Without it FP8 weights have one scale each, which is another format",
        )
    for key in ("modules_to_not_convert", "ignored_layers"):
        if data.get(key) is not None:
            _set(result, "modules_to_not_convert", data[key], f"{name}.{key}")
    return result


# Helpers -----------------------------------------------------------------------------------------


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
