"""The emulated tensor core against the same sums in whole numbers and fractions, one by one."""

import math
from fractions import Fraction

import pytest
import torch

from dsv3.book.measured import accumulation_measurement
from dsv3.errors import DSV3Error
from dsv3.fp8.accumulation import READINGS, Accumulator

pytest.importorskip("triton", reason="Triton is not installed (there is none for this platform)")

from benchmarks.accumulation import KINDS, inputs

# The oracle: Python's fractions, which are exact, and no torch.


def power_below(size: Fraction) -> int:
    """The e with 2^e <= size < 2^(e+1), counted."""
    exponent = 0
    while Fraction(2) ** exponent > size:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= size:
        exponent += 1
    return exponent


def cut(term: Fraction, exponent: int, bits: int) -> Fraction:
    last = Fraction(2) ** (exponent - bits)
    return math.trunc(term / last) * last


def power_of(*terms: Fraction) -> int:
    """That of the largest; far below all others if there are zeros alone."""
    largest = max(abs(term) for term in terms)
    return power_below(largest) if largest else -600


def power_of_product(a: Fraction, b: Fraction) -> int:
    """The exponent bits of both codes say it; subnormals have those of 2^-6."""
    if not a * b:
        return -600
    return sum(max(power_below(abs(factor)), -6) for factor in (a, b))


def to_fp32(value: Fraction) -> Fraction:
    if value == 0:
        return value
    last = Fraction(2) ** (power_below(abs(value)) - 23)
    return round(value / last) * last  # a fraction rounds ties to even


def summed(x: list[float], w: list[float], chip: Accumulator) -> Fraction:
    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(x, w)]
    bits = chip.fraction_bits
    register = total = Fraction(0)
    waiting = 0
    while pairs:
        group, pairs = pairs[: chip.group], pairs[chip.group :]
        largest = max(power_of_product(*pair) for pair in group)
        terms = [a * b for a, b in group]
        if chip.aligned_with == "products":
            terms = [sum(cut(term, largest, bits) for term in terms)]
            largest = power_of(*terms)
        largest = max(largest, power_of(register))
        register = sum(cut(term, largest, bits) for term in [register, *terms])
        register = cut(register, power_of(register), bits)
        waiting += chip.group
        if waiting == chip.promote_every or (chip.promote_every and not pairs):
            total, register, waiting = to_fp32(total + register), Fraction(0), 0
    return total if chip.promote_every else register


def codes(*shape: int, kind: str = "mixed") -> torch.Tensor:
    """E4M3 numbers: "even" spread over 0 to 448, or of both signs, all exponents, and zeros."""
    generator = torch.Generator().manual_seed(36)
    if kind == "even":
        return (torch.rand(shape, generator=generator) * 448).to(torch.float8_e4m3fn)
    sizes = torch.randint(-8, 9, shape, generator=generator)
    x = torch.randn(shape, generator=generator) * 2.0**sizes
    zero = torch.rand(shape, generator=generator) < 0.1
    return x.masked_fill(zero, 0.0).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("promote_every", [None, 128])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("k", [1, 31, 32, 200, 256, 333])
