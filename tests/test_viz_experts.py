"""Figures of chapter 3 say what they are given."""

from __future__ import annotations

import torch

from dsv3 import viz


def texts(figure) -> str:
    return "\n".join(
        text.get_text()
        for axes in figure.axes
        for text in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
    )


def test_choice_shows_groups_and_the_chosen():
    scores, bias = torch.linspace(0.1, 0.8, 8), torch.tensor([0.0, -2.0] * 4)
    figure = viz.choice_figure(scores, bias, torch.tensor([True, False, False, True]), [0, 6])
    assert texts(figure).count("open") == 2 and texts(figure).count("closed") == 2
    assert f"two best: {0.1 + 0.2 - 2.0:.2f}" in texts(figure)
    edges = [
        bar.get_x()
        for bar in figure.axes[1].patches
        if bar.get_linewidth() > 1 and bar.get_edgecolor()[3] > 0
    ]
    assert [round(x + 0.35) for x in edges] == [0, 6]


def test_nodes_has_bars_for_every_count():
    shares = {"free": torch.tensor([0, 0.25, 0.75]), "limited": torch.tensor([0, 1.0, 0])}
    figure = viz.nodes_figure(shares, {"free": 1.75, "limited": 1.0})
    assert len(figure.axes[0].patches) == 6
    assert "1.75" in figure.axes[0].get_legend().get_texts()[0].get_text()


def test_dispatch_parts_the_runs():
    figure = viz.dispatch_figure([2, 0, 0, 1], [1, 2, 3, 0], ["To", " be"])
    assert texts(figure).count("To\n") == 4
    assert len(figure.axes[0].patches) == 8 and len(figure.axes[0].lines) == 2


def test_histories_prices_violations():
    loads = torch.rand(40, 5) + 0.1
    figure = viz.load_history_figure({"a": loads, "b": loads})
    assert len(figure.axes) == 2 and len(figure.axes[0].collections) == 5
    figure = viz.balance_price_figure({"a": (2.0, 0.5), "b": (0.1, 0.4)})
    assert len(figure.axes[0].lines) == 2
    figure = viz.violation_figure({"slow": torch.rand(30) + 0.3}, 0.25, smooth=3)
    assert len(figure.axes[0].lines[0].get_xdata()) == 10 and "0.25" in texts(figure)


def test_domains_and_overlaps():
    shares = torch.full((2, 3, 8), 1 / 8)
    figure = viz.domain_figure(shares, ["a", "b", "c"], ["layer 1", "layer 2"])
    assert figure.axes[0].images[0].get_array().max() == 1
    figure = viz.overlap_figure({"same": [3.0, 2.0]}, ["layer 1", "layer 2"], 1.0, 4)
    assert len(figure.axes[0].patches) == 2 and "of 4" in texts(figure)
