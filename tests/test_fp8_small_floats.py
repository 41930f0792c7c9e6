"""Small float formats against torch's own types: every code, every tie, every special value."""

import math

import pytest
import torch
from fp8_cases import hard_values, same_bits

from dsv3 import fp8
from dsv3.errors import DSV3Error
from dsv3.fp8 import formats
from dsv3.fp8.small_floats import (
    BF16,
    E4M3,
    E5M2,
    E5M6,
    FORMATS,
    FP16,
    UE8M0,
    Neighbours,
    SmallFloat,
)

TORCH = {
    E4M3: torch.float8_e4m3fn,
    E5M2: torch.float8_e5m2,
    FP16: torch.float16,
    BF16: torch.bfloat16,
    UE8M0: torch.float8_e8m0fnu,
}
STORED = {8: torch.uint8, 16: torch.uint16}
E2M1 = SmallFloat("E2M1", 2, 1, 1, specials="none", saturates=True)  # as in 4-bit formats


def as_torch(kind: SmallFloat, codes: torch.Tensor) -> torch.Tensor:
    """The numbers of codes, by torch."""
    return codes.to(STORED[kind.bits]).view(TORCH[kind]).double()


def points(kind: SmallFloat) -> torch.Tensor:
    """FP32: numbers of a format, ties between neighbours, and one step to each side of both."""
    codes = torch.arange(1 << kind.bits)
    if kind.bits == 16:  # every 31st, and the ends
        codes = torch.cat([codes[:70], codes[::31], codes[kind.encode(kind.largest) - 40 :][:80]])
    numbers = torch.tensor([kind.value(code) for code in codes.tolist()])
    numbers = numbers[numbers.isfinite()]
    steps = torch.tensor([kind.step(x) for x in numbers.tolist()])
    here = torch.cat([numbers, numbers + steps / 2])
    return torch.cat([here, *(torch.nextafter(here, torch.tensor(s)) for s in (-1e38, 1e38))])


@pytest.mark.parametrize("kind", list(TORCH), ids=lambda kind: kind.name)
def test_every_code_is_the_number_torch_takes_it_for(kind):
    codes = torch.arange(1 << kind.bits)
    assert same_bits(
        torch.tensor(kind.values(), dtype=torch.float64).float(), as_torch(kind, codes).float()
    )
    kinds = [kind.kind(code) for code in codes.tolist()]
    expected = as_torch(kind, codes)
    assert [k == "nan" for k in kinds] == expected.isnan().tolist()
    assert [k == "infinity" for k in kinds] == expected.isinf().tolist()
    assert [k == "zero" for k in kinds] == (expected == 0).tolist()
    info = torch.finfo(TORCH[kind])
    assert (kind.largest, kind.smallest_normal) == (info.max, info.smallest_normal)
    positive = expected[expected > 0]
    assert kind.smallest == positive.min()
    small = (expected.abs() > 0) & (expected.abs() < info.smallest_normal)
    assert [k == "subnormal" for k in kinds] == small.tolist()


@pytest.mark.parametrize("kind", [E4M3, E5M2, FP16, BF16], ids=lambda kind: kind.name)
def test_numbers_become_the_codes_torch_gives_them(kind):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e38, -1e38, 1e-45, -1e-45])
    x = torch.cat([points(kind), special])
    cast = x.clamp(-448, 448) if kind is E4M3 else x  # torch has saturated only since 2.8 or so
    expected = cast.to(TORCH[kind]).view(STORED[kind.bits]).tolist()
    assert [kind.encode(number) for number in x.tolist()] == expected
    assert kind.kind(kind.encode(math.nan)) == "nan"
    assert (
        kind.encode(math.nan) & 0x7FFF == {E4M3: 0x7F, E5M2: 0x7E, FP16: 0x7E00, BF16: 0x7FC0}[kind]
    )
    assert kind.fields(kind.encode(-math.nan)).sign == "1"


def test_the_fast_encoder_of_e4m3_does_what_the_definition_says():
    x = hard_values()
    x = x[~x.isnan()]  # Python may lose the sign of a NaN
    assert fp8.encode_e4m3(x).tolist() == [E4M3.encode(number) for number in x.tolist()]
    x = points(E4M3)
    assert fp8.encode_e4m3(x).tolist() == [E4M3.encode(number) for number in x.tolist()]
    decoded = fp8.decode_e4m3(torch.arange(256, dtype=torch.uint8))
    assert same_bits(decoded, torch.tensor(E4M3.values()))


def test_e5m6_is_what_training_rounds_to():
    x = torch.cat([points(E5M6), torch.tensor([1e9, -1e9, math.inf, -math.inf, 0.0, -0.0, 1e-9])])
    rounded = torch.tensor([E5M6.round(number) for number in x.tolist()])
    assert same_bits(formats.round_e5m6(x).float(), rounded)
    # Twelve of sixteen bits: each number is a float16 whose last four bits are 0.
    codes = torch.arange(1 << 12)
    half = (codes << 4).to(torch.uint16).view(torch.float16).float()
    assert same_bits(torch.tensor(E5M6.values()), half)
    assert E5M6.largest == formats.E5M6_MAX


