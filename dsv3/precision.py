"""How numbers are kept and multiplied: one object, chosen per model.

=======  ==========================  =====================================================
name     weights in memory           products
=======  ==========================  =====================================================
fp32     float32                     float32; the oracle mode
bf16     bfloat16                    bfloat16 operands, float32 accumulation
fp8      E4M3, a scale per 128x128   operands E4M3, activations scaled per 1x128 (TR 3.3)
=======  ==========================  =====================================================

In use, the norms, the router and the attention core compute in float32 or wider, whatever the
weights are kept in. In fp8 the embedding, the head and MTP's eh_proj stay bfloat16, as released
(TR 3.3).

A precision is an object with a few operations: make room for a matrix, take one from a file,
multiply. ``Precision`` does so with plain numbers, ``Fp8`` with stored codes, ``Training`` with
float32 master weights and ``Fp8Training`` in FP8 products that have gradients. A layer calls the
operations and never asks which of them it has.

Sums are rounded once, when they are whole. They are taken in float32, and in float64 for fp8 on a
CPU, for this reason: two orders of one float32 sum differ in the last bit. Rounded to bfloat16, one
value in 30,000 then lands on the other side; rounded to E4M3 after that, the step is 6 to 12
percent, and a handful of such steps move all logits by about one percent. The text would depend on
how a prompt was cut into chunks, on its neighbours in the batch, on drafting and on the number of
ranks. With float64 sums it does not. (A GPU is no way out: Hopper's tensor cores add FP8 products
with about 14 bits, and only what they hand over every 128 products is float32.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3 import fp8
from dsv3.backward import asks_gradient
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.fp8 import Fp8Recipe, QuantizedTensor, fp8_linear
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.latent import check_kind
from dsv3.fp8.stored import is_plain, stored_blocks
from dsv3.grouped import fp8_experts, one_by_one, plain_experts
from dsv3.kernels.operations import has_room, norm_quant
from dsv3.plain import linear, wide_linear


class Normed(NamedTuple):
    """A norm in both of its forms, where one kernel made them together.

    plain: its numbers, for who reads them; operand: the same, as products take it.
    """

    plain: Float[Tensor, "*lead d"]
    operand: QuantizedTensor


def unquantized(x: Float[Tensor, "*lead d"] | Normed) -> Float[Tensor, "*lead d"]:
    """x for who reads its numbers."""
    return x.plain if isinstance(x, Normed) else x


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Plain numbers, in use: "fp32" and "bf16", and what fp8 does not keep in FP8.

    name: "fp32", "bf16" or "fp8"; dtype: of activations; weights: of matrices in memory; exact:
    whether sums are float64 on a CPU; cache: how caches keep latents, "plain" (in dtype) or "fp8"
    (``dsv3.fp8.latent``); recompute: whether training computes cheap results again in the backward
    pass instead of keeping them (``dsv3.recompute``).

    ``matrix`` below is what ``matrix()`` gives: here the weight, in fp8 codes with their scales.
    """

    name: str
    dtype: torch.dtype
    weights: torch.dtype
    exact: bool = False
    cache: str = "plain"
    recompute: bool = False

    quantized: ClassVar[bool] = False  # weights lie in memory as codes and scales
    trains: ClassVar[bool] = False

    @staticmethod
    def of(name: str, config: ModelConfig, cache: str = "plain") -> Precision:
        """The precision called ``name`` for using a model of this config."""
        check_kind("cache", cache)
        if name not in ("fp32", "bf16", "fp8"):
            raise _unknown(name)
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        options = dict(name=name, dtype=dtype, weights=dtype, cache=cache)
        if name == "fp8":
            return Fp8(**options, exact=True, scale_format=config.scale_fmt)
        return Precision(**options)

    @staticmethod
    def training(name: str, recipe: Fp8Recipe = Fp8Recipe(), recompute: bool = False) -> Training:
        """The precision called ``name`` for training. recompute: keep less for the backward pass
        (``dsv3.recompute``)."""
        kind = {"fp32": Training, "bf16": Training, "fp8": Fp8Training}.get(name)
        if kind is None:
            raise _unknown(name)
        dtype = torch.float32 if name == "fp32" else torch.bfloat16
        options = {"recipe": recipe} if kind is Fp8Training else {}
        return kind(name=name, dtype=dtype, weights=torch.float32, recompute=recompute, **options)

    def sums(self, device: torch.device) -> torch.dtype:
        """In which sums that go on are kept there: of the router, logits, parts of ranks."""
        return torch.float64 if self.exact and device.type == "cpu" else torch.float32

    def core(self, device: torch.device) -> torch.dtype:
        """In which attention computes there, between the projections."""
        return self.sums(device)

    def in_kernels(self, *inputs: Tensor) -> bool:
        """Whether Triton kernels compute what stands between the products there: attention, norms,
        the router, sums over experts. On a Hopper GPU or a large Blackwell one, in use and not in
        training, for activations in bfloat16; float32 is the oracle mode and stays plain torch.

        Inputs that ask for a gradient stay with torch too, since no kernel has a backward pass. So
        a model in bf16 on such a GPU computes by kernels under ``no_grad`` and by torch without it;
        how far the two differ is in ``dsv3.mla`` and ``dsv3.kernels``."""
        return (
            self.dtype == torch.bfloat16
            and not self.trains
            and not asks_gradient(*inputs)
            and pick_backend(inputs[0].device) == "triton"
            and has_room(inputs[0].device)
        )

    def in_loops(self, *inputs: Tensor) -> bool:
        """Whether compiled loops compute attention of few queries there: on a CPU, in use."""
        loops = pick_backend(inputs[0].device) == "numba"
        return loops and not self.trains and not asks_gradient(*inputs)

    @property
    def plain(self) -> Precision:
        """How matrices are multiplied that are never FP8: embedding, head, eh_proj."""
        return self

    def saving(self, form: str) -> Precision:
        """The same for products that keep their input in this form, where one is chosen at all."""
        return self

    # A matrix in memory -------------------------------------------------------------------------

    def room(self, shape: tuple[int, ...], device) -> tuple[nn.Parameter, Tensor | None]:
        """Room for matrices of ``shape``, not filled: the numbers, and their scales if any."""
        return nn.Parameter(torch.empty(shape, dtype=self.weights, device=device)), None

    def matrix(self, weight: Tensor, scale: Tensor | None) -> Tensor | QuantizedTensor:
        """What lies in that room, as the products below take it."""
        return weight

    def taken(
        self, name: str, weight: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """A stored matrix, in plain numbers or in FP8 blocks, in the form that is kept here.

        Raises DSV3Error for codes without their scales, scales without codes, and what is no
        weight; ``name`` is for that message.
        """
        if is_plain(name, weight, scale):
            return weight, None
        return stored_blocks(name, weight, scale).dequantize(), None

    # Products -----------------------------------------------------------------------------------

    def normed(
        self, norm: nn.Module, x: Float[Tensor, "*lead d"]
    ) -> Float[Tensor, "*lead d"] | Normed:
        """norm(x) for what follows, in both forms where one kernel makes them."""
        return norm(x)

    def operand(
        self, x: Float[Tensor, "*lead d"] | QuantizedTensor | Normed
    ) -> Float[Tensor, "*lead d"] | QuantizedTensor:
        """x as products take it, made once where several read the same x."""
        return x.operand if isinstance(x, Normed) else x

    def parts(self, x: Float[Tensor, "*lead d"] | QuantizedTensor) -> tuple[Tensor, ...]:
        """The tensors that an operand is made of, to be sent to another rank."""
        assert isinstance(x, Tensor)
        return (x,)

    def of_parts(self, *parts: Tensor) -> Float[Tensor, "*lead d"] | QuantizedTensor:
        """The operand that has arrived there."""
        return parts[0]

    @property
    def wire(self) -> Fp8Training | None:
        """What packs vectors that have a gradient when they travel; None: they go as they are."""
        return None

    def rounded(
        self, x: Float[Tensor, "*lead in"] | QuantizedTensor, matrix: Tensor | QuantizedTensor
    ) -> Float[Tensor, "*lead out"]:
        """x W^T in the activations' dtype."""
        return linear(x, matrix)

    def wide(
        self, x: Float[Tensor, "*lead in"] | QuantizedTensor, matrix: Tensor | QuantizedTensor
    ) -> Float[Tensor, "*lead out"]:
        """The same product in ``sums``, not rounded: for sums that go on, and for logits."""
        return wide_linear(x, matrix, self.sums(x.device))

    def each(
        self,
        x: Float[Tensor, "choices in"] | QuantizedTensor,
        stack: Tensor | QuantizedTensor,
        ends: Int[Tensor, " experts"],
    ) -> Float[Tensor, "choices out"]:
        """Every expert's rows of x times its own matrix, rounded as ``rounded`` does.

        stack: (experts, out, in), or (experts, parts, out, in) for several at once, whose outputs
        then stand side by side. ends: where each expert's rows end; rows past the last are junk.
        """
        return plain_experts(x, stack.flatten(1, -2), ends)

    def each_wide(
        self,
        x: Float[Tensor, "choices in"],
        stack: Tensor | QuantizedTensor,
        ends: Int[Tensor, " experts"],
    ) -> Float[Tensor, "choices out"]:
        """The same for sums that go on: with no fewer bits than float32."""
        return self.each(x, stack, ends).float()

    # The latent's way up (wkv_b) ----------------------------------------------------------------

    def from_latent(
        self, latent: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"]
    ) -> Float[Tensor, "*lead out"]:
        """Keys and values from the latent, in the latent's dtype."""
        return linear(latent, weight)


@dataclass(frozen=True, kw_only=True)
class Fp8(Precision):
    """Weights stay E4M3 in blocks; activations are quantised on the way into each product.

    scale_format: of the blocks and of activations, "float32" or "ue8m0".
    """

    scale_format: str
    quantized: ClassVar[bool] = True

    @property
    def plain(self) -> Precision:
        return Precision(**{f.name: getattr(self, f.name) for f in fields(Precision)})

    def room(self, shape: tuple[int, ...], device) -> tuple[nn.Parameter, Tensor | None]:
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        grid = fp8.scale_shape(shape, fp8.WEIGHT_BLOCK)
        return (
            nn.Parameter(codes, requires_grad=False),
            torch.empty(grid, dtype=torch.float32, device=device),
        )

    def matrix(self, weight: Tensor, scale: Tensor | None) -> QuantizedTensor:
        return QuantizedTensor(weight, scale, scale_format=self.scale_format)

    def taken(
        self, name: str, weight: Tensor, scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Codes are kept bit for bit, plain numbers are quantised."""
        if is_plain(name, weight, scale):
            blocks = fp8.quantize_weight(weight.float(), self.scale_format)
        else:
            blocks = stored_blocks(name, weight, scale)
        # Asked here, so that no product has to. A scale of 0 is strange and does no harm.
        if not (blocks.scale < fp8.LARGEST_SCALE).all():
            blocks.check_scales(name)
        return blocks.data, blocks.scale

    def normed(
        self, norm: nn.Module, x: Float[Tensor, "*lead d"]
    ) -> Float[Tensor, "*lead d"] | Normed:
        if not self.in_kernels(x, norm.weight):
            return norm(x)
        data, scale, plain = norm_quant(x, norm.weight, norm.eps, self.scale_format)
        return Normed(plain, self.of_parts(data, scale))

    def operand(self, x: Float[Tensor, "*lead d"] | QuantizedTensor | Normed) -> QuantizedTensor:
        x = super().operand(x)
        if isinstance(x, QuantizedTensor):
            return x
        return fp8.quantize_activation(x, self.scale_format)

    def parts(self, x: QuantizedTensor) -> tuple[Tensor, ...]:
        return x.data, x.scale

    def of_parts(self, *parts: Tensor) -> QuantizedTensor:
        data, scale = parts
        return QuantizedTensor(data, scale, fp8.ACTIVATION_BLOCK, self.scale_format)

    def rounded(
        self, x: Float[Tensor, "*lead in"] | QuantizedTensor, matrix: QuantizedTensor
    ) -> Float[Tensor, "*lead out"]:
        return fp8.matmul(self.operand(x), matrix, self.sums(x.device), dtype=self.dtype)

    def wide(
        self, x: Float[Tensor, "*lead in"] | QuantizedTensor, matrix: QuantizedTensor
    ) -> Float[Tensor, "*lead out"]:
        return fp8.matmul(self.operand(x), matrix, self.sums(x.device))

    def each(
        self, x: QuantizedTensor, stack: QuantizedTensor, ends: Int[Tensor, " experts"]
    ) -> Float[Tensor, "choices out"]:
        return self.each_wide(x, stack, ends).to(self.dtype)

    def each_wide(
        self,
        x: Float[Tensor, "choices in"] | QuantizedTensor,
        stack: QuantizedTensor,
        ends: Int[Tensor, " experts"],
    ) -> Float[Tensor, "choices out"]:
        x, sums = self.operand(x), self.sums(x.device)
        return fp8_experts(x.data, x.scale, stack.data, stack.scale, ends, sums)


@dataclass(frozen=True, kw_only=True)
class Training(Precision):
    """Float32 master weights in every mode, of which a product takes a rounded copy.

    A step of AdamW changes a weight by about 1e-3 of itself or less; bfloat16 holds steps of 4e-3,
    so most updates would be rounded away (TR 3.3.3). In bf16 and fp8, activations are bfloat16, and
    so is what enters and leaves the attention core. No rank's part is missing from a sum here, so
    none need go on unrounded.
    """

    trains: ClassVar[bool] = True

    def core(self, device: torch.device) -> torch.dtype:
        return self.dtype

    def wide(self, x: Float[Tensor, "*lead in"], matrix: Tensor) -> Float[Tensor, "*lead out"]:
        return self.rounded(x, matrix)


@dataclass(frozen=True, kw_only=True)
class Fp8Training(Training):
    """Products whose three forms, forward and both gradients, take FP8 operands (TR 3.3.1).

    recipe: what is quantised how. saved: what is kept of a product's input, "e4m3" or "e5m6".
    """

    recipe: Fp8Recipe = Fp8Recipe()
    saved: str = "e4m3"

    @property
    def plain(self) -> Training:
        return Training(**{f.name: getattr(self, f.name) for f in fields(Training)})

    def saving(self, form: str) -> Fp8Training:
        return replace(self, saved=form)

    @property
    def wire(self) -> Fp8Training | None:
        """A product quantises its input anyhow. With scales that are powers of two it finds the
        same codes again in what has arrived, so that to travel in codes costs no bit."""
        return self if self.recipe.activation_scales == "ue8m0" else None

    def pack(self, x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        codes = fp8.quantize_activation(x, self.recipe.activation_scales)
        return codes.data, codes.scale

    def unpack(self, *parts: Tensor) -> Float[Tensor, "n d"]:
        """The vectors, in the activations' dtype."""
        (data, scale), kind = parts, self.recipe.activation_scales
        return QuantizedTensor(data, scale, fp8.ACTIVATION_BLOCK, kind).dequantize(self.dtype)

    def rounded(self, x: Float[Tensor, "*lead in"], matrix: Tensor) -> Float[Tensor, "*lead out"]:
        return fp8_linear(x, matrix, self.recipe, self.saved)

    def each(
        self, x: Float[Tensor, "choices in"], stack: Tensor, ends: Int[Tensor, " experts"]
    ) -> Float[Tensor, "choices out"]:
        return one_by_one(self.rounded, x, stack.flatten(1, -2).unbind(), ends)

    def from_latent(
        self, latent: Float[Tensor, "*lead in"], weight: Float[Tensor, "out in"]
    ) -> Float[Tensor, "*lead out"]:
        return fp8_linear(latent, weight, self.recipe)


def _unknown(name: str) -> DSV3Error:
    return DSV3Error(
        "unknown precision", where="precision", found=name, expected="fp32, bf16 or fp8"
    )
