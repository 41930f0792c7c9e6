"""The plain parts: norm, linear, embedding, head, SwiGLU. Each knows which part of it is mine.

A linear layer multiplies by a matrix; everything hard about it is where the matrix lives and in
which bits. So ``Linear`` carries its weight in the form the model's precision asks for, and its
two parallel kin carry only this rank's slice:

* ``ColumnParallelLinear`` (outputs cut): every rank computes some of the outputs;
* ``RowParallelLinear`` (inputs cut): every rank computes a partial sum of all outputs, unrounded,
  and one all-reduce adds them (see ``dsv3.parallel.tensor``).

Modules allocate their weights without filling them. ``load`` takes a slice from a checkpoint in
whatever form it was stored and keeps what the precision needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from dsv3 import fp8
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.training import fp8_linear
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision, wide_linear


def put(target: Tensor, value: Tensor, what: str) -> None:
    """Copy a loaded tensor into its place; raises DSV3Error when the shapes differ."""
    if tuple(target.shape) != tuple(value.shape):
        raise DSV3Error(
            "wrong shape", where=what, found=list(value.shape), expected=list(target.shape)
        )
    with torch.no_grad():
        target.copy_(value)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32: no mean is taken, no bias added.

    Without it the residual stream's growing size would drive the softmax and the sigmoids of
    deeper layers into saturation.
    """

    def __init__(self, dim: int, eps: float = 1e-6, device=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32, device=device))

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)

    def load(self, name: str, value: Float[Tensor, "..."], scale: Tensor | None = None) -> None:
        put(self.weight, value, name)


class Linear(nn.Module):
    """y = x W^T with W (out_features, in_features), whole on every rank.

    quantizable: whether this matrix is stored in FP8 blocks when the precision says so; the
    embedding, the head and eh_proj are not (TR 3.3). saved: what FP8 training keeps of the input,
    see ``dsv3.fp8.training``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        precision: Precision,
        *,
        quantizable: bool = True,
        saved: str = "e4m3",
        device=None,
    ):
        super().__init__()
        self.precision = precision
        self.quantized = precision.quantized and quantizable
        self.trains_fp8 = precision.fp8 is not None and quantizable
        self.saved = saved
        shape = (out_features, in_features)
        if self.quantized:
            self.weight, self.scale = quantized_storage(shape, device)
        else:
            self.weight = nn.Parameter(torch.empty(shape, dtype=precision.weights, device=device))

    @property
    def quantized_weight(self) -> QuantizedTensor:
        """The FP8 weight with its scales (only when quantized)."""
        return QuantizedTensor(
            self.weight, self.scale, (fp8.BLOCK, fp8.BLOCK), self.precision.scale_format
        )

    def forward(self, x: Float[Tensor, "*lead in"] | QuantizedTensor) -> Float[Tensor, "*lead out"]:
        """x may be plain or already quantised."""
        if self.quantized:
            return self.wide(x).to(self.precision.dtype)
        return self.rounded(x)

    def rounded(self, x: Float[Tensor, "*lead in"]) -> Float[Tensor, "*lead out"]:
        """The product by a weight that is not stored in FP8, in x's dtype."""
        if self.trains_fp8:
            return fp8_linear(x, self.weight, self.precision.fp8, self.saved)
        return F.linear(x, self.weight.to(x.dtype))

    def wide(self, x: Float[Tensor, "*lead in"] | QuantizedTensor) -> Float[Tensor, "*lead out"]:
        """The same product, not rounded: for sums that go on, and for logits."""
        sums = self.precision.sums
        if self.quantized:
            return fp8.matmul(quantize_once(x, self.precision), self.quantized_weight, sums)
        if self.precision.has_masters:  # in training no rank's part is missing from the sum
            return self.rounded(x)
        return wide_linear(x, self.weight, sums)

    def load(self, name: str, value: Float[Tensor, "..."], scale: Tensor | None = None) -> None:
        """Take this rank's slice: E4M3 with its scale grid, or a plain tensor."""
        if self.quantized:
            stored = as_quantized(name, value, scale, self.precision)
            put(self.weight.view(torch.uint8), stored.data.view(torch.uint8), name)
            put(self.scale, stored.scale, name + "_scale_inv")
        else:
            put(self.weight, as_plain(name, value, scale), name)


class ColumnParallelLinear(Linear):
    """A linear whose outputs are cut over the ranks: (..., in) -> (..., out / size)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        precision: Precision,
        group: TensorGroup,
        *,
        what: str,
        **options,
    ):
        super().__init__(in_features, group.split(out_features, what), precision, **options)


class RowParallelLinear(Linear):
    """A linear whose inputs are cut over the ranks: (..., in / size) -> (..., out), summed."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        precision: Precision,
        group: TensorGroup,
        *,
        what: str,
        **options,
    ):
        super().__init__(group.split(in_features, what), out_features, precision, **options)
        self.group = group

    def forward(self, x: Float[Tensor, "*lead in"] | QuantizedTensor) -> Float[Tensor, "*lead out"]:
        if self.group.size == 1:
            return super().forward(x)
        return self.group.all_reduce(self.wide(x)).to(self.precision.dtype)


