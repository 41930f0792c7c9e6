"""One model in every form: ours in three precisions, transformers', the released code's.

All have the same weights, which are those of an FP8 checkpoint: random numbers, quantised once. So
what an FP8 model multiplies, and what the others multiply, are the same numbers, and the logits can
be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dsv3 import fp8
from dsv3.bench.peers import transformers
from dsv3.bench.released import Released
from dsv3.checkpoint.comparison import load, their_names
from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.model import Transformer
from dsv3.moe import MoE
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

T = TypeVar("T")

# About 108M parameters, of which a token uses 46M.
CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=32,
    num_experts_per_tok=4,
    kv_lora_rank=256,
    q_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=16384,
)


def stored(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights as a checkpoint of the released format has them, under our names."""
    numbers = Transformer(config).init_weights(seed).state_dict()
    out: dict[str, Tensor] = {}
    for spec in layout(config.but(quantization_config=QuantizationConfig())):
        if spec.scale:
            codes = fp8.quantize_weight(numbers[spec.name])
            out[spec.name], out[spec.scale.name] = codes.data, codes.scale
        elif not spec.scale_of:
            out[spec.name] = numbers[spec.name]
    return out


def moe_layer(config: ModelConfig, experts: int, precision: str) -> MoE:
    """A layer of so many experts with random weights, the same in each precision."""
    config = config.but(n_routed_experts=experts)
    with torch.inference_mode(False):
        plain = MoE(config, Precision.of("fp32", config), TensorGroup())
        random = torch.Generator().manual_seed(0)
        for value in plain.parameters():
            value.data.normal_(0, config.initializer_range, generator=random)
        for value in plain.buffers():
            value.zero_()
        if precision == "fp32":
            return plain.requires_grad_(False)
        other = MoE(config, Precision.of(precision, config), TensorGroup())
        other.load_state_dict(plain.state_dict())
        return other.requires_grad_(False)


class Models:
    """Each form of one model, made when it is first asked for."""

    def __init__(self, device: torch.device, config: ModelConfig = CONFIG):
        self.config, self.device = config, device
        self._made: dict[Any, Any] = {}

    def of(self, config: ModelConfig) -> Models:
        """The same for another config, kept likewise."""
        return self._once(config, lambda: Models(self.device, config))

    def weights(self) -> dict[str, Tensor]:
        """As ``stored``."""
        return self._once("weights", lambda: stored(self.config))

    def ours(self, precision: str) -> Transformer:
        return self._once(precision, partial(self._ours, precision))

    def compiled(self, precision: str) -> Transformer:
        """The same weights, decoding by compiled code."""
        return self._once(
            ("compiled", precision), lambda: copy.copy(self.ours(precision)).compile()
        )

    def layer(self, precision: str, number: int) -> Any:
        """A block of ours, with its ``attn`` and ``ffn``."""
        return self.ours(precision).layers[number]

    def theirs(self, dtype: torch.dtype) -> Any:
        """transformers' model. Raises Missing where it is not installed."""
        return self._once(dtype, partial(self._theirs, dtype))

    def released(self, dtype: torch.dtype) -> Released:
        """Weights in FP8, products in ``dtype``."""
        return self._once(
            ("released", dtype), lambda: Released(self.config, self.weights(), dtype, self.device)
        )

    def text(self, length: int, rows: int = 1) -> Tensor:
        """(rows, length) random ids, the same every time."""
        random = torch.Generator().manual_seed(length)
        return torch.randint(self.config.vocab_size, (rows, length), generator=random).to(
            self.device
        )

    def _once(self, key: object, make: Callable[[], T]) -> T:
        if key not in self._made:
            with torch.inference_mode(False):
                self._made[key] = make()
        return self._made[key]

    def _ours(self, precision: str) -> Transformer:
        model = Transformer(self.config, precision, device=self.device)
        model.load_state_dict(dict(self.weights()))
        return model.eval().requires_grad_(False)

    def _theirs(self, dtype: torch.dtype) -> nn.Module:
        numbers = self.ours("fp32").state_dict()
        return in_transformers(self.config, numbers).to(self.device, dtype).requires_grad_(False)


def in_transformers(config: ModelConfig, numbers: Mapping[str, Tensor]) -> nn.Module:
    """transformers' model with a copy of these weights, which have our names. Raises Missing."""
    library = transformers()
    fields = config.to_dict() | {"num_mtp_layers": 0}
    model = library.DeepseekV3ForCausalLM(library.DeepseekV3Config(**fields)).eval()
    names = {spec.hf_name: numbers[spec.name].clone() for spec in layout(config)}
    load(model, their_names(config, names)[0])
    return model
