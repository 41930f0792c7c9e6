"""Chapter 7, drawn: what training keeps of every parameter, and how ZeRO shares it out.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from dsv3.config import ModelConfig
from dsv3.costs import PLAIN, Formats, parameter_count
from dsv3.costs.training import ITEM_BYTES
from dsv3.viz.scene import Scene, text_width
from dsv3.viz.schematic import SMALL, WIDTH, headline, legend, number

STRONG = 0.35


@dataclass(frozen=True)
class Kept:
    """What training keeps of each parameter: ``bytes`` of it, and in what."""

    name: str
    words: str
    bytes: float
    colour: str


def kept(formats: Formats = PLAIN) -> tuple[Kept, ...]:
    """What training keeps of each parameter, in the order of the pictures."""

    def part(name: str, format_: str, count: int, colour: str) -> Kept:
        size = count * ITEM_BYTES[format_]
        words = f"{number(size)} bytes, {f'{count} × ' * (count > 1)}{format_.upper()}"
        return Kept(name, words, size, colour)

    return (
        part("weights", formats.weights, 1, "blue"),
        part("gradients", formats.gradients, 1, "orange"),
        part("master weights", formats.master, 1, "green"),
        part("two moments", formats.moments, 2, "purple"),
    )


GPU = 80e9  # bytes, as on the label


def what_one_gpu_cannot_hold(
    config: ModelConfig | None = None, formats: Formats = PLAIN, gpu: float = GPU
) -> Scene:
    """What training keeps of all parameters, laid out on GPUs of 80 GB one after the other.

    config: the 671B model's by default; formats: those of plain mixed precision; gpu: its bytes.
    """
    parameters, parts = parameter_count(config or ModelConfig.deepseek_v3()), kept(formats)
    each = sum(part.bytes for part in parts)
    needed = each * parameters / gpu
    if not 1 < needed <= 270:
        raise ValueError(f"something for 2 to 270 GPUs, not {number(needed)}")
    columns, wide, high = 27, WIDTH / 27, 24
    rows = ceil(needed / columns)
    top = 150
    scene = Scene(WIDTH, top + rows * (high + 6) + 22, _gpus_alt(parameters, parts, gpu, needed))
    billions = number(parameters / 1e9)
    headline(
        scene,
        f"{billions} billion parameters × {number(each)} bytes = {each * parameters / 1e12:.1f} TB",
    )
    at = 0.0
    for part in parts:
        share = part.bytes / each * WIDTH
        scene.rect(
            at,
            34,
            share,
            66,
            fill=part.colour,
            opacity=STRONG,
            stroke=part.colour,
            stroke_width=1.6,
        )
        words = (part.name, part.words, f"{part.bytes * parameters / 1e12:.2f} TB")
        for line, text in enumerate(words):
            bold = line == 0 and text_width(text, SMALL, bold=True) < share - 4
            scene.text(at + share / 2, 50 + 17 * line, text, anchor="middle", size=SMALL, bold=bold)
        at += share
    scene.text(0, 128, f"on GPUs of {number(gpu / 1e9)} GB: {needed:.1f} of them", bold=True)
    scene.text(WIDTH, 128, "before the first activation", anchor="end", fill="soft")
    for place in range(ceil(needed)):
        x, y = wide * (place % columns), top + (high + 6) * (place // columns)
        scene.rect(x, y, wide - 5, high, fill="paper", stroke="line")
        begun = 0.0
        for part in parts:
            ended = begun + part.bytes * parameters / gpu
            start, end = max(begun, place), min(ended, place + 1)
            if start < end:
                scene.rect(
                    x + (start - place) * (wide - 5),
                    y,
                    (end - start) * (wide - 5),
                    high,
                    fill=part.colour,
                    opacity=0.6,
                )
            begun = ended
    y = top + rows * (high + 6) + 8
    scene.text(0, y, "each box is one GPU, filled in the order of the bar", fill="soft", size=SMALL)
    return scene


def _gpus_alt(parameters: int, parts: Sequence[Kept], gpu: float, needed: float) -> str:
    bars = "; ".join(
        f"{part.name}: {part.words}, {part.bytes * parameters / 1e12:.2f} TB" for part in parts
    )
    return (
        f"A bar of what training keeps of {number(parameters / 1e9)} billion parameters: {bars}. "
        f"Below, GPUs of {number(gpu / 1e9)} GB in rows, filled with it: {needed:.1f} are full."
    )


ZERO = ("plain", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def _cut(part: Kept, stage: int) -> bool:
    """Whether a ZeRO stage shares it out: 1 what the optimizer has, 2 gradients too, 3 weights."""
    return stage >= {"weights": 3, "gradients": 2}.get(part.name, 1)


def zero_shards(ranks: int = 4, formats: Formats = PLAIN) -> Scene:
    """What each rank keeps of every parameter in plain data parallelism and in ZeRO-1, 2 and 3."""
    parts = kept(formats)
    if not 2 <= ranks <= 4:
        raise ValueError(f"2 to 4 ranks, not {ranks}")
    each = sum(part.bytes for part in parts)
    stages = [
        sum(part.bytes / (ranks if _cut(part, stage) else 1) for part in parts)
        for stage in range(len(ZERO))
    ]
    left, room, tall, top = 74, 602 / ranks, 62, 26
    unit = (room - 14) / each
    scene = Scene(
        WIDTH,
        top + tall * len(ZERO) + 22,
        f"Bars of what each of {ranks} ranks keeps: {', '.join(part.name for part in parts)}. "
        + "; ".join(f"{name}: {number(size)} bytes" for name, size in zip(ZERO, stages))
        + " per parameter and rank.",
    )
    for rank in range(ranks):
        scene.text(left + room * (rank + 0.5) - 7, 10, f"rank {rank}", anchor="middle", bold=True)
    scene.text(WIDTH, 10, "per parameter", anchor="end", size=SMALL, fill="soft")
    legend(
        scene,
        left,
        scene.height - 8,
        [(part.colour, 0.6, f"{part.name}: {number(part.bytes)} bytes") for part in parts],
    )
    sent = (
        "gradients: all-reduce",
        "gradients: reduce-scatter; then new weights: all-gather",
        "the same, and no rank keeps more gradients than it needs",
        "weights are gathered for every forward and backward, and dropped",
    )
    for stage, (name, size, words) in enumerate(zip(ZERO, stages, sent)):
        y = top + tall * stage
        scene.text(0, y + 15, name, bold=True)
        for rank in range(ranks):
            _bar(scene, left + room * rank, y, unit, parts, stage, rank, ranks)
        scene.text(WIDTH, y + 15, f"{number(size)} bytes", anchor="end", bold=True)
        scene.text(left, y + 42, words, size=SMALL, fill="soft")
    return scene


def _bar(
    scene: Scene, x, y, unit, parts: Sequence[Kept], stage: int, rank: int, ranks: int
) -> None:
    """All that is kept of a parameter; of what is shared out, this rank's share in colour."""
    for part in parts:
        wide, shared = unit * part.bytes, _cut(part, stage)
        scene.rect(x, y, wide, 30, fill="pale", stroke="line")
        own = wide / ranks if shared else wide
        at = x + own * rank if shared else x
        scene.rect(at, y, own, 30, fill=part.colour, opacity=0.6, stroke=part.colour)
        x += wide
