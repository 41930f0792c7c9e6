"""The plain parts: norm, linear, embedding, head, SwiGLU. Each knows which part of it is mine.

A linear layer multiplies by a matrix; everything hard about it is where the matrix lives and in
which bits. The bits are the precision's (``dsv3.precision``), and ``Linear`` hands its products to
it; its two parallel kin carry only this rank's slice:

* ``ColumnParallelLinear`` (outputs cut): every rank computes some of the outputs;
* ``RowParallelLinear`` (inputs cut): every rank computes a partial sum of all outputs, unrounded,
  and one all-reduce adds them (see ``dsv3.parallel.tensor``).

Modules allocate their weights without filling them. ``load_state_dict`` takes a matrix in whatever
form it was stored, plain or in FP8 blocks, and keeps what the precision needs.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn

from dsv3.backward import asks_gradient
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.backend import pick_backend
from dsv3.opaque import opaque
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Normed, Precision


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in float32: no mean is taken, no bias added.

    Without it the residual stream's growing size would drive the softmax and the sigmoids of
    deeper layers into saturation.
    """

    def __init__(self, dim: int, eps: float = 1e-6, device=None, *, exact: bool = False):
        """exact: whether squares are summed in float64 on a CPU (``Precision.exact``), else in
        float32."""
        super().__init__()
        self.eps, self.exact = eps, exact
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32, device=device))

    def forward(self, x: Float[Tensor, "*lead d"]) -> Float[Tensor, "*lead d"]:
        return _normalised(x, self.weight, self.eps, self.exact and x.device.type == "cpu")


# A compiler would take the sum in another order, and in FP8 the text would not be the same.
@opaque(
    "rms_norm(Tensor x, Tensor weight, float eps, bool exact) -> Tensor",
    like=lambda x, weight, eps, exact: torch.empty_like(x, memory_format=torch.contiguous_format),
)
def _normalised(
    x: Float[Tensor, "*lead d"], weight: Float[Tensor, " d"], eps: float, exact: bool
) -> Float[Tensor, "*lead d"]:
    served = x.dtype in (torch.bfloat16, torch.float32) and not asks_gradient(x, weight)
    if served and pick_backend(x.device) == "numba":
        from dsv3.kernels import cpu_norm

        return cpu_norm.rms_norm(x, weight, eps, exact)
    if exact:
        return exactly_normalised(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def exactly_normalised(
    x: Float[Tensor, "*lead d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*lead d"]:
    """x / rms(x) * weight with squares summed in float64; all else is float32, and to the nearest
    (a float32 root is not, where MKL takes it)."""
    x_wide = x.float()
    total = x_wide.square().sum(-1, keepdim=True, dtype=torch.float64).float()
    rms = (total / x.shape[-1] + eps).double().sqrt().float()
    return (x_wide / rms * weight).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T with W (out_features, in_features), whole on every rank.

    precision: of the product; a matrix that is never FP8 gets ``precision.plain``. scale: of the
    blocks of an FP8 weight, else None.
    """

    def __init__(self, in_features: int, out_features: int, precision: Precision, *, device=None):
        super().__init__()
        self.precision = precision
        self.weight, scale = precision.room((out_features, in_features), device)
        self.register_buffer("scale", scale)
        self.register_load_state_dict_pre_hook(partial(take_stored, precision))

    @property
    def matrix(self) -> Tensor | QuantizedTensor:
        """The weight as the precision's products take it."""
        return self.precision.matrix(self.weight, self.scale)

    def forward(
        self, x: Float[Tensor, "*lead in"] | QuantizedTensor | Normed
    ) -> Float[Tensor, "*lead out"]:
        """x may be plain or already an operand of the precision."""
        return self.precision.rounded(self.precision.operand(x), self.matrix)

    def wide(self, x: Float[Tensor, "*lead in"] | QuantizedTensor) -> Float[Tensor, "*lead out"]:
        """The same product, not rounded: for sums that go on, and for logits."""
        return self.precision.wide(x, self.matrix)


def take_stored(
    precision: Precision, module: nn.Module, state: dict[str, Tensor], prefix: str, *_
) -> None:
    """Before a module takes its weight from a state_dict: bring it into the precision's form.

    A checkpoint holds codes and scales where the model may keep plain numbers, or the reverse.
    """
    name = prefix + "weight"
    if name in state:
        weight, scale = precision.taken(name, state[name], state.pop(prefix + "scale", None))
        state[name] = weight
        if scale is not None:
            state[prefix + "scale"] = scale


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


class Head(ColumnParallelLinear):
    """Scores of all tokens of the vocabulary, on every rank.

    Logits stay in float32. Rounded to bfloat16, neighbours around 10 lie 0.06 apart, and the
    best two tokens of a text tie now and then.
    """

    def __init__(
        self, dim: int, vocab_size: int, precision: Precision, group: TensorGroup, device=None
    ):
        super().__init__(dim, vocab_size, precision.plain, group, what="vocab_size", device=device)
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

    def inner(
        self, x: Float[Tensor, "*lead d"] | QuantizedTensor | Normed
    ) -> Float[Tensor, "*lead inner"]:
        """silu(w1 x) * w3 x, this rank's channels."""
        operand = self.precision.operand(x)  # both products read the same values
        return F.silu(self.w1(operand)) * self.w3(operand)

    def forward(self, x: Float[Tensor, "*lead d"] | Normed) -> Float[Tensor, "*lead d"]:
        return self.w2(self.inner(x))

    def partial_sum(
        self, x: Float[Tensor, "*lead d"] | QuantizedTensor
    ) -> Float[Tensor, "*lead d"]:
        """This rank's part of the output, neither reduced nor rounded: MoE adds to it first."""
        return self.w2.wide(self.inner(x))
