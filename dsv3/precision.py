"""How numbers are kept and multiplied: one object, chosen per model.

=======  ==========================  =====================================================
name     weights in memory           products
=======  ==========================  =====================================================
fp32     float32                     float32; the oracle mode
bf16     bfloat16                    bfloat16 operands, float32 accumulation
fp8      E4M3, a scale per 128x128   operands E4M3, activations scaled per 1x128 (TR 3.3)
=======  ==========================  =====================================================

In every mode the norms, the router and the attention core compute wider than the weights are
kept; in fp8 the embedding, the head and MTP's eh_proj stay bfloat16, as released (TR 3.3).

Sums are taken in ``sums`` and rounded once, when they are whole. That is float32, and float64 for
fp8 on a CPU, for this reason: two orders of one float32 sum differ in the last bit. Rounded to
bfloat16, one value in 30,000 then lands on the other side; rounded to E4M3 after that, the step
is 6 to 12 percent, and a handful of such steps move all logits by about one percent. The text
would depend on how a prompt was cut into chunks, on its neighbours in the batch, on drafting and
on the number of ranks. With float64 sums it does not. (A GPU is no way out: Hopper's tensor cores
add FP8 products with about 14 bits, and only what they hand over every 128 products is float32.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.fp8.training import Fp8Recipe

# Rows of a bfloat16 weight that are widened at a time: small enough to stay in a core's cache.
_WIDEN_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Precision:
    """name: "fp32", "bf16" or "fp8"; dtype: activations; weights: unquantised weights in memory;
    sums: router, logits and partial sums, before they are rounded; core: attention between the
    projections; quantized: whether linear weights stay in FP8 blocks; scale_format: of those
    blocks and of activations; trains: whether the weights are to be trained; fp8: how a model in
    training multiplies in FP8, if it does; recompute: whether training keeps less for the backward
    pass (``dsv3.recompute``).
    """

    name: str
    dtype: torch.dtype
    weights: torch.dtype
    sums: torch.dtype = torch.float32
    core: torch.dtype = torch.float32
    quantized: bool = False
    scale_format: str = "float32"
    trains: bool = False
    fp8: Fp8Recipe | None = None
    recompute: bool = False

    @classmethod
    def of(cls, name: str, config: ModelConfig, device: torch.device) -> Precision:
        """The precision called ``name`` for using a model of this config on this device."""
        if name == "fp32":
            return cls(name=name, dtype=torch.float32, weights=torch.float32)
        if name == "bf16":
            return cls(name=name, dtype=torch.bfloat16, weights=torch.bfloat16)
        if name == "fp8":
            return cls(
                name=name,
                dtype=torch.bfloat16,
                weights=torch.bfloat16,
                quantized=True,
                scale_format=config.scale_fmt,
            ).on(device)
        raise _unknown(name)

    def on(self, device: torch.device) -> Precision:
        """The same precision where the model lives on ``device``."""
        if not self.quantized:
            return self
        sums = torch.float64 if device.type == "cpu" else torch.float32
        return replace(self, sums=sums, core=sums)

    @classmethod
    def training(
        cls, name: str, fp8: Fp8Recipe = Fp8Recipe(), recompute: bool = False
    ) -> Precision:
        """The precision called ``name`` for training: float32 master weights in every mode.

        A step of AdamW changes a weight by about 1e-3 of itself or less; bfloat16 holds steps of
        4e-3, so most updates would be rounded away (TR 3.3.3). In bf16 and fp8 a product takes a
        rounded copy of the weights, and activations and the attention core are bfloat16.
        """
        if name == "fp32":
            return cls(
                name=name,
                dtype=torch.float32,
                weights=torch.float32,
                trains=True,
                recompute=recompute,
            )
        if name in ("bf16", "fp8"):
            return cls(
                name=name,
                dtype=torch.bfloat16,
                weights=torch.float32,
                core=torch.bfloat16,
                trains=True,
                fp8=fp8 if name == "fp8" else None,
                recompute=recompute,
            )
        raise _unknown(name)

    @property
    def has_masters(self) -> bool:
        """Whether weights are kept wider than they are multiplied."""
        return self.weights.itemsize > self.dtype.itemsize


def _unknown(name: str) -> DSV3Error:
    return DSV3Error(
        "unknown precision", where="precision", found=name, expected="fp32, bf16 or fp8"
    )


def wide_linear(
    x: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"], sums: torch.dtype
) -> Float[Tensor, "*lead out"]:
    """x @ weight.T, summed in ``sums`` and not rounded to fewer bits.

    x and weight come in float32 or bfloat16, the result leaves in ``sums``.
    """
    if weight.dtype == sums:
        return F.linear(x.to(sums), weight)
    if x.is_cuda:
        flat = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=sums)
        return flat.view(*x.shape[:-1], -1)
    wide = x.to(sums)
    parts = [F.linear(wide, rows.to(sums)) for rows in weight.split(_WIDEN_ROWS)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
