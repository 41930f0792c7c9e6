"""Figures of chapter 6: what a run is told, and what its log says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from dsv3.training.log import RunLog
from dsv3.training.schedules import LearningRate, Schedules
from dsv3.viz.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    styled,
)

_LINES = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
SHARES = LinearSegmentedColormap.from_list("shares", [BLUE, "#ffffff", VERMILLION])
EVEN = TwoSlopeNorm(1, vmin=0, vmax=3)
_MARKS = ("o", "s", "^", "D", "v", "P")


@styled
def schedules_figure(schedules: Schedules | None = None, seq_len: int = 4096) -> Figure:
    """Learning rate, batch, lambda and gamma over the tokens of a run, with their breakpoints.

    schedules: the report's by default; seq_len: tokens of a window, by which the warm-up's steps
    become tokens.
    """
    told = schedules or Schedules.deepseek_v3()
    rate, size, unit = told.learning_rate, *_unit(told.total)
    if not isinstance(rate, LearningRate):
        raise ValueError("pre-training's schedules, not an extension's")
    warm, tokens = [], 0.0
    for step in range(rate.warmup_steps):
        warm.append((tokens, rate.at(step, tokens)))
        tokens += told.batch.at(tokens) * seq_len
    after = np.linspace(tokens, told.total, 2000)
    step = rate.warmup_steps
    figure, panels = new_figure(9.6, 5.0, nrows=2, ncols=2, sharex=True)
    (first, second), (third, fourth) = panels
    first.plot(
        [at / size for at, _ in warm] + list(after / size),
        [value for _, value in warm] + [rate.at(step, at) for at in after],
        color=BLUE,
    )
    first.set(title="learning rate", ylim=(0, 1.2 * rate.peak))
    first.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    first.yaxis.get_offset_text().set_visible(False)
    peak = rate.peak
    _note(first, tokens / size, peak, f"{_sci(peak)} after {step:,} steps", up=True)
    _edge(first, rate.constant_until / size, unit)
    _edge(first, rate.cosine_until / size, unit, right=True)
    first.set_yticks([rate.low, peak], labels=[_sci(rate.low), _sci(peak)])
    _note(
        first,
        told.total / size,
        rate.last,
        f"{_sci(rate.last)} for the last {(told.total - rate.low_until) / size:.3g}{unit}",
        right=True,
        up=True,
        away=42,
    )
    ramp = np.linspace(0, told.total, 2000)
    second.plot(ramp / size, [told.batch.at(at) for at in ramp], color=ORANGE)
    second.set(title="windows per step", ylim=(0, 1.2 * told.batch.last))
    sizes = sorted({told.batch.first, told.batch.last})
    second.set_yticks(sizes, labels=[f"{windows:,}" for windows in sizes])
    if len(sizes) > 1:
        _edge(second, told.batch.until / size, unit)
    for panel, switch, title, colour in (
        (third, told.mtp_weight, "λ, weight of the MTP loss", GREEN),
        (fourth, told.bias_speed, "γ, step of the routing bias", VERMILLION),
    ):
        panel.plot(
            [0, switch.until / size, switch.until / size, told.total / size],
            [switch.before, switch.before, switch.after, switch.after],
            color=colour,
        )
        panel.set(title=title, ylim=(-0.05 * switch.before, 1.25 * switch.before))
        levels = [switch.after, switch.before]
        panel.set_yticks(levels, labels=[f"{level:g}" for level in levels])
        _edge(panel, switch.until / size, unit, right=switch.until > 0.9 * told.total)
        panel.set_xlabel(f"tokens read ({_WORDS[unit]})")
    for panel in panels.flat:
        panel.set_xlim(-0.01 * told.total / size, 1.01 * told.total / size)
    return figure


_WORDS = {"T": "trillions", "B": "billions", "M": "millions", "": "tokens"}


def _unit(tokens: float) -> tuple[float, str]:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return size, letter
    return 1.0, ""


def _sci(value: float) -> str:
    digits, _, exponent = f"{value:.1e}".partition("e")
    return rf"${digits.removesuffix('.0')}\cdot 10^{{{int(exponent)}}}$"


def _edge(axes: Axes, x: float, unit: str, right: bool = False) -> None:
    """A breakpoint, with its tokens."""
    axes.axvline(x, color=GREY, linestyle=":", linewidth=1)
    words = f"{x:.3g}{unit} "
    top = axes.get_ylim()[1]
    axes.text(
        x, top, words if right else " " + words, ha="right" if right else "left", va="top",
        color=GREY, fontsize=9,
    )  # fmt: skip


def _note(axes: Axes, x, y, words: str, *, right=False, up=False, away=4) -> None:
    axes.annotate(
        words,
        (x, y),
        (-away if right else away, 5 if up else -5),
        textcoords="offset points",
        ha="right" if right else "left",
        va="bottom" if up else "top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )


def _changes(log: RunLog) -> list[float]:
    """Millions of tokens after which windows became longer."""
    return [log.step_at(part.before)["tokens"] / 1e6 for part in log.stretches[1:]]


def _longer(axes: Axes, log: RunLog, high: float, *, level: bool = False) -> None:
    """A dotted line where longer windows begin, with words from ``high`` on, 0 to 1: upwards, or
    level."""
    for at in _changes(log):
        axes.axvline(at, color=GREY, linestyle=":", linewidth=1)
        axes.text(
            at, high, "longer windows ", color=GREY, fontsize=9, rotation=0 if level else 90,
            transform=axes.get_xaxis_transform(), ha="right", va="bottom",
        )  # fmt: skip


def _smooth(values: Sequence[float], over: int) -> np.ndarray:
    """The mean of each value and those around it, fewer at the ends."""
    kernel = np.ones(over)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


@styled
def run_figure(log: RunLog, smooth: int = 9, over: str = "tokens") -> Figure:
    """Left, the training loss as logged and smoothed; right, bits per byte on held-out text, by
    domain. A dotted line where longer windows begin.

    over: what runs to the right, "tokens" (in millions) or "steps".
    """
    if over not in ("tokens", "steps"):
        raise ValueError(f'over: "tokens" or "steps", not {over!r}')
    steps, held = log.steps, log.held_out
    figure, (left, right) = new_figure(9.6, 3.6, ncols=2)

    def place(line: Mapping) -> float:
        return line["step"] if over == "steps" else line["tokens"] / 1e6

    x = [place(line) for line in steps]
    for key, name, colour in (
        ("mtp_loss", "MTP, one token further", SKY),
        ("loss", "next token", BLUE),
    ):
        y = [line[key] for line in steps]
        left.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        left.plot(x, _smooth(y, min(smooth, len(y))), color=colour, linewidth=1.8, label=name)
    left.set(title="training", ylabel="loss (nats per token)", ylim=(0, None))
    for domain, colour, mark in zip(held[0]["held_out"], (BLUE, ORANGE, GREEN, PURPLE), _MARKS):
        right.plot(
            [place(line) for line in held],
            [line["held_out"][domain]["bits_per_byte"] for line in held],
            color=colour,
            marker=mark,
            markersize=4.5,
            label=domain,
        )
    right.set(title="text never seen", ylabel="bits per byte", ylim=(0, None))
    for panel, high in ((left, 0.42), (right, 0.04)):
        name = "step" if over == "steps" else "tokens read (millions)"
        panel.set(xlabel=name, xlim=(0, x[-1] * 1.01))
        if over == "tokens":
            _longer(panel, log, high)
    right.set_ylim(0, 1.05 * right.get_ylim()[1])
    left.legend(loc="upper right", bbox_to_anchor=(0.86, 1))
    right.legend(loc="lower left")
    return figure


@styled
def loads_figure(log: RunLog, router: str) -> Figure:
    """Who got how many tokens, step by step, in multiples of the even share; below, MaxVio.

    router: its name in the log, "layers.3.ffn.gate".
    """
    steps = log.steps
    if router not in steps[0]["load"]:
        raise ValueError(f"no router {router!r}; there are {', '.join(steps[0]['load'])}")
    loads = np.array([line["load"][router] for line in steps], dtype=float)
    share = loads / loads.mean(1, keepdims=True)
    x = np.array([line["tokens"] / 1e6 for line in steps])
    figure, (top, bottom) = new_figure(
        9.6, 4.6, nrows=2, sharex=True, gridspec_kw={"height_ratios": (2, 1)}
    )
    edges = np.concatenate([[0], (x[1:] + x[:-1]) / 2, x[-1:]])
    image = top.pcolormesh(
        edges, np.arange(loads.shape[1] + 1) - 0.5, share.T, cmap=SHARES, norm=EVEN
    )
    top.set(title=f"tokens of each expert, {router}", ylabel="expert")
    top.set_yticks(range(0, loads.shape[1], max(loads.shape[1] // 4, 1)))
    bar = figure.colorbar(image, ax=top, label="times the even share", extend="max")
    bar.set_ticks([0, 0.5, 1, 2, 3], labels=["0", "0.5", "1", "2", "3"])
    violation = share.max(1) - 1
    bottom.plot(x, violation, color=VERMILLION, alpha=0.35, linewidth=0.8)
    bottom.plot(x, _smooth(violation, min(9, len(x))), color=VERMILLION, linewidth=1.8)
    bottom.set(ylabel="MaxVio", ylim=(0, None), xlabel="tokens read (millions)", xlim=(0, x[-1]))
    _longer(top, log, 1.0, level=True)
    for at in _changes(log):
        bottom.axvline(at, color=GREY, linestyle=":", linewidth=1)
    still = [line["tokens"] / 1e6 for line in steps if line["bias_speed"] == 0]
    if still:
        bottom.axvline(still[0], color=GREY, linestyle=":", linewidth=1)
        bottom.text(
            still[0], 0.95, "γ = 0 ", color=GREY, fontsize=9,
            transform=bottom.get_xaxis_transform(), ha="right", va="top",
        )  # fmt: skip
    return figure


@styled
def grad_norm_figure(log: RunLog, clip: float = 1.0) -> Figure:
    """The norm of the gradient before clipping, and the bound; steps above it are marked."""
    steps = log.steps
    x = np.array([line["tokens"] / 1e6 for line in steps])
    norms = np.array([line["grad_norm"] for line in steps])
    over = norms > clip
    figure, axes = new_figure(9.6, 3.1)
    axes.plot(x, norms, color=BLUE, linewidth=0.9)
    axes.plot(
        x[over],
        norms[over],
        color=VERMILLION,
        marker="o",
        markersize=4.5,
        linestyle="none",
        label=f"clipped: {int(over.sum())} of {len(steps)} logged steps",
    )
    axes.axhline(clip, color=BLACK, linestyle="--", linewidth=1)
    axes.annotate(
        f"bound {clip:g}", (1, clip), (0, 3), xycoords=axes.get_yaxis_transform(),
        textcoords="offset points", ha="right", va="bottom", fontsize=9,
    )  # fmt: skip
    _longer(axes, log, 0.48, level=True)
    axes.set(
        xlabel="tokens read (millions)",
        ylabel="norm of the gradient\n(log scale)",
        yscale="log",
        xlim=(0, x[-1] * 1.01),
    )
    low, high = 0.8 * norms.min(), 1.3 * max(norms.max(), clip)
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if low <= t <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper center")
    return figure


Grid = Mapping[int, Mapping[float, float]]
"""Share of needles found: tokens -> depth in the text -> 0 to 1, as ``needle_test`` gives it."""


@styled
def retrieval_figure(before: Grid, after: Grid, trained: int | None = None) -> Figure:
    """Share of needles found by the length of the text, before the extension and after it; lines
    are means over depths, bars reach from the worst depth to the best.

    trained: tokens of a window before the extension.
    """
    figure, axes = new_figure(8.6, 3.3)
    lengths = sorted({*before, *after})
    place = {length: number for number, length in enumerate(lengths)}
    for name, grid, colour, mark in (
        ("before the extension", before, ORANGE, "s"),
        ("after it", after, BLUE, "o"),
    ):
        own = sorted(grid)
        axes.plot(
            [place[length] for length in own],
            [sum(grid[length].values()) / len(grid[length]) for length in own],
            color=colour,
            marker=mark,
            markersize=5,
            clip_on=False,
            label=name,
        )
        for length in own:
            depths = grid[length].values()
            axes.plot(
                [place[length]] * 2,
                [min(depths), max(depths)],
                color=colour,
                linewidth=4,
                alpha=0.35,
                clip_on=False,
            )
    if trained is not None:
        inside = sum(length <= trained for length in lengths)
        axes.axvline(inside - 0.5, color=GREY, linestyle=":", linewidth=1)
        axes.text(
            inside - 0.45, 0.7, f"longer than {trained:,}:\nnot trained on", color=GREY,
            fontsize=9, va="center",
        )  # fmt: skip
    axes.set(xlabel="tokens of text", ylabel="needles found", ylim=(0, 1.02))
    axes.set_xticks(range(len(lengths)), labels=[f"{length:,}" for length in lengths])
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], labels=["0%", "25%", "50%", "75%", "100%"])
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


@styled
def disturbed_figure(
    runs: Mapping[str, Sequence[float]], undisturbed: Sequence[float], first: int = 41
) -> Figure:
    """How much higher than in an undisturbed run the loss is, step by step after a bad batch.

    runs: name -> losses, of which the first is that of the bad batch itself and is not drawn;
    undisturbed: losses of the same steps; first: number of the bad batch's step.
    """
    figure, axes = new_figure(9.6, 3.1)
    for (name, losses), colour, mark in zip(runs.items(), (VERMILLION, BLUE, GREEN), _MARKS):
        more = [a - b for a, b in zip(losses, undisturbed, strict=True)][1:]
        x = range(first + 1, first + 1 + len(more))
        axes.plot(x, more, color=colour, marker=mark, markersize=4.5, label=name)
    axes.axhline(0, color=GREY, linestyle="--", linewidth=1)
    axes.set(
        xlabel=f"step (the bad batch is step {first})",
        ylabel="loss above the undisturbed\nrun (nats)",
    )
    axes.legend(loc="upper left")
    return figure
