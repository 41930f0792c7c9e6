"""Cost curves as they were measured (``dsv3 bench --curves``): log-log, with fitted slopes."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3.bench.curves import AT_THE_END, Curve
from dsv3.viz.figure import BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, styled

_COLOURS, _MARKS = (BLUE, ORANGE, GREEN, PURPLE), ("o", "s", "^", "D")


@styled
def cost_curves_figure(found: dict) -> Figure:
    """One panel for each quantity: its curves, and through the last points of each the line whose
    slope is told beside it. found: what ``dsv3 bench --curves`` wrote."""
    groups: dict[str, list[Curve]] = {}
    for told in found["curves"]:
        curve = Curve.of_dict(told)
        groups.setdefault(curve.group, []).append(curve)
    columns = 3 if len(groups) > 4 else 2
    rows = -(-len(groups) // columns)
    figure, panels = new_figure(9.6, 3.1 * rows, nrows=rows, ncols=columns, squeeze=False)
    for axes, (group, curves) in zip(panels.flat, groups.items()):
        _panel(axes, group, curves)
    for axes in list(panels.flat)[len(groups) :]:
        axes.axis("off")
    return figure


def _panel(axes: Axes, group: str, curves: Sequence[Curve]) -> None:
    for curve, colour, mark in zip(curves, _COLOURS, _MARKS):
        sizes, lows, middles, highs = zip(*curve.points)
        overall, last = curve.slopes()
        axes.plot(
            sizes, middles, mark + "-", color=colour, markersize=4,
            label=f"{curve.name}: slope {overall:.2f}, at the end {last:.2f}",
        )  # fmt: skip
        axes.fill_between(sizes, lows, highs, color=colour, alpha=0.2, linewidth=0)
        ends = sizes[-AT_THE_END:]
        middle = len(ends) // 2
        height = middles[-AT_THE_END:][middle]
        axes.plot(
            ends,
            [height * (size / ends[middle]) ** last for size in ends],
            "--",
            color=GREY,
            linewidth=1,
        )
    axes.set(xscale="log", yscale="log", title=group, ylabel=curves[0].quantity)
    axes.set_xlabel(" / ".join(dict.fromkeys(curve.size for curve in curves)))
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=7)


def in_words(found: dict) -> str:
    """The figure's alternative text: where it was measured, and every slope."""
    machine = found["machine"]
    told = "; ".join(Curve.of_dict(each).in_words() for each in found["curves"])
    return f"Cost curves, measured on {machine['cpu']}, {machine['threads']} threads. {told}."
