"""Any small float format, described in a few numbers and computed by the definition.

A float is a sign, an exponent and a mantissa, cut out of a row of bits:

    E4M3   | s | e e e e | m m m |        value = (-1)^s * 2^(e - bias) * (1 + mantissa / 2^3)

Exponent bits buy range, mantissa bits buy precision, and in 8 bits you cannot have both: E4M3
reaches 448 in steps of 6 to 12.5 percent, E5M2 reaches 57344 in steps of 12.5 to 25. Where the
exponent's bits are all 0 the leading 1 is dropped, and the numbers go down to zero in equal steps
(*subnormals*). Where they are all 1, IEEE formats keep infinity and NaN; E4M3 gives up only its
very last code for NaN and counts on. "ue8m0" is the format of scales: eight bits of exponent and
nothing else, so every code is a power of two, and there is no sign and no zero.

``SmallFloat`` is the specification: one number at a time, in Python's floats (whose 53 bits hold
all of these exactly) and whole numbers, for reading, for the number line, and for tests.
``dsv3.fp8.formats`` is the fast form for tensors of E4M3, in which the model is computed; a test
holds it to this one. ``fields``, ``value`` and ``kind`` go from bits to numbers; ``encode``,
``neighbours``, ``step`` and ``grid`` from numbers to bits.

    E4M3.encode(10.5)       0x52: halfway from 10 to 11, and the even mantissa, that of 10, wins
    E4M3.neighbours(10.5)   Neighbours(below=10.0, above=11.0, nearest=10.0, tie=True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from dsv3.errors import DSV3Error

SPECIALS = ("infinities", "nan", "none")


class Fields(NamedTuple):
    """The bits of a code as text, "" where a format has none of a kind."""

    sign: str
    exponent: str
    mantissa: str


class Neighbours(NamedTuple):
    """Where a number stands on the grid of a format.

    below, above: the grid points around it, both the number itself if it is one of them; minus
        and plus infinity where the grid has ended.
    nearest: the one that ``encode`` picks, after saturation.
    tie: the number is halfway between two, and the even mantissa decided.
    """

    below: float
    above: float
    nearest: float
    tie: bool


@dataclass(frozen=True)
class SmallFloat:
    """A float format of at most 16 bits.

    bias: what is taken off the exponent field. specials: which codes are no numbers; "infinities":
    all those whose exponent is all ones (mantissa 0: infinity, else NaN, as in IEEE 754), "nan":
    only those of ones in exponent and mantissa, "none". saturates: ``encode`` takes what is too
    large, infinity too, to the largest number; otherwise to infinity. is_scale: codes are positive
    powers of two, and ``encode`` rounds up, so that nothing divided by the scale grows too large.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "infinities"
    saturates: bool = False
    is_scale: bool = False

    def __post_init__(self):
        if self.specials not in SPECIALS:
            self._refuse("unknown kind of special codes", self.specials, ", ".join(SPECIALS))
        if not self.saturates and self.specials != "infinities":
            self._refuse("no infinity to round to", self.specials, "saturates=True")
        if not 1 <= self.exponent_bits <= 8 or self.mantissa_bits < 0 or self.bits > 16:
            self._refuse("not a small format", self, "1 to 8 bits of exponent, 16 bits in all")

    # From bits to numbers

    @property
    def bits(self) -> int:
        return (not self.is_scale) + self.exponent_bits + self.mantissa_bits

    def fields(self, code: int) -> Fields:
        """The code's bits: ``E4M3.fields(0x52)`` is ("0", "1010", "010")."""
        if not 0 <= code < 1 << self.bits:
            self._refuse("no such code", code, f"0 to {(1 << self.bits) - 1}")
        text = format(code, f"0{self.bits}b")
        mantissa = self.bits - self.mantissa_bits
        exponent = mantissa - self.exponent_bits
        return Fields(text[:exponent], text[exponent:mantissa], text[mantissa:])

    def kind(self, code: int) -> str:
        """ "zero", "subnormal", "normal", "infinity" or "nan"."""
        _, exponent, mantissa = self.fields(code)
        if "0" not in exponent:
            if self.specials == "infinities":
                return "nan" if "1" in mantissa else "infinity"
            if self.specials == "nan" and "0" not in mantissa:
                return "nan"
        if "1" in exponent or self.is_scale:
            return "normal"
        return "subnormal" if "1" in mantissa else "zero"

    def value(self, code: int) -> float:
        """The number that a code stands for."""
        sign, exponent, mantissa = (int(bits or "0", 2) for bits in self.fields(code))
        match self.kind(code):
            case "nan":
                size = math.nan
            case "infinity":
                size = math.inf
            case "normal":
                whole = (1 << self.mantissa_bits) + mantissa
                size = math.ldexp(whole, exponent - self.bias - self.mantissa_bits)
            case _:
                size = math.ldexp(mantissa, self._lowest - self.mantissa_bits)
        return math.copysign(size, -1.0) if sign else size

    def values(self) -> list[float]:
        """The numbers of all codes, in the order of the codes."""
        return [self.value(code) for code in range(1 << self.bits)]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return self.value(self._last)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with a leading 1 of its own."""
        return math.ldexp(1.0, self._lowest)

    @property
    def smallest(self) -> float:
        """The smallest positive number."""
        return self.value(0 if self.is_scale else 1)

    # From numbers to bits

    def encode(self, x: float) -> int:
        """The code of the number nearest to x; a tie goes to the even mantissa.

        Beyond the largest number: to it, or to infinity, as ``saturates`` says. The sign is kept,
        that of zero too. NaN becomes one of the NaN codes, or is refused where there is none. A
        scale is rounded up; what is below its smallest, zero and negative numbers too, becomes
        that.
        """
        if math.isnan(x):
            return self._nan | self._sign(x)
        size = max(x, self.smallest) if self.is_scale else abs(x)
        if size > 2 * self.largest:  # infinity, and whatever is as good as that
            code = self._last + 1
        else:
            count = size / self.step(size)
            count = math.ceil(count) if self.is_scale else round(count)  # round: ties to even
            # Codes of one sign are numbered in the order of their values: 2^mantissa_bits to a
            # power of two. Where a count reaches the next power of two, so does the code.
            powers = self._exponent(size) - self._lowest
            code = (powers << self.mantissa_bits) + count - self.is_scale
        if code > self._last:
            code = self._last if self.saturates else self._last + 1
        return code | self._sign(x)

    def round(self, x: float) -> float:
        """The number of the format that x becomes."""
        return self.value(self.encode(x))

    def step(self, x: float) -> float:
        """How far apart the grid points around x are; for a power of two, those above it."""
        return math.ldexp(1.0, self._exponent(abs(x)) - self.mantissa_bits)

    def neighbours(self, x: float) -> Neighbours:
        """The grid points around x, the one it is rounded to, and whether that was a tie."""
        nearest = self.round(x)
        if math.isnan(x):
            return Neighbours(x, x, nearest, False)
        least = self.smallest if self.is_scale else -self.largest
        if x > self.largest or x < least:
            inner, beyond = (self.largest, math.inf) if x > 0 else (least, -math.inf)
            below, above = sorted((inner, beyond))
            # The step beyond the largest number is the last one again: half of it is a tie.
            half_way = abs(x) - self.largest == self.step(self.largest) / 2
            return Neighbours(below, above, nearest, half_way and not self.saturates)
        step = self.step(x)
        count = x / step
        below, above = math.floor(count) * step, math.ceil(count) * step
        tie = count - math.floor(count) == 0.5 and not self.is_scale
        return Neighbours(below, above, nearest, tie)

    def grid(self, low: float, high: float) -> list[float]:
        """All numbers of the format from low to high, in order; one zero."""
        least = self.smallest if self.is_scale else -self.largest
        first = self._place(self.neighbours(max(low, least)).above)
        last = self._place(self.neighbours(min(high, self.largest)).below)
        return [math.copysign(self.value(abs(i)), i) for i in range(first, last + 1)]

    # What the above share

    @property
    def _lowest(self) -> int:
        """The exponent of the smallest normal number, and of all subnormals."""
        return -self.bias if self.is_scale else 1 - self.bias

    @property
    def _last(self) -> int:
        """The code of the largest number."""
        after = 1 << (self.exponent_bits + self.mantissa_bits)
        if self.specials == "infinities":
            return after - (1 << self.mantissa_bits) - 1
        return after - 1 - (self.specials == "nan")

    @property
    def _nan(self) -> int:
        """IEEE's quiet NaN, whose first mantissa bit is 1; or the only one there is."""
        if self.specials == "none":
            self._refuse("no code for NaN", math.nan, "a number")
        quiet = 1 << self.mantissa_bits >> 1
        return self._last + 1 + (quiet if self.specials == "infinities" else 0)

    def _place(self, x: float) -> int:
        """Which number of the grid this is, counted from zero: the code with the sign as a sign."""
        return self.encode(x) if x >= 0 else -self.encode(-x)

    def _exponent(self, size: float) -> int:
        """The e with 2^e <= size < 2^(e+1); on and below the subnormals, theirs."""
        return max(math.frexp(size)[1] - 1, self._lowest) if size else self._lowest

    def _sign(self, x: float) -> int:
        """The sign bit, where it belongs."""
        return (math.copysign(1.0, x) < 0 and not self.is_scale) << (self.bits - 1)

    def _refuse(self, what: str, found: object, expected: str) -> None:
        raise DSV3Error(what, where=self.name, found=found, expected=expected)


E4M3 = SmallFloat("E4M3", 4, 3, 7, specials="nan", saturates=True)
E5M2 = SmallFloat("E5M2", 5, 2, 15)
E5M6 = SmallFloat("E5M6", 5, 6, 15, saturates=True)  # as ``formats.round_e5m6`` does
FP16 = SmallFloat("FP16", 5, 10, 15)
BF16 = SmallFloat("BF16", 8, 7, 127)
UE8M0 = SmallFloat("UE8M0", 8, 0, 127, specials="nan", saturates=True, is_scale=True)
FORMATS = (E4M3, E5M2, E5M6, FP16, BF16, UE8M0)
