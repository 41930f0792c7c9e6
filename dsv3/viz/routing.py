"""Which experts the tokens of a text go to: one row per token, one column per expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from dsv3.viz.figure import GREEN, LIGHT, new_figure, styled


@styled
def routing_figure(
    weights: torch.Tensor, labels: Sequence[str], groups: int, titles: Sequence[str]
) -> Figure:
    """weights (layers, tokens, N_r): gate weight of each expert, 0 where it was not chosen.

    labels: the tokens' texts; groups: how many groups the experts stand in; titles: one a layer.
    """
    layers, tokens, experts = weights.shape
    figure, axes = new_figure(11, 1.1 + 0.24 * tokens, ncols=layers, sharey=True, squeeze=False)
    largest = weights.max()
    for panel, layer, title in zip(axes[0], weights, titles, strict=True):
        for token, expert in layer.nonzero().tolist():
            weight = float(layer[token, expert] / largest)
            panel.scatter(expert, token, s=12 + 75 * weight, color=GREEN, linewidths=0)
        for edge in range(experts // groups, experts, experts // groups):
            panel.axvline(edge - 0.5, color=LIGHT, linewidth=1.5, zorder=0)
        panel.set(
            title=title,
            xlabel="expert (lines part the groups)",
            xlim=(-0.6, experts - 0.4),
            ylim=(tokens - 0.5, -0.5),
            yticks=range(tokens),
        )
        panel.set_xticks(range(0, experts, experts // groups))
        panel.set_yticklabels([label.replace("\n", "⏎") for label in labels])
    return figure
