"""Where a gradient is hurt when 128 tokens share a scale: tiles against blocks, layer by layer.

The report says that a model diverged with blocks (TR App. B.2), and not in which layers the harm
arose. Here a trained model reads a batch, and the dgrad of each linear layer, dx = dy W, is taken
three times: from dy as it is, from dy in tiles of 1 x 128, and from dy in blocks of 128 x 128. All
else is held equal:

* forward runs in FP8 as in training, but with activations in float32: codes are rounded, and
  nothing else is;
* W is the E4M3 matrix that forward used, in all three; sums are float32;
* what goes on to the layer before is the product from dy as it is. So a layer is asked about the
  same dy in both forms, and not about errors that were made behind it. ``embedding_errors`` is
  about those: whole backward passes, one for each form.

Two errors are told, and they answer differently. That of dx *as a whole* is the error of its
largest rows. That of a *token*, as a mean, counts all tokens alike, also the small ones that share
a block with a large one.

Experts multiply one by one, each with blocks of its own rows, as in training; what is told is of
all experts of a layer together. Head, router and MTP's eh_proj are never FP8, and wkv_b is a
product only where windows are so long that attention expands its keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.fields import BLOCK
from dsv3.fp8 import Fp8Recipe, QuantizedTensor, quantize_activation, quantize_weight
from dsv3.fp8.training import dgrad, fprop
from dsv3.model import Transformer
from dsv3.precision import Fp8Training
from dsv3.training.objective import losses, objective

FORMS = ("tile", "block")  # of dy, as ``Fp8Recipe`` calls them
_MTP_WEIGHT = 0.3  # lambda in most of the report's training (TR 4.2)
_RARE = 0.95  # ``spread`` is what one token in twenty exceeds
_Note = Callable[[Tensor, QuantizedTensor, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Harm:
    """Relative errors, length of the difference / length: of a gradient as a whole, and of one of
    its rows, the mean over rows that are not zero."""

    whole: float
    token: float


@dataclass(frozen=True, kw_only=True)
class GradientError:
    """What dy in tiles and dy in blocks do to the input gradient of one layer's product.

    name: of the matrix, as in the model. tokens: rows that are not zero. spread: the largest value
    of a block over a token's largest in it; one token in twenty exceeds this.
    """

    name: str
    tokens: int
    tile: Harm
    block: Harm
    spread: float


def gradient_errors(
    model: Transformer,
    batch: Int[Tensor, "n w"],
    *,
    recipe: Fp8Recipe = Fp8Recipe(),
    mtp_weight: float = _MTP_WEIGHT,
) -> list[GradientError]:
    """The errors of each product's input gradient, in the model's order.

    model: of any precision. batch: windows of s + 1 + D tokens. recipe: formats of the scales; its
    ``gradients`` is what is compared. mtp_weight: lambda. Products that get no gradient at all are
    left out.
    """
    heard: dict[int, list[tuple[Tensor, ...]]] = defaultdict(list)

    def note(matrix: Tensor, wq: QuantizedTensor, dy: Tensor, dx: Tensor) -> None:
        heard[_memory(matrix)].append(
            (dx.norm(dim=1), *row_errors(dy, wq, dx, recipe), times_smaller(dy))
        )

    reader = _reader(model, _unrounded(recipe, note))
    _embedding_gradient(reader, batch, mtp_weight)
    told = []
    for name, weight in reader.named_parameters():
        if _memory(weight) not in heard:
            continue
        sizes, tile, block, smaller = map(torch.cat, zip(*heard[_memory(weight)]))
        if sizes.any():
            told.append(
                GradientError(
                    name=name.removesuffix(".weight"),
                    tokens=int(sizes.count_nonzero()),
                    tile=_harm(tile, sizes),
                    block=_harm(block, sizes),
                    spread=float(smaller.quantile(_RARE)),
                )
            )
    return told


def embedding_errors(
    model: Transformer,
    batch: Int[Tensor, "n w"],
    *,
    recipe: Fp8Recipe = Fp8Recipe(),
    mtp_weight: float = _MTP_WEIGHT,
) -> dict[str, Harm]:
    """How far off the embedding's gradient is when dy is rounded in every layer, for each of
    ``FORMS``. Its rows are those of the table: of tokens of the vocabulary, not of places."""
    wanted = _embedding_gradient(_reader(model, _unrounded(recipe)), batch, mtp_weight)
    told = {}
    for form in FORMS:
        usual = Fp8Training(
            name="fp8",
            dtype=torch.float32,
            weights=torch.float32,
            recipe=replace(recipe, gradients=form),
        )
        found = _embedding_gradient(_reader(model, usual), batch, mtp_weight)
        told[form] = _harm((found - wanted).norm(dim=1), wanted.norm(dim=1))
    return told


def row_errors(
    dy: Float[Tensor, "rows out"],
    wq: QuantizedTensor,
    dx: Float[Tensor, "rows in"],
    recipe: Fp8Recipe = Fp8Recipe(),
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Of each row, the length of dgrad less dx, for each of ``FORMS``. dx: dy W, unrounded."""
    tile, block = (
        (dgrad(dy, wq, replace(recipe, gradients=form)) - dx).norm(dim=1) for form in FORMS
    )
    return tile, block


