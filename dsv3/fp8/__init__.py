"""Chapter 4: block-scaled FP8. Numbers (small_floats, formats), tensors (quantize), layers
(product, experts), their gradients (training), and what a tensor core loses in its sums
(accumulation)."""

from dsv3.fp8.accumulation import Accumulator
from dsv3.fp8.experts import fused_experts
from dsv3.fp8.formats import decode_e4m3, decode_scale, encode_e4m3, encode_scale
from dsv3.fp8.product import linear, matmul, outer
from dsv3.fp8.quantize import (
    ACTIVATION_BLOCK,
    LARGEST_SCALE,
    WEIGHT_BLOCK,
    QuantizedTensor,
    quantize_activation,
    quantize_columns,
    quantize_weight,
    scale_shape,
)
from dsv3.fp8.training import Fp8Recipe, fp8_linear

__all__ = [
    "Accumulator",
    "Fp8Recipe",
    "QuantizedTensor",
    "ACTIVATION_BLOCK",
    "LARGEST_SCALE",
    "WEIGHT_BLOCK",
    "decode_e4m3",
    "decode_scale",
    "encode_e4m3",
    "encode_scale",
    "fp8_linear",
    "fused_experts",
    "linear",
    "matmul",
    "outer",
    "quantize_activation",
    "quantize_columns",
    "quantize_weight",
    "scale_shape",
]
