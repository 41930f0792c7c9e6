"""Figures of chapter 5: what they say is what they were given."""

from __future__ import annotations

import pytest

from dsv3 import viz
from dsv3.viz.drafts import kind


@pytest.mark.parametrize(
    "text, wanted",
    [
        (" ", "white space"),
        ("\n\n", "white space"),
        (" the", "new word"),
        ("ing", "rest of a word"),
        (" 7", "digit"),
        ("):\n", "sign"),
        ("x1", "digit"),
        ("", "white space"),  # the begin token says nothing
    ],
)
def test_kinds_of_tokens(text, wanted):
    assert kind(text) == wanted


def test_bars_of_acceptance_have_their_heights_and_counts():
    rates = {"plays": (0.5, 1200), "sums": (0.9, 80), "sign": (0.25, 7)}
    (axes,) = viz.acceptance_figure(rates, first=2).axes
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.9, 0.25]
    said = [text.get_text() for text in axes.texts]
    assert {"50%", "1,200", "90%", "80", "25%", "7"} < set(said)
    left = [bar.get_x() for bar in axes.patches]
    assert left[2] - left[1] > left[1] - left[0]  # a gap between the two ways to count


def test_the_curve_of_the_gain_and_what_was_measured():
    (axes,) = viz.gain_figure([1, 2, 4], [1.2, 1.0, 0.9], {"ours": ([1, 4], [0.8, 0.7])}).axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines["671B, computed"] == [1.2, 1.0, 0.9] and lines["ours"] == [0.8, 0.7]
    assert axes.get_legend() is not None
    assert viz.gain_figure([1, 2, 4], [1.2, 1.0, 0.9]).axes[0].get_legend() is None
