"""The block-scaled product: FP8 operands, FP32 sums (TR 3.3.2, figure 7).

A layer y = x W^T in FP8 quantises x on the way in and multiplies the codes:

    y[m, n] = sum over blocks k of  sx[m, k] * sw[n / 128, k] * ( sum of 128 products of codes )

The scales are constant inside a block of 128 along K, so a tensor core can multiply bare codes and
the scales come in once every 128 products, where the partial sum is promoted to an FP32 register.
That promotion is also what keeps the sum exact: the tensor core itself adds with about 14 bits.

Three forms compute the same sum.

* "triton": a kernel on a GPU that multiplies E4M3 itself: ``dsv3.kernels.persistent_gemm`` on
  Hopper where rows start at multiples of 16 bytes, else ``dsv3.kernels.fp8_gemm``.
* "numba": on a CPU, for few rows, a compiled loop over the codes: ``dsv3.kernels.cpu_fp8``.
* "torch": everywhere else. A run of rows of W is dequantised, multiplied, and forgotten. W stays in
  FP8 in memory; nothing that was dequantised outlives the call.

Sums in float64, which precision "fp8" takes on a CPU, come out the same in the last two to 2^-50 or
so: code times scale is then a number without rounding. Sums in float32 are within 1e-5 of the
float64 product of the dequantised operands (on a GPU as long as TF32 is off).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float8e4m3fn, Float32
from torch import Tensor

from dsv3.backward import without_backward
from dsv3.errors import DSV3Error
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.quantize import (
    ACTIVATION_BLOCK,
    COLUMN_BLOCK,
    NO_GRADIENT,
    WEIGHT_BLOCK,
    QuantizedTensor,
    dequantize_rows,
    quantize_activation,
    row_chunks,
)
from dsv3.opaque import opaque

# On a CPU, loops over codes serve up to so many rows. Beyond, the library's product of large
# matrices makes up for the numbers that are written down for it.
ROWS_IN_LOOPS = 16


def linear(
    x: Float[Tensor, "*lead in"], w: QuantizedTensor, backend: str | None = None
) -> Float32[Tensor, "*lead out"]:
    """x times W^T for W (out, in) in FP8.

    x is quantised per token and 128 channels, with scales of the format that W has.
    backend: "torch", "numba", "triton", or None for the best one on x's device.
    """
    backend = pick_backend(x.device, backend)
    return matmul(quantize_activation(x, w.scale_format, backend), w, backend=backend)


def matmul(
    xq: QuantizedTensor,
    wq: QuantizedTensor,
    sums: torch.dtype = torch.float32,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... out"]:
    """The product of quantised activations (..., in) and weights (out, in).

    sums: dtype in which products are added up; float64 not for the "triton" form. dtype: what the
    sums are rounded to, once; None leaves them as they are.
    No rows at all (an expert without tokens) are fine. NaN scales of activations come out as NaN.
    A gradient through it is refused (``dsv3.backward``); ``fp8_linear`` is the product that trains.
    """
    _check_operands(xq, wq)

    def product(x, x_scale):
        return _product(x, x_scale, wq.data, wq.scale, sums, backend, dtype or sums)

    return without_backward(product, xq.data, xq.scale, **NO_GRADIENT)


def outer(
    a: QuantizedTensor, b: QuantizedTensor, backend: str | None = None
) -> Float32[Tensor, "a_cols b_cols"]:
    """a^T b for a and b in tiles of 128 x 1, one scale for each column and 128 rows: a sum over
    rows, in float32. The gradient of a weight is one, of its output's gradient and its input.
    """
    if a.block != COLUMN_BLOCK or b.block != COLUMN_BLOCK or len(a) != len(b):
        raise DSV3Error(
            "operands of a sum over rows in the wrong form",
            found=f"{tuple(a.shape)} in blocks {a.block}, {tuple(b.shape)} in blocks {b.block}",
            expected="two matrices of as many rows in (128, 1) tiles",
            fix="Quantise both with quantize_columns.",
        )
    if pick_backend(a.device, backend) == "triton":
        from dsv3.kernels.persistent_gemm import persistent_gemm, serves

        if serves(a.data.T, b.data.T):
            return persistent_gemm(a.data.T, a.scale.T, b.data.T, b.scale.T, rows_of_w=1)
    return a.dequantize().T @ b.dequantize()


@opaque(
    "fp8_product(Tensor x, Tensor x_scale, Tensor w, Tensor w_scale, ScalarType sums, "
    "str? backend, ScalarType dtype) -> Tensor",
    like=lambda x, x_scale, w, w_scale, sums, backend, dtype: x.new_empty(
        (*x.shape[:-1], w.shape[0]), dtype=dtype
    ),
)
def _product(
    x: Float8e4m3fn[Tensor, "... inner"],
    x_scale: Float32[Tensor, "... tiles"],
    w: Float8e4m3fn[Tensor, "out inner"],
    w_scale: Float32[Tensor, "blocks tiles"],
    sums: torch.dtype,
    backend: str | None,
    dtype: torch.dtype,
) -> Float[Tensor, "... out"]:
    shape, k = (*x.shape[:-1], w.shape[0]), x.shape[-1]
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=x.device)
    backend = pick_backend(x.device, backend)
    if backend == "numba" and x.shape[:-1].numel() <= ROWS_IN_LOOPS:
        from dsv3.kernels import cpu_fp8

        return cpu_fp8.product(x, x_scale, w, w_scale).to(dtype)
    x, x_scale = x.reshape(-1, k), x_scale.reshape(-1, x_scale.shape[-1])
    if backend == "triton":
        if sums != torch.float32:
            raise DSV3Error(
                "the Triton product adds up in float32",
                where="sums",
                found=sums,
                fix='Use the "torch" backend for wider sums',
            )
        out = _product_triton(x, x_scale, w, w_scale, dtype)
    else:
        out = _product_torch(x, x_scale, w, w_scale, sums).to(dtype)
    return out.view(shape)


def _product_triton(
    x: Float8e4m3fn[Tensor, "rows inner"],
    x_scale: Float32[Tensor, "rows tiles"],
    w: Float8e4m3fn[Tensor, "out inner"],
    w_scale: Float32[Tensor, "blocks tiles"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows out"]:
    from dsv3.kernels.fp8_gemm import fp8_gemm
    from dsv3.kernels.persistent_gemm import persistent_gemm, serves

    # Which it is does not depend on the number of rows.
    if dtype in (torch.float32, torch.bfloat16) and serves(x, w):
        return persistent_gemm(x, x_scale, w, w_scale, dtype)
    return fp8_gemm(x, x_scale, w, w_scale).to(dtype)


def _product_torch(
    x: Float8e4m3fn[Tensor, "rows inner"],
    x_scale: Float32[Tensor, "rows tiles"],
    w: Float8e4m3fn[Tensor, "out inner"],
    w_scale: Float32[Tensor, "blocks tiles"],
    sums: torch.dtype,
) -> Float[Tensor, "rows out"]:
    """x times W^T in ``sums``, a run of W's rows at a time."""
    n, k = w.shape
    values = _values(x, x_scale, sums)
    chunks = list(row_chunks((n, k), WEIGHT_BLOCK[0]))
    buffer = torch.empty(chunks[0][0].stop, k, dtype=sums, device=x.device)
    out = values.new_empty(len(x), n)
    for rows, blocks in chunks:
        codes = w[rows]
        run = dequantize_rows(codes, w_scale[blocks], WEIGHT_BLOCK, out=buffer[: len(codes)])
        if len(x) == 1:
            torch.mv(run, values[0], out=out[0, rows])
        else:
            out[:, rows] = values @ run.T
    return out


