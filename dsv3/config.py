"""What the model is, as data: the fields of the released ``config.json``.

Everything else in the house reads its sizes here and nowhere else. Field names are those of the
released file (TR 4.2 gives the numbers), so a reader can lay the two side by side. Files of other
families, and newer spellings of the same fields, are read by ``dsv3.translation``; what a single
field may be stands in ``dsv3.fields``.

A config that asks for something the model does not do is refused by the name of the field.
Silently building another model than the one that was trained is the worst answer.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.families import FAMILIES, NEVER_GUESSED, WRITTEN
from dsv3.fields import (
    BLOCK,
    MOST,
    MOST_EXPERTS,
    OBJECTS,
    QuantizationConfig,
    YarnScaling,
    bad,
    is_int,
    number,
    whole,
)
from dsv3.files import read_json
from dsv3.shipped import model_folder
from dsv3.translation import spell, translate
from dsv3.unfinished import how_to_finish

CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and choices of one DeepSeek-V3 model. The paper's symbol follows each field.

    model_type: the family under whose name it is published, a key of ``families.FAMILIES``.

    Raises DSV3Error, naming the field, for a value that is of the wrong type, out of range, at
    odds with another field, or not supported.
    """

    vocab_size: int
    hidden_size: int  # d
    intermediate_size: int  # inner width of a dense feed-forward
    moe_intermediate_size: int  # inner width of one expert
    num_hidden_layers: int  # l
    num_attention_heads: int  # n_h
    n_routed_experts: int  # N_r
    num_experts_per_tok: int  # K_r
    kv_lora_rank: int  # d_c
    q_lora_rank: int | None  # d_c'; None: queries are not compressed
    qk_nope_head_dim: int  # d_h
    qk_rope_head_dim: int  # d_h^R
    v_head_dim: int  # d_h
    n_shared_experts: int = 1  # N_s
    first_k_dense_replace: int = 0  # so many first layers have a dense feed-forward
    n_group: int = 1  # groups ("nodes") of routed experts
    topk_group: int = 1  # M: groups a token may reach
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    gate_bias: bool = True  # b_i; a property of the model, not of its size
    num_nextn_predict_layers: int = 0  # D: MTP modules
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: YarnScaling | None = None
    quantization_config: QuantizationConfig | None = None
    tie_word_embeddings: bool = False
    model_type: str = "deepseek_v3"
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 1

    def __post_init__(self):
        for name, most in MOST.items():
            value = getattr(self, name)
            if name != "q_lora_rank" or value is not None:
                whole(
                    name,
                    value,
                    0 if name in ("first_k_dense_replace", "num_nextn_predict_layers") else 1,
                    most,
                )
        for name in ("norm_topk_prob", "gate_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise bad(name, getattr(self, name), "true or false")
        for name, least, most in (
            ("routed_scaling_factor", 1e-6, 1e6),
            ("rms_norm_eps", 1e-30, 1),
            ("initializer_range", 1e-30, 1e3),
            ("rope_theta", 1.001, 1e12),
        ):
            object.__setattr__(self, name, number(name, getattr(self, name), least, most))
        if self.scoring_func not in ("sigmoid", "softmax"):
            raise bad("scoring_func", self.scoring_func, '"sigmoid" or "softmax"')
        if self.model_type not in list(FAMILIES):
            raise bad("model_type", self.model_type, "one of " + ", ".join(FAMILIES))
        for name, kind in OBJECTS.items():
            if not isinstance(getattr(self, name), (kind, type(None))):
                raise bad(name, getattr(self, name), f"a {kind.__name__} or None")
        if self.qk_rope_head_dim % 2:
            raise bad(
                "qk_rope_head_dim", self.qk_rope_head_dim, "an even number, since RoPE turns pairs"
            )
        self._check_routing()
        self._check_tokens()

    def _check_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise bad(
                "n_routed_experts", self.n_routed_experts, f"a multiple of n_group ({self.n_group})"
            )
        if self.topk_group > self.n_group:
            raise bad("topk_group", self.topk_group, f"at most n_group ({self.n_group})")
        per_group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and per_group < 2 and self.gate_bias:
            raise bad(
                "n_group",
                self.n_group,
                "groups of at least 2 experts, since a group is ranked by its two best",
            )
        if self.num_experts_per_tok > self.topk_group * per_group:
            raise bad(
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"at most the {self.topk_group * per_group} experts of topk_group groups",
            )
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        if (layers - self.first_k_dense_replace) * self.n_routed_experts > MOST_EXPERTS:
            raise bad(
                "n_routed_experts",
                self.n_routed_experts,
                f"at most {MOST_EXPERTS:,} experts in all {layers} layers together",
            )

    def _check_tokens(self) -> None:
        eos = self.eos_token_id
        if isinstance(eos, list):
            eos = tuple(eos)
            object.__setattr__(self, "eos_token_id", eos)
        ids = list(eos) if isinstance(eos, tuple) else [eos]
        for name, values in (("bos_token_id", [self.bos_token_id]), ("eos_token_id", ids)):
            for value in values:
                if value is not None and not (is_int(value) and 0 <= value < self.vocab_size):
                    raise bad(name, value, f"a token id below vocab_size ({self.vocab_size})")

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
        path = model_folder(path)
        file = path / CONFIG_FILE if os.path.isdir(path) else path
        absent = how_to_finish(file.parent) or (
            "Name a folder that holds a checkpoint in the released layout"
        )
        data = read_json(file, unique=True, absent=absent)
        try:
            return cls.from_dict(data)
        except DSV3Error as error:
            raise DSV3Error(
                f"{error.where}: {error.what}" if error.where else error.what,
                where=file,
                found=error.found,
                expected=error.expected,
                fix=error.fix,
            ) from None

    @classmethod
    def from_dict(cls, data: dict) -> ModelConfig:
        """Build a config from the contents of a ``config.json`` of any family."""
        data = translate(data)
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        for name in ("q_lora_rank", "bos_token_id", "eos_token_id"):
            values.setdefault(name, None)  # absent, as null, says something of its own here
        for name, kind in OBJECTS.items():
            if values[name] is not None:
                values[name] = kind(**values[name])
        missing = [
            f.name
            for f in fields(cls)
            if f.name not in values and (f.default is f.default_factory or f.name in NEVER_GUESSED)
        ]
        if missing:
            raise DSV3Error(
                "missing field",
                where=", ".join(missing),
                fix="Tools take different "
                "values for an absent field: write down what the model was made with",
            )
        return cls(**values)

    def to_dict(self) -> dict:
        """The contents of a ``config.json``: the released spelling, as the family has it."""
        data: dict = {**WRITTEN, "num_key_value_heads": self.num_attention_heads}
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
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
            }
            if self.scale_fmt != "float32":
                data["quantization_config"]["scale_fmt"] = self.scale_fmt
            if kept := self.quantization_config.modules_to_not_convert:
                # pyrefly: ignore[bad-assignment] - values of JSON are of every kind
                data["quantization_config"]["modules_to_not_convert"] = list(kept)
        data["torch_dtype"] = "bfloat16"
        return dict(sorted(spell(data).items()))

    def to_json(self) -> str:
        """``to_dict`` as the text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    # Presets ------------------------------------------------------------------------------------

    @classmethod
    def deepseek_v3(cls) -> ModelConfig:
        """The released 671B model (TR 4.2, 4.3), field for field."""
        return cls(
            vocab_size=129280,
            hidden_size=7168,
            intermediate_size=18432,
            moe_intermediate_size=2048,
            num_hidden_layers=61,
            num_attention_heads=128,
            n_routed_experts=256,
            num_experts_per_tok=8,
            kv_lora_rank=512,
            q_lora_rank=1536,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            first_k_dense_replace=3,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
            max_position_embeddings=163840,
            rope_scaling=YarnScaling(
                factor=40, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
            ),
            quantization_config=QuantizationConfig(),
        )

    @classmethod
    def kimi_k2(cls) -> ModelConfig:
        """Kimi K2 Instruct, 1.03T parameters: its config.json, field for field."""
        return cls.deepseek_v3().but(
            model_type="kimi_k2",
            vocab_size=163840,
            num_attention_heads=64,
            n_routed_experts=384,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            routed_scaling_factor=2.827,
            num_nextn_predict_layers=0,
            max_position_embeddings=131072,
            rope_theta=50000.0,
            rope_scaling=YarnScaling(
                factor=32,
                original_max_position_embeddings=4096,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
            bos_token_id=163584,
            eos_token_id=163585,
        )

    @classmethod
    def moonlight(cls) -> ModelConfig:
        """Moonlight 16B-A3B: its config.json, field for field. Not quantised."""
        return cls(
            vocab_size=163840,
            hidden_size=2048,
            intermediate_size=11264,
            moe_intermediate_size=1408,
            num_hidden_layers=27,
            num_attention_heads=16,
            n_routed_experts=64,
            num_experts_per_tok=6,
            kv_lora_rank=512,
            q_lora_rank=None,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            n_shared_experts=2,
            first_k_dense_replace=1,
            routed_scaling_factor=2.446,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=50000.0,
            bos_token_id=163584,
            eos_token_id=163585,
        )

    @classmethod
    def glm_4_7_flash(cls) -> ModelConfig:
        """GLM-4.7-Flash, 30B-A3B: its config.json, field for field. Not quantised."""
        return cls(
            model_type="glm4_moe_lite",
            vocab_size=154880,
            hidden_size=2048,
            intermediate_size=10240,
            moe_intermediate_size=1536,
            num_hidden_layers=47,
            num_attention_heads=20,
            n_routed_experts=64,
            num_experts_per_tok=4,
            kv_lora_rank=512,
            q_lora_rank=768,
            qk_nope_head_dim=192,
            qk_rope_head_dim=64,
            v_head_dim=256,
            first_k_dense_replace=1,
            routed_scaling_factor=1.8,
            num_nextn_predict_layers=1,
            max_position_embeddings=202752,
            rms_norm_eps=1e-5,
            rope_theta=1e6,
            bos_token_id=None,
            eos_token_id=(154820, 154827, 154829),
        )

    @classmethod
    def mini(cls) -> ModelConfig:
        """The small model that comes with the book; every mechanism of the large one is in it.

        Its FP8 blocks can be cut over four ranks, and the ragged case is met: wkv_a is 160 x 192.
        A head's parts stand in the proportions of the large one, 2 : 1 : 2.
        """
        return cls(
            vocab_size=2048,
            hidden_size=192,
            intermediate_size=512,
            moe_intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=16,
            n_routed_experts=16,
            num_experts_per_tok=2,
            kv_lora_rank=128,
            q_lora_rank=256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            first_k_dense_replace=2,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=2.5,
            num_nextn_predict_layers=1,
            max_position_embeddings=1024,
            rope_scaling=YarnScaling(
                factor=4, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=1.0
            ),
            quantization_config=QuantizationConfig(),
        )

    def but(self, **changes) -> ModelConfig:
        """A copy with some fields changed, checked again."""
        return replace(self, **changes)


PRESETS = {
    "deepseek-v3": ModelConfig.deepseek_v3,
    "kimi-k2": ModelConfig.kimi_k2,
    "moonlight": ModelConfig.moonlight,
    "glm-4.7-flash": ModelConfig.glm_4_7_flash,
    "mini": ModelConfig.mini,
}
