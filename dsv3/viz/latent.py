"""Figures of chapter 2: low rank, the rotation in the way, the two forms, YaRN's ramp."""

from __future__ import annotations

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

_LINES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
_MARKS = ("o", "s", "D", "^", "v", "P")


@styled
def rank_error_figure(kept: Sequence[int], errors: Mapping[str, Sequence[float]]) -> Figure:
    """What is lost when a token's keys and values are told in few numbers.

    kept: numbers stored for a token; errors: name of a way to store them -> relative error of the
    restored keys and values for each of ``kept``.
    """
    figure, axes = new_figure(8, 3.2)
    for number, (name, line) in enumerate(errors.items()):
        axes.plot(
            kept,
            line,
            color=_LINES[number],
            marker=_MARKS[number],
            markersize=4.5,
            clip_on=False,
            label=name,
        )
    axes.set(
        xlabel="numbers stored for one token",
        ylabel="relative error",
        ylim=(0, 1),
        xlim=(0, max(kept)),
    )
    axes.legend(loc="upper right")
    return figure


@styled
def rotation_in_between_figure(
    distances: Sequence[int], changes: Mapping[str, Sequence[float]]
) -> Figure:
    """How far the product of two matrices is from itself when a rotation stands between them.

    changes: name -> relative change against distance 0, for each of ``distances`` in tokens.
    """
    figure, axes = new_figure(8, 3.0)
    for number, (name, line) in enumerate(changes.items()):
        axes.plot(distances, line, color=_LINES[number], linewidth=2 - 0.4 * number, label=name)
    axes.set(
        xlabel="distance from query to key, in tokens",
        ylim=(-0.03, 1.1),
        ylabel="relative change of\nthe absorbed matrix",
        xlim=(0, max(distances)),
    )
    axes.legend(loc="upper left", ncols=2)
    return figure


@styled
def forms_figure(
    queries: Sequence[int],
    flops: Mapping[str, Sequence[float]],
    moved: Mapping[str, Sequence[float]],
    meet: float,
) -> Figure:
    """FLOPs and bytes of one layer's attention by the number of new tokens, a line for each form.

    meet: queries at which the forms do equally many FLOPs, drawn as a dashed line.
    """
    figure, (left, right) = new_figure(9.4, 3.5, ncols=2)
    for panel, lines, unit, label in ((left, flops, 1e9, "GFLOP"), (right, moved, 1e6, "MB moved")):
        for number, (name, line) in enumerate(lines.items()):
            panel.plot(
                queries,
                [value / unit for value in line],
                color=_LINES[number],
                marker=_MARKS[number],
                markersize=3.5,
                clip_on=False,
                label=name,
            )
        panel.set(
            xscale="log",
            yscale="log",
            xlabel="new tokens s (log scale)",
            ylabel=f"{label} a layer (log scale)",
            xlim=(min(queries), max(queries)),
        )
    left.axvline(meet, color=GREY, linestyle="--", linewidth=1)
    low, high = left.get_ylim()
    left.text(
        meet * 0.9, low * (high / low) ** 0.04, f"{meet:.0f} new tokens", ha="right", fontsize=8
    )
    left.legend(loc="upper left")
    return figure


@styled
def break_even_figure(keys: Sequence[int], meet: Sequence[float], limit: float) -> Figure:
    """Which form does fewer FLOPs, by the keys that can be seen and the new tokens among them.

    meet: for each of ``keys``, new tokens at which both do the same; limit: for endless keys.
    """
    figure, axes = new_figure(8, 3.6)
    top = max(keys)
    axes.fill_between(keys, 1, meet, color=ORANGE, alpha=0.25, linewidth=0)
    axes.fill_between(keys, meet, keys, color=BLUE, alpha=0.2, linewidth=0)
    axes.plot(keys, meet, color=BLACK, linewidth=2)
    axes.plot(keys, keys, color=GREY, linewidth=1)
    axes.axhline(limit, color=GREY, linestyle="--", linewidth=1)
    axes.text(top * 0.9, limit * 1.15, f"{limit:.0f}", ha="right", fontsize=9)
    axes.text(top**0.75, 5, "absorbed does less", ha="center", fontsize=11)
    axes.text(top**0.84, top**0.62, "expanded does less", ha="center", fontsize=11)
    axes.text(
        top**0.45, top**0.62, "no such pass:\nmore new tokens than keys", ha="center", color=GREY
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(min(keys), top),
        ylim=(1, top),
        xlabel="tokens that can be seen, new ones included, T (log scale)",
        ylabel="new tokens s (log scale)",
    )
    return figure