def times_smaller(dy: Float[Tensor, "rows out"]) -> Float[Tensor, " tiles"]:
    """The largest value of a block of 128 x 128 over that of each of its tiles of 1 x 128; tiles of
    zeros have nothing to lose and are left out."""
    largest = torch.stack([part.abs().amax(1) for part in dy.split(BLOCK, 1)], 1)
    return torch.cat([(part.amax(0) / part)[part > 0] for part in largest.split(BLOCK)])


def _harm(off: Float[Tensor, " rows"], sizes: Float[Tensor, " rows"]) -> Harm:
    some = sizes > 0
    return Harm(whole=float(off.norm() / sizes.norm()), token=float((off / sizes)[some].mean()))


# A backward pass that can be listened to ---------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Unrounded(Fp8Training):
    """FP8 forward, and backward from dy as it is; ``note`` hears (masters, W, dy, dx)."""

    note: _Note

    def rounded(self, x: Float[Tensor, "*lead in"], matrix: Tensor) -> Float[Tensor, "*lead out"]:
        return _Product.apply(x, matrix, self)

    def from_latent(
        self, latent: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"]
    ) -> Float[Tensor, "*lead out"]:
        return self.rounded(latent, weight)


class _Product(torch.autograd.Function):
    """``dsv3.fp8.fp8_linear``, not rounded on the way back, and without a gradient of W."""

    @staticmethod
    def forward(ctx, x, matrix, precision):
        recipe, rows = precision.recipe, x.reshape(-1, x.shape[-1])
        xq = quantize_activation(rows, recipe.activation_scales)
        wq = quantize_weight(matrix, recipe.weight_scales)
        ctx.matrix, ctx.wq, ctx.note, ctx.shape = matrix, wq, precision.note, x.shape
        return fprop(xq, wq, x.dtype).view(*x.shape[:-1], len(matrix))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        rows = dy.reshape(-1, dy.shape[-1])
        dx = rows @ ctx.wq.dequantize()
        ctx.note(ctx.matrix, ctx.wq, rows, dx)
        return dx.view(ctx.shape), None, None


def _unrounded(recipe: Fp8Recipe, note: _Note = lambda *heard: None) -> _Unrounded:
    wide = torch.float32
    return _Unrounded(name="fp8", dtype=wide, weights=wide, recipe=recipe, note=note)


def _reader(model: Transformer, precision: Fp8Training) -> Transformer:
    """The same weights as masters of FP8 products; only the embedding asks for a gradient."""
    reader = Transformer(model.config, precision, device=model.device)
    reader.load_state_dict(model.state_dict())
    reader.requires_grad_(False)
    reader.embed.weight.requires_grad_()
    return reader


@torch.enable_grad()
def _embedding_gradient(
    model: Transformer, batch: Int[Tensor, "n w"], mtp_weight: float
) -> Float[Tensor, "vocab d"]:
    main, extra = losses(model, batch.to(model.device))
    return torch.autograd.grad(objective(main, extra, mtp_weight), model.embed.weight)[0]


def _memory(weight: Tensor) -> int:
    """Where a matrix lies; an expert's lies in its stack."""
    return weight.untyped_storage().data_ptr()
