"""How numbers are kept and multiplied: one object, chosen per model.

=======  ==========================  =====================================================
name     weights in memory           products
=======  ==========================  =====================================================
fp32     float32                     float32; the oracle mode
bf16     bfloat16                    bfloat16 operands, float32 accumulation
fp8      E4M3, a scale per 128x128   operands E4M3, activations scaled per 1x128 (TR 3.3)
=======  ==========================  =====================================================

In every mode the norms, the router and the attention core compute in float32; in fp8 the
embedding, the head and MTP's eh_proj stay bfloat16 (TR 3.3, FACTS of the released dtypes). Where
a product is a partial sum that other products are added to, it is asked for in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error

# Rows of a bfloat16 weight that are widened at a time: small enough to stay in a core's cache.
_WIDEN_ROWS = 1024


@dataclass(frozen=True)
class Precision:
    """name: "fp32", "bf16" or "fp8"; dtype: activations and unquantised weights; quantized:
    whether linear weights stay in FP8 blocks; scale_format: of those blocks and of activations.
    """

    name: str
    dtype: torch.dtype
    quantized: bool = False
    scale_format: str = "float32"

    @classmethod
    def of(cls, name: str, config: ModelConfig) -> Precision:
        """The precision called ``name`` for a model of this config."""
        if name == "fp32":
            return cls(name, torch.float32)
        if name == "bf16":
            return cls(name, torch.bfloat16)
        if name == "fp8":
            return cls(name, torch.bfloat16, quantized=True, scale_format=config.scale_fmt)
        raise DSV3Error("unknown precision", where="precision", found=name,
                        expected="fp32, bf16 or fp8")


def linear_fp32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T with a float32 result that was never rounded to fewer bits.

    x (..., K) and weight (N, K) in float32 or bfloat16. Returns (..., N) float32.
    """
    if weight.dtype == torch.float32:
        return F.linear(x.float(), weight)
    if x.is_cuda:
        flat = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32)
        return flat.view(*x.shape[:-1], -1)
    wide = x.float()
    parts = [F.linear(wide, rows.float()) for rows in weight.split(_WIDEN_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
