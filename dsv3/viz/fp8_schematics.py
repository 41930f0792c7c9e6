"""Chapter 4, drawn: numbers of few bits, and the scales that carry them.

Each function returns a ``Scene`` for ``viz.draw``. What stands on a picture is computed by
``dsv3.fp8`` from the arguments: change a value and the picture follows. The products of FP8
operands are in ``dsv3.viz.fp8_products_schematics``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dsv3.fp8.formats import E4M3_MAX, block_scale, decode_e4m3, encode_e4m3
from dsv3.fp8.small_floats import BF16, E4M3, E5M2, E5M6, UE8M0
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import (
    SMALL,
    TINT,
    WIDTH,
    arrow,
    bracket,
    cells,
    headline,
    legend,
    lines,
    number,
    power,
)

SIGN, EXPONENT, MANTISSA = "vermillion", "blue", "green"
STRONG = 0.35  # tint of bits and of cells that are meant


def _bits(code: int, width: int) -> str:
    return f"{code:0{width}b}"


def _e4m3(value: float) -> tuple[int, float]:
    """(code, the number that it stands for)."""
    code = encode_e4m3(torch.tensor([value], dtype=torch.float32))
    return int(code), float(decode_e4m3(code))


def _written(value: float) -> list[tuple[str, str, int, float, float]]:
    """For each format: name, bits, how many are exponent, the number they are, the largest."""
    rows = []
    for each in (BF16, E5M6, E5M2, E4M3, UE8M0):
        code = each.encode(value)
        name = each.name.lower() if each.is_scale else each.name
        bits = _bits(code, each.bits)
        rows.append((name, bits, each.exponent_bits, each.value(code), each.largest))
    return rows


def bits_of(value: float = 11.4) -> Scene:
    """One number in five formats: its bits, what it becomes, how fine and how wide they are."""
    if not 2**-6 <= value <= E4M3_MAX:
        raise ValueError(f"a value from 2^-6 to 448, which is normal in all formats; not {value}")
    rows = _written(value)
    left, bit, top, step = 64, 20, 62, 42
    columns = [(474, f"{number(value)} becomes"), (590, "numbers in [1, 2)"), (700, "largest")]
    became = ", ".join(f"{number(near, 5)} in {name}" for name, _, _, near, _ in rows)
    scene = Scene(
        WIDTH,
        top + step * len(rows) + 22,
        f"The bits of {number(value)} in five formats, with sign, exponent and mantissa in three "
        f"colours. It becomes {became}.",
    )
    headline(scene, f"{number(value)} in five formats")
    for x, words in columns:
        scene.text(x, 42, words, anchor="middle", size=SMALL, fill="soft")
    for row, (name, bits, exponent, near, largest) in enumerate(rows):
        y = top + step * row
        signed = name != "ue8m0"
        scene.text(0, y + 13, name, bold=True)
        for place, text in enumerate(bits if signed else " " + bits):
            kind = SIGN if place == 0 else EXPONENT if place <= exponent else MANTISSA
            if text == " ":
                continue
            x = left + place * bit + 4 * (place > 0) + 4 * (place > exponent)
            _bit(scene, x, y, bit, text, kind)
        mantissa = len(bits) - exponent - signed
        most = number(largest) if largest < 1e6 else _magnitude(largest)
        for (x, _), text in zip(columns, (number(near, 5), str(2**mantissa), most)):
            scene.text(x, y + 13, text, anchor="middle", bold=x == columns[0][0])
    legend(
        scene,
        left,
        top + step * len(rows) + 10,
        [(SIGN, STRONG, "sign"), (EXPONENT, STRONG, "exponent"), (MANTISSA, STRONG, "mantissa")],
    )
    return scene


def _bit(scene: Scene, x: float, y: float, width: float, text: str, kind: str) -> None:
    scene.rect(x, y, width, 26, fill=kind, opacity=STRONG, stroke=kind)
    scene.text(x + width / 2, y + 13, text, anchor="middle", code=True)


def _magnitude(value: float) -> str:
    return f"about {power(math.floor(math.log10(value)), '10')}"


def e4m3_codes() -> Scene:
    """All 256 codes: a table of the positive ones, a row for each exponent, and one line on which
    every number of both signs has its tick."""
    values = decode_e4m3(torch.arange(256, dtype=torch.uint8)).tolist()
    left, top, wide, high = 150, 70, 58, 20
    table = [values[8 * e : 8 * e + 8] for e in range(15, -1, -1)]
    below = top + high * 16
    scene = Scene(
        WIDTH,
        below + 128,
        "The 128 codes of E4M3 without a sign as a table: a row for each of 16 exponents, a column "
        "for each of 8 mantissas, and the step from number to number, which doubles from row to "
        "row up to 32; code 0x7F is NaN, 448 is the largest. Below, all numbers of both signs on "
        "one line: crowded at 0, 32 apart at the ends.",
    )
    headline(scene, "All codes of E4M3: 16 exponents × 8 mantissas, and a sign")
    scene.text(left + 4 * wide, 40, "mantissa bits", anchor="middle", size=SMALL, fill="soft")
    for m in range(8):
        scene.text(left + (m + 0.5) * wide, 57, _bits(m, 3), anchor="middle", size=SMALL, code=True)
    scene.text(left - 14, 57, "exponent bits", anchor="end", size=SMALL, fill="soft")
    scene.text(left + 8 * wide + 66, 57, "step", anchor="middle", size=SMALL, fill="soft")

    def look(row: int, column: int) -> dict:
        if math.isnan(table[row][column]):
            return {"fill": "vermillion", "opacity": STRONG, "bold": True}
        if table[row][column] == E4M3_MAX:
            return {"fill": "orange", "opacity": 0.6, "bold": True}
        return {
            "fill": "purple" if row == 15 else "sky",
            "opacity": 0.3 if row == 15 else 0.08 + 0.4 * (row % 2),
        }

    texts = [[exact(value) for value in row] for row in table]
    cells(scene, left, top, texts, width=wide, height=high, look=look)
    for row in range(16):
        exponent, y = 15 - row, top + (row + 0.5) * high
        step = table[row][1] - table[row][0]
        scene.text(left - 14, y, _bits(exponent, 4), anchor="end", size=SMALL, code=True)
        scene.text(left + 8 * wide + 66, y, exact(step), anchor="middle", size=SMALL)
    scene.text(0, below - high / 2, "subnormal", size=SMALL, fill="soft")
    _line_of_all(scene, values, below + 68)
    return scene


def exact(value: float) -> str:
    """Exact: whole numbers and halves as they are, small ones as a fraction of a power of two."""
    if math.isnan(value) or value == 0 or value >= 1:
        return number(value, 4)
    top, bottom = value.as_integer_ratio()
    return f"{top}/{bottom}" if bottom <= 1024 else number(value)


def _line_of_all(scene: Scene, values: Sequence[float], y: float) -> None:
    def at(value: float) -> float:
        return WIDTH / 2 + value / E4M3_MAX * (WIDTH / 2 - 20)

    finite = sorted({value for value in values if not math.isnan(value)})
    scene.text(
        0, y - 30, f"the {len(finite)} numbers of both signs on one line", size=SMALL, fill="soft"
    )
    scene.line((at(-E4M3_MAX), y), (at(E4M3_MAX), y), stroke="ink", stroke_width=1.2)
    for value in finite:
        scene.line((at(value), y - 14), (at(value), y), stroke="blue", stroke_width=1)
    for value in (-448, -256, -128, 0, 128, 256, 448):
        scene.line((at(value), y), (at(value), y + 5), stroke="ink", stroke_width=1.2)
        scene.text(at(value), y + 16, number(value), anchor="middle", size=SMALL, fill="soft")
    bracket(scene, at(256), at(448), y + 28, "6 numbers between, 32 apart", "below")


def encode_by_hand(value: float = 11.4) -> Scene:
    """The steps from a number to its E4M3 code, and where it falls between neighbours."""
    if not 2**-6 <= abs(value) < E4M3_MAX:
        raise ValueError(f"a normal number of E4M3, 2^-6 to below 448 in size; not {value}")
    size, sign = abs(value), int(value < 0)
    e = math.floor(math.log2(size))
    eighths = (size / 2**e - 1) * 8
    code, near = _e4m3(value)
    mantissa, exponent = code & 7, code >> 3 & 15
    carried = exponent != e + 7
    scene = Scene(
        WIDTH,
        280,
        f"{number(value)} becomes an E4M3 code in four steps: split into sign, power of two and a "
        f"factor from 1 to 2; write the exponent as {e} + 7 and the factor's fraction in eighths, "
        f"rounded; put the bits together. The number kept is {number(near)}.",
    )
    headline(scene, f"From {number(value)} to its code")
    parts = [
        (200, SIGN, "sign", "−" if sign else "+", f"{sign}"),
        (370, EXPONENT, "power of two", power(e), _bits(exponent, 4)),
        (585, MANTISSA, "factor from 1 to 2", number(size / 2**e, 5), _bits(mantissa, 3)),
    ]
    how = [
        ("− is 1" if sign else "+ is 0",),
        (f"{e} + 7 = {e + 7}", f"carry: {exponent}") if carried else (f"{e} + 7 = {e + 7}",),
        (
            f"({number(size / 2**e, 5)} − 1) × 8 = {number(eighths)}",
            f"rounds to {8 if carried else mantissa}" + (": carry" if carried else ""),
        ),
    ]
    for y, words in ((60, "1  split"), (125, "2  count"), (190, "3  write bits")):
        scene.text(0, y, words, bold=True)
    for (x, kind, name, text, bits), notes in zip(parts, how):
        scene.text(x, 39, name, anchor="middle", size=SMALL, fill="soft")
        scene.text(x, 61, text, anchor="middle", size=16, bold=True)
        arrow(scene, (x, 74), (x, 106))
        first = 125 - 8 * (len(notes) - 1)
        lines(scene, x, first, *notes, anchor="middle")
        arrow(scene, (x, 145), (x, 173))
        for place, bit in enumerate(bits):
            at = x + (place - len(bits) / 2) * 24
            _bit(scene, at, 178, 24, bit, kind)
    scene.text(285, 61, "×", anchor="middle", size=16)
    scene.text(470, 61, "×", anchor="middle", size=16)
    scene.text(WIDTH, 191, f"= 0x{code:02X}", anchor="end", bold=True)
    _neighbours(scene, value, near, e, 252)
    return scene


def _neighbours(scene: Scene, value: float, near: float, e: int, y: float) -> None:
    """The binade of a value with its nine ends of steps, the value and where it goes."""
    low, high, sign = 2.0**e, 2.0 ** (e + 1), math.copysign(1, value)

    def at(place: float) -> float:
        return 150 + (abs(place) - low) / (high - low) * 540

    scene.text(0, y, "4  what is kept", bold=True)
    scene.line((at(low), y), (at(high), y), stroke="ink", stroke_width=1.2)
    for eighth in range(9):
        place = low + eighth * (high - low) / 8
        meant = place == abs(near)
        scene.line(
            (at(place), y - 6), (at(place), y + 6), stroke="ink", stroke_width=2.4 if meant else 1.2
        )
        scene.text(at(place), y + 20, number(sign * place, 4), anchor="middle", bold=meant)
    scene.circle(at(value), y, 5, fill="orange", stroke="ink")
    scene.text(at(value), y - 17, number(value, 5), anchor="middle", bold=True)


OUTLIER = ((1, 3, 7, 2), (5, 1, 2, 7), (2, 458752, 3, 1), (7, 2, 1, 5))


def outlier_block(values: Sequence[Sequence[float]] = OUTLIER) -> Scene:
    """A small block with an outlier: one scale for all of it beside one scale for each row."""
    x = torch.tensor(values, dtype=torch.float32)
    if x.dim() != 2 or not 1 <= x.shape[0] <= 6 or not 1 <= x.shape[1] <= 4:
        raise ValueError(f"1 to 6 rows of 1 to 4 values, not {tuple(x.shape)}")
    rows, columns = x.shape
    wide, high = 50, 24
    tall, across = high * rows, wide * columns
    tops = (62, 62 + tall + 66)
    scene = Scene(WIDTH, tops[1] + tall + 34, _outlier_alt(x))
    middle = (tops[0] + tops[1] + tall) / 2
    scene.text(across / 2, middle - tall / 2 - 14, "values", anchor="middle", fill="soft")

    def outlier(row: int, column: int) -> dict:
        largest = abs(x[row, column]) == x.abs().max()
        return {"fill": "orange", "opacity": 0.6} if largest else {}

    cells(scene, 0, middle - tall / 2, _texts(x), width=wide, height=high, look=outlier)
    xs = (262, 318, WIDTH - across)
    for top, per_row in zip(tops, (False, True)):
        _way(scene, x, per_row, top, (across, middle), xs, (wide, high))
    legend(
        scene,
        xs[1],
        tops[1] + tall + 22,
        [("orange", 0.6, "outlier"), ("vermillion", STRONG, "off by more than 1/16")],
    )
    return scene


def _scaled(x: torch.Tensor, per_row: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, what the codes stand for, and the values that come back."""
    amax = x.abs().amax(1, keepdim=True) if per_row else x.abs().max().view(1, 1)
    scale = block_scale(amax, "float32")
    codes = decode_e4m3(encode_e4m3(x / scale))
    return scale, codes, codes * scale


