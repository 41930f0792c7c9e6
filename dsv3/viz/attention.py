"""Figures of chapter 1: rotations, the residual stream, attention maps, caches and the roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure

from dsv3.viz.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    styled,
)

_LINES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, BLACK)
_MARKS = ("o", "s", "D", "^", "v", "P", "X")


@styled
def rotation_figure(frequencies: torch.Tensor, pairs: Sequence[int], positions: int) -> Figure:
    """Where the pair (1, 0) is turned to at positions 0, 1, ..., a circle for each of ``pairs``.

    frequencies (d_h / 2,): radians per position.
    """
    figure, axes = new_figure(9, 2.9, ncols=len(pairs), squeeze=False)
    for panel, pair in zip(axes[0], pairs):
        speed = float(frequencies[pair])
        around = torch.linspace(0, 2 * math.pi, 200)
        panel.plot(around.cos(), around.sin(), color=LIGHT, linewidth=1.2, zorder=0)
        for position in range(positions):
            x, y = math.cos(position * speed), math.sin(position * speed)
            panel.plot(
                [0, x],
                [0, y],
                color=BLUE,
                linewidth=1.1,
                alpha=0.25 + 0.75 * position / (positions - 1),
            )
            if speed * positions > 1.5:
                panel.text(1.17 * x, 1.17 * y, str(position), ha="center", va="center", fontsize=8)
        if speed * positions <= 1.5:
            end = (positions - 1) * speed
            panel.text(1.1, 0, "0", ha="left", va="center", fontsize=8)
            if end > 0.3:
                panel.text(
                    1.12 * math.cos(end),
                    1.12 * math.sin(end),
                    str(positions - 1),
                    ha="left",
                    va="center",
                    fontsize=8,
                )
        panel.set(aspect="equal", xlim=(-1.35, 1.35), ylim=(-1.35, 1.35), xticks=[], yticks=[])
        panel.set_title(f"pair {pair}", fontsize=10)
        panel.set_xlabel(f"a full turn every\n{2 * math.pi / speed:,.0f} positions")
        for spine in panel.spines.values():
            spine.set_visible(False)
    return figure


@styled
def relative_figure(scores: Mapping[int, torch.Tensor]) -> Figure:
    """One query's scores with one key, by their distance, for queries at several positions.

    scores: position of the query -> scores for distance 0, 1, 2, ...
    """
    figure, axes = new_figure(8, 3.0)
    for number, (position, line) in enumerate(scores.items()):
        axes.plot(
            range(len(line)),
            line,
            color=_LINES[number],
            linewidth=7 - 2.5 * number,
            alpha=0.4 if number == 0 else 1.0,
            label=f"query at position {position:,}",
        )
    axes.axhline(0, color=LIGHT, linewidth=1, zorder=0)
    axes.set(
        xlabel="distance m - n from query to key, in tokens",
        ylabel="score q · k",
        xlim=(0, max(map(len, scores.values())) - 1),
    )
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.3 * (high - low))
    axes.legend(loc="upper right", ncols=len(scores))
    return figure


@styled
def stream_figure(sizes: torch.Tensor, labels: Sequence[str]) -> Figure:
    """Root mean square of the residual stream: a line for each token, a step for each layer.

    sizes (1 + layers, tokens), the embedding first. The axis is logarithmic.
    """
    figure, axes = new_figure(8, 3.2)
    for token, label in enumerate(labels):
        first = token == 0
        axes.plot(
            range(len(sizes)),
            sizes[:, token],
            marker="o",
            markersize=4,
            color=VERMILLION if first else BLUE,
            linewidth=2 if first else 1,
            alpha=1 if first else 0.55,
            zorder=3 if first else 2,
            label=f"first token ({label})" if first else "the other tokens" if token == 1 else None,
        )
    axes.set(
        yscale="log",
        xticks=range(len(sizes)),
        ylabel="rms of x (log scale)",
        xlabel="residual stream behind",
    )
    axes.set_xticklabels(["embedding"] + [f"layer {i}" for i in range(len(sizes) - 1)])
    axes.legend(loc="lower right")
    return figure


@styled
def attention_maps_figure(
    weights: torch.Tensor, labels: Sequence[str], heads: Sequence[Sequence[int]] | None = None
) -> Figure:
    """A square for each head: rows are tokens that look, columns tokens that are looked at.

    weights (layers, heads, s, s), rows summing to 1. One row of panels for each layer, with the
    heads named for it in ``heads`` (equally many; left out: all). The part above the diagonal is
    grey: no query may look there.
    """
    layers, all_heads, tokens = weights.shape[:3]
    shown = [range(all_heads)] * layers if heads is None else heads
    figure, axes = new_figure(
        9.4,
        0.4 + 2.3 * layers,
        nrows=layers,
        ncols=len(shown[0]),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    ahead = torch.ones(tokens, tokens).triu(1).bool()
    for layer in range(layers):
        for column, head in enumerate(shown[layer]):
            panel = axes[layer][column]
            panel.set_facecolor(LIGHT)
            image = panel.imshow(
                weights[layer, head].masked_fill(ahead, math.nan).numpy(),
                vmin=0,
                vmax=1,
                cmap="Blues",
            )
            panel.set_title(f"layer {layer}, head {head}", fontsize=9)
            panel.set(xticks=range(tokens), yticks=range(tokens))
            panel.set_xticklabels(labels, rotation=90, fontsize=8)
            panel.set_yticklabels(labels, fontsize=8)
            if column == 0:
                panel.set_ylabel("looks", fontsize=8)
            if layer == layers - 1:
                panel.set_xlabel("is looked at", fontsize=8)
    figure.colorbar(image, ax=axes, shrink=0.4, label="attention weight")
    return figure


@styled
def cache_bars_figure(kilobytes: Mapping[str, float], lit: str) -> Figure:
    """Kilobytes (1000 bytes) of cache for a token, one bar a model; ``lit`` has its own colour."""
    figure, axes = new_figure(8, 0.9 + 0.36 * len(kilobytes))
    names = list(kilobytes)
    for place, name in enumerate(names):
        axes.barh(place, kilobytes[name], height=0.62, color=VERMILLION if name == lit else BLUE)
        axes.text(kilobytes[name], place, f"  {kilobytes[name]:,.1f} kB", va="center")
    axes.set(
        yticks=range(len(names)),
        xlabel="cache for one token, kB",
        xlim=(0, 1.15 * max(kilobytes.values())),
    )
    axes.set_yticklabels(names)
    axes.invert_yaxis()
    return figure


@styled
def cache_lines_figure(
    bytes_per_token: Mapping[str, float], longest: int, memory: Mapping[str, float]
) -> Figure:
    """Gigabytes of cache for one text by its length in tokens, both axes logarithmic.

    longest: tokens at the right edge; memory: name -> GB, drawn as dashed lines.
    """
    figure, axes = new_figure(8, 3.8)
    lengths = [2**power for power in range(9, int(math.log2(longest)) + 1)]
    for number, (name, size) in enumerate(bytes_per_token.items()):
        line = [size * length / 1e9 for length in lengths]
        axes.plot(lengths, line, color=_LINES[number], linewidth=2)
        axes.text(lengths[-1] * 1.12, line[-1], name, va="center", color=_LINES[number])
    for name, size in memory.items():
        axes.axhline(size, color=GREY, linestyle="--", linewidth=1)
        axes.text(lengths[0] * 1.1, size * 1.1, f"{name}: {size:.0f} GB", va="bottom", fontsize=8)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of one text (log scale)",
        ylabel="GB of cache (log scale)",
        xlim=(lengths[0], lengths[-1]),
    )
    ticks = [4**power for power in range(5, 10) if 4**power <= longest]
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    return figure


@styled
def roofline_figure(points: Mapping[str, float], flops: float, memory: float) -> Figure:
    """FLOPs a second that a GPU can reach, by the FLOPs that work does for each byte it moves.

    points: name of a piece of work -> its FLOPs a byte; flops, memory: FLOPs and bytes a second
    of the GPU. Each point sits on the roof, the best that the GPU can do there. Both axes are
    logarithmic.
    """
    figure, axes = new_figure(8, 4.0)
    ridge, left, right = flops / memory, 0.5, 1e4
    axes.plot(
        [left, ridge, right],
        [left * memory / 1e12, flops / 1e12, flops / 1e12],
        color=BLACK,
        linewidth=1.6,
        zorder=1,
    )
    axes.axvline(ridge, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axes.text(ridge * 1.1, left * memory / 1e12 * 1.15, f"{ridge:.0f} FLOP/byte", fontsize=8)
    axes.text(
        left * 1.15, flops / 1e12 * 0.92, "waits for memory", fontsize=8, color=GREY, va="top"
    )
    axes.text(
        right / 1.15, flops / 1e12 * 1.5, "waits for arithmetic", fontsize=8, color=GREY, ha="right"
    )
    for number, (name, intensity) in enumerate(points.items()):
        height = min(flops, intensity * memory) / 1e12
        colour, mark = _LINES[number % len(_LINES)], _MARKS[number % len(_MARKS)]
        axes.plot(
            [intensity],
            [height],
            mark,
            color=colour,
            markersize=8,
            zorder=3,
            label=f"{name}: {intensity:,.0f} FLOP/byte",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        ylim=(left * memory / 1e12, 2.8 * flops / 1e12),
        xlabel="arithmetic intensity, FLOP per byte moved (log scale)",
        ylabel="attainable TFLOP/s (log scale)",
    )
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure
