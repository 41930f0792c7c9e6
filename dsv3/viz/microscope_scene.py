"""A quantised matrix under the microscope: its blocks by their scales, and one block from inside.

On the left the matrix, block by block, as dark as the scale is large; on the right the chosen
block, value by value; below, how its codes use E4M3's exponents, and what other scales would do to
the same values.

What there is to compare with depends on the matrix. Of *activations* the values before quantising
are known, so the errors are those that the model makes. Of stored *weights* they are not: the file
holds codes and scales, and what they were rounded from is gone. Then the values that the file holds
are the measure, the stored scales add nothing, and another scale adds what a second rounding costs.
"""

from __future__ import annotations

import math

import numpy
import torch
from matplotlib import colormaps
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor

from dsv3.fp8.formats import E4M3_MAX
from dsv3.viz import figure as book
from dsv3.viz.scene import Scene
from dsv3.viz.specimen import Block, Specimen

WIDTH = 920
MAP_LEFT, MAP_SIZE, MAP_MOST = 36, 300, 64  # the map of scales; rows and columns of blocks at most
BLOCK_LEFT, BLOCK_SIZE, FACTS_LEFT = 420, 256, 706
SHOWS = {
    "value": "value",
    "exponent": "exponent of the code",
    "own": "error, its own scale",
    "ue8m0": "error, power-of-two scale",
    "tensor": "error, one scale for the matrix",
}
_SCALES = colormaps["cividis"]
_SIGNED = LinearSegmentedColormap.from_list("signed", [book.ORANGE, "#ffffff", book.BLUE])
_ERRORS = LinearSegmentedColormap.from_list("errors", ["#ffffff", book.VERMILLION, "#5e2a00"])
_WORST_SHOWN = 1 / 8  # relative errors from here on have the darkest colour


def microscope_scene(specimen: Specimen, place: tuple[int, int], show: str) -> Scene:
    """place: row and column of the chosen block; show: a key of ``SHOWS``, what its values are
    coloured by."""
    block = specimen.block(place)
    scene = Scene(WIDTH, 652, _alt(specimen, block, place))
    rows, cols = specimen.values.shape
    kind = "activations, quantised as the model reads them" if specimen.exact else "stored weights"
    scene.text(0, 12, f"{specimen.name}, {rows} × {cols}: {kind}", bold=True, size=14)
    _map(scene, specimen, place, 66)
    _inside(scene, specimen, block, place, show, 66)
    _facts(scene, specimen, block, 66)
    _histogram(scene, block, 424)
    _schemes(scene, specimen, block, 578)
    return scene


def _alt(specimen: Specimen, block: Block, place: tuple[int, int]) -> str:
    scales = specimen.quantized.scale
    rows, cols = specimen.spans(place)
    return (
        f"{specimen.name}: {specimen.grid[0]} × {specimen.grid[1]} blocks with scales from "
        f"{number(float(scales.min()))} to {number(float(scales.max()))}. Block {place[0]}, "
        f"{place[1]} ({len(rows)} × {len(cols)} values) has the scale "
        f"{number(float(block.scales['own']))}; {_against(specimen)} a power-of-two scale is off "
        f"by {percent(block.error('ue8m0'))}, one scale for the whole matrix by "
        f"{percent(block.error('tensor'))}."
    )


def _against(specimen: Specimen) -> str:
    return "against the true values" if specimen.exact else "against the stored values"


# The map of scales ----------------------------------------------------------------------------