def _off(x: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """True where a value comes back wrong by more than half a step of a normal number, 1/16."""
    return (back - x).abs() > x.abs() / 16 * 1.0001


def _texts(x: torch.Tensor) -> list[list[str]]:
    return [[number(value) for value in row] for row in x.tolist()]


def _outlier_alt(x: torch.Tensor) -> str:
    wrong = [int(_off(x, _scaled(x, per_row)[2]).sum()) for per_row in (False, True)]
    return (
        f"A block of {x.shape[0]} by {x.shape[1]} values with the outlier "
        f"{number(float(x.abs().max()))}, divided by its scale, rounded to E4M3 and multiplied "
        f"back. With one scale for all, {wrong[0]} of {x.numel()} values come back wrong; with a "
        f"scale for each row, {wrong[1]}, all of them in the outlier's row."
    )


def _way(scene, x, per_row: bool, top: float, start, xs, cell) -> None:
    scale, codes, back = _scaled(x, per_row)
    (rows, columns), (wide, high) = x.shape, cell
    middle, off = top + high * rows / 2, _off(x, back)
    scene.text(
        xs[0] - 30, top - 40, "one scale for each row" if per_row else "one scale", bold=True
    )
    half = wide * columns / 2
    for at, words in (
        (xs[0], "scale"),
        (xs[1] + half, "value ÷ scale, rounded"),
        (xs[2] + half, "code × scale"),
    ):
        scene.text(at, top - 14, words, anchor="middle", fill="soft")
    (left, from_y), turn = start, start[0] + 14
    arrow(scene, (left, from_y), (turn, from_y), (turn, middle), (xs[0] - 31, middle))
    share = high * rows / len(scale)
    cells(
        scene,
        xs[0] - 30,
        top,
        [[exact(share) for share in row] for row in scale.tolist()],
        width=60,
        height=share,
        look=lambda row, column: {"fill": "blue", "opacity": TINT, "stroke": "blue"},
    )
    arrow(scene, (xs[0] + 32, middle), (xs[1] - 2, middle))
    cells(scene, xs[1], top, [[exact(v) for v in row] for row in codes.tolist()], width=wide)
    arrow(scene, (xs[1] + wide * columns + 2, middle), (xs[2] - 2, middle))

    def look(row: int, column: int) -> dict:
        if off[row, column]:
            return {"fill": "vermillion", "opacity": STRONG, "bold": True}
        return {}

    cells(scene, xs[2], top, _texts(back), width=wide, look=look)
