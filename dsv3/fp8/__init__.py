"""Chapter 4: block-scaled FP8. Numbers (formats), tensors (quantize), layers (product)."""

from dsv3.fp8.formats import decode_e4m3, decode_scale, encode_e4m3, encode_scale
from dsv3.fp8.product import linear, matmul
from dsv3.fp8.quantize import BLOCK, QuantizedTensor, quantize_activation, quantize_weight

__all__ = [
    "BLOCK", "QuantizedTensor", "decode_e4m3", "decode_scale", "encode_e4m3", "encode_scale",
    "linear", "matmul", "quantize_activation", "quantize_weight",
]
