"""Chapter 4, drawn: tiles and blocks with their scales, and the product in which they meet.

Each function returns a ``Scene`` for ``viz.draw``; numbers on it are computed from its arguments.
The numbers of FP8 are drawn in ``dsv3.viz.fp8_schematics``, training in
``dsv3.viz.fp8_training_schematics``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsv3.fp8.quantize import WEIGHT_BLOCK, scale_shape
from dsv3.viz.scene import Scene, text_width
from dsv3.viz.schematic import (
    SMALL,
    TEXT,
    TINT,
    WIDTH,
    Box,
    arrow,
    beside,
    box,
    bracket,
    cells,
    headline,
    number,
    plus,
    power,
)

X, W, Y = "sky", "orange", "green"  # activations, weights, what comes out
BLOCK = WEIGHT_BLOCK[0]


def tiles_and_blocks(tokens: int = 5, channels: int = 512, rows: int = 576) -> Scene:
    """Activations in 1 x 128 tiles and a weight in 128 x 128 blocks, with the scales of both."""
    if not (1 <= tokens <= 8 and 1 <= channels <= 6 * BLOCK and 1 <= rows <= 6 * BLOCK):
        raise ValueError(
            f"1 to 8 tokens, 1 to {6 * BLOCK} channels and rows; not {tokens}, {channels}, {rows}"
        )
    high, wide = scale_shape((rows, channels), WEIGHT_BLOCK)
    left, right, top, side = 60, 448, 76, min(44.0, 210 / max(high, wide), (282 - 18 * wide) / wide)
    down = max(side * high, 26 * tokens)
    scene = Scene(
        WIDTH,
        top + down + 62,
        f"Left, activations of {tokens} tokens by {channels} channels in tiles of 1 by {BLOCK}: "
        f"{wide} scales for each token. Right, a weight of {rows} by {channels} in blocks of "
        f"{BLOCK} by {BLOCK}: {high} by {wide} scales, the last row of blocks "
        f"{(rows - 1) % BLOCK + 1} high.",
    )
    exact = channels / BLOCK * side
    headline(scene, f"X: tiles of 1 × {BLOCK}")
    headline(scene, f"W: blocks of {BLOCK} × {BLOCK}", x=right - 52)
    _matrix(scene, left, top, exact, [26.0] * tokens, side, X, 8)
    bracket(scene, left, left + exact, top - 6, f"{channels} channels", "above")
    bracket(scene, top, top + 26 * tokens, left - 6, f"{tokens}\ntokens", "left")
    at = left + exact + 26
    scales = cells(
        scene,
        at,
        top,
        [[""] * wide] * tokens,
        width=18,
        height=26,
        look=lambda row, column: {"fill": X, "opacity": 0.7, "stroke": "ink"},
    )
    _counted(scene, scales, f"{tokens} × {wide} scales")
    heights = [min(BLOCK, rows - BLOCK * row) / BLOCK * side for row in range(high)]
    _matrix(scene, right, top, exact, heights, side, W, 6)
    bracket(scene, right, right + exact, top - 6, f"{channels} in", "above")
    bracket(scene, top, top + sum(heights), right - 6, f"{rows}\nout", "left")
    at = right + exact + 30
    scales = cells(
        scene,
        at,
        top,
        [[""] * wide] * high,
        width=18,
        height=18,
        look=lambda row, column: {"fill": W, "opacity": 0.8, "stroke": "ink"},
    )
    _counted(scene, scales, f"{high} × {wide} scales")
    if rows % BLOCK:
        scene.text(
            right,
            top + sum(heights) + 18,
            f"last block: {rows % BLOCK} of {BLOCK} rows, a scale of its own",
            size=SMALL,
            fill="soft",
        )
    scene.text(left, top + 26 * tokens + 18, "one scale for each tile", size=SMALL, fill="soft")
    return scene


def _matrix(scene, x, y, width, heights, side, colour, bands) -> None:
    """A matrix cut in blocks: columns of ``side`` (the last may be narrower), rows of heights."""
    top = y
    for height in heights:
        at = x
        while at < x + width - 0.01:
            wide = min(side, x + width - at)
            scene.rect(
                at, top, wide, height, fill=colour, opacity=TINT, stroke=colour, stroke_width=1.5
            )
            at += wide
        top += height


def _counted(scene: Scene, scales: Box, words: str) -> None:
    scene.text(scales.x, scales.bottom[1] + 15, words, anchor="middle", size=SMALL, fill="soft")


def scales_in_product(blocks: int = 4, out_blocks: int = 3, lit: int = 1, k: int = 2) -> Scene:
    """One tile of the output: which scales of X and W its partial sum of block k takes.

    blocks: of 128 along K; out_blocks: of 128 output channels; lit: the output block shown.
    """
    if not (2 <= blocks <= 5 and 1 <= out_blocks <= 4 and 0 <= lit < out_blocks):
        raise ValueError(f"2 to 5 blocks, 1 to 4 output blocks, not {blocks}, {out_blocks}, {lit}")
    if not 0 <= k < blocks:
        raise ValueError(f"a block from 0 to {blocks - 1}, not {k}")
    side, left, top = 58, 78, 74
    tall = 34
    xy = (left, top + tall * blocks + 30)
    yx = left + side * blocks + 40
    tokens, high = 4, 22
    bottom = xy[1] + tokens * high
    scene = Scene(
        WIDTH,
        bottom + 100,
        f"A product cut along K in {blocks} blocks of {BLOCK}. Block {k} of the row of X and block "
        f"{k} of the column of W meet in output block {lit}: their sum of {BLOCK} products is "
        f"multiplied by the token's scale sx[m, {k}] and the weight block's scale sw[{lit}, {k}], "
        "then added to an FP32 register.",
    )
    headline(scene, "Which scales meet in one output tile")

    def of_w(row: int, column: int) -> dict:
        on = row == k and column == lit
        return {"fill": W, "opacity": 0.75 if on else TINT, "stroke": W, "bold": on}

    def of_x(row: int, column: int) -> dict:
        on = row == 1 and column == k
        return {"fill": X, "opacity": 0.9 if on else TINT, "stroke": X, "bold": on}

    def of_y(row: int, column: int) -> dict:
        on = row == 1 and column == lit
        return {"fill": Y, "opacity": 0.75 if on else TINT, "stroke": Y, "bold": on}

    wide = 74
    w = cells(
        scene,
        yx,
        top,
        [
            [f"sw[{n}, {b}]" if (n, b) == (lit, k) else "" for n in range(out_blocks)]
            for b in range(blocks)
        ],
        width=wide,
        height=tall,
        look=of_w,
    )
    x = cells(
        scene,
        *xy,
        [[f"sx[m, {k}]" if (m, b) == (1, k) else "" for b in range(blocks)] for m in range(tokens)],
        width=side,
        height=high,
        look=of_x,
    )
    y = cells(
        scene,
        yx,
        xy[1],
        [["y" if (m, n) == (1, lit) else "" for n in range(out_blocks)] for m in range(tokens)],
        width=wide,
        height=high,
        look=of_y,
    )
    bracket(scene, yx, yx + wide * out_blocks, top - 6, f"N: output blocks of {BLOCK}", "above")
    bracket(
        scene, top, top + tall * blocks, w.right[0] + 6, f"K: {blocks} blocks\nof {BLOCK}", "right"
    )
    bracket(scene, xy[1], bottom, left - 6, "M\ntokens", "left")
    beside(
        scene,
        (x.x - 60, bottom),
        (x.x + 60, bottom),
        "X: a scale for each token and block",
        "below",
    )
    beside(scene, (y.x - 60, bottom), (y.x + 60, bottom), "Y = X Wᵀ", "below")
    beside(scene, w.left, w.left, "Wᵀ: a scale for each\nblock of 128 × 128", "left", gap=14)
    row = xy[1] + 1.5 * high
    arrow(scene, (left + side * blocks + 2, row), (yx - 2, row))
    column = yx + (lit + 0.5) * wide
    arrow(scene, (column, top + tall * blocks + 2), (column, xy[1] - 2))
    _sum_of_a_block(scene, k, lit, bottom + 72)
    return scene


def _sum_of_a_block(scene: Scene, k: int, lit: int, y: float) -> None:
    """What happens once for each block of K, in a line of boxes."""
    first = box(scene, 110, y, 210, 42, f"sum of {BLOCK} products", "codes × codes", colour="grey")
    times = plus(scene, 268, y, "×")
    second = box(
        scene, 385, y, 170, 42, f"sx[m, {k}] · sw[{lit}, {k}]", "once a block", colour="purple"
    )
    add = plus(scene, 520, y, "+")
    third = box(scene, 665, y, 180, 42, "FP32 register", "over all blocks of K", colour=Y)
    arrow(scene, first.right, times.left)
    arrow(scene, second.left, times.right)
    arrow(scene, times.top, (268, y - 32), (520, y - 32), add.top)
    arrow(scene, add.right, third.left)


PRODUCTS = (448.0, 60.0, 9.5, 3.25, 0.8125)


def accumulation(products: Sequence[float] = PRODUCTS, kept: int = 8) -> Scene:
    """Products lined up at the largest one's exponent, and what falls off after ``kept`` bits."""
    if not 2 <= len(products) <= 6 or min(products) <= 0 or not 4 <= kept <= 14:
        raise ValueError("2 to 6 positive products and 4 to 14 bits")
    e = math.floor(math.log2(max(products)))
    last = e - kept + 1  # the exponent of the last bit kept
    columns = kept + 5
    bit, left, top, step = 26, 96, 76, 30
    cut = [math.floor(p / 2.0**last) * 2.0**last for p in products]
    bottom = top + step * len(products)
    scene = Scene(
        WIDTH,
        bottom + 176,
        f"{len(products)} products in binary, lined up at the exponent {e} of the largest. Bits "
        f"after the first {kept} are cut off: the sum is {number(sum(cut), 9)} instead of "
        f"{number(sum(products), 9)}. Below, sums of {BLOCK} products are added in FP32.",
    )
    headline(scene, f"Lined up, then cut: {kept} bits are kept")
    edge = left + bit * kept
    for place in range(columns):
        scene.text(
            left + bit * (place + 0.5) + 8 * (place >= kept),
            60,
            power(e - place),
            anchor="middle",
            size=SMALL,
            fill="soft",
        )
    scene.text(left - 12, 60, "product", anchor="end", size=SMALL, fill="soft")
    kept_at = left + bit * columns + 100
    scene.text(kept_at, 60, "kept", anchor="end", size=SMALL, fill="soft")
    for row, (value, short) in enumerate(zip(products, cut)):
        y = top + step * row
        scene.text(left - 12, y + 12, number(value, 6), anchor="end")
        _aligned(scene, value, e, kept, columns, left, y, bit)
        scene.text(kept_at, y + 12, number(short, 6), anchor="end", bold=True)
    scene.line((edge + 4, 48), (edge + 4, bottom + 8), stroke="vermillion", stroke_width=2)
    scene.text(left - 12, bottom + 20, number(sum(products), 9), anchor="end")
    scene.text(kept_at, bottom + 20, number(sum(cut), 9), anchor="end", bold=True)
    scene.text(left, bottom + 20, "true sum", size=SMALL, fill="soft")
    scene.text(
        kept_at - text_width(number(sum(cut), 9), TEXT, bold=True) - 8,
        bottom + 20,
        "kept sum",
        anchor="end",
        size=SMALL,
        fill="soft",
    )
    scene.text(edge + 14, bottom + 20, "cut off", size=SMALL, fill="vermillion")
    _promotion(scene, bottom + 118)
    return scene


