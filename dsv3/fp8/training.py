"""FP8 training: the three products of a linear layer, all in E4M3 (TR 3.3).

A linear layer multiplies three times for each token it learns from:

    fprop   y  = x W^T       sums over inputs
    dgrad   dx = dy W        sums over outputs
    wgrad   dW = dy^T x      sums over tokens

A scale can leave a sum only if it is the same for all its terms, or for 128 of them in a row
(``dsv3.fp8.product``). So an operand is grouped along the axis that is summed over:

              left operand            right operand
    fprop     x   1 x 128             W   128 x 128
    dgrad     dy  1 x 128             W   128 x 128, transposed
    wgrad     dy  128 x 1             x   128 x 1           (rows are tokens)

W is quantised once for two products. A square block that is transposed has the same largest
number, hence the same scale and the same codes: nothing is rounded again.

x is not so lucky. The layer keeps it from fprop to wgrad as FP8, in 1 byte a number instead of 2,
and in between the tiles must turn from 1 x 128 to 128 x 1. With scales amax / 448 nearly every
number changes at that: a second rounding, as large as the first. With powers of two a number keeps
its four significant bits when its scale changes; only what is too small for the new scale is
rounded. Therefore x has power-of-two scales ("ue8m0"). dy is there in full when both its tilings
are made, so its scales may be any; and so may those of W.

The input of the projection after attention is also read by attention's own backward pass, where
E4M3 would be too coarse. The paper keeps that one in E5M6, 12 bits a number (``saved="e5m6"``).

Why tiles and not blocks for dy as well? The gradient of one token may be a thousand times
that of its neighbour. Inside a block of 128 tokens one of them decides the scale, and the others
fall below its smallest step. The paper tried it (App. B.2): a 16B model diverged.
``Fp8Recipe(gradients="block")`` is that experiment.

Scales are made from the tensor itself, at once ("online"); a maximum remembered from earlier steps
would be wrong just when a value jumps. The gradient of W leaves in float32, as the master weights
are. Embedding, head, router, norms and the attention core are not multiplied in FP8 at all.

On a GPU that multiplies E4M3 fprop and dgrad run in Triton kernels, and on Hopper wgrad does: its
kernel takes a scale for each row of its right operand, where the others take one for 128. Elsewhere
the operands are dequantised and multiplied in float32. A code times a power of two has four
significant bits, so with "ue8m0" on both sides bfloat16 holds the operands exactly. Where the
result is rounded to bfloat16 anyhow, the portable product is then taken in bfloat16: the same
numbers, two to three times as fast on a CPU with units for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from dsv3.bfloat16 import has_units
from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.formats import E5M6_MAX, block_scale, round_e5m6
from dsv3.fp8.product import matmul, outer
from dsv3.fp8.quantize import (
    ACTIVATION_BLOCK,
    COLUMN_BLOCK,
    WEIGHT_BLOCK,
    QuantizedTensor,
    quantize_activation,
    quantize_columns,
    quantize_weight,
    quantized_values,
)


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """How the products of training are quantised; the defaults are the paper's.

    gradients: groups of dy in dgrad, "tile" (1 x 128) or "block" (128 x 128, App. B.2).
    activation_scales, gradient_scales, weight_scales: format of the scales of x, dy and W,
    "float32" or "ue8m0". Raises DSV3Error for any other value.
    """

    gradients: str = "tile"
    activation_scales: str = "ue8m0"
    gradient_scales: str = "float32"
    weight_scales: str = "float32"

    def __post_init__(self):
        _one_of("gradients", self.gradients, ("tile", "block"))
        for name in ("activation_scales", "gradient_scales", "weight_scales"):
            _one_of(name, getattr(self, name), ("float32", "ue8m0"))


def _one_of(name: str, value: str, allowed: tuple[str, str]) -> None:
    if value not in allowed:
        raise DSV3Error(
            "unknown choice in FP8 training",
            where=name,
            found=repr(value),
            expected=" or ".join(allowed),
        )


def fp8_linear(
    x: Float[Tensor, "*lead in"],
    w: Float32[Tensor, "out in"],
    recipe: Fp8Recipe = Fp8Recipe(),
    saved: str = "e4m3",
) -> Float[Tensor, "*lead out"]:
    """y = x W^T with gradients, in FP8 products (TR 3.3.1, figure 6).

    x: float32, bfloat16 or float16, and so are y and dx; no rows at all are fine. w: the master
    weights, float32; so is their gradient. saved: what is kept of x for wgrad, "e4m3" or "e5m6".
    backward can be called, but its result has no gradient of its own. Raises DSV3Error for master
    weights of another dtype or shape.
    """
    _one_of("saved", saved, ("e4m3", "e5m6"))
    if w.dtype != torch.float32 or w.dim() != 2 or x.shape[-1] != w.shape[1]:
        raise DSV3Error(
            "master weights of the wrong dtype or shape",
            where="fp8_linear",
            found=f"{w.dtype} {tuple(w.shape)} for x {tuple(x.shape)}",
            expected=f"torch.float32 (out, {x.shape[-1]})",
        )
    return _Fp8Linear.apply(x, w, recipe, saved)


class _Fp8Linear(torch.autograd.Function):
    """Kept from forward to backward: codes and scales of x and W, nothing wider."""

    @staticmethod
    def forward(ctx, x, w, recipe, saved):
        rows = x.reshape(-1, x.shape[-1])
        xq = quantize_activation(rows, recipe.activation_scales)
        wq = quantize_weight(w, recipe.weight_scales)
        kept = (xq.data, xq.scale) if saved == "e4m3" else quantize_e5m6(rows)
        ctx.save_for_backward(*kept, wq.data, wq.scale)
        ctx.recipe, ctx.shape = recipe, x.shape
        return fprop(xq, wq, x.dtype).view(*x.shape[:-1], len(w))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        *kept, w_data, w_scale = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dw = None
        if ctx.needs_input_grad[0]:
            wq = QuantizedTensor(w_data, w_scale, WEIGHT_BLOCK, ctx.recipe.weight_scales)
            dx = dgrad(rows, wq, ctx.recipe).to(dy.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dw = wgrad(rows, dequantize_kept(*kept), ctx.recipe)
        return dx, dw, None, None


def fprop(
    xq: QuantizedTensor, wq: QuantizedTensor, dtype: torch.dtype
) -> Float[Tensor, "tokens out"]:
    """x W^T, rounded to ``dtype``."""
    if pick_backend(xq.device) == "triton":
        return matmul(xq, wq, dtype=dtype)
    exact = _operand_dtype(xq.device, dtype, xq.scale_format, wq.scale_format)
    return (xq.dequantize(exact) @ wq.dequantize(exact).T).to(dtype)


def dgrad(
    dy: Float[Tensor, "tokens out"], wq: QuantizedTensor, recipe: Fp8Recipe
) -> Float[Tensor, "tokens in"]:
    """dy W. dy is quantised here, W (out, in) is the one that fprop used."""
    if pick_backend(dy.device) == "triton":
        return matmul(quantize_gradient(dy, recipe), transpose(wq), dtype=dy.dtype)
    block = ACTIVATION_BLOCK if recipe.gradients == "tile" else WEIGHT_BLOCK
    dtype = _operand_dtype(dy.device, dy.dtype, recipe.gradient_scales, wq.scale_format)
    return quantized_values(dy, block, recipe.gradient_scales, dtype) @ wq.dequantize(dtype)


def wgrad(
    dy: Float[Tensor, "tokens out"], x: Float[Tensor, "tokens in"], recipe: Fp8Recipe
) -> Float32[Tensor, "out in"]:
    """dy^T x, both quantised here in tiles of 128 x 1.

    x holds values that were quantised before, in tiles of 1 x 128. With "ue8m0" scales the second
    time changes only those below 2^-6 of their new scale (TR 3.3.3).
    """
    if pick_backend(dy.device) == "triton":
        return outer(
            quantize_columns(dy, recipe.gradient_scales),
            quantize_columns(x, recipe.activation_scales),
        )
    dy = quantized_values(dy, COLUMN_BLOCK, recipe.gradient_scales)
    return dy.T @ quantized_values(x, COLUMN_BLOCK, recipe.activation_scales)


def transpose(w: QuantizedTensor) -> QuantizedTensor:
    """W^T from W (out, in) in square blocks: the same codes and scales in another order."""
    return QuantizedTensor(w.data.T.contiguous(), w.scale.T.contiguous(), w.block, w.scale_format)


def quantize_gradient(dy: Float[Tensor, "tokens out"], recipe: Fp8Recipe) -> QuantizedTensor:
    """dy for dgrad, as tiles of 1 x 128.

    Blocks of 128 x 128 are tiles too: 128 of them below one another have the same scale.
    """
    if recipe.gradients == "tile":
        return quantize_activation(dy, recipe.gradient_scales)
    blocks = quantize_weight(dy, recipe.gradient_scales)
    scale = blocks.scale.repeat_interleave(BLOCK, 0)[: len(dy)]
    return QuantizedTensor(blocks.data, scale, ACTIVATION_BLOCK, recipe.gradient_scales)


def quantize_e5m6(
    x: Float[Tensor, "tokens in"],
) -> tuple[Float16[Tensor, "tokens in"], Float32[Tensor, "tokens tiles"]]:
    """x in E5M6 with a power-of-two scale for each tile of 1 x 128 (TR 3.3.3)."""
    tiles = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = block_scale(tiles.abs().amax(-1), "ue8m0", E5M6_MAX)
    codes = round_e5m6(tiles / scale[..., None])
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), scale


def dequantize_kept(
    data: Float[Tensor, "tokens in"], scale: Float32[Tensor, "tokens tiles"]
) -> Float32[Tensor, "tokens in"]:
    """The values of x as forward kept them, in E4M3 or in E5M6."""
    if data.dtype == torch.float16:
        return data.float() * scale.repeat_interleave(BLOCK, 1)[:, : data.shape[1]]
    return QuantizedTensor(data, scale, ACTIVATION_BLOCK).dequantize()


def _operand_dtype(device: torch.device, result: torch.dtype, *scale_formats: str) -> torch.dtype:
    """bfloat16 where it holds the operands exactly, the result is wanted in it, and the processor
    has units for it."""
    exact = all(name == "ue8m0" for name in scale_formats) and has_units(device)
    return torch.bfloat16 if exact and result == torch.bfloat16 else torch.float32