def _map(scene: Scene, specimen: Specimen, place: tuple[int, int], top: float) -> None:
    """One rectangle a block, as large as the block; the chosen one framed."""
    rows, cols = (min(many, MAP_MOST) for many in specimen.grid)
    high = [len(specimen.spans((row, 0))[0]) for row in range(rows)]
    wide = [len(specimen.spans((0, col))[1]) for col in range(cols)]
    across = down = MAP_SIZE / max(sum(high), sum(wide))
    if specimen.quantized.block[0] == 1:  # a row of tokens is drawn thicker than one of weights
        across, down = 0.8 * MAP_SIZE / sum(wide), min(14.0, MAP_SIZE / sum(high))
    scales = specimen.quantized.scale[:rows, :cols]
    low, most = float(scales.min()), float(scales.max())
    of = " × ".join(map(str, specimen.grid))
    scene.text(0, top - 26, f"Scales of {of} blocks", bold=True, size=13)
    if (rows, cols) != specimen.grid:
        scene.text(0, top - 9, f"the first {rows} × {cols} are shown", fill="soft", size=11)
    cells = numpy.repeat(numpy.repeat(_shades(scales, low, most), high, 0), wide, 1)
    down_by, across_by = math.gcd(*high), math.gcd(*wide)
    width, height = sum(wide) * across, sum(high) * down
    scene.image(MAP_LEFT, top, width, height, cells[::down_by, ::across_by])
    frame: dict = {}
    for row in range(rows):
        for col in range(cols):
            inside, chosen = specimen.spans((row, col)), (row, col) == place
            at = dict(
                x=MAP_LEFT + inside[1].start * across,
                y=top + inside[0].start * down,
                width=wide[col] * across,
                height=high[row] * down,
            )
            frame = at if chosen else frame
            scene.rect(
                **at,
                stroke="paper",
                stroke_width=0.5,
                key=f"block {row} {col}",
                chosen=chosen,
                label=_says(specimen, (row, col), float(scales[row, col])),
            )
    if frame:  # last, so that no neighbour covers it
        scene.rect(**frame, stroke="vermillion", stroke_width=3)
    scene.text(MAP_LEFT - 6, top + 6, "0", anchor="end", size=11, fill="soft")
    scene.text(
        MAP_LEFT - 6, top + height - 6, str(sum(high) - 1), anchor="end", size=11, fill="soft"
    )
    names = f"{sum(high)} {specimen.axes[0]} ↓   {sum(wide)} {specimen.axes[1]} →"
    scene.text(MAP_LEFT, top + height + 14, names, size=11, fill="soft")
    _bar(scene, MAP_LEFT + width + 10, top, height, [number(most), number(low)], _SCALES)


def _shades(scales: Tensor, low: float, most: float) -> numpy.ndarray:
    """Colours of scales, by their logarithms between the smallest and the largest."""
    if most > low > 0:
        share = (scales / low).log() / math.log(most / low)
    else:
        share = torch.full_like(scales, 0.5)
    return _coloured(share, _SCALES)


def _says(specimen: Specimen, place: tuple[int, int], scale: float) -> str:
    rows, cols = specimen.spans(place)
    return (
        f"block {place[0]}, {place[1]}: {_from_to(specimen.axes[0], rows)}, "
        f"{_from_to(specimen.axes[1], cols)}\nscale {number(scale)}, reaches ±{number(448 * scale)}"
    )


def _from_to(names: str, numbers: range) -> str:
    if len(numbers) == 1:
        return f"{names.removesuffix('s')} {numbers.start}"
    return f"{names} {numbers.start} to {numbers.stop - 1}"


def _bar(scene: Scene, x: float, y: float, height: float, words: list[str], colours) -> None:
    """A bar of colours with its numbers, the first one above."""
    height = max(height, 40)
    share = torch.linspace(1, 0, 64)[:, None]
    scene.image(x, y, 10, height, _coloured(share, colours))
    for at, word in enumerate(words):
        scene.text(
            x + 15, y + 6 + (height - 12) * at / (len(words) - 1), word, size=11, fill="soft"
        )


def _coloured(share: Tensor, colours) -> numpy.ndarray:
    """(rows, cols) between 0 and 1 to (rows, cols, 3) uint8."""
    return colours(share.numpy(), bytes=True)[..., :3]


# One block ------------------------------------------------------------------------------------


def _inside(
    scene: Scene, specimen: Specimen, block: Block, place: tuple[int, int], show: str, top: float
) -> None:
    """The block's values as an image, with fields over it that say what they hold; a tile, which
    is one row, with its values as bars."""
    rows, cols = specimen.spans(place)
    pixel = BLOCK_SIZE / 128
    width, height = len(cols) * pixel, max(len(rows) * pixel, 20)
    scene.text(BLOCK_LEFT, top - 26, f"Inside block {place[0]}, {place[1]}", bold=True, size=13)
    many = f"{len(rows)} × {len(cols)} values"
    scene.text(BLOCK_LEFT + BLOCK_SIZE, top - 26, many, fill="soft", anchor="end")
    scene.text(BLOCK_LEFT, top - 9, f"coloured by: {SHOWS[show]}", fill="soft", size=11)
    share, colours, words = _colouring(block, show)
    scene.image(BLOCK_LEFT, top, width, height, _coloured(share, colours))
    scene.rect(BLOCK_LEFT, top, width, height, stroke="line")
    y = top + height + 8
    scene.image(BLOCK_LEFT, y, BLOCK_SIZE, 8, _coloured(torch.linspace(0, 1, 64)[None], colours))
    for at, (word, anchor) in enumerate(zip(words, ("start", "middle", "end"))):
        scene.text(
            BLOCK_LEFT + BLOCK_SIZE * at / 2, y + 19, word, size=11, fill="soft", anchor=anchor
        )
    if len(rows) == 1:
        _tile(scene, specimen, block, cols, show, y + 44)
    else:
        _fields(scene, specimen, block, (rows, cols), show, (top, width, height))


