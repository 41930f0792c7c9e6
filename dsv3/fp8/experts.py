"""Routed experts in one go: w2( silu(w1 x) * w3 x ) of rows sorted by expert, codes in, sums out.

The plain form multiplies expert by expert and asks where each one's rows end. The fused form, a
pair of Triton kernels (``dsv3.kernels.experts``), leaves that question on the GPU and keeps what
is between the products in codes. Both round at the same points.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from dsv3.backward import without_backward
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.quantize import NO_GRADIENT, QuantizedTensor
from dsv3.opaque import opaque


def fused_experts(
    x: Float[Tensor, "choices d"] | QuantizedTensor,
    w13: Tensor | QuantizedTensor,
    w2: Tensor | QuantizedTensor,
    ends: Int[Tensor, " experts"],
    backend: str | None = None,
) -> Float32[Tensor, "choices d"] | None:
    """w2( silu(w1 x) * w3 x ) of rows sorted by expert, each by its own expert, unrounded; None
    where no kernel serves: operands that are not in FP8, another chip than Hopper, odd sizes.

    x (choices, d), w13 (experts, 2, inner, d), w2 (experts, d, inner). ends: where each expert's
    rows end; what follows the last is junk. A gradient through it is refused.
    """
    if not isinstance(x, QuantizedTensor) or not can_fuse(w13, w2, backend) or len(x) == 0:
        return None

    def product(data: Tensor, scale: Tensor) -> Tensor:
        kind = w2.scale_format
        return _fused(data, scale, w13.data, w13.scale, w2.data, w2.scale, ends, kind)

    return without_backward(product, x.data.contiguous(), x.scale, **NO_GRADIENT)


def can_fuse(
    w13: Tensor | QuantizedTensor, w2: Tensor | QuantizedTensor, backend: str | None = None
) -> bool:
    """Whether kernels serve these experts, whatever rows come: then nothing has to know on the host
    where each one's rows end."""
    if not isinstance(w13, QuantizedTensor) or not isinstance(w2, QuantizedTensor):
        return False
    if pick_backend(w13.device, backend) != "triton":
        return False
    from dsv3.kernels.experts import serves

    return serves(w13.data, w2.data)


@opaque(
    "fused_experts(Tensor x, Tensor x_scale, Tensor w13, Tensor w13_scale, Tensor w2, "
    "Tensor w2_scale, Tensor ends, str scale_format) -> Tensor",
    like=lambda x, x_scale, w13, w13_scale, w2, *_: x.new_empty(
        (len(x), w2.shape[1]), dtype=torch.float32
    ),
)
def _fused(x, x_scale, w13, w13_scale, w2, w2_scale, ends, scale_format):
    from dsv3.kernels.experts import experts

    return experts(x, x_scale, w13, w13_scale, w2, w2_scale, ends, scale_format)
