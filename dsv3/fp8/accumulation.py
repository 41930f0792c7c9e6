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

**An H200 follows the first, with 13 fraction bits, bit for bit**: every output of the sums that we
let it add without promotion is the emulator's, for inputs of one sign, of both, and of very
different sizes, K from 32 to 4,096 (``benchmarks/accumulation.py``; figures and chip in
``assets/measurements/accumulation.json``). That took one detail that neither paper tells. Two
factors from 1 to 2 have a product from 1 to 4, and the chip aligns it by the *sum of its factors'
exponents*, as it comes, without moving its point first; for a subnormal code that exponent is -6.
Other chips were not asked.

With codes spread evenly over 0 to 448, K = 4096 and 13 fraction bits, the largest relative error is
7.8% by the first reading and 0.3% by the second; with promotion 0.06% and 0.01%. So:

* Both readings show that the error grows with K, is 0.1% or more at K = 4096, and that promotion
  takes away 24 of 25 parts of it or more. These claims are asserted (facts 36 and 37).
* "Nearly 2%" is the report's measurement, on inputs that it does not describe; ours reach that at
  K = 1024.
* The figures belong to the inputs. Relative error depends on where the sum lies between two powers
  of two: codes spread over 0 to 1 give 7.0%. And where signs cancel, the *largest relative*
  error says nothing: among many outputs one is near zero, and any error is large beside it. Use
  inputs of one sign, or compare norms.

Everything is emulated in float64, exactly: a wide adder that cuts towards zero, as the magnitudes
of sign and magnitude are cut. The eight exponent bits of FP22 neither overflow nor underflow on
sums of E4M3 products, so a range is not modelled. Slow, and meant to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dsv3.errors import DSV3Error

READINGS = ("accumulator", "products")
_OF_SUBNORMALS = -6  # the exponent of E4M3's codes whose exponent bits are all 0
_OF_ZERO = -500  # below that of any sum of products


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

        x, w: E4M3 numbers, as values or as a tensor of float8_e4m3fn, finite. Without promotion the
        result has ``fraction_bits`` bits, with it those of an FP32 number.
        """
        x, w = x.double(), w.double()
        register = torch.zeros_like(x[..., 0] * w[..., 0])
        total = torch.zeros_like(register)
        for first in range(0, x.shape[-1], self.group):
            here = slice(first, first + self.group)
            register = self._add(register, x[..., here], w[..., here])
            if self.promote_every and (first + self.group) % self.promote_every == 0:
                total = (total + register).float().double()
                register = torch.zeros_like(register)
        # A last part that is shorter than promote_every is still in the register.
        return (total + register).float().double() if self.promote_every else register

    def matmul(self, x: Float[Tensor, "m k"], w: Float[Tensor, "n k"]) -> Float64[Tensor, "m n"]:
        """x w^T, each element a ``dot``. Takes 33 * m * n * 8 bytes."""
        return self.dot(x[:, None], w[None])

    def _add(
        self,
        register: Float64[Tensor, "*lead"],
        x: Float64[Tensor, "*#lead group"],
        w: Float64[Tensor, "*#lead group"],
    ) -> Float64[Tensor, "*lead"]:
        """The register after one group of products."""
        products = x * w
        exponents = _exponent(x).clamp(min=_OF_SUBNORMALS) + _exponent(w).clamp(min=_OF_SUBNORMALS)
        largest = torch.where(products == 0, _OF_ZERO, exponents).amax(-1)
        if self.aligned_with == "products":
            products = self._cut(products, largest[..., None]).sum(-1, keepdim=True)
            largest = _exponent(products[..., 0])
        largest = torch.maximum(largest, _exponent(register))
        products = self._cut(products, largest[..., None])
        total = products.sum(-1) + self._cut(register, largest)
        # The sum may be longer than the register that takes it up.
        return self._cut(total, _exponent(total))

    def _cut(
        self, terms: Float64[Tensor, "*shape"], exponent: Int[Tensor, "*#shape"]
    ) -> Float64[Tensor, "*shape"]:
        """Terms shifted to an exponent, what leaves at the right cut off."""
        last_bit = torch.ldexp(torch.ones_like(terms), exponent - self.fraction_bits)
        return torch.trunc(terms / last_bit) * last_bit


def _exponent(values: Float64[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The e of 2^e <= |value| < 2^(e+1); ``_OF_ZERO`` for 0."""
    return torch.where(values == 0, _OF_ZERO, torch.frexp(values).exponent - 1)
