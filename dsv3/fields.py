"""What a field of ``config.json`` may be: bounds, checks, and the two fields that are objects.

A number is checked for its type (JSON's 1.0 and true are no whole numbers) and against bounds; an
error names the field, the value found and what was expected.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.errors import DSV3Error

# An FP8 weight has one scale for so many rows and columns, and so has every tile of activations
# along its channels (TR 3.3). Files, kernels and cuts over ranks go by this one number.
BLOCK = 128

# The largest sizes that are believed, each several times those of any published model. A damaged
# file may say 2^32 layers, and whoever lists their tensors first runs out of memory.
MOST = {
    "vocab_size": 2**24,
    "hidden_size": 2**17,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "num_attention_heads": 4096,
    "n_routed_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "kv_lora_rank": 2**16,
    "q_lora_rank": 2**16,
    "qk_nope_head_dim": 2**13,
    "qk_rope_head_dim": 2**13,
    "v_head_dim": 2**13,
    "n_shared_experts": 1024,
    "n_group": 2**14,
    "topk_group": 2**14,
    "first_k_dense_replace": 1024,
    "num_nextn_predict_layers": 64,
    "max_position_embeddings": 2**24,  # float32 tells positions apart up to here
}
MOST_EXPERTS = 2**16  # of all layers together; Kimi K2 has 23,040


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN context extension (TR 4.3): fields of ``rope_scaling`` with ``type: yarn``.

    factor: how many times longer the context gets; original_max_position_embeddings: tokens seen
    in pre-training; beta_fast, beta_slow: rotations over the original context above which a
    frequency is left alone and below which it is divided by ``factor``; mscale, mscale_all_dim:
    coefficients of the two temperature terms, see ``dsv3.rope``.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    def __post_init__(self):
        for name, least, most in (
            ("factor", 1, 2**24),
            ("beta_fast", 1e-3, 1e6),
            ("beta_slow", 1e-3, 1e6),
            ("mscale", 0, 1e3),
            ("mscale_all_dim", 0, 1e3),
        ):
            object.__setattr__(
                self, name, number(f"rope_scaling.{name}", getattr(self, name), least, most)
            )
        whole(
            "rope_scaling.original_max_position_embeddings",
            self.original_max_position_embeddings,
            1,
            MOST["max_position_embeddings"],
        )
        if self.beta_fast < self.beta_slow:
            raise bad(
                "rope_scaling.beta_fast", self.beta_fast, f"at least beta_slow ({self.beta_slow})"
            )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the checkpoint's weights are stored: E4M3 with one scale per 128x128 block (TR 3.3).

    scale_fmt: "float32" for any scale (V3), "ue8m0" for powers of two (V3.1). It also decides how
    activations are scaled at run time. modules_to_not_convert: parts of the model that a tool left
    in plain numbers, by name; what is really there is seen in the files.
    """

    scale_fmt: str = "float32"
    modules_to_not_convert: tuple[str, ...] = ()

    def __post_init__(self):
        if self.scale_fmt not in ("float32", "ue8m0"):
            raise bad("quantization_config.scale_fmt", self.scale_fmt, '"float32" or "ue8m0"')
        names = self.modules_to_not_convert
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise bad("quantization_config.modules_to_not_convert", names, "a list of names")
        object.__setattr__(self, "modules_to_not_convert", tuple(names))


# Fields that are objects in the file, and of what class here.
OBJECTS = {"rope_scaling": YarnScaling, "quantization_config": QuantizationConfig}


def bad(name: str, found, expected: str) -> DSV3Error:
    """The error for a field's value."""
    return DSV3Error("bad value", where=name, found=quoted(found), expected=expected)


def is_int(value) -> bool:
    """True is not 1 here."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole(name: str, value, least: int, most: int) -> None:
    """Raise DSV3Error unless ``value`` is a whole number from ``least`` to ``most``."""
    if not is_int(value) or not least <= value <= most:
        raise bad(
            name,
            value,
            f"a whole number, {least} or more"
            if not is_int(value) or value < least
            else f"at most {most}",
        )


def number(name: str, value, least: float, most: float) -> float:
    """``value`` as a float; DSV3Error unless it is a number from ``least`` to ``most``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise bad(name, value, "a finite number")
    if not least <= value <= most:
        raise bad(name, value, f"a finite number from {least:g} to {most:g}")
    return float(value)


def quoted(value) -> str:
    """A value as Python writes it, so that "1" is not taken for 1; at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, a deep nest
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:52]} ... {text[-22:]}"