def test_sums_are_those_of_exact_fractions(k, reading, promote_every):
    for bits in (5, 13, 14, 22, 40):
        chip = Accumulator(bits, aligned_with=reading, promote_every=promote_every)
        for kind in ("mixed", "even"):
            x, w = codes(6, k, kind=kind).double(), codes(12, k, kind=kind)[6:].double()
            expected = [summed(a, b, chip) for a, b in zip(x.tolist(), w.tolist())]
            assert chip.dot(x, w).tolist() == expected, (bits, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_h200_gave_these_sums(kind):
    """What its tensor cores answered, with and without promotion, to the last bit."""
    lines = [line for line in accumulation_measurement()["lines"] if line["inputs"] == kind]
    assert len(lines) >= 16
    x, w = inputs(kind)
    for line in lines:
        k, chip = line["k"], Accumulator(13, promote_every=128 if line["promoted"] else None)
        assert chip.dot(x[:1, :k], w[:8, :k]).tolist() == line["sums"], (k, line["promoted"])
        assert line["equal"]["kernel, accumulator 13"] == 1
        assert line["equal"]["cublas, accumulator 13"] == 1


def test_other_groups_and_promotions():
    x, w = codes(3, 100), codes(6, 100)[3:]
    for group, every in ((1, None), (1, 7), (4, 16), (64, 64), (128, None)):
        for reading in READINGS:
            chip = Accumulator(7, group, reading, every)
            expected = [
                summed(a, b, chip) for a, b in zip(x.double().tolist(), w.double().tolist())
            ]
            assert chip.dot(x, w).tolist() == expected


def test_a_sum_by_hand():
    """3 fraction bits beside 8, where the last bit counts 1; sums of 16 or more count in 2."""
    x = torch.tensor([[8.0, 1.75, 1.75, 1.75]])
    one = torch.ones(1, 4)
    assert Accumulator(3, group=4).dot(x, one).item() == 11  # 8 + 1 + 1 + 1
    assert Accumulator(3, group=2).dot(x, one).item() == 11  # 8 + 1, then + 1 + 1
    # Among themselves 1.75 and 1.75 lose nothing; 3.5 is cut to 3 beside the 9.
    assert Accumulator(3, group=2, aligned_with="products").dot(x, one).item() == 12
    assert Accumulator(3, group=2, promote_every=2).dot(x, one).item() == 9 + 3.5
    # Cut towards zero, on both sides of it, and -8 + 8 leaves what stood beside them: nothing.
    assert Accumulator(3, group=4).dot(-x, one).item() == -11
    assert Accumulator(3).dot(torch.tensor([8.0, 0.9, -8.0]), torch.ones(3)).item() == 0


@pytest.mark.parametrize("reading", READINGS)
def test_one_large_number_and_many_small_ones(reading):
    x = torch.ones(4096)
    x[0] = 2.0**14
    one = torch.ones(4096)
    kept = Accumulator(13, aligned_with=reading).dot(x, one).item()
    # Beside 2^14 the last of 13 bits counts 2: a single 1 vanishes, 32 of them together do not.
    assert kept == (2**14 if reading == "accumulator" else 2**14 + 127 * 32)
    promoted = Accumulator(13, aligned_with=reading, promote_every=128).dot(x, one).item()
    assert 0 <= 2**14 + 4095 - promoted < 128


@pytest.mark.parametrize("reading", READINGS)
def test_with_many_bits_nothing_is_lost(reading):
    x, w = codes(32, 1000).double(), codes(64, 1000)[32:].double()
    chip = Accumulator(40, aligned_with=reading)
    assert torch.equal(chip.dot(x, w), (x * w).sum(-1))
    assert torch.equal(chip.matmul(x, w), x @ w.T)
    fp32 = Accumulator(40, aligned_with=reading, promote_every=128).matmul(x, w)
    assert torch.equal(fp32, fp32.float().double()) and not torch.equal(fp32, x @ w.T)


def test_a_product_of_matrices_is_all_its_dots():
    x, w = codes(5, 160), codes(7, 160, kind="even")
    chip = Accumulator(aligned_with="products", promote_every=32)
    y = chip.matmul(x, w)
    assert y.shape == (5, 7)
    for i in range(5):
        assert torch.equal(chip.dot(x[i], w), y[i])
    assert Accumulator().matmul(x[:0], w).shape == (0, 7)


def test_zeros_stay_zero():
    zeros = torch.zeros(2, 70)
    for reading in READINGS:
        assert torch.equal(Accumulator(aligned_with=reading).dot(zeros, zeros).float(), zeros[:, 0])


def worst(chip: Accumulator, x: torch.Tensor, w: torch.Tensor) -> float:
    exact = (x.double() * w.double()).sum(-1)
    return ((chip.dot(x, w) - exact) / exact).abs().max().item()


# FACTS: the largest relative error at K = 4096, alone and with promotion, inputs "even".
MEASURED = {
    ("accumulator", 13): (7.8e-2, 6.4e-4),
    ("accumulator", 14): (3.7e-2, 2.1e-4),
    ("products", 13): (3.4e-3, 1.3e-4),
    ("products", 14): (1.7e-3, 6.0e-5),
}


@pytest.mark.parametrize("reading, bits", list(MEASURED))
def test_the_error_grows_with_k_and_promotion_mends_it(reading, bits):
    x, w = codes(256, 4096, kind="even"), codes(512, 4096, kind="even")[256:]
    chip = Accumulator(bits, aligned_with=reading)
    lengths = [2**power for power in range(5, 13)]
    errors = [worst(chip, x[:, :k], w[:, :k]) for k in lengths]
    # fact 36
    assert errors == sorted(errors) and errors[-1] > 1e-3
    # fact 37
    promoted = worst(Accumulator(bits, 32, reading, promote_every=128), x, w)
    assert promoted * 25 <= errors[-1]
    expected = MEASURED[reading, bits]
    assert errors[-1] == pytest.approx(expected[0], rel=0.05)
    assert promoted == pytest.approx(expected[1], rel=0.1)


def test_where_signs_cancel_the_largest_relative_error_says_nothing():
    generator = torch.Generator().manual_seed(0)
    x, w = ((torch.randn(512, 4096, generator=generator) * 100) for _ in range(2))
    x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    chip = Accumulator(13)
    exact = (x.double() * w.double()).sum(-1)
    norms = (chip.dot(x, w) - exact).norm() / exact.norm()
    assert norms < 0.002 and worst(chip, x, w) > 50 * norms


def test_a_chip_that_cannot_be_emulated_is_refused():
    with pytest.raises(DSV3Error, match="aligned_with: unknown reading.*nothing"):
        Accumulator(aligned_with="nothing")
    for bits in (0, 41):
        with pytest.raises(DSV3Error, match="fraction_bits: .*1 to 40"):
            Accumulator(bits)
    with pytest.raises(DSV3Error, match="group: .*1 to 1024"):
        Accumulator(group=0)
    for every in (0, 100):
        with pytest.raises(DSV3Error, match="a multiple of the group, 32"):
            Accumulator(promote_every=every)
