"""Chapter 4, drawn: a linear layer that trains in FP8, its three products and their tiles.

Each function returns a ``Scene`` for ``viz.draw``; numbers on it are computed from its arguments.
One product and its scales are drawn in ``dsv3.viz.fp8_products_schematics``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dsv3.fp8.formats import decode_e4m3, encode_e4m3
from dsv3.viz.fp8_products_schematics import BLOCK, W, X, Y
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, TINT, WIDTH, Box, arrow, box, headline, legend, number, power


def training_products(tokens: int = 4096, inner: int = 7168, out: int = 2048) -> Scene:
    """The three products of a linear layer: operands, the axis summed over, how each is grouped."""
    rows = [
        (
            "Forward: y = x Wᵀ",
            ("x", tokens, inner, X, "1×128"),
            ("Wᵀ", inner, out, W, "128×128"),
            ("y", tokens, out, Y),
            "input channels",
        ),
        (
            "Input gradient: dx = dy W",
            ("dy", tokens, out, "purple", "1×128"),
            ("W", out, inner, W, "128×128"),
            ("dx", tokens, inner, Y),
            "output channels",
        ),
        (
            "Weight gradient: dW = dyᵀ x",
            ("dyᵀ", out, tokens, "purple", "128×1"),
            ("x", tokens, inner, X, "128×1"),
            ("dW", out, inner, Y),
            "tokens",
        ),
    ]
    if min(tokens, inner, out) < BLOCK:
        raise ValueError(f"sizes of {BLOCK} at least, not {tokens}, {inner}, {out}")
    step, top = 170, 40
    scene = Scene(
        WIDTH,
        top + step * len(rows) + 8,
        f"The three products of a linear layer with {tokens} tokens, {inner} inputs and {out} "
        "outputs. Forward sums over input channels, the input gradient over output channels, the "
        "weight gradient over tokens. Activations and gradients are grouped along the axis that "
        "is summed: 1 by 128, and 128 by 1 in the last.",
    )
    headline(scene, "Group along the axis that is summed over")
    for number_, row in enumerate(rows):
        _product(scene, top + step * number_, *row)
    return scene


def _product(scene: Scene, y: float, title: str, one, two, result, summed: str) -> None:
    middle = y + 92
    scene.text(0, y + 16, title, bold=True)
    a = _operand(scene, 150, middle, one, along=True)
    b = _operand(scene, 400, middle, two, along=False)
    c = _operand(scene, 650, middle, result, along=None)
    scene.text((a.right[0] + b.left[0]) / 2, middle, "×", anchor="middle", size=16)
    scene.text((b.right[0] + c.left[0]) / 2, middle, "=", anchor="middle", size=16)
    scene.text(250, y + 16, f"summed over {summed}", size=SMALL, fill="vermillion")


def _operand(scene: Scene, x: float, y: float, what, along: bool | None) -> Box:
    """A matrix with the grouping of its scales; along: its summed axis is level (True), upright
    (False) or gone (None)."""
    name, high, wide, colour, *grouped = what
    width, height = 104, 72
    at = (x - width / 2, y - height / 2)
    scene.rect(*at, width, height, fill=colour, opacity=TINT, stroke=colour, stroke_width=1.6)
    if grouped:
        square = grouped[0] == "128×128"
        across = 4 if square or along else 13
        down = 4 if square or not along else 9
        for column in range(1, across):
            place = at[0] + width * column / across
            scene.line((place, at[1]), (place, at[1] + height), stroke=colour, stroke_width=0.9)
        for row in range(1, down):
            place = at[1] + height * row / down
            scene.line((at[0], place), (at[0] + width, place), stroke=colour, stroke_width=0.9)
    scene.rect(x - 19, y - 11, 38, 22, fill="paper", rounded=4)
    scene.text(x, y, name, anchor="middle", bold=True)
    if along:
        arrow(
            scene,
            (at[0], at[1] + height + 9),
            (at[0] + width, at[1] + height + 9),
            colour="vermillion",
        )
    elif along is False:
        arrow(scene, (at[0] - 9, at[1]), (at[0] - 9, at[1] + height), colour="vermillion")
    below = y + height / 2 + 24
    scene.text(x, below, f"({high:,}, {wide:,})", anchor="middle", size=SMALL, fill="soft")
    if grouped:
        word = "tiles" if not square else "blocks"
        words = f"{name[:-1] if name[-1] == 'ᵀ' else name} in {grouped[0]} {word}"
        scene.text(x, y - height / 2 - 11, words, anchor="middle", size=SMALL)
    return Box(x, y, width, height)


def framework() -> Scene:
    """A linear layer in FP8 training (TR figure 6): what is kept in what, what is cast to FP8."""
    scene = Scene(
        WIDTH,
        386,
        "A linear layer in FP8 training: x and the FP32 master weight are cast to FP8 and "
        "multiplied to y in BF16; the gradient dy is cast to FP8 for two products, dx in BF16 and "
        "the weight's gradient in FP32; the optimizer with BF16 moments updates the master weight.",
    )
    headline(scene, "A linear layer in FP8 training")
    product, brain, full = "orange", "sky", "purple"
    legend(
        scene,
        400,
        10,
        [
            (product, TINT, "FP8 product, promoted to FP32"),
            (brain, TINT, "BF16"),
            (full, TINT, "FP32"),
        ],
    )
    x = box(scene, 48, 104, 92, 44, "x", "BF16", colour=brain)
    forward = box(scene, 246, 104, 130, 48, "forward", "y = x Wᵀ", colour=product)
    y = box(scene, 706, 104, 92, 44, "y", "BF16", colour=brain)
    master = box(scene, 246, 208, 130, 44, "master W", "FP32", colour=full)
    adam = box(scene, 390, 208, 110, 44, "AdamW", "moments BF16", colour=brain)
    wgrad = box(scene, 546, 208, 124, 48, "gradient of W", "dyᵀ x", colour=product)
    dgrad = box(scene, 246, 312, 130, 48, "gradient of x", "dy W", colour=product)
    dy = box(scene, 706, 312, 92, 44, "dy", "BF16", colour=brain)
    dx = box(scene, 48, 312, 92, 44, "dx", "BF16", colour=brain)
    arrow(scene, x.right, forward.left, label="FP8, 1×128")
    arrow(scene, forward.right, y.left, label="to BF16", side="below")
    scene.rect(540, 100, 12, 8, fill="paper")  # one arrow passes under the other
    arrow(
        scene,
        x.top,
        (48, 58),
        (546, 58),
        wgrad.top,
        label="kept in FP8, re-tiled to 128×1",
        side="below",
    )
    arrow(scene, master.top, forward.bottom, label="FP8, 128×128")
    arrow(scene, master.bottom, dgrad.top, label="FP8, 128×128")
    arrow(scene, dy.left, dgrad.right, label="FP8, 1×128")
    arrow(scene, dgrad.left, dx.right, label="to BF16")
    arrow(scene, dy.top, (706, 208), wgrad.right, label="FP8, 128×1", at=1)
    arrow(scene, wgrad.left, adam.right, label="FP32")
    arrow(scene, adam.left, master.right)
    scene.text(
        0,
        376,
        "Not in FP8 at all: embedding, head, router, norms and the attention between its "
        "projections",
        size=SMALL,
        fill="soft",
    )
    return scene


CODES = (5.5, 1.25, 0.375)


def retiling(values: Sequence[float] = CODES, powers=(-3, -5), scales=(0.11, 0.037)) -> Scene:
    """The same codes put under another scale: between powers of two only the exponent moves.

    values: numbers of E4M3; powers: exponents of the old and the new scale; scales: the same with
    scales of any size.
    """
    both = [[2.0**e for e in powers], list(scales)]
    for old, new in both:
        moved = [value * old / new for value in values]
        if not 1 <= len(moved) <= 5 or min(moved) < 2**-6 or max(moved) > 448:
            raise ValueError("1 to 5 values that stay from 2^-6 to 448 under the new scale")
    step, top, half = 32, 92, 84 + 32 * len(values)
    scene = Scene(WIDTH, half * 2 + 62, _retiling_alt(values, *both))
    headline(scene, "From one tile's scale to another's")
    for number_, (old, new) in enumerate(both):
        y = top + half * number_
        exact = number_ == 0
        names = [power(e) for e in powers] if exact else [number(v) for v in (old, new)]
        kind = "powers of two" if exact else "any scales"
        scene.text(0, y - 42, f"{kind}: {names[0]} → {names[1]}", bold=True)
        for at, words in ((78, f"code, scale {names[0]}"), (468, f"code, scale {names[1]}")):
            scene.text(at, y - 16, words, anchor="middle", size=SMALL, fill="soft")
        scene.text(WIDTH, y - 16, "change", anchor="end", size=SMALL, fill="soft")
        for row, value in enumerate(values):
            _moved(scene, value, old, new, y + step * row)
    legend(
        scene,
        0,
        half * 2 + 50,
        [("blue", 0.35, "exponent moves"), ("green", 0.35, "mantissa stays"), RED],
    )
    return scene


RED = ("vermillion", 0.45, "mantissa bit that changed")


def _recoded(value: float, old: float, new: float) -> tuple[str, str, float]:
    """Bits before, bits after, and the number that the new bits are."""
    pair = torch.tensor([value, value * old / new], dtype=torch.float32)
    codes = encode_e4m3(pair)
    first, second = (f"{code:08b}" for code in codes.tolist())
    return first, second, float(decode_e4m3(codes)[1])


def _retiling_alt(values, exact, rough) -> str:
    changed = [
        sum(
            not math.isclose(_recoded(v, *pair)[2] * pair[1], v * pair[0], rel_tol=1e-6)
            for v in values
        )
        for pair in (exact, rough)
    ]
    return (
        f"{len(values)} codes of E4M3 rewritten for another scale, bit by bit. Between powers of "
        f"two the exponent bits move, the mantissa bits stay and {changed[0]} values change; "
        f"between scales of any size {changed[1]} values change."
    )


def _moved(scene: Scene, value: float, old: float, new: float, y: float) -> None:
    first, second, near = _recoded(value, old, new)
    for left, bits in ((0, first), (390, second)):
        for place, bit in enumerate(bits):
            kind = "grey" if place == 0 else "blue" if place < 5 else "green"
            strong = 0.35
            if place > 4 and left and bit != first[place]:
                kind, strong = "vermillion", 0.45
            x = left + 19 * place + 3 * (place > 0) + 3 * (place > 4)
            scene.rect(x, y, 19, 24, fill=kind, opacity=strong, stroke=kind)
            scene.text(x + 9.5, y + 12, bit, anchor="middle", code=True)
    scene.text(172, y + 12, f"= {number(value, 5)}")
    scene.text(562, y + 12, f"= {number(near, 5)}")
    ratio = number(old / new)
    arrow(scene, (250, y + 14), (376, y + 14), label=f"× {ratio}", at=0)
    change = near * new / (value * old) - 1
    none = abs(change) < 1e-6
    scene.text(
        WIDTH,
        y + 12,
        "0" if none else f"{change:+.1%}".replace("-", "−"),
        anchor="end",
        bold=True,
        fill="ink" if none else "vermillion",
    )
