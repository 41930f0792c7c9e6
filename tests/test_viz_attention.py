"""Figures of chapter 1: what they are given is what they show."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3 import viz
from dsv3.rope import plain_frequencies


def texts(figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


def test_a_circle_for_each_pair_with_its_period():
    figure = viz.rotation_figure(plain_frequencies(64, 10000.0), [0, 31], positions=8)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "a full turn every\n6 positions",
        "a full turn every\n47,117 positions",
    ]
    hands = figure.axes[0].lines[1:]
    assert len(hands) == 8
    assert [line.get_xdata()[1] for line in hands] == pytest.approx(
        [math.cos(position) for position in range(8)]
    )


def test_a_line_for_each_place():
    figure = viz.relative_figure({60: torch.arange(5.0), 3000: torch.arange(5.0)})
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["query at position 60", "query at position 3,000"]


def test_a_line_for_each_token_of_the_stream():
    sizes = torch.tensor([[0.2, 0.2, 0.2], [50.0, 9.0, 11.0]])
    axes = viz.stream_figure(sizes, ["begin", "To", " be"]).axes[0]
    assert [line.get_ydata().tolist() for line in axes.lines] == sizes.T.tolist()
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "first token (begin)",
        "the other tokens",
    ]


def test_maps_hide_what_no_query_sees():
    weights = torch.full((2, 3, 4, 4), 0.25)
    figure = viz.attention_maps_figure(weights, ["a", "b", "c", "d"])
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 6
    assert images[0].get_array().mask.sum() == 6  # above the diagonal
    assert images[0].get_clim() == (0, 1)


def test_maps_of_chosen_heads():
    weights = torch.eye(4).repeat(2, 3, 1, 1)
    weights[1, 0] = torch.tensor([1.0, 0, 0, 0]).expand(4, 4)
    figure = viz.attention_maps_figure(weights, ["a", "b", "c", "d"], [[1, 2], [2, 0]])
    panels = [axes for axes in figure.axes if axes.images]
    assert [panel.get_title(loc="left") or panel.get_title() for panel in panels] == [
        "layer 0, head 1",
        "layer 0, head 2",
        "layer 1, head 2",
        "layer 1, head 0",
    ]
    assert panels[3].images[0].get_array()[3].tolist() == [1, 0, 0, 0]
    assert panels[2].images[0].get_array()[3].tolist() == [0, 0, 0, 1]


def test_bars_and_lines_carry_their_numbers():
    assert "70.3 kB" in texts(viz.cache_bars_figure({"MHA": 4997.12, "MLA": 70.272}, lit="MLA"))
    figure = viz.cache_lines_figure({"MLA": 70_272}, 131_072, {"one GPU": 80})
    assert "one GPU: 80 GB" in texts(figure)
    assert figure.axes[0].lines[0].get_ydata()[-1] == pytest.approx(131_072 * 70_272 / 1e9)


def test_points_sit_on_the_roof():
    axes = viz.roofline_figure({"low": 1.0, "high": 1000.0}, flops=1e15, memory=2e12).axes[0]
    points = [line for line in axes.lines if line.get_marker() in "os"]
    assert [float(line.get_ydata()[0]) for line in points] == [2.0, 1000.0]
    assert "500 FLOP/byte" in texts(axes.figure)
