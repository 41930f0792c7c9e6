"""Cost curves as they were measured (``dsv3 bench --curves``): log-log, with fitted slopes.

A curve is an object of that file: "points" (size, and the quartiles of the quantity there),
"slope" through all of them, "slope_at_the_end" through the last few, which are "fitted".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3.viz.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, styled

_COLOURS, _MARKS = (BLUE, ORANGE, GREEN, PURPLE), ("o", "s", "^", "D")


@styled
def cost_curves_figure(found: Mapping) -> Figure:
    """One panel for each quantity: its curves, and through the last points of each the line whose
    slope is told beside it. found: what ``dsv3 bench --curves`` wrote."""
    groups: dict[str, list[Mapping]] = {}
    for curve in found["curves"]:
        groups.setdefault(curve["group"], []).append(curve)
    rows = -(-len(groups) // 2)
    figure, panels = new_figure(9.6, 3.2 * rows, nrows=rows, ncols=2, squeeze=False)
    for axes, (group, curves) in zip(panels.flat, groups.items()):
        _panel(axes, group, curves)
    for axes in list(panels.flat)[len(groups) :]:
        axes.axis("off")
    return figure


def _panel(axes: Axes, group: str, curves: Sequence[Mapping]) -> None:
    for curve, colour, mark in zip(curves, _COLOURS, _MARKS):
        sizes, lows, middles, highs = zip(*curve["points"])
        axes.plot(sizes, middles, mark + "-", color=colour, markersize=4, label=_slopes(curve))
        axes.fill_between(sizes, lows, highs, color=colour, alpha=0.2, linewidth=0)
        axes.plot(*_fit(curve), "--", color=GREY, linewidth=1)
    axes.set(xscale="log", yscale="log", title=group, ylabel=curves[0]["quantity"])
    axes.set_xlabel(" / ".join(dict.fromkeys(curve["size"] for curve in curves)))
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** (0.12 * len(curves) + 0.1))  # room for the legend
    axes.legend(fontsize=7, loc="upper left")


def _slopes(curve: Mapping) -> str:
    return (
        f"{curve['name']}: slope {curve['slope']:.2f}, at the end {curve['slope_at_the_end']:.2f}"
    )


def _fit(curve: Mapping) -> tuple[list[float], list[float]]:
    """The line of the last slope, through the geometric middle of the points that it fits."""
    sizes, _, middles, _ = zip(*curve["points"][-curve["fitted"] :])
    size, height = _middle(sizes), _middle(middles)
    return list(sizes), [height * (at / size) ** curve["slope_at_the_end"] for at in sizes]


def _middle(values: Sequence[float]) -> float:
    product = 1.0
    for value in values:
        product *= value ** (1 / len(values))
    return product


def in_words(found: Mapping) -> str:
    """The figure's alternative text: where it was measured, and every curve."""
    machine, told = found["machine"], []
    for curve in found["curves"]:
        size, _, middle, _ = curve["points"][-1]
        told.append(
            f"{curve['group']}, {_slopes(curve)}: {middle:.3g} {curve['quantity']} at {size:,.0f} "
            f"{curve['size']}"
        )
    return (
        f"Cost curves, measured on {machine['cpu']}, {machine['threads']} threads. "
        + "; ".join(told)
        + "."
    )
