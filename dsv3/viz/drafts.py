"""Figures of chapter 5: which drafts are accepted, and when drafting pays."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from dsv3.viz.figure import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, styled


def kind(text: str) -> str:
    """What kind of token a text is: white space, digit, sign, new word or rest of a word."""
    if not text.strip():
        return "white space"
    if re.search(r"\d", text):
        return "digit"
    if not re.search("[A-Za-z]", text):
        return "sign"
    return "new word" if text[0] == " " else "rest of a word"


@styled
def acceptance_figure(rates: Mapping[str, tuple[float, int]], first: int = 3) -> Figure:
    """Share of drafts accepted: name -> (share, places); a gap after ``first``."""
    figure, axes = new_figure(8.6, 2.9)
    places = [number + (0.6 if number >= first else 0) for number in range(len(rates))]
    for number, (place, (share, count)) in enumerate(zip(places, rates.values())):
        axes.bar(place, share, width=0.7, color=ORANGE if number < first else BLUE)
        axes.text(place, share + 0.02, f"{share:.0%}", ha="center", color=BLACK)
        axes.text(place, 0.02, f"{count:,}", ha="center", color="white", fontsize=8)
    axes.set(
        xticks=places,
        xticklabels=[name.replace(" of ", "\nof ") for name in rates],
        ylim=(0, 1.12),
        ylabel="accepted",
    )
    axes.text(places[0] - 0.45, 1.06, "by text", color=GREY, fontsize=9)
    axes.text(
        places[first] - 0.45, 1.06, "by the token that the model says", color=GREY, fontsize=9
    )
    return figure


@styled
def gain_figure(
    texts: Sequence[int],
    computed: Sequence[float],
    measured: Mapping[str, tuple[Sequence[int], Sequence[float]]] | None = None,
) -> Figure:
    """How many times as fast drafting is, against the texts that share a pass.

    measured: name -> (texts, times as fast).
    """
    figure, axes = new_figure(8.6, 3.1)
    axes.axhline(1.0, color=GREY, linewidth=1)
    axes.plot(texts, computed, color=BLUE, marker="o", markersize=4, label="671B, computed")
    for (name, (x, y)), colour in zip((measured or {}).items(), (VERMILLION, GREEN)):
        axes.plot(x, y, color=colour, marker="s", markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="texts that share a pass",
        xticks=list(texts)[::2],
        xticklabels=[f"{n:,}" for n in list(texts)[::2]],
        ylabel="times as fast",
        ylim=(0.6, 2.0),
    )
    axes.text(
        texts[0], 1.28, "experts of the second token\nhave to be read", color=GREY, fontsize=9
    )
    axes.text(texts[-1], 0.68, "arithmetic is full", color=GREY, fontsize=9, ha="right")
    axes.text(
        texts[len(texts) // 2],
        1.88,
        "the second token is nearly free",
        color=GREY,
        fontsize=9,
        ha="center",
    )
    if measured:
        axes.legend()
    return figure
