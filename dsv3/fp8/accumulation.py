"""How a tensor core adds FP8 products: few bits, cut off; and what promotion does about it.

A product of E4M3 codes is exact; their sum is not. To add numbers of different sizes hardware
first *aligns* them: it shifts each to the right until all have the largest exponent. What leaves
the adder at the right is cut off. Here with 3 fraction bits, the largest number between 8 and 16,
so that the last bit counts 1:

    1000.     8
    0001.|11  1.75, of which 1 stays

The report found that Hopper's FP8 tensor cores keep "around 14 bits" (TR 3.3.2): 32 products are
aligned by the largest exponent, the highest 14 bits of each are added, the registers that collect
the sums have no more, and 34 bits would be needed for 32 products (TR 3.5.2). The later paper says
13 fraction bits and registers of 1 + 8 + 13 bits, "FP22" (ISCA 3.1.1); with the leading 1, which is
not stored, 13 fraction bits are 14 bits. In long sums the register grows, its last bit counts more
and more, and what is cut off always pulls towards zero: it adds up. At K = 4096 the report saw
errors "nearly 2%". Its remedy, *promotion*: every N_C = 128 products, which are four instructions,
the register is emptied into an FP32 sum.

Neither paper says whether the register takes part in the alignment. Both readings are here:

    aligned_with="accumulator"   register and 32 products are aligned together: each product loses
                                 the bits that are small beside the sum so far
    aligned_with="products"      the products are aligned among themselves and added; only their
                                 sum is then aligned with the register

With codes spread evenly over 0 to 448, K = 4096 and fraction bits 13 / 14, the largest relative
error is 7.8% / 3.7% by the first reading, 0.34% / 0.17% by the second, and 0.06% / 0.02% and
0.013% / 0.006% with promotion. So:

* Both readings show that the error grows with K, is 0.1% or more at K = 4096, and that promotion
  takes away 24 of 25 parts of it or more. These claims are asserted (facts 36 and 37).
* "Nearly 2%" lies between the two. It is the report's measurement; no reading gives exactly that,
  and it is not asserted here.
* The figures belong to the inputs. Relative error depends on where the sum lies between two powers
  of two: codes spread over 0 to 1 give 7.0% / 3.3%. And where signs cancel, the *largest relative*
  error says nothing: among many outputs one is near zero, and any error is large beside it. Use
  inputs of one sign, or compare norms.

Everything is emulated in float64, exactly: a wide adder that cuts towards zero, as the magnitudes
of sign and magnitude are cut. The eight exponent bits of FP22 neither overflow nor underflow on
sums of E4M3 products, so a range is not modelled. Slow, and meant to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from dsv3.errors import DSV3Error

READINGS = ("accumulator", "products")


@dataclass(frozen=True)
class Accumulator:
    """A register that collects products, ``group`` at a time, with ``fraction_bits`` bits.

    fraction_bits: bits after the leading one, 1 to 40. 13 is FP22.
    group: how many products are added at once; 32 in one Hopper instruction.
    aligned_with: "accumulator" or "products", the two readings above.
    promote_every: after so many products (a multiple of ``group``) the register is added to an
        FP32 sum and set to zero; None for never. The report's N_C is 128.
    """

    fraction_bits: int = 13
    group: int = 32
    aligned_with: str = "accumulator"
    promote_every: int | None = None

    def __post_init__(self):
        if self.aligned_with not in READINGS:
            raise DSV3Error(
                "unknown reading of the hardware",
                where="aligned_with",
                found=self.aligned_with,
                expected=" or ".join(READINGS),
            )
        # Up to here all sums below are exact in float64.
        if not 1 <= self.fraction_bits <= 40:
            raise DSV3Error(
                "the emulator cannot keep so many bits",
                where="fraction_bits",
                found=self.fraction_bits,
                expected="1 to 40",
            )
        if not 1 <= self.group <= 1024:
            raise DSV3Error(
                "not a number of products to add at once",
                where="group",
                found=self.group,
                expected="1 to 1024",
            )
        every = self.promote_every
        if every is not None and (every < 1 or every % self.group):
            raise DSV3Error(
                "promotion falls inside a group of products",
                where="promote_every",
                found=every,
                expected=f"a multiple of the group, {self.group}, or None",
            )

    def dot(
        self, x: Float[Tensor, "*#lead k"], w: Float[Tensor, "*#lead k"]
    ) -> Float64[Tensor, "*lead"]:
        """Sums of x * w over the last axis, added as the hardware would; other axes broadcast.

        x, w: values (or a tensor of float8_e4m3fn, whose values are meant), finite. Without
        promotion the result has ``fraction_bits`` bits, with it those of an FP32 number.
        """
        x, w = x.double(), w.double()
        register = torch.zeros_like(x[..., 0] * w[..., 0])
        total = torch.zeros_like(register)
        for first in range(0, x.shape[-1], self.group):
            here = slice(first, first + self.group)
            register = self._add(register, x[..., here] * w[..., here])
            if self.promote_every and (first + self.group) % self.promote_every == 0:
                total = (total + register).float().double()
                register = torch.zeros_like(register)
        # A last part that is shorter than promote_every is still in the register.
        return (total + register).float().double() if self.promote_every else register

    def matmul(self, x: Float[Tensor, "m k"], w: Float[Tensor, "n k"]) -> Float64[Tensor, "m n"]:
        """x w^T, each element a ``dot``. Takes 33 * m * n * 8 bytes."""
        return self.dot(x[:, None], w[None])

    def _add(
        self, register: Float64[Tensor, "*lead"], products: Float64[Tensor, "*lead group"]
    ) -> Float64[Tensor, "*lead"]:
        """The register after one group of products."""
        if self.aligned_with == "products":
            products = self._aligned(products).sum(-1, keepdim=True)
        both = torch.cat([register[..., None], products], dim=-1)
        # The sum may be longer than the register that takes it up: alone it is aligned with itself.
        return self._aligned(self._aligned(both).sum(-1, keepdim=True))[..., 0]

    def _aligned(self, terms: Float64[Tensor, "*lead n"]) -> Float64[Tensor, "*lead n"]:
        """Terms shifted to the largest exponent among them, what leaves at the right cut off."""
        largest = terms.abs().amax(-1, keepdim=True)
        largest = torch.where(largest > 0, largest, 1.0)
        # largest = mantissa * 2^e with a mantissa from 1/2 to 1; its leading bit counts 2^(e - 1).
        leading_bit = largest / torch.frexp(largest).mantissa / 2
        last_bit = leading_bit / 2**self.fraction_bits
        return torch.trunc(terms / last_bit) * last_bit
