"""Quantised tensors: bytes, and one scale for each block of them (TR 3.3.2, figure 7a).

E4M3 spans 2^-9 to 448. One outlier in a tensor would push everything else out at the lower end
if the whole tensor shared a scale. So a scale serves few numbers:

    weights      128 x 128 blocks    scale[i, j] = max |w| in the block / 448
    activations  1 x 128 tiles       one scale for each token and 128 channels
    (training)   128 x 1 tiles       one scale for each channel and 128 tokens: for the product
                                     that sums over tokens, the gradient of a weight

    value = code * scale,            code = round_to_E4M3(value / scale)

Activations need the finer grid because outliers come with single tokens; weights, quantised once,
do with the coarser one, and it makes the product cheap. A last block that is not full (the 576
rows of wkv_a are 4.5 blocks) counts as padded with zeros: it has its own scale, so there are
ceil(rows / 128) of them.

How scales were made is a property of the tensor, not an argument that someone can forget: a layer
whose weights have power-of-two scales ("ue8m0") quantises its activations the same way. Here we
differ on purpose from the released code, whose column- and row-parallel layers forget the format
and scale their activations by any float32.

A block with an infinity or a NaN gets the scale NaN: all of it, and all that is computed from it,
is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int, Shaped
from torch import Tensor

from dsv3.backward import without_backward
from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.formats import (
    E4M3,
    block_scale,
    decode_e4m3,
    decode_finite,
    has_nan_code,
    is_nan_code,
    round_e4m3,
    to_e4m3,
)
from dsv3.opaque import opaque

WEIGHT_BLOCK = (BLOCK, BLOCK)
ACTIVATION_BLOCK = (1, BLOCK)
COLUMN_BLOCK = (BLOCK, 1)
# What a gradient through FP8 codes is told.
NO_GRADIENT = dict(
    what="no gradient goes back through stored FP8 codes",
    fix='Train with Transformer(config, Precision.training("fp8")), or use bf16 or fp32',
)
# Scales of weights stay below this, so that 256 times a scale is a number (``dequantize_rows``).
LARGEST_SCALE = 2.0**120
# Numbers worked on at a time: few enough for their FP32 copies to stay near the core. There is one
# copy (2 MiB) in dequantising, and there are several in quantising.
_CHUNK = 1 << 19
_QUANTIZED_AT_ONCE = 1 << 17
# What loops on a CPU write.
_LOOPED = (torch.float32, torch.float64, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """E4M3 codes with their block scales. value[.., r, c] = data[.., r, c] * scale[.., r/br, c/bc].

    data: float8_e4m3fn (..., rows, cols); for activations the leading axes may be any, with rows
        or without. scale: float32 (..., ceil(rows/br), ceil(cols/bc)). block: (br, bc).
    """

    data: Float8e4m3fn[Tensor, "... cols"]
    scale: Float32[Tensor, "... col_blocks"]
    block: tuple[int, int] = WEIGHT_BLOCK
    scale_format: str = "float32"

    def __post_init__(self):
        if self.data.dtype != E4M3 or self.scale.dtype != torch.float32:
            raise DSV3Error(
                "wrong dtypes of a quantised tensor",
                found=f"data {self.data.dtype}, scale {self.scale.dtype}",
                expected="data torch.float8_e4m3fn, scale torch.float32",
                fix="Stored scales of other dtypes go through decode_scale.",
            )
        if self.scale_format not in ("float32", "ue8m0"):
            raise DSV3Error(
                "unknown scale format", found=self.scale_format, expected="float32 or ue8m0"
            )
        expected = scale_shape(self.data.shape, self.block)
        if self.scale.shape != expected:
            raise DSV3Error(
                "scales do not match the quantised data",
                found=f"scale {tuple(self.scale.shape)}",
                expected=f"{expected} for data {tuple(self.data.shape)} in blocks of "
                f"{self.block[0]}x{self.block[1]}",
            )

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.data.nbytes + self.scale.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def __getitem__(self, index: int | slice) -> QuantizedTensor:
        """One matrix of a stack (experts, rows, cols), or a run of rows of activations: a view."""
        return QuantizedTensor(self.data[index], self.scale[index], self.block, self.scale_format)

    def index_select(self, dim: int, index: Int[Tensor, " n"]) -> QuantizedTensor:
        """Rows of activations by number, copied, as of a Tensor."""
        at = (slice(None),) * dim + (index,)
        return QuantizedTensor(self.data[at], self.scale[at], self.block, self.scale_format)

    def flatten(self, first: int, last: int) -> QuantizedTensor:
        """Axes of activations merged, as of a Tensor."""
        return QuantizedTensor(
            self.data.flatten(first, last),
            self.scale.flatten(first, last),
            self.block,
            self.scale_format,
        )

    def __len__(self) -> int:
        return len(self.data)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        return QuantizedTensor(
            self.data.to(device), self.scale.to(device), self.block, self.scale_format
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "... cols"]:
        """The values: code * scale in FP32, rounded once to ``dtype``. NaN codes give NaN."""
        if self.data.dim() > 2 and self.block[0] > 1:  # a stack: its matrices, one by one
            return torch.stack([matrix.dequantize(dtype) for matrix in self])
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        data, scale, flat = _matrix(self.data), _matrix(self.scale), _matrix(out)
        if dtype in _LOOPED and self.block[1] == BLOCK and pick_backend(self.device) == "numba":
            return dequantize_rows(data, scale, self.block, flat).view(self.shape)
        for rows, blocks in row_chunks(data.shape, self.block[0]):
            if not (scale[blocks] < LARGEST_SCALE).all():
                wide = scale[blocks].repeat_interleave(self.block[0], 0)
                wide = wide.repeat_interleave(self.block[1], 1)
                some = data[rows]
                flat[rows] = decode_e4m3(some).mul_(wide[: some.shape[0], : some.shape[1]])
                continue
            in_place = flat[rows] if dtype == torch.float32 else None
            values = dequantize_rows(data[rows], scale[blocks], self.block, in_place)
            if has_nan_code(data[rows]):
                values.masked_fill_(is_nan_code(data[rows]), torch.nan)
            if in_place is None:
                flat[rows] = values
        return out

    def check(self, where: str) -> QuantizedTensor:
        """Refuse what no quantiser makes: NaN codes, and scales that are not positive numbers.

        To be called once, on what comes from a file: the products trust it afterwards.
        """
        if has_nan_code(self.data):
            raise DSV3Error(
                "NaN among the quantised weights",
                where=where,
                fix="The file is damaged or was quantised from broken weights.",
            )
        return self.check_scales(where)

    def check_scales(self, where: str) -> QuantizedTensor:
        """Refuse scales that are not positive numbers, or so large that values overflow."""
        if not ((self.scale > 0) & (self.scale < LARGEST_SCALE)).all():
            finite = bool(self.scale.isfinite().all()) and bool((self.scale > 0).all())
            raise DSV3Error(
                "a scale is so large that values overflow"
                if finite
                else "a scale is not a positive finite number",
                where=where,
                fix="The file is damaged or was quantised from broken weights.",
            )
        return self


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales for data of ``shape``: ragged last blocks count as whole ones."""
    if len(shape) == 0 or (len(shape) == 1 and block[0] != 1):
        raise DSV3Error(
            "too few dimensions to be cut into blocks",
            found=tuple(shape),
            expected=f"rows and columns for blocks of {block[0]}x{block[1]}",
        )
    tiles = -(-shape[-1] // block[1])
    if block[0] == 1:
        return (*shape[:-1], tiles)
    return (*shape[:-2], -(-shape[-2] // block[0]), tiles)


def quantize_weight(
    w: Float[Tensor, "... rows cols"], scale_format: str = "float32"
) -> QuantizedTensor:
    """Weights of any float dtype to E4M3 with one scale per 128 x 128 block."""
    return _quantize(w, WEIGHT_BLOCK, scale_format)


def quantize_activation(
    x: Float[Tensor, "... cols"], scale_format: str = "float32", backend: str | None = None
) -> QuantizedTensor:
    """Activations to E4M3 with one scale per token and 128 channels.

    backend: "torch", "numba", "triton", or None for the best one on x's device; all give the same
    bits.
    A gradient through it is refused (``dsv3.backward``).
    """

    def quantized(x):
        return _quantized_activation(x, scale_format, backend)

    data, scale = without_backward(quantized, x, **NO_GRADIENT)
    return QuantizedTensor(data, scale, ACTIVATION_BLOCK, scale_format)


def _like_activation(x, scale_format, backend):
    scale = x.new_empty(scale_shape(x.shape, ACTIVATION_BLOCK), dtype=torch.float32)
    return torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format), scale


@opaque(
    "quantize_activation(Tensor x, str scale_format, str? backend) -> (Tensor, Tensor)",
    like=_like_activation,
)
def _quantized_activation(x, scale_format, backend):
    backend = pick_backend(x.device, backend)
    if backend == "triton":
        from dsv3.kernels.act_quant import act_quant

        return act_quant(x, scale_format)
    if backend == "numba":
        from dsv3.kernels import cpu_fp8

        return cpu_fp8.quantize(x, scale_format)
    codes = _quantize(x, ACTIVATION_BLOCK, scale_format)
    return codes.data, codes.scale


def quantize_columns(
    x: Float[Tensor, "tokens channels"], scale_format: str = "float32", backend: str | None = None
) -> QuantizedTensor:
    """Activations to E4M3 with one scale per channel and 128 tokens (TR 3.3.2: tiles of 128x1).

    A number of tokens that is no multiple of 128 counts as padded with zeros. backend: as above;
    "triton" lays the tokens of a channel side by side in memory, where ``outer`` sums over them.
    """
    if pick_backend(x.device, backend) == "triton":
        from dsv3.kernels.column_quant import column_quant

        codes, scale = column_quant(x, scale_format)
        return QuantizedTensor(codes.T, scale.T, COLUMN_BLOCK, scale_format)
    return _quantize(x, COLUMN_BLOCK, scale_format)


def _quantize(
    x: Float[Tensor, "... cols"], block: tuple[int, int], scale_format: str
) -> QuantizedTensor:
    scale = torch.empty(scale_shape(x.shape, block), dtype=torch.float32, device=x.device)
    if x.dim() > 2 and block[0] > 1:  # a stack: its matrices, one by one
        parts = [_quantize(matrix, block, scale_format) for matrix in x]
        return QuantizedTensor(
            torch.stack([part.data for part in parts]),
            torch.stack([part.scale for part in parts]),
            block,
            scale_format,
        )
    data = torch.empty(x.shape, dtype=E4M3, device=x.device)
    matrix, codes, scales = _matrix(x), _matrix(data), _matrix(scale)
    for rows, blocks in row_chunks(matrix.shape, block[0], _QUANTIZED_AT_ONCE):
        codes[rows], scales[blocks] = _quantize_rows(matrix[rows], block, scale_format)
    return QuantizedTensor(data, scale, block, scale_format)


def _quantize_rows(
    x: Float[Tensor, "rows cols"], block: tuple[int, int], scale_format: str
) -> tuple[Float8e4m3fn[Tensor, "rows cols"], Float32[Tensor, "row_blocks col_blocks"]]:
    tiles, scale = _scaled_tiles(x, block, scale_format)
    return _rows(to_e4m3(tiles), x), scale


def _scaled_tiles(
    x: Float[Tensor, "rows cols"], block: tuple[int, int], scale_format: str
) -> tuple[
    Float32[Tensor, "row_blocks br col_blocks bc"], Float32[Tensor, "row_blocks col_blocks"]
]:
    """x in blocks, padded with zeros and divided by their scales; and the scales."""
    rows, cols = x.shape
    br, bc = block
    x = x.to(torch.float32, copy=True)
    if rows % br or cols % bc:
        x = F.pad(x, (0, -cols % bc, 0, -rows % br))
    tiles = x.view(-1, br, x.shape[1] // bc, bc)
    amax = torch.maximum(tiles.amax(dim=(1, 3)), -tiles.amin(dim=(1, 3)))
    scale = block_scale(amax, scale_format)
    # A NaN scale marks its block already; dividing by it would leave the sign of the codes to the
    # processor. Such blocks are divided by 1, so that every machine writes the same bytes.
    divisor = torch.where(scale.isnan(), 1.0, scale)
    return tiles.div_(divisor[:, None, :, None]), scale


def _rows(
    tiles: Shaped[Tensor, "row_blocks br col_blocks bc"], x: Float[Tensor, "rows cols"]
) -> Shaped[Tensor, "rows cols"]:
    """Blocks laid out as the rows they were cut from, without the padding."""
    return tiles.flatten(2).flatten(0, 1)[: x.shape[0], : x.shape[1]]


def quantized_values(
    x: Float[Tensor, "rows cols"],
    block: tuple[int, int],
    scale_format: str,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows cols"]:
    """The values that x has once it is quantised and dequantised, without making its codes.

    For operands that are used at once and not kept, where no processor multiplies codes. Equal,
    up to the sign of zeros, to ``dequantize`` of the quantised tensor, in half the time.
    """
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    for rows, _ in row_chunks(x.shape, block[0], _QUANTIZED_AT_ONCE):
        tiles, scale = _scaled_tiles(x[rows], block, scale_format)
        out[rows] = _rows(round_e4m3(tiles).mul_(scale[:, None, :, None]), x[rows])
    return out


def dequantize_rows(
    data: Float8e4m3fn[Tensor, "rows cols"],
    scale: Float32[Tensor, "row_blocks col_blocks"],
    block: tuple[int, int],
    out: Float[Tensor, "rows cols"] | None = None,
) -> Float[Tensor, "rows cols"]:
    """code * scale for whole rows of blocks, in FP32 or in the dtype of ``out``, which then takes
    the values.

    It asks nothing: NaN codes need not be looked for, and 256 * scale must be a number (``check``
    has seen to both). On a CPU a loop does it, where there is one: the same values.
    """
    if block[1] == BLOCK and pick_backend(data.device) == "numba":
        from dsv3.kernels import cpu_fp8

        out = scale.new_empty(data.shape) if out is None else out
        cpu_fp8.dequantize(data, scale, block[0], out)
        return out
    rows, cols = data.shape
    br, bc = block
    if data.device.type == "cpu":
        values = decode_finite(data, out)
        scale = scale.to(values.dtype) * 256.0
    else:  # torch's cast is fast on a GPU
        values = data.to(torch.float32) if out is None else out.copy_(data)
    if cols % bc == 0 and rows % br == 0:
        values.view(-1, br, cols // bc, bc).mul_(scale[:, None, :, None])
        return values
    wide = scale[:, :, None].expand(-1, -1, bc).reshape(scale.shape[0], -1)[:, :cols]
    whole = rows // br * br
    values[:whole].view(-1, br, cols).mul_(wide[: whole // br, None, :])
    if whole < rows:
        values[whole:].mul_(wide[-1])
    return values


def row_chunks(
    shape: Sequence[int], block_rows: int, numbers: int = _CHUNK
) -> Iterator[tuple[slice, slice]]:
    """Cut a matrix into runs of whole row blocks of about so many numbers.

    Yields (rows, blocks): the slice of the data and the slice of its scales. Working on a run at
    a time keeps temporaries small and in the processor's cache.
    """
    rows, cols = shape
    blocks_at_once = max(1, numbers // max(1, cols * block_rows))
    for first in range(0, -(-rows // block_rows), blocks_at_once):
        last = first + blocks_at_once
        yield slice(first * block_rows, min(last * block_rows, rows)), slice(first, last)


def _matrix(x: Float[Tensor, "... cols"]) -> Float[Tensor, "rows cols"]:
    """x with two axes, its leading axes merged: a view wherever x is contiguous."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