def test_ue8m0_is_how_scales_are_stored_and_rounded():
    scales = torch.tensor(UE8M0.values()[1:255])
    stored = formats.encode_scale(scales, torch.uint8)
    assert stored.tolist() == list(range(1, 255))
    assert stored.tolist() == [UE8M0.encode(scale) for scale in scales.tolist()]
    x = torch.cat([scales, scales * 1.25, scales[:-1] * (1 + 2.0**-23), scales[1:] * 1.9])
    up = formats.next_power_of_two(x.clamp(max=2.0**127)).clamp(max=2.0**127)
    assert [UE8M0.round(number) for number in x.tolist()] == up.tolist()
    assert [UE8M0.encode(x) for x in (0.0, -3.0, 1e-45, math.inf, math.nan)] == [0, 0, 0, 254, 255]
    assert UE8M0.fields(130) == ("", "10000010", "") and UE8M0.value(130) == 8


@pytest.mark.parametrize("kind", [*FORMATS, E2M1], ids=lambda kind: kind.name)
def test_neighbours_stand_around_a_number(kind):
    grid = sorted({value for value in kind.values() if math.isfinite(value)})
    inside = grid if len(grid) < 3000 else grid[:30] + grid[2000::977] + grid[-30:-1]
    places = {value: i for i, value in enumerate(grid)}
    for low in inside:
        if (at := places[low]) + 1 == len(grid):
            continue
        high = grid[at + 1]
        assert kind.neighbours(low) == (low, low, low, False)
        for part in (0.25, 0.5, 0.75):
            x = low + (high - low) * part
            found = kind.neighbours(x)
            assert found[:2] == (low, high)
            assert found.tie == (part == 0.5 and not kind.is_scale)
            assert found.nearest == kind.round(x) and found.nearest in (low, high)
            if kind.is_scale or part != 0.5:
                assert found.nearest == (high if kind.is_scale or part > 0.5 else low)
            else:
                assert kind.encode(x) % 2 == 0
    assert kind.grid(grid[3], grid[3:900][-1]) == grid[3:900]
    assert kind.grid(grid[-9], math.inf) == grid[-9:]


def test_examples_that_can_be_worked_out_by_hand():
    assert E4M3.grid(8, 16) == [8, 9, 10, 11, 12, 13, 14, 15, 16]
    assert E4M3.grid(8.1, 8.9) == [] and E4M3.grid(447, 1e9) == [448] and E5M2.grid(1e9, 1e10) == []
    assert E4M3.grid(-0.002, 0.004) == [-(2**-9), 0, 2**-9, 2**-8]
    assert UE8M0.grid(-5, 2.0**-125) == [2.0**-127, 2.0**-126, 2.0**-125]
    assert E2M1.values()[:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6] and E2M1.encode(-99) == 0b1111
    assert E4M3.fields(0x52) == ("0", "1010", "010") and E4M3.value(0x52) == 10
    assert E4M3.neighbours(10.5) == Neighbours(10, 11, 10, True)
    assert E4M3.neighbours(11.5) == Neighbours(11, 12, 12, True)
    assert E4M3.neighbours(464) == Neighbours(448, math.inf, 448, False)
    assert E4M3.neighbours(-500) == Neighbours(-math.inf, -448, -448, False)
    assert FP16.neighbours(65520) == Neighbours(65504, math.inf, math.inf, True)
    assert FP16.neighbours(65519) == Neighbours(65504, math.inf, 65504, False)
    assert UE8M0.neighbours(0) == Neighbours(-math.inf, 2.0**-127, 2.0**-127, False)
    assert (E4M3.step(15), E4M3.step(16), E4M3.step(-0.01), E4M3.step(0)) == (1, 2, 2**-9, 2**-9)
    assert all(math.isnan(v) for v in E4M3.neighbours(math.nan)[:3])
    # One binade up everything doubles; E5M2 is twice as coarse and BF16 sixteen times finer.
    assert (E5M2.step(10), BF16.step(10), E5M6.step(10)) == (2, 1 / 16, 1 / 8)


def test_the_ends_of_e4m3():
    # fact 31
    finite = [value for value in E4M3.values() if not math.isnan(value)]
    assert max(finite) == 448 and min(value for value in finite if value > 0) == 2**-9
    assert len(finite) == 254 and len(set(finite)) == 253  # two NaN, and zero has two signs


def test_wrong_uses_are_refused():
    for code in (-1, 256):
        with pytest.raises(DSV3Error, match=r"E4M3: no such code.*0 to 255"):
            E4M3.value(code)
    with pytest.raises(DSV3Error, match="E2M1: no code for NaN"):
        E2M1.encode(math.nan)
    with pytest.raises(DSV3Error, match="X: unknown kind of special codes"):
        SmallFloat("X", 4, 3, 7, specials="all")
    with pytest.raises(DSV3Error, match="X: no infinity to round to"):
        SmallFloat("X", 4, 3, 7, specials="nan")
    for exponent, mantissa in ((0, 3), (9, 3), (8, 8), (4, -1)):
        with pytest.raises(DSV3Error, match="X: not a small format"):
            SmallFloat("X", exponent, mantissa, 7)