def _values(
    x: Float8e4m3fn[Tensor, "rows inner"], scale: Float32[Tensor, "rows tiles"], dtype: torch.dtype
) -> Float[Tensor, "rows inner"]:
    """code * scale of activations, of which nothing is asked: NaN codes come with NaN scales. A
    scale can be as large as 2^120, so it comes in smaller by 256 and the values are mended."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for rows, tiles in row_chunks(x.shape, ACTIVATION_BLOCK[0]):
        dequantize_rows(x[rows], scale[tiles] / 256.0, ACTIVATION_BLOCK, out=out[rows])
    return out.mul_(256.0)


def _check_operands(xq: QuantizedTensor, wq: QuantizedTensor) -> None:
    if xq.block != ACTIVATION_BLOCK or wq.block != WEIGHT_BLOCK or len(wq.shape) != 2:
        raise DSV3Error(
            "operands of an FP8 product in the wrong form",
            found=f"x in blocks {xq.block}, w {tuple(wq.shape)} in blocks {wq.block}",
            expected="x in (1, 128) tiles and a matrix w in (128, 128) blocks",
            fix="Quantise x with quantize_activation and w with quantize_weight; "
            "index a stack of experts first.",
        )
    if xq.shape[-1] != wq.shape[1]:
        raise DSV3Error(
            "inner sizes of an FP8 product differ",
            found=f"x {tuple(xq.shape)}, w {tuple(wq.shape)}",
            expected="the last axes to be equal",
        )
