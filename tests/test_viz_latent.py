"""Figures of chapter 2 show the numbers that they are given."""

import pytest
import torch

from dsv3 import viz


def lines(axes) -> dict:
    return {
        line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")
    }


def test_energy_rises_to_one_and_a_baseline_is_dashed():
    values = torch.tensor([3.0, 2.0, 1.0])
    figure = viz.energy_figure(
        {"left": {"keys": values, "untrained keys": torch.ones(4)}, "right": {"values": values}}
    )
    left, right = figure.axes
    drawn = lines(left)
    assert drawn["keys"].get_ydata() == pytest.approx([0, 9 / 14, 13 / 14, 1])
    assert drawn["untrained keys"].get_linestyle() == "--" != drawn["keys"].get_linestyle()
    assert left.get_title(loc="left") == "left" and set(lines(right)) == {"values"}


def test_loss_by_position_is_the_mean_of_each_run():
    figure = viz.loss_by_position_figure({"a": torch.arange(10.0)}, 4, 4)
    line = lines(figure.axes[0])["a"]
    assert list(line.get_xdata()) == [2, 6] and list(line.get_ydata()) == [1.5, 5.5]


def test_forms_and_their_meeting_point():
    figure = viz.forms_figure(
        [1, 10],
        {"expanded": [5e9, 6e9], "absorbed": [1e9, 1e10]},
        {"expanded": [2e6, 3e6], "absorbed": [1e6, 1e6]},
        meet=7.0,
    )
    left, right = figure.axes
    assert list(lines(left)["absorbed"].get_ydata()) == [1, 10]  # GFLOP
    assert list(lines(right)["expanded"].get_ydata()) == [2, 3]  # MB
    assert any("7 new tokens" in text.get_text() for text in left.texts)


@pytest.mark.parametrize(
    "figure",
    [
        lambda: viz.rank_error_figure([8, 16], {"joint": [0.5, 0.2]}),
        lambda: viz.rotation_in_between_figure([0, 1], {"RoPE": [0.0, 0.1]}),
        lambda: viz.break_even_figure([1, 10, 1000], [1, 9, 146], 171),
        lambda: viz.yarn_figure(
            {"ramp": torch.tensor([0, 0.5, 1])}, {"plain": torch.tensor([100, 1, 0.1])}
        ),
        lambda: viz.kept_directions_figure([4, 8], {"main": [5.0, 4.0]}, 3.9),
    ],
)
def test_every_axis_says_what_it_is(figure):
    drawn = figure()
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in drawn.axes)
    assert viz.show(drawn, alt="a figure").alt == "a figure"
