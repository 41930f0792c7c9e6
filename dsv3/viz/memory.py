"""What each rank holds, against what common GPUs have."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from dsv3.viz.figure import BLUE, GREY, ORANGE, new_figure, styled


@styled
def memory_per_rank_figure(
    weights: Mapping[int, float], cache: float, gpus: Mapping[str, float]
) -> Figure:
    """Bars of gigabytes per rank, and a dashed line for each GPU's memory.

    weights: number of ranks -> GB of weights on each; cache: GB of cache, the same on each rank;
    gpus: name -> GB.
    """
    figure, axes = new_figure(8, 3.6)
    places = range(len(weights))
    axes.bar(places, list(weights.values()), width=0.55, color=BLUE, label="weights")
    axes.bar(
        places,
        [cache] * len(weights),
        width=0.55,
        bottom=list(weights.values()),
        color=ORANGE,
        label="cache",
        hatch="///",
        edgecolor="white",
        linewidth=0,
    )
    for name, memory in gpus.items():
        axes.axhline(memory, color=GREY, linestyle="--", linewidth=1)
        axes.text(
            len(weights) - 0.42,
            memory,
            f"{name}: {memory:.0f} GB",
            va="bottom",
            ha="left",
            fontsize=8,
        )
    axes.set(
        xticks=list(places),
        ylabel="GB on each rank",
        xlabel="ranks (one GPU each)",
        xlim=(-0.5, len(weights) + 0.35),
    )
    axes.set_xticklabels([str(n) for n in weights])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)
    return figure