def _fields(
    scene: Scene,
    specimen: Specimen,
    block: Block,
    spans: tuple[range, range],
    show: str,
    box: tuple[float, float, float],
) -> None:
    """Over the image, unseen: up to 8 x 8 fields that say what they hold."""
    (rows, cols), (top, width, height) = spans, box
    errors = block.errors(show) if show in block.scales else None
    for down in _parts(len(rows)):
        for right in _parts(len(cols)):
            inside = slice(down.start, down.stop), slice(right.start, right.stop)
            part, worst = block.values[inside], ""
            if errors is not None:
                worst = f"\nlargest relative error {percent(float(errors[inside].max()))}"
            scene.rect(
                BLOCK_LEFT + right.start * width / len(cols),
                top + down.start * height / len(rows),
                len(right) * width / len(cols),
                len(down) * height / len(rows),
                label=f"{_from_to(specimen.axes[0], _shifted(down, rows))}, "
                f"{_from_to(specimen.axes[1], _shifted(right, cols))}\n"
                f"from {number(float(part.min()))} to {number(float(part.max()))}{worst}",
            )


def _tile(
    scene: Scene, specimen: Specimen, block: Block, cols: range, show: str, top: float
) -> None:
    """The values of one row as bars, each with its way through the code."""
    name = show if show in block.scales else "own"
    values, codes = block.values[0].tolist(), (block.rounded(name) / block.scales[name])[0].tolist()
    news, errors = block.rounded(name)[0].tolist(), block.errors(name)[0].tolist()
    largest, pixel, middle = max(max(map(abs, values)), 1e-30), BLOCK_SIZE / 128, top + 85
    for at, (value, code, new, error) in enumerate(zip(values, codes, news, errors)):
        x, tall = BLOCK_LEFT + at * pixel, 80 * abs(value) / largest
        scene.rect(
            x,
            middle - tall if value > 0 else middle,
            pixel * 0.8,
            tall,
            fill="blue" if value > 0 else "orange",
        )
        scene.rect(
            x,
            top,
            pixel,
            170,
            label=f"{specimen.axes[1].removesuffix('s')} {cols.start + at}: {number(value)} → code "
            f"{code:g} → {number(new)}\noff by {percent(error)}".replace("-", "−"),
        )
    scene.line((BLOCK_LEFT, middle), (BLOCK_LEFT + BLOCK_SIZE, middle), stroke_width=0.8)


