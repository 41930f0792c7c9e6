"""Figures of chapter 3: who is chosen, how it is limited, what balances it, what was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

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

_LINES = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
_MARKS = ("o", "s", "D", "^", "v", "P")


@styled
def choice_figure(
    scores: torch.Tensor, bias: torch.Tensor, is_open: torch.Tensor, chosen: Sequence[int]
) -> Figure:
    """One token's way through the router: s, then s + b in groups, then the choice.

    scores, bias: (N_r,); is_open: (groups,) booleans; chosen: numbers of the experts chosen.
    """
    experts, groups = len(scores), len(is_open)
    size = experts // groups
    figure, (top, bottom) = new_figure(9.4, 4.4, nrows=2, sharex=True)
    top.bar(range(experts), scores.tolist(), color=SKY, width=0.7)
    top.set(ylabel="affinity s", title="what makes the weights")
    biased = scores + bias
    for expert in range(experts):
        free = bool(is_open[expert // size])
        colour = GREEN if expert in chosen else SKY if free else LIGHT
        bottom.bar(
            expert,
            float(biased[expert]),
            width=0.7,
            color=colour,
            edgecolor=BLACK if expert in chosen else "none",
            linewidth=1.2,
        )
    low, high = bottom.get_ylim()
    for group in range(groups):
        two = biased[group * size : (group + 1) * size].topk(min(2, size)).values.sum()
        bottom.text(
            (group + 0.5) * size - 0.5,
            high * 1.03,
            f"two best: {float(two):.2f}, " + ("open" if is_open[group] else "closed"),
            ha="center",
            color=BLACK if is_open[group] else GREY,
        )
        if group:
            for panel in (top, bottom):
                panel.axvline(group * size - 0.5, color=GREY, linestyle=":", linewidth=1)
    bottom.set(
        ylabel="s + b",
        xlabel="expert (dotted lines part the groups)",
        xticks=range(experts),
        ylim=(low, high * 1.18),
    )
    bottom.set_title("what decides who is chosen (green)", pad=4)
    return figure


@styled
def nodes_figure(shares: Mapping[str, torch.Tensor], mean: Mapping[str, float]) -> Figure:
    """Share of tokens by the number of groups they visit; a set of bars for each way to choose.

    shares: name -> (groups + 1,), from 0 groups on; mean: name -> groups on average.
    """
    figure, axes = new_figure(8, 3.0)
    width = 0.8 / len(shares)
    for number, (name, share) in enumerate(shares.items()):
        places = [place + (number - (len(shares) - 1) / 2) * width for place in range(len(share))]
        axes.bar(
            places,
            share.tolist(),
            width=width * 0.92,
            color=_LINES[number],
            label=f"{name}: {mean[name]:.2f} on average",
        )
    axes.set(
        xlabel="nodes that a token visits",
        ylabel="share of tokens",
        xticks=range(1, len(share)),
        xlim=(0.4, len(share) - 0.4),
    )
    axes.legend(loc="upper left")
    return figure


@styled
def dispatch_figure(before: Sequence[int], after: Sequence[int], tokens: Sequence[str]) -> Figure:
    """The choices of a few tokens as a row of cells: as they come, and sorted by expert.

    before: expert of each choice, token after token, as many each; after: the order that sorts
    them; tokens: what to call the tokens.
    """
    figure, axes = new_figure(10, 2.5)
    k = len(before) // len(tokens)
    for row, order in ((1, range(len(before))), (0, after)):
        for place, choice in enumerate(order):
            expert = before[choice]
            colour = _LINES[expert % len(_LINES)]
            axes.add_patch(
                Rectangle(
                    (place + 0.06, row * 2 + 0.1),
                    0.88,
                    1.0,
                    facecolor=colour + "55",
                    edgecolor=colour,
                    linewidth=1.2,
                )
            )
            axes.text(
                place + 0.5,
                row * 2 + 0.6,
                f"{tokens[choice // k]}\n→ {expert}",
                ha="center",
                va="center",
                fontsize=8,
            )
    starts = [
        place for place in range(1, len(after)) if before[after[place]] != before[after[place - 1]]
    ]
    for place in starts:
        axes.plot((place, place), (-0.1, 1.3), color=BLACK, linewidth=1.4)
    axes.text(0, 3.25, f"as they come: token after token, {k} choices each", fontsize=9)
    axes.text(0, 1.4, "sorted: one run for each expert, one product for each run", fontsize=9)
    axes.set(xlim=(-0.1, len(before) + 0.1), ylim=(-0.2, 3.7))
    axes.axis("off")
    return figure


@styled
def load_history_figure(loads: Mapping[str, torch.Tensor], smooth: int = 10) -> Figure:
    """Who gets the tokens, step by step: a panel for each run, a band for each expert.

    loads: name -> (steps, experts). Bands are shares of all choices, a mean of ``smooth`` steps,
    the expert with the largest share at the end lowest.
    """
    figure, axes = new_figure(10, 3.1, ncols=len(loads), sharey=True, squeeze=False)
    for panel, (name, load) in zip(axes[0], loads.items()):
        steps = len(load) // smooth * smooth
        share = load[:steps].view(-1, smooth, load.shape[1]).mean(1)
        share = share / share.sum(1, keepdim=True)
        order = share[-5:].mean(0).argsort(descending=True)
        x = [smooth * (place + 0.5) for place in range(len(share))]
        shades = [
            _LINES[number % len(_LINES)] + ("cc" if number // len(_LINES) % 2 == 0 else "77")
            for number in range(load.shape[1])
        ]
        panel.stackplot(
            x, share[:, order].T.tolist(), colors=shades, edgecolor="white", linewidth=0.4
        )
        panel.set(xlabel="step", xlim=(x[0], x[-1]), ylim=(0, 1))
        panel.set_title(name, fontsize=10)
    axes[0][0].set_ylabel("share of the choices")
    return figure


@styled
def balance_price_figure(points: Mapping[str, tuple[float, float]]) -> Figure:
    """What balance costs: name -> (MaxVio at the end, loss at the end)."""
    figure, axes = new_figure(7, 3.2)
    for number, (name, (violation, loss)) in enumerate(points.items()):
        axes.plot(
            violation,
            loss,
            color=_LINES[number],
            marker=_MARKS[number],
            markersize=9,
            linestyle="none",
            label=name,
        )
    top = max(loss for _, loss in points.values())
    axes.set(
        xlabel="MaxVio at the end (0: balanced)",
        xlim=(-0.1, None),
        ylim=(0, 1.2 * top),
        ylabel="loss at the end\n(1: no better than zeros)",
    )
    axes.legend(loc="lower right")
    return figure


@styled
def violation_figure(runs: Mapping[str, torch.Tensor], floor: float, smooth: int = 1) -> Figure:
    """MaxVio by step on a logarithmic scale; ``floor``: what chance alone leaves, dashed."""
    figure, axes = new_figure(8, 3.3)
    for number, (name, violation) in enumerate(runs.items()):
        steps = len(violation) // smooth * smooth
        line = violation[:steps].view(-1, smooth).mean(1)
        axes.plot(
            [smooth * (place + 0.5) for place in range(len(line))],
            line.tolist(),
            color=_LINES[number],
            linewidth=1.4,
            label=name,
        )
    axes.axhline(floor, color=GREY, linestyle="--", linewidth=1)
    axes.text(1, floor * 0.93, f"chance alone: {floor:.2f}", fontsize=8, va="top")
    axes.set(
        yscale="log",
        xlabel="step",
        ylabel="MaxVio (log scale)",
        xlim=(0, None),
        ylim=(floor * 0.6, None),
    )
    axes.set_yticks([0.2, 0.5, 1, 2, 5, 10], labels=["0.2", "0.5", "1", "2", "5", "10"])
    axes.minorticks_off()
    axes.legend(loc="upper right")
    return figure


@styled
def domain_figure(shares: torch.Tensor, domains: Sequence[str], titles: Sequence[str]) -> Figure:
    """How often each expert is chosen in each domain, in multiples of the even share.

    shares: (layers, domains, N_r), each row summing to 1; titles: one a layer.
    """
    layers, rows, experts = shares.shape
    figure, axes = new_figure(10, 1.2 + 0.36 * rows, ncols=layers, sharey=True, squeeze=False)
    for panel, share, title in zip(axes[0], shares, titles, strict=True):
        image = panel.imshow(
            (share * experts).tolist(), cmap="cividis", vmin=0, vmax=3, aspect="auto"
        )
        panel.set(xlabel="expert", yticks=range(rows), xticks=range(0, experts, 4))
        panel.set_title(title, fontsize=10)
    axes[0][0].set_yticklabels(domains)
    figure.colorbar(image, ax=axes[0].tolist(), label="times the even share", extend="max")
    return figure


@styled
def overlap_figure(
    overlaps: Mapping[str, Sequence[float]], titles: Sequence[str], chance: float, most: int
) -> Figure:
    """Experts that two places in the texts have in common, on average.

    overlaps: kind of pair -> one number a layer; chance: for random choices; most: K_r.
    """
    figure, axes = new_figure(8.6, 3.3)
    width = 0.8 / len(overlaps)
    for number, (name, line) in enumerate(overlaps.items()):
        places = [place + (number - (len(overlaps) - 1) / 2) * width for place in range(len(line))]
        axes.bar(places, line, width=width * 0.92, color=_LINES[number], label=name)
    axes.axhline(chance, color=BLACK, linestyle="--", linewidth=1, label="two random choices")
    axes.set(xticks=range(len(titles)), ylim=(0, most), ylabel=f"experts in common, of {most}")
    axes.set_xticklabels(titles)
    axes.legend(loc="upper right")
    return figure