@styled
def yarn_figure(slowed: Mapping[str, torch.Tensor], turns: Mapping[str, torch.Tensor]) -> Figure:
    """Left, YaRN's ramp: how much each pair is slowed. Right, turns within the stretched context.

    slowed: name -> (pairs,) from 0 (left alone) to 1 (divided by the factor); turns: name ->
    (pairs,) full turns.
    """
    figure, (left, right) = new_figure(9.4, 3.3, ncols=2)
    for number, (name, line) in enumerate(slowed.items()):
        left.plot(
            range(len(line)),
            line,
            color=_LINES[number],
            marker=_MARKS[number],
            markersize=4,
            label=name,
        )
    left.set(
        xlabel="pair of values, fastest first",
        ylabel="slowed: 0 not, 1 by the factor",
        ylim=(-0.05, 1.25),
    )
    left.legend(loc="upper left")
    for number, (name, line) in enumerate(turns.items()):
        right.plot(
            range(len(line)),
            line,
            color=_LINES[number],
            marker=_MARKS[number],
            markersize=4,
            label=name,
        )
    right.axhline(1, color=GREY, linestyle="--", linewidth=1)
    right.text(0.3, 1.15, "one turn", fontsize=8, va="bottom")
    right.set(
        yscale="log",
        xlabel="pair of values, fastest first",
        ylabel="full turns in the context (log scale)",
    )
    right.legend(loc="upper right")
    return figure


@styled
def loss_by_position_figure(
    losses: Mapping[str, torch.Tensor], width: int, original: int
) -> Figure:
    """Mean loss of runs of ``width`` tokens along a text; ``original``: where it was stretched."""
    figure, axes = new_figure(8, 3.3)
    for number, (name, loss) in enumerate(losses.items()):
        whole = len(loss) // width * width
        line = loss[:whole].view(-1, width).mean(1)
        middle = [width * (place + 0.5) for place in range(len(line))]
        axes.plot(
            middle,
            line,
            color=_LINES[number],
            marker=_MARKS[number],
            markersize=4.5,
            zorder=9 - number,
            label=name,
        )
    axes.axvline(original, color=GREY, linestyle="--", linewidth=1)
    axes.text(original * 1.02, axes.get_ylim()[1], "original length", va="top", fontsize=8)
    axes.set(xlabel="position in the text, tokens", ylabel="loss, nats a token", xlim=(0, whole))
    axes.legend(loc="lower right")
    return figure


@styled
def energy_figure(panels: Mapping[str, Mapping[str, torch.Tensor]]) -> Figure:
    """Share of a matrix's energy in its largest directions, a panel for each kind of matrix.

    panels: title -> name of a matrix -> its singular values, largest first. Energy is the sum of
    their squares. A name that begins with "untrained" is drawn dashed.
    """
    figure, axes = new_figure(9.4, 3.3, ncols=len(panels), sharey=True, squeeze=False)
    for panel, (title, matrices) in zip(axes[0], panels.items()):
        for number, (name, values) in enumerate(matrices.items()):
            energy = (values.double() ** 2).cumsum(0) / (values.double() ** 2).sum()
            dashed = name.startswith("untrained")
            panel.plot(
                range(len(values) + 1),
                [0.0, *energy.tolist()],
                color=GREY if dashed else _LINES[number],
                linestyle="--" if dashed else "-",
                linewidth=1.8,
                label=name,
            )
        for share in (0.9, 0.99):
            panel.axhline(share, color=LIGHT, linewidth=1, zorder=0)
        panel.set(xlabel="directions kept", xlim=(0, None), ylim=(0, 1.02))
        panel.set_title(title, fontsize=10)
        panel.legend(loc="lower right")
    axes[0][0].set_ylabel("share of the energy")
    return figure


@styled
def kept_directions_figure(
    kept: Sequence[int], losses: Mapping[str, Sequence[float]], whole: float
) -> Figure:
    """Loss of a model whose latents keep ``kept`` directions each; ``whole``: with all of them."""
    figure, axes = new_figure(8, 3.2)
    axes.axhline(whole, color=GREY, linestyle="--", linewidth=1)
    for number, (name, line) in enumerate(losses.items()):
        axes.plot(kept, line, color=_LINES[number], marker=_MARKS[number], markersize=5, label=name)
    axes.set(
        xscale="log",
        xlabel="directions kept of each latent (log scale)",
        ylabel="loss, nats a token",
    )
    axes.set_xticks(list(kept), labels=[str(number) for number in kept])
    axes.minorticks_off()
    axes.text(min(kept), whole, "all kept", va="bottom", fontsize=8)
    axes.legend(loc="upper right")
    return figure
