"""Figures of chapter 4: what numbers of few bits cost, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv3.viz.figure import BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, styled

_LINES = (VERMILLION, ORANGE, BLUE, GREEN)
_MARKS = ("o", "s", "^", "D")
_ERRORS = LinearSegmentedColormap.from_list("errors", ["#ffffff", VERMILLION, "#5e2a00"])
_SHARES = BoundaryNorm([0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1], _ERRORS.N)


@styled
def relative_error_figure(
    edges: torch.Tensor, errors: Mapping[str, torch.Tensor], ends: Mapping[str, float]
) -> Figure:
    """Largest relative rounding error over the size of a number, and where a format ends.

    edges: (n + 1,) of the ranges of sizes; errors: name of a format -> (n,), as a share of the
    number. ends: what stands at a vertical line -> where it is.
    """
    figure, axes = new_figure(9.2, 3.2)
    for (name, error), colour in zip(errors.items(), (BLUE, ORANGE, GREEN)):
        axes.stairs(error, edges, color=colour, linewidth=1.6, label=name, baseline=None)
    for words, where in ends.items():
        axes.axvline(where, color=GREY, linestyle=":", linewidth=1)
        axes.text(where, 1.3, " " + words, color=GREY, ha="left", va="bottom", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set(
        yscale="log",
        ylim=(1e-3, 4),
        xlim=(float(edges[0]), float(edges[-1])),
        xlabel="size of the number (log scale)",
        ylabel="largest error, as a share\nof the number (log scale)",
    )
    axes.legend(loc="lower right", ncols=3)
    return figure


@styled
def outlier_figure(
    factors: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> Figure:
    """Error of all other values over the size of an outlier.

    factors: how many times larger than its neighbours. panels: where the outlier is -> name of a
    grouping -> relative error for each factor.
    """
    figure, axes = new_figure(9.2, 3.3, ncols=len(panels), sharey=True)
    for panel, (title, lines) in zip(axes, panels.items()):
        for (name, values), colour, mark in zip(lines.items(), _LINES, _MARKS):
            panel.plot(factors, values, color=colour, marker=mark, markersize=4, label=name)
        panel.set_xscale("log", base=2)
        panel.set(title=title, xlabel="outlier, times its neighbours", yscale="log")
    axes[0].set(ylabel="error of all others, as a share")
    axes[0].legend(loc="upper left", frameon=True)
    return figure


@styled
def error_map_figure(errors: Mapping[str, torch.Tensor]) -> Figure:
    """Relative error of every value, side by side for several ways to group scales.

    errors: name -> (tokens, channels), shares of the value; 1 is a value lost altogether, and what
    rounding costs any number, up to 1/16, is white.
    """
    figure, axes = new_figure(9.6, 3.4, ncols=len(errors), sharey=True)
    for panel, (title, error) in zip(axes, errors.items()):
        shown = panel.imshow(
            error, cmap=_ERRORS, norm=_SHARES, aspect="auto", interpolation="nearest"
        )
        panel.set(title=title, xlabel="channel")
    axes[0].set(ylabel="token")
    bar = figure.colorbar(shown, ax=list(axes), label="error, as a share of the value")
    bar.set_ticks(_SHARES.boundaries, labels=["0", "1/16", "1/8", "1/4", "1/2", "1"])
    return figure


@styled
def accumulation_figure(
    lengths: Sequence[int], errors: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Largest relative error of sums by their length, a colour for each reading of the hardware.

    errors: reading -> (errors without promotion, errors with it) for each of ``lengths``.
    """
    figure, axes = new_figure(8, 3.6)
    for (name, (plain, promoted)), colour, mark in zip(errors.items(), (BLUE, ORANGE), "os"):
        more = dict(color=colour, marker=mark, markersize=5)
        axes.plot(lengths, plain, label=name, **more)
        axes.plot(lengths, promoted, linestyle="--", label=f"{name}, promoted", **more)
    axes.axhspan(0.018, 0.02, color=GREY, alpha=0.5, linewidth=0)
    axes.text(lengths[0], 0.021, "“nearly 2%” at 4,096 (reported)", fontsize=8, va="bottom")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="products in one sum, K (log scale)",
        ylabel="largest relative error (log scale)",
    )
    axes.set_xticks(list(lengths), labels=[f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


@styled
def measured_roofline_figure(
    lines: Mapping[str, Sequence[tuple[float, float]]], flops: float, memory: float
) -> Figure:
    """FLOPs a second that were measured, under the best that the chip can do.

    lines: name of a layer -> (FLOPs a byte, FLOPs a second) of its products; flops, memory: FLOPs
    and bytes a second of the chip. Both axes are logarithmic.
    """
    figure, axes = new_figure(8, 3.6)
    left, ridge, right = 1.0, flops / memory, 1e4
    axes.plot(
        [left, ridge, right],
        [left * memory / 1e12, flops / 1e12, flops / 1e12],
        color=GREY,
        linewidth=2,
        label="the chip's limit",
    )
    for (name, points), colour, mark in zip(lines.items(), _LINES, _MARKS):
        axes.plot(
            [intensity for intensity, _ in points],
            [reached / 1e12 for _, reached in points],
            color=colour,
            marker=mark,
            markersize=5,
            label=name,
        )
    axes.axvline(ridge, color=GREY, linestyle=":", linewidth=1)
    axes.text(ridge / 1.1, 1.0, "waits for memory", ha="right", fontsize=8, color=GREY)
    axes.text(ridge * 1.1, 1.0, "waits for arithmetic", fontsize=8, color=GREY)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        xlabel="FLOP per byte moved (log scale)",
        ylabel="TFLOP/s (log scale)",
    )
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
