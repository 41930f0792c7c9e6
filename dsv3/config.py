"""What the model is, as data: the fields of the released ``config.json``.

Everything else in the house reads its sizes here and nowhere else. Field names are those of the
released file (TR 4.2 gives the numbers), so a reader can lay the two side by side. Two spellings
of the position fields are in use, ``rope_scaling`` beside ``rope_theta`` (released) and
``rope_parameters`` (newer tools); both are read, the released one is written.

A config that asks for something the model does not do is refused by the name of the field.
Silently building another model than the one that was trained is the worst answer.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dsv3.errors import DSV3Error

CONFIG_FILE = "config.json"

# Fields that other tools write and that this model supports with one value only.
_ONLY = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "rope_interleave": True,
}
_DISTILLED = {"qwen2", "llama"}


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
        for name in ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            object.__setattr__(self, name, _number(f"rope_scaling.{name}", getattr(self, name)))
        _positive_int("rope_scaling.original_max_position_embeddings",
                      self.original_max_position_embeddings)
        if self.factor < 1:
            raise _bad("rope_scaling.factor", self.factor, "a number of at least 1")
        if not self.beta_fast > self.beta_slow > 0:
            raise _bad("rope_scaling.beta_fast", self.beta_fast,
                       f"more than beta_slow ({self.beta_slow}), both positive")


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How the checkpoint's weights are stored: E4M3 with one scale per 128x128 block (TR 3.3).

    scale_fmt: "float32" for any scale (V3), "ue8m0" for powers of two (V3.1). It also decides how
    activations are scaled at run time.
    """

    scale_fmt: str = "float32"

    def __post_init__(self):
        if self.scale_fmt not in ("float32", "ue8m0"):
            raise _bad("quantization_config.scale_fmt", self.scale_fmt, '"float32" or "ue8m0"')


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of one DeepSeek-V3 model. The paper's symbol follows each field.

    Raises DSV3Error, naming the field, for a value that is of the wrong type, out of range, at
    odds with another field, or not supported.
    """

    vocab_size: int
    hidden_size: int                    # d
    intermediate_size: int              # inner width of a dense feed-forward
    moe_intermediate_size: int          # inner width of one expert
    num_hidden_layers: int              # l
    num_attention_heads: int            # n_h
    n_routed_experts: int               # N_r
    num_experts_per_tok: int            # K_r
    kv_lora_rank: int                   # d_c
    q_lora_rank: int | None             # d_c'; None: queries are not compressed
    qk_nope_head_dim: int               # d_h
    qk_rope_head_dim: int               # d_h^R
    v_head_dim: int                     # d_h
    n_shared_experts: int = 1           # N_s
    first_k_dense_replace: int = 0      # so many first layers have a dense feed-forward
    n_group: int = 1                    # groups ("nodes") of routed experts
    topk_group: int = 1                 # M: groups a token may reach
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    gate_bias: bool = True              # b_i; a property of the model, not of its size
    num_nextn_predict_layers: int = 0   # D: MTP modules
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    quantization_config: QuantizationConfig | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
                     "num_hidden_layers", "num_attention_heads", "n_routed_experts",
                     "num_experts_per_tok", "kv_lora_rank", "qk_nope_head_dim",
                     "qk_rope_head_dim", "v_head_dim", "n_shared_experts", "n_group",
                     "topk_group", "max_position_embeddings"):
            _positive_int(name, getattr(self, name))
        if self.q_lora_rank is not None:
            _positive_int("q_lora_rank", self.q_lora_rank)
        for name in ("first_k_dense_replace", "num_nextn_predict_layers"):
            if not _is_int(getattr(self, name)) or getattr(self, name) < 0:
                raise _bad(name, getattr(self, name), "a whole number, 0 or more")
        for name in ("norm_topk_prob", "gate_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "true or false")
        for name in ("routed_scaling_factor", "rms_norm_eps", "initializer_range", "rope_theta"):
            value = _number(name, getattr(self, name))
            object.__setattr__(self, name, value)
            if value <= 0:
                raise _bad(name, value, "a number above 0")
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise _bad("scoring_func", self.scoring_func, '"sigmoid" or "softmax"')
        if self.qk_rope_head_dim % 2:
            raise _bad("qk_rope_head_dim", self.qk_rope_head_dim,
                       "an even number, since RoPE turns pairs")
        self._check_routing()
        self._check_tokens()

    def _check_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise _bad("n_routed_experts", self.n_routed_experts,
                       f"a multiple of n_group ({self.n_group})")
        if self.topk_group > self.n_group:
            raise _bad("topk_group", self.topk_group, f"at most n_group ({self.n_group})")
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2:
            raise _bad("n_group", self.n_group,
                       "groups of at least 2 experts, since a group is ranked by its two best")
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise _bad("num_experts_per_tok", self.num_experts_per_tok,
                       f"at most the {self.topk_group * per_group} experts of topk_group groups")

    def _check_tokens(self) -> None:
        eos = self.eos_token_id
        if isinstance(eos, list):
            eos = tuple(eos)
            object.__setattr__(self, "eos_token_id", eos)
        ids = list(eos) if isinstance(eos, tuple) else [eos]
        for name, values in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", ids)):
            for value in values:
                if value is not None and not (_is_int(value) and 0 <= value < self.vocab_size):
                    raise _bad(name, value, f"a token id below vocab_size ({self.vocab_size})")

    # Derived sizes ------------------------------------------------------------------------------

    @property
    def qk_head_dim(self) -> int:
        """Width of one query and key head, d_h + d_h^R (eq. 4 and 9)."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Values cached per token and layer, d_c + d_h^R (TR 2.1.1)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a text."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else self.eos_token_id

    @property
    def scale_fmt(self) -> str:
        """Scale format of quantised weights and activations: "float32" or "ue8m0"."""
        return self.quantization_config.scale_fmt if self.quantization_config else "float32"

    def is_moe(self, layer: int) -> bool:
        """Whether layer ``layer`` (MTP modules count on from num_hidden_layers) has experts."""
        return layer >= self.first_k_dense_replace

    # Reading and writing ------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read ``config.json``, given itself or its folder."""
        path = Path(path)
        file = path / CONFIG_FILE if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DSV3Error("no such file", where=file, fix="Name a folder that holds a "
                            "checkpoint in the released layout") from None
        except (OSError, UnicodeDecodeError) as error:
            raise DSV3Error("cannot be read", where=file, found=error) from None
        except json.JSONDecodeError as error:
            raise DSV3Error("is not JSON", where=file, found=error) from None
        try:
            return cls.from_dict(data)
        except DSV3Error as error:
            raise DSV3Error(f"{error.where}: {error.what}" if error.where else error.what,
                            where=file, found=error.found, expected=error.expected,
                            fix=error.fix) from None

    @classmethod
    def from_dict(cls, data: dict) -> ModelConfig:
        """Build a config from the contents of a ``config.json``, old or new spelling."""
        if not isinstance(data, dict):
            raise DSV3Error("is not a JSON object", where="config", found=type(data).__name__)
        model_type = data.get("model_type")
        if model_type != "deepseek_v3":
            raise DSV3Error("unsupported model", where="model_type", found=model_type,
                            expected="deepseek_v3", fix=_model_type_hint(model_type))
        for name, value in _ONLY.items():
            if name in data and data[name] is not None and data[name] != value:
                raise DSV3Error("unsupported value", where=name, found=data[name], expected=value)
        heads, kv_heads = data.get("num_attention_heads"), data.get("num_key_value_heads")
        if kv_heads is not None and kv_heads != heads:
            raise DSV3Error("unsupported value", where="num_key_value_heads", found=kv_heads,
                            expected=f"num_attention_heads ({heads}); all heads read one latent")
        known = {f.name for f in fields(cls)}
        values = {k: v for k, v in data.items() if k in known}
        for name, value in list(values.items()):
            # null stands for "not set", except where it says something of its own
            if value is None and name not in ("q_lora_rank", "bos_token_id", "eos_token_id"):
                del values[name]
        values.setdefault("q_lora_rank", None)
        values.update(_rope_fields(data))
        values["quantization_config"] = _quantization(data.get("quantization_config"))
        missing = [f.name for f in fields(cls)
                   if f.name not in values and f.default is f.default_factory]
        if missing:
            raise DSV3Error("missing field", where=", ".join(missing))
        return cls(**values)

    def to_dict(self) -> dict:
        """The contents of a ``config.json`` in the released spelling."""
        data: dict = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
                      **_ONLY, "num_key_value_heads": self.num_attention_heads}
        del data["rope_interleave"]  # only newer tools write it
        for field in fields(self):
            data[field.name] = getattr(self, field.name)
        if self.gate_bias:
            del data["gate_bias"]  # the released file takes it for granted
        if isinstance(self.eos_token_id, tuple):
            data["eos_token_id"] = list(self.eos_token_id)
        if self.rope_scaling is not None:
            data["rope_scaling"] = {"type": "yarn", **vars(self.rope_scaling)}
        if self.quantization_config is None:
            del data["quantization_config"]
        else:
            data["quantization_config"] = {
                "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                "weight_block_size": [128, 128]}
            if self.scale_fmt != "float32":
                data["quantization_config"]["scale_fmt"] = self.scale_fmt
        data["torch_dtype"] = "bfloat16"
        return dict(sorted(data.items()))

    def to_json(self) -> str:
        """``to_dict`` as the text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    # Presets ------------------------------------------------------------------------------------

    @classmethod
    def deepseek_v3(cls) -> ModelConfig:
        """The released 671B model (TR 4.2, 4.3), field for field."""
        return cls(
            vocab_size=129280, hidden_size=7168, intermediate_size=18432,
            moe_intermediate_size=2048, num_hidden_layers=61, num_attention_heads=128,
            n_routed_experts=256, num_experts_per_tok=8, kv_lora_rank=512, q_lora_rank=1536,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=3,
            n_group=8, topk_group=4, routed_scaling_factor=2.5, num_nextn_predict_layers=1,
            max_position_embeddings=163840,
            rope_scaling=YarnScaling(factor=40, original_max_position_embeddings=4096,
                                     mscale=1.0, mscale_all_dim=1.0),
            quantization_config=QuantizationConfig())

    @classmethod
    def mini(cls) -> ModelConfig:
        """The small model that comes with the book; every mechanism of the large one is in it.

        Sizes are chosen so that FP8 blocks can be cut over two ranks, and so that the ragged
        case is met: wkv_a has 128 + 64 = 192 rows, one and a half blocks (576 at 671B).
        """
        return cls(
            vocab_size=4096, hidden_size=256, intermediate_size=512, moe_intermediate_size=256,
            num_hidden_layers=4, num_attention_heads=4, n_routed_experts=16,
            num_experts_per_tok=4, kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=64,
            qk_rope_head_dim=64, v_head_dim=64, first_k_dense_replace=1, n_group=4, topk_group=2,
            routed_scaling_factor=2.5, num_nextn_predict_layers=1, max_position_embeddings=1024,
            rope_scaling=YarnScaling(factor=4, original_max_position_embeddings=256, mscale=1.0,
                                     mscale_all_dim=1.0),
            quantization_config=QuantizationConfig())

    def but(self, **changes) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


def _bad(name: str, found, expected: str) -> DSV3Error:
    return DSV3Error("bad value", where=name, found=repr(found), expected=expected)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive_int(name: str, value) -> None:
    if not _is_int(value) or value < 1:
        raise _bad(name, value, "a whole number, 1 or more")


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise _bad(name, value, "a finite number")
    return float(value)


def _model_type_hint(model_type) -> str:
    if model_type in _DISTILLED:
        return ("This is the config of a distilled model: its architecture is that of "
                f"{model_type}, not DeepSeek-V3; load it with a tool for {model_type}")
    return "Only DeepSeek-V3, V3.1 and R1 share this architecture"


def _rope_fields(data: dict) -> dict:
    """rope_theta and rope_scaling from either spelling."""
    rope = data.get("rope_parameters") or data.get("rope_scaling")
    result = {}
    if data.get("rope_theta") is not None:
        result["rope_theta"] = data["rope_theta"]
    if rope is None:
        return {**result, "rope_scaling": None}
    if not isinstance(rope, dict):
        raise _bad("rope_scaling", rope, "an object or null")
    if rope.get("rope_theta") is not None:
        result["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {**result, "rope_scaling": None}
    if kind != "yarn":
        raise DSV3Error("unsupported value", where="rope_scaling.type", found=kind,
                        expected="yarn or default")
    for name, only in (("attention_factor", None), ("truncate", True)):
        if rope.get(name, only) not in (None, only):
            raise DSV3Error("unsupported value", where=f"rope_scaling.{name}", found=rope[name],
                            expected="no such field" if only is None else only)
    names = {f.name for f in fields(YarnScaling)}
    given = {k: v for k, v in rope.items() if k in names and v is not None}
    for name in ("factor", "original_max_position_embeddings"):
        if name not in given:
            raise DSV3Error("missing field", where=f"rope_scaling.{name}")
    return {**result, "rope_scaling": YarnScaling(**given)}


def _quantization(data) -> QuantizationConfig | None:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise _bad("quantization_config", data, "an object or null")
    expected = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128],
                "activation_scheme": "dynamic"}
    for name, value in expected.items():
        if data.get(name, value) != value:
            raise DSV3Error("unsupported value", where=f"quantization_config.{name}",
                            found=data[name], expected=value)
    return QuantizationConfig(scale_fmt=data.get("scale_fmt") or "float32")