def _parts(many: int) -> list[range]:
    """Up to 8 runs of rows or columns."""
    each = max(1, -(-many // 8))
    return [range(first, min(first + each, many)) for first in range(0, many, each)]


def _shifted(part: range, inside: range) -> range:
    return range(part.start + inside.start, part.stop + inside.start)


def _colouring(block: Block, show: str) -> tuple[Tensor, object, list[str]]:
    """Shares between 0 and 1, their colours, and what to write under the bar."""
    if show == "value":
        largest = max(float(block.values.abs().max()), 1e-30)
        words = [f"−{number(largest)}", "0, colour by the root", f"+{number(largest)}"]
        root = (block.values.abs() / largest).sqrt() * block.values.sign()
        return 0.5 + root / 2, _SIGNED, words
    if show == "exponent":
        return (block.exponents + 1) / 16, _SCALES, ["0", "exponent field 7", "15"]
    return (
        (block.errors(show) / _WORST_SHOWN).clamp(max=1),
        _ERRORS,
        ["exact", "off by 6.25%", "12.5% +"],
    )


def _facts(scene: Scene, specimen: Specimen, block: Block, top: float) -> None:
    """Numbers beside the block."""
    size, codes = block.values.numel(), block.codes.abs()
    scale, largest = float(block.scales["own"]), float(block.values.abs().max())
    zeros = int((codes == 0).sum())
    small = int(((codes > 0) & (codes < 2.0**-6)).sum())
    rows = [
        ("scale", number(scale)),
        ("largest value", number(largest)),
        ("its code", f"{number(largest / scale)} of 448" if scale > 0 else "−"),
        ("range above zero", f"{number(scale * 2.0**-9)} to {number(448 * scale)}"),
        ("codes that are zero", f"{zeros:,} of {size:,}"),
        ("subnormal codes", f"{small:,} of {size:,}"),
        ("at 448", f"{int((codes == E4M3_MAX).sum()):,}"),
    ]
    for at, (name, value) in enumerate(rows):
        scene.text(FACTS_LEFT, top + 10 + 38 * at, name, fill="soft", size=11)
        scene.text(FACTS_LEFT, top + 26 + 38 * at, value)


# How the codes are used -----------------------------------------------------------------------


def _histogram(scene: Scene, block: Block, top: float, height: float = 74) -> None:
    """How many codes have which exponent, and how far their neighbours lie apart."""
    scene.text(0, top, "Codes of this block, by the exponent in their bits", bold=True, size=13)
    scene.text(
        WIDTH,
        top,
        "rounding can be off by half a step: at most 6.25% of a normal code",
        fill="soft",
        anchor="end",
    )
    fields = block.exponents
    counts = [int((fields == field).sum()) for field in range(-1, 16)]
    most, size, width = max(counts), fields.numel(), WIDTH / 17
    bottom = top + 26 + height
    for at, count in enumerate(counts):
        x, tall = at * width, height * count / most
        name, step, reach = _field(at - 1)
        scene.rect(x + 4, bottom - tall, width - 8, tall, fill="orange" if at < 2 else "blue")
        if count:
            scene.text(
                x + width / 2, bottom - tall - 8, _short(count / size), anchor="middle", size=10
            )
        scene.text(x + width / 2, bottom + 10, name, anchor="middle", size=11, fill="soft")
        scene.rect(
            x,
            top + 12,
            width,
            height + 30,
            label=f"{reach}\n{count:,} of {size:,} codes, {percent(count / size)}{step}",
        )
    scene.line((0, bottom), (WIDTH, bottom), stroke="line", stroke_width=1.2)


def _field(field: int) -> tuple[str, str, str]:
    """Of an exponent field: name; its step; the codes that have it."""
    if field == -1:
        return "zero", "", "the code 0"
    if field == 0:
        return (
            "subn.",
            "\nneighbours are 2⁻⁹ apart, however small the value",
            f"exponent 0, subnormal: codes of {2.0**-9:g} to {7 * 2.0**-9:g}",
        )
    low = 2.0 ** (field - 7)
    high = min(2 * low - low / 8, E4M3_MAX)
    return (
        str(field),
        f"\nneighbours are {low / 8:g} apart, off by {low / 16:g} at most",
        f"exponent {field}: codes of {low:g} to {high:g}",
    )


def _short(share: float) -> str:
    return f"{100 * share:.0f}%" if share >= 0.095 else f"{100 * share:.1g}%"


# Other scales ---------------------------------------------------------------------------------


def _schemes(scene: Scene, specimen: Specimen, block: Block, top: float) -> None:
    """A row a scale: what it does to the values of this block."""
    if specimen.exact:
        words = "Error of this tile against the values before rounding, by its scale"
        own = "its own, as the model does"
    else:
        words = "Error that another scale would add to the stored values"
        own = "as stored"
    scene.text(0, top - 12, words, bold=True, size=13)
    if not specimen.exact:
        scene.text(
            WIDTH,
            top - 12,
            "the weights before rounding are not in the file",
            fill="soft",
            anchor="end",
        )
    lefts = (0, 240, 370, 480, 800)
    for x, word in zip((0, *lefts[2:]), ("scale", "block off by", "worst value", "lost to 0")):
        scene.text(x, top + 8, word, fill="soft", size=11)
    names = {"own": own, "ue8m0": "a power of two, rounded up", "tensor": "one for the matrix"}
    for at, (name, words) in enumerate(names.items()):
        y, error = top + 26 + 19 * at, block.error(name)
        row, col = block.worst(name)
        old, new = float(block.values[row, col]), float(block.rounded(name)[row, col])
        worst = "none is off"
        if error:
            change = (new - old) / old
            sign = "−" if change < 0 else "+"
            worst = f"{number(old)} → {number(new)}   ({sign}{percent(abs(change))})"
        cells = (words, number(float(block.scales[name])), percent(error), worst)
        for x, cell in zip(lefts, (*cells, f"{block.lost(name):,}")):
            scene.text(x, y, cell)
        scene.rect(
            0,
            y - 9,
            WIDTH,
            18,
            rounded=2,
            label=f"{words}: scale {cells[1]}\nblock off by {cells[2]}, worst value {worst}",
        )


def number(value: float) -> str:
    """Three digits, with a minus sign; very small ones as a power of ten."""
    if value and abs(value) < 1e-4:
        digits, _, power = f"{value:.2e}".partition("e")
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return f"{digits}·10{raised}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def percent(share: float) -> str:
    """0%, or two digits."""
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"
