"""Figures of chapter 4: what few bits do to sums and to gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from dsv3.viz.figure import BLUE, GREY, LIGHT, ORANGE, new_figure, styled

_MARKS = {BLUE: "o", ORANGE: "s"}


@styled
def accumulation_figure(
    lengths: Sequence[int], errors: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """Largest relative error of sums by their length, a colour for each reading of the hardware.

    errors: reading -> (errors without promotion, errors with it) for each of ``lengths``.
    """
    figure, axes = new_figure(8, 3.6)
    for colour, (name, (plain, promoted)) in zip((BLUE, ORANGE), errors.items()):
        more = dict(color=colour, marker=_MARKS[colour], markersize=5)
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
def token_error_figure(
    sizes: Float[Tensor, " n"], errors: Mapping[str, Float[Tensor, " n"]]
) -> Figure:
    """Relative error of each token's dx by the size of its gradient.

    sizes: of each token's dy, relative to the largest among the 128 tokens that share its blocks;
    errors: way of grouping -> relative error of each token.
    """
    figure, axes = new_figure(8, 3.4)
    axes.axhspan(0.5, 2.0, color=LIGHT, linewidth=0, zorder=0)
    axes.text(float(sizes.max()), 1.6, "worthless", ha="right", va="top", fontsize=8)
    for colour, (name, error) in zip((ORANGE, BLUE), errors.items()):
        axes.plot(
            sizes,
            error.clamp(max=1.8),
            linestyle="",
            marker=_MARKS[colour],
            markersize=3.5,
            alpha=0.7,
            color=colour,
            label=name,
        )
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(0.008, 2.0),
        xlabel="size of a token's gradient, the largest of its 128 neighbours = 1 (log scale)",
        ylabel="relative error\nof its dx (log scale)",
    )
    axes.legend(loc="center right")
    return figure
