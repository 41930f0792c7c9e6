"""Weights as a file has them: plain numbers, or FP8 codes with a grid of scales beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.errors import DSV3Error
from dsv3.fp8.formats import decode_scale
from dsv3.fp8.quantize import QuantizedTensor

_PLAIN = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def is_plain(name: str, weight: Tensor, scale: Tensor | None) -> bool:
    """Whether a weight of a file is in plain numbers; False for FP8 codes. DSV3Error for all else:
    bytes that may be codes, for one, would be taken for the numbers 0 to 255."""
    kind = getattr(weight, "dtype", type(weight).__name__)
    if kind == torch.float8_e4m3fn:
        return False
    if kind not in _PLAIN or scale is not None:
        raise DSV3Error(
            "not a weight that can be read",
            where=name,
            found=f"{kind} with scales" if scale is not None else kind,
            expected="float32, bfloat16, float16 or float64, or float8_e4m3fn with its scales",
        )
    return True


def stored_blocks(name: str, weight: Tensor, scale: Tensor | None) -> QuantizedTensor:
    """An FP8 weight of a file with its grid of scales; DSV3Error when that is not there."""
    if scale is None:
        raise DSV3Error(
            "FP8 weight without its scale", where=name, expected="its grid of scales beside it"
        )
    return QuantizedTensor(weight, decode_scale(scale))