def _aligned(scene, value, e, kept, columns, left, y, bit) -> None:
    started, rest = False, value
    for place in range(columns):
        worth = 2.0 ** (e - place)
        on = rest >= worth
        rest -= worth if on else 0
        started |= on
        if not started or (not on and rest == 0 and place >= kept):
            continue
        gone = place >= kept
        colour = "vermillion" if gone else "blue"
        x = left + bit * place + 8 * gone
        scene.rect(x, y, bit, 24, fill=colour, opacity=TINT if not on else 0.45, stroke=colour)
        scene.text(x + bit / 2, y + 12, str(int(on)), anchor="middle", code=True)


def _promotion(scene: Scene, y: float) -> None:
    scene.text(0, y - 50, f"Promotion: every {BLOCK} products the few-bit sum moves on", bold=True)
    end = None
    for number_ in range(3):
        x = 72 + 190 * number_
        part = box(
            scene, x, y - 6, 140, 36, f"{BLOCK} products", "few bits", colour="grey", size=SMALL
        )
        add = plus(scene, x, y + 40)
        arrow(scene, part.bottom, add.top)
        if end:
            arrow(scene, end, add.left)
        end = add.right
    total = box(scene, 672, y + 40, 170, 32, "FP32 accumulator", colour=Y)
    arrow(scene, end, total.left)