class Embedding(nn.Module):
    """Rows of a (vocab_size, hidden_size) table; each rank holds a range of the vocabulary.

    A rank gives zeros for tokens that are not its own; the all-reduce fills them in, exactly.
    """

    def __init__(
        self, vocab_size: int, dim: int, precision: Precision, group: TensorGroup, device=None
    ):
        super().__init__()
        self.group, self.precision = group, precision
        rows = group.split(vocab_size, "vocab_size")
        self.first = group.rank * rows
        self.weight = nn.Parameter(torch.empty(rows, dim, dtype=precision.weights, device=device))

    def forward(self, tokens: Int[Tensor, "b s"]) -> Float[Tensor, "b s d"]:
        if self.group.size == 1:
            return F.embedding(tokens, self.weight).to(self.precision.dtype)
        local = tokens - self.first
        mine = (local >= 0) & (local < len(self.weight))
        x = F.embedding(local.where(mine, 0), self.weight).float()
        x = self.group.all_reduce(x * mine[..., None])
        return x.to(self.precision.dtype)

    def load(self, name: str, value: Float[Tensor, "..."], scale: Tensor | None = None) -> None:
        put(self.weight, value, name)


class Head(ColumnParallelLinear):
    """Scores of all tokens of the vocabulary, on every rank.

    Logits stay in float32. Rounded to bfloat16, neighbours around 10 lie 0.06 apart, and the
    best two tokens of a text tie now and then.
    """

    def __init__(
        self, dim: int, vocab_size: int, precision: Precision, group: TensorGroup, device=None
    ):
        super().__init__(
            dim, vocab_size, precision, group, what="vocab_size", quantizable=False, device=device
        )
        self.group = group

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float32[Tensor, "*lead v"]:
        return self.group.all_gather(self.wide(x).float())


class SwiGLU(nn.Module):
    """Feed-forward of one token: w2( silu(w1 x) * w3 x ), inner width cut over the ranks."""

    def __init__(
        self,
        dim: int,
        inner: int,
        precision: Precision,
        group: TensorGroup,
        *,
        what: str,
        device=None,
    ):
        super().__init__()
        options = dict(what=what, device=device)
        self.precision = precision
        self.w1 = ColumnParallelLinear(dim, inner, precision, group, **options)
        self.w3 = ColumnParallelLinear(dim, inner, precision, group, **options)
        self.w2 = RowParallelLinear(inner, dim, precision, group, **options)

    def inner(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead inner"]:
        """silu(w1 x) * w3 x, this rank's channels."""
        x = quantize_once(x, self.precision)  # both products read the same FP8 values
        return F.silu(self.w1(x)) * self.w3(x)

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return self.w2(self.inner(x))

    def partial_sum(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        """This rank's part of the output, neither reduced nor rounded: MoE adds to it first."""
        return self.w2.wide(self.inner(x))


def quantize_once(
    x: Float[Tensor, "*lead d"] | QuantizedTensor, precision: Precision
) -> Float[Tensor, "*lead d"] | QuantizedTensor:
    """x as the products of this precision take it; quantised here unless it already is."""
    if precision.quantized and not isinstance(x, QuantizedTensor):
        return fp8.quantize_activation(x, precision.scale_format)
    return x


def quantized_storage(shape: tuple[int, ...], device) -> tuple[nn.Parameter, nn.Parameter]:
    """Room for an E4M3 weight of ``shape`` and its grid of block scales."""
    grid = (*shape[:-2], -(-shape[-2] // fp8.BLOCK), -(-shape[-1] // fp8.BLOCK))
    data = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    return (
        nn.Parameter(data, requires_grad=False),
        nn.Parameter(torch.empty(grid, dtype=torch.float32, device=device), requires_grad=False),
    )


def as_plain(
    name: str, value: Float[Tensor, "*shape"], scale: Tensor | None
) -> Float[Tensor, "*shape"]:
    """A stored tensor as plain numbers: E4M3 blocks are multiplied by their scales."""
    if value.dtype != torch.float8_e4m3fn:
        return value
    if scale is None:
        raise DSV3Error("FP8 weight without its scale", where=name, expected=name + "_scale_inv")
    return QuantizedTensor(value, fp8.decode_scale(scale), (fp8.BLOCK, fp8.BLOCK)).dequantize()


def as_quantized(
    name: str, value: Float[Tensor, "*shape"], scale: Tensor | None, precision: Precision
) -> QuantizedTensor:
    """A stored tensor as FP8 blocks: kept bit for bit if it is, else quantised here."""
    if value.dtype != torch.float8_e4m3fn:
        return fp8.quantize_weight(value.float(), precision.scale_format)
    if scale is None:
        raise DSV3Error("FP8 weight without its scale", where=name, expected=name + "_scale_inv")
    return QuantizedTensor(
        value, fp8.decode_scale(scale), (fp8.BLOCK, fp8.BLOCK), precision.scale_format
    )
