"""Figures of the experiments of chapter 6: arms against their base, seed by seed.

Runs from the same seed begin alike and read the same text, so what is compared is the difference
within each pair; seeds themselves scatter more than most choices do. These figures take
``dsv3.training.experiments.Results``; ``described`` says in words what ``compared`` shows. The last
one, ``tiles_against_blocks``, compares what one backward pass does in each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from math import ceil

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter

from dsv3.training.experiments import Results
from dsv3.training.experiments.gradients import FORMS, GradientError
from dsv3.training.experiments.results import Spread
from dsv3.training.routing import mutual_information
from dsv3.viz.figure import BLACK, BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, new_figure, styled
from dsv3.viz.training_figures import EVEN, SHARES

_ARMS = (BLUE, ORANGE, GREEN, PURPLE)
_SEEDS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SUBNORMAL = 448 / 2.0**-6  # E4M3's largest number over its smallest with all digits
_LOSS = "loss on text never seen (nats per token)"


def loss(run: dict) -> float:
    """Of a run, in nats a token of held-out text."""
    return run["loss"]


def _runs(results: Results, arm: str) -> list[dict]:
    """Of an arm, by seed."""
    runs = [run for run in results.told["runs"] if run["arm"] == arm]
    return sorted(runs, key=lambda run: run["seed"])


def _conditions(results: Results) -> str:
    """How much each run read, and how many there are of each arm."""
    seeds = len(_runs(results, results.arms[0]))
    return f"{results.told['tokens']:,} tokens per run, {seeds} seed{'s' * (seeds != 1)} per arm"


def _colours(results: Results) -> dict[str, str]:
    if not 2 <= len(results.arms) <= len(_ARMS):
        raise ValueError(f"2 to {len(_ARMS)} arms, not {len(results.arms)}")
    return dict(zip(results.arms, _ARMS))


def _told(spread: Spread) -> str:
    """Mean and deviation, with digits for the smaller of them."""
    size = min(x for x in (abs(spread.mean), spread.deviation, 1.0) if x > 0)
    digits = min(max(2, ceil(-np.log10(size)) + 1), 4)
    return f"{spread.mean:+.{digits}f} ± {spread.deviation:.{digits}f}".replace("-", "−")


def _percent(share: float) -> str:
    """With two or three digits, whatever its size."""
    digits = 2 if abs(share) < 0.01 else 1 if abs(share) < 0.1 else 0
    return f"{share:+.{digits}%}".replace("-", "−")


@styled
def compared(results: Results, figure: Callable[[dict], float] = loss, name: str = _LOSS) -> Figure:
    """Left, a figure of every run, pairs joined; right, its difference to the base arm from the
    same seed, with mean and standard deviation over the seeds.

    figure: of a run, by default its loss; name: what to call it, with its unit.
    """
    arms, base, colours = results.arms, results.told["base"], _colours(results)
    drawn, (left, right) = new_figure(9.6, 1.5 + 0.55 * len(arms), ncols=2, sharey=True)
    values = [results.of(arm, figure).values for arm in arms]
    for pair in zip(*values, strict=True):
        left.plot(pair, range(len(arms)), color=GREY, linewidth=0.8, zorder=1)
    right.axvline(0, color=GREY, linewidth=1, zorder=1)
    for row, arm in enumerate(arms):
        more = {"color": colours[arm], "linestyle": "none", "markersize": 6}
        for value, mark in zip(values[row], _SEEDS):
            left.plot(value, row, marker=mark, **more)
        mean = results.of(arm, figure).mean
        left.plot([mean, mean], [row - 0.28, row + 0.28], color=BLACK, linewidth=1.6)
        gap = results.against(arm, figure)
        whole = results.of(base, figure).mean
        share = _percent(gap.mean / whole) if whole else ""
        right.text(
            0.98, row, "the base" if arm == base else share, ha="right", va="center", color=GREY,
            transform=right.get_yaxis_transform(),
        )  # fmt: skip
        if arm == base:
            continue
        for value, mark in zip(gap.values, _SEEDS):
            right.plot(value, row, marker=mark, **more)
        right.errorbar(
            gap.mean, row + 0.3, xerr=gap.deviation, color=BLACK, fmt="|", capsize=3, elinewidth=1.4
        )
        right.annotate(
            _told(gap), (gap.mean, row - 0.22), ha="center", va="bottom",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
    left.set_yticks(range(len(arms)), labels=arms)
    left.set(ylim=(len(arms) - 0.4, -0.6), xlabel=name, title=_conditions(results))
    reach = max(abs(x) for arm in arms for x in results.against(arm, figure).values) or 1.0
    right.set(xlim=(-1.6 * reach, 2 * reach), title="the same, seed by seed")
    right.set_xlabel(f"difference to “{base}”\n(mean ± standard deviation; grey: in % of the base)")
    right.tick_params(axis="y", length=0)
    for panel in (left, right):
        panel.locator_params(axis="x", nbins=6)
    return drawn


def described(results: Results, figure: Callable[[dict], float] = loss, name: str = _LOSS) -> str:
    """What ``compared`` shows, in a sentence for each arm."""
    base = results.told["base"]
    said = [f"Dots for each run, {name}, {_conditions(results)}."]
    for arm in results.arms:
        own = results.of(arm, figure)
        words = f"{arm}: mean {own.mean:.3f}"
        if arm != base:
            words += f", against {base} {_told(results.against(arm, figure))}"
        said.append(words + ".")
    return " ".join(said)


@styled
def curves(results: Results) -> Figure:
    """Left, the training loss of the arms; right, how far each is from the base arm on the same
    batches. Lines are means over the seeds, bands reach from the least to the most."""
    colours, base = _colours(results), results.told["base"]
    figure, (left, right) = new_figure(9.6, 3.5, ncols=2)
    stored = {arm: np.array([run["curve"] for run in _runs(results, arm)]) for arm in results.arms}
    for arm, curve in stored.items():
        x = curve[0, :, 0] / 1e6
        for panel, lines in (
            (left, curve[:, :, 1]),
            (right, curve[:, :, 1] - stored[base][:, :, 1]),
        ):
            if panel is right and arm == base:
                continue
            panel.fill_between(
                x, lines.min(0), lines.max(0), color=colours[arm], alpha=0.25, linewidth=0
            )
            panel.plot(x, lines.mean(0), color=colours[arm], label=arm)
        left.set_xlim(0, x[-1] * 1.01)
        right.set_xlim(0, x[-1] * 1.01)
    right.axhline(0, color=GREY, linewidth=1, zorder=1)
    late = [curve[:, len(curve[0]) // 6 :, 1] for curve in stored.values()]
    left.set_ylim(None, 1.02 * max(float(part.max()) for part in late))
    left.set(ylabel="training loss (nats per token)", title=_conditions(results))
    right.set(ylabel="nats per token", title=f"difference to “{base}”")
    for panel in (left, right):
        panel.set_xlabel("tokens read (millions)")
    left.legend(loc="upper right")
    return figure


def specialisation(run: dict, router: str) -> float:
    """What a token's domain says about its experts, in bits a choice: the mutual information of
    domain and expert where all domains have equal shares."""
    loads = torch.tensor([by[router] for by in run["load_by_domain"].values()], dtype=torch.float64)
    return mutual_information(loads / loads.sum(1, keepdim=True))


@styled
def loads_by_domain(results: Results, seed: int | None = None) -> Figure:
    """Who works on which domain: a panel for each arm and router of the main model, rows of
    domains, columns of experts, in multiples of the even share. Arms without experts are left out.

    seed: of the runs drawn, by default the least; experts of other seeds have other numbers, so
    they cannot be averaged. What is said of bits is over all seeds.
    """
    seeds = [run["seed"] for run in results.told["runs"]]
    seed = min(seeds) if seed is None else seed
    if seed not in seeds:
        raise ValueError(f"no seed {seed}; there are {', '.join(map(str, sorted(set(seeds))))}")
    shown = {
        run["arm"]: run
        for arm in results.arms
        for run in _runs(results, arm)
        if run["seed"] == seed and _routers(run)
    }
    if not shown:
        raise ValueError("no arm has experts")
    rows = max(len(_routers(run)) for run in shown.values())
    domains = list(next(iter(shown.values()))["load_by_domain"])
    figure, axes = new_figure(
        9.6, 0.6 + rows * (0.75 + 0.27 * len(domains)), nrows=rows, ncols=len(shown), squeeze=False
    )
    for column, (arm, run) in enumerate(shown.items()):
        for row, router in enumerate(_routers(run)):
            panel = axes[row][column]
            loads = np.array([run["load_by_domain"][domain][router] for domain in domains], float)
            share = loads / loads.mean(1, keepdims=True)
            image = panel.imshow(share, cmap=SHARES, norm=EVEN, aspect="auto")
            bits = results.of(arm, lambda run, router=router: specialisation(run, router))
            layer = router.split(".")[1]
            panel.set_title(
                f"{arm}\nlayer {layer}: {bits.mean:.2f} ± {bits.deviation:.2f} bits"
                if row == 0
                else f"layer {layer}: {bits.mean:.2f} ± {bits.deviation:.2f} bits",
                fontsize=9,
            )
            panel.set_xticks(range(0, loads.shape[1], loads.shape[1] // 4))
            panel.set_yticks(range(len(domains)), labels=domains if column == 0 else [])
            if row == rows - 1:
                panel.set_xlabel(f"expert (seed {run['seed']})")
    bar = figure.colorbar(
        image, ax=axes.ravel().tolist(), label="times the even share", extend="max"
    )
    bar.set_ticks([0, 0.5, 1, 2, 3], labels=["0", "0.5", "1", "2", "3"])
    return figure


def _routers(run: dict) -> list[str]:
    """Of the layers of the main model."""
    loads = next(iter(run["load_by_domain"].values()))
    return [name for name in loads if name.startswith("layers.")]


@styled
def tiles_against_blocks(found: Sequence[GradientError]) -> Figure:
    """Above, the error of a token's input gradient in every product, with dy in tiles and in
    blocks, and the name of the product where blocks add most; below, how unlike the tokens of a
    block are. Both scales are logarithmic."""
    place = range(len(found))
    tile, block = (np.array([getattr(one, form).token for one in found]) for form in FORMS)
    figure, (above, below) = new_figure(
        9.6, 5.2, nrows=2, sharex=True, gridspec_kw={"height_ratios": (3, 2)}
    )
    above.vlines(place, tile, block, color=GREY, linewidth=0.8, zorder=1)
    above.plot(place, tile, "o", color=BLUE, markersize=5, label="tiles, 1 × 128")
    above.plot(place, block, "s", color=ORANGE, markersize=5, label="blocks, 128 × 128")
    worst = int((block / tile).argmax())
    side = -1 if worst > len(found) / 2 else 1
    above.annotate(
        f"{found[worst].name}: {block[worst] / tile[worst]:.1f} times", (worst, block[worst]),
        xytext=(8 * side, 0), textcoords="offset points",
        ha="right" if side < 0 else "left", va="center",
    )  # fmt: skip
    above.set(yscale="log", ylim=(0.7 * tile.min(), 2.4 * block.max()))
    above.set_ylabel("error of a token's dx\n(mean, share of its length)")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    above.minorticks_off()
    above.legend(loc="upper left", ncols=2)
    below.plot(place, [one.spread for one in found], "o", color=BLACK, markersize=4)
    below.axhline(_SUBNORMAL, color=GREY, linestyle=":", linewidth=1)
    below.text(
        0, _SUBNORMAL, f"{_SUBNORMAL:,.0f}: beyond, all of a token is subnormal in E4M3",
        color=GREY, va="bottom",
    )  # fmt: skip
    below.set(yscale="log", ylabel="largest of the block\nover the token's\n(1 in 20 exceeds)")
    below.set_xticks(place, labels=[_matrix(one.name) for one in found], rotation=90)
    end = 0
    for layer, some in groupby(found, lambda one: ".".join(one.name.split(".")[:2])):
        start, end = end, end + len(list(some))
        above.text(
            (start + end - 1) / 2, 1.02, layer, ha="center", transform=above.get_xaxis_transform()
        )
        for panel in (above, below):
            panel.axvline(end - 0.5, color=LIGHT, linewidth=1, zorder=0)
    below.set_xlim(-0.7, end - 0.3)
    return figure


def _matrix(name: str) -> str:
    """What a matrix is called within its layer."""
    *_, where, matrix = name.split(".")
    return {"experts": "routed ", "shared_experts": "shared "}.get(where, "") + matrix
