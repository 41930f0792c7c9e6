"""Chapter 7, drawn: what ranks send each other, and what that is for in data parallelism.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed. Products that
are shared out are drawn in ``dsv3.viz.cut_schematics``, memory in ``dsv3.viz.shard_schematics``,
machines and experts in ``dsv3.viz.cluster_schematics``, pipelines in
``dsv3.viz.pipeline_schematics``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from dsv3.parallel.traffic import (
    all_gather_bytes,
    all_reduce_bytes,
    all_to_all_bytes,
    broadcast_bytes,
    reduce_scatter_bytes,
)
from dsv3.viz.scene import Scene, text_width
from dsv3.viz.schematic import (
    HEAD,
    SMALL,
    WIDTH,
    Box,
    arrow,
    box,
    cells,
    headline,
    legend,
    lines,
    number,
)

RANKS = ("blue", "orange", "green", "purple")  # colours of four ranks
STRONG = 0.35  # tint of a chunk

# Collectives ------------------------------------------------------------------------------------

Chunks = list[list[int | None]]
"""A row for each rank, a column for each chunk; None where the rank has nothing."""


def vectors(ranks: int = 4) -> Chunks:
    """What rank r starts from: 1, 2, 3 ... times 10^r, so that each digit of a sum is a rank."""
    return [[(chunk + 1) * 10**rank for chunk in range(ranks)] for rank in range(ranks)]


def collective(name: str, ranks: int = 4) -> tuple[Chunks, Chunks]:
    """What every rank has before and after, by the definition of the collective."""
    whole = vectors(ranks)
    empty: Chunks = [[None] * ranks for _ in range(ranks)]
    total: list[int | None] = [sum(column) for column in zip(*whole)]
    own: Chunks = [
        [v if c == r else None for c, v in enumerate(row)] for r, row in enumerate(whole)
    ]
    if name == "broadcast":
        return [list(whole[0]), *empty[1:]], [list(whole[0]) for _ in whole]
    if name == "all-reduce":
        return [list(row) for row in whole], [list(total) for _ in whole]
    if name == "reduce-scatter":
        return [list(row) for row in whole], [
            [v if c == r else None for c, v in enumerate(total)] for r in range(ranks)
        ]
    if name == "all-gather":
        return own, [[whole[c][c] for c in range(ranks)] for _ in range(ranks)]
    if name == "all-to-all":
        return [list(row) for row in whole], [list(column) for column in zip(*whole)]
    raise ValueError(f"no such collective: {name!r}; there are {', '.join(COLLECTIVES)}")


# In words, and bytes that a rank sends (of a vector of so many bytes).
COLLECTIVES = {
    "broadcast": ("one rank's vector, to all", broadcast_bytes),
    "all-reduce": ("the sum, to all", all_reduce_bytes),
    "reduce-scatter": ("the sum, one part each", reduce_scatter_bytes),
    "all-gather": ("one part each, to all", all_gather_bytes),
    "all-to-all": ("part k of each, to rank k", all_to_all_bytes),
}


def collectives(names: Sequence[str] = tuple(COLLECTIVES)) -> Scene:
    """What four ranks have before and after each collective, and how much a rank sends."""
    if not 1 <= len(names) <= 5:
        raise ValueError(f"1 to 5 collectives, not {len(names)}")
    each = [(name, *collective(name)) for name in names]
    tall, wide = 160, 386
    rows = (len(names) + 2) // 2
    scene = Scene(
        WIDTH,
        tall * rows - 16,
        "Four ranks with a vector of four parts each; the numbers of rank r end in r zeros. "
        + " ".join(f"{name}: {COLLECTIVES[name][0]}; {_after(after)}." for name, _, after in each),
    )
    for place, (name, before, after) in enumerate(each):
        _collective(scene, wide * (place % 2), tall * (place // 2), name, before, after)
    x, y = wide * (len(names) % 2), tall * (len(names) // 2)
    headline(scene, "How to read it", y + 10, x)
    lines(
        scene,
        x,
        y + 36,
        "A row is a rank's memory, a cell one part",
        "of its vector; an empty cell is nothing yet.",
        "Rank r's numbers end in r zeros, so",
        "1,111 has heard of all four ranks.",
        fill="soft",
        step=18,
    )
    entries = [(colour, STRONG, f"rank {rank}") for rank, colour in enumerate(RANKS)]
    legend(scene, x, y + 116, entries)
    legend(scene, x, y + 136, [("yellow", 0.6, "a sum over ranks")])
    return scene


def _after(after: Chunks) -> str:
    shown = [
        ", ".join(number(value) for value in row if value is not None) or "nothing" for row in after
    ]
    if len(set(shown)) == 1:
        return f"afterwards every rank has {shown[0]}"
    return "afterwards rank " + ", rank ".join(f"{r} has {words}" for r, words in enumerate(shown))


def _collective(scene: Scene, x, y, name: str, before: Chunks, after: Chunks) -> None:
    words, sent = COLLECTIVES[name]
    headline(scene, name, y + 10, x)
    scene.text(x + text_width(name, HEAD, bold=True) + 14, y + 11, words, fill="soft")
    left, top = x + 22, y + 28
    for rank in range(len(before)):
        scene.text(left - 8, top + 22 * rank + 11, str(rank), anchor="end", size=SMALL, fill="soft")
    first = _memory(scene, left, top, before)
    second = _memory(scene, left + 196, top, after)
    arrow(scene, (first.right[0] + 10, first.y), (second.left[0] - 10, first.y))
    share = Fraction(sent(1, len(before))).limit_denominator(99)
    twice = share > 1
    amount = f"{'2 · ' * twice}{share / (1 + twice)} of a vector"
    mean = " on average" if name == "broadcast" else ""
    scene.text(
        left, top + 22 * len(before) + 14, f"a rank sends {amount}{mean}", size=SMALL, fill="soft"
    )


def _memory(scene: Scene, x: float, y: float, chunks: Chunks) -> Box:
    """What ranks have, one row each; coloured by the rank it comes from."""

    def look(rank: int, chunk: int) -> dict:
        value = chunks[rank][chunk]
        if value is None:
            return {"fill": "paper", "stroke": "line"}
        return _from(value)

    return cells(
        scene,
        x,
        y,
        [["" if value is None else number(value) for value in row] for row in chunks],
        width=39,
        height=22,
        look=look,
    )


def _from(value: int) -> dict:
    """The look of a number: its zeros say which rank it comes from, a sum has none to spare."""
    digits = str(value)
    heard = len(digits) - digits.count("0")
    if heard > 1:
        return {"fill": "yellow", "opacity": 0.7 if heard == len(RANKS) else 0.3, "stroke": "ink"}
    colour = RANKS[len(digits) - 1]
    return {"fill": colour, "opacity": STRONG, "stroke": colour}


# A ring -----------------------------------------------------------------------------------------


def ring_steps(ranks: int = 4) -> list[tuple[list[tuple[int, int]], Chunks]]:
    """The steps of ``collectives.all_reduce``: who receives which chunk, and what all have then.

    First sums are passed on and grow; then whole sums are passed on as they are.
    """
    held, steps = vectors(ranks), []
    for step in range(2 * (ranks - 1)):
        growing = step < ranks - 1
        out = -1 - step if growing else ranks - 1 - step
        moves = [((rank + 1) % ranks, (rank + out) % ranks) for rank in range(ranks)]
        passed = [(held[target - 1][chunk], held[target][chunk]) for target, chunk in moves]
        for (target, chunk), (came, had) in zip(moves, passed):
            held[target][chunk] = came + had if growing else came
        steps.append((moves, [list(row) for row in held]))
    return steps


def ring_all_reduce() -> Scene:
    """A ring all-reduce on four ranks, step by step: which chunk moves where, and the sums."""
    steps = ring_steps()
    half = len(steps) // 2
    wide, tall = 192, 212
    scene = Scene(
        WIDTH,
        2 * tall + 4,
        f"A ring all-reduce of four ranks in {len(steps)} steps. In each, every rank sends one of "
        f"its four parts to the next rank, the last one to rank 0. In the first {half} steps the "
        "sums grow, until every rank has one whole sum; in the other "
        f"{half} the whole sums go round, until every rank has all of them: "
        f"{', '.join(number(value) for value in steps[-1][1][0])}.",
    )
    _ring_frame(scene, 0, 0, "start", [], vectors())
    for place, (moves, held) in enumerate(steps):
        row, column = divmod(place + 1, 4)
        if place >= half:
            row, column = 1, place - half
        _ring_frame(scene, wide * column, tall * row, f"step {place + 1}", moves, held)
    x, y = 3 * wide + 4, tall
    headline(scene, "What is done", y + 10, x)
    lines(
        scene,
        x,
        y + 40,
        f"steps 1 to {half}: added",
        "(reduce-scatter)",
        "",
        f"steps {half + 1} to {2 * half}: replaced",
        "(all-gather)",
        "",
        f"a rank sends {2 * half} quarters:",
        f"2 · {half}/4 of its vector",
        fill="soft",
        size=SMALL,
        step=18,
    )
    return scene


def _ring_frame(scene: Scene, x, y, title: str, moves, held: Chunks) -> None:
    """Ranks below each other with room for the arrows of what came from the rank above."""
    scene.text(x + 22, y + 8, title, bold=True)
    width, high, pitch, top = 38, 24, 40, y + 36
    for rank, row in enumerate(held):
        scene.text(
            x + 14, top + pitch * rank + high / 2, str(rank), anchor="end", size=SMALL, fill="soft"
        )

        cells(
            scene,
            x + 22,
            top + pitch * rank,
            [[number(value) for value in row if value is not None]],
            width=width,
            height=high,
            look=lambda _, chunk, row=row: _from(row[chunk] or 0),
        )
    for rank, chunk in moves:
        middle, at = x + 22 + width * (chunk + 0.5), top + pitch * rank
        scene.rect(middle - width / 2, at, width, high, stroke="ink", stroke_width=2.4)
        arrow(scene, (middle, at - 15), (middle, at - 1), width=2)
        if rank == 0:  # from the last rank, round the page
            low = top + pitch * (len(held) - 1) + high
            scene.line((middle, low + 1), (middle, low + 12), stroke="ink", stroke_width=2)


# Data parallelism -------------------------------------------------------------------------------

WINDOWS = (("To", "be", ","), ("or", "not", "to"), ("be", ",", "that"), ("is", "the", "question"))
GRADIENTS = ((4, 0), (2, -2), (0, 4), (2, 2))


def data_parallel(
    windows: Sequence[Sequence[str]] = WINDOWS, gradients: Sequence[Sequence[int]] = GRADIENTS
) -> Scene:
    """Ranks with the same weights and different windows of text, whose gradients are averaged."""
    ranks = len(windows)
    if not 2 <= ranks <= 4 or len(gradients) != ranks:
        raise ValueError(f"2 to 4 windows with a gradient each, not {ranks}, {len(gradients)}")
    mean = [sum(column) / ranks for column in zip(*gradients)]
    shown = _vector(mean)
    scene = Scene(
        WIDTH,
        374,
        f"{ranks} ranks side by side. Each has the same weights and another window of text; their "
        f"gradients {', '.join(map(_vector, gradients))} differ. An all-reduce gives every rank "
        f"their mean {shown}, so all take the same step and end with the same weights again.",
    )
    label = 122
    for y, words in (
        (19, "its own window"),
        (84, "the same weights"),
        (166, "its own gradient"),
        (278, "the mean"),
        (346, "the same step"),
    ):
        scene.text(label - 12, y, words, anchor="end", fill="soft")
    wide = (WIDTH - label) / ranks
    middle = [label + wide * (rank + 0.5) for rank in range(ranks)]
    scene.rect(label + 4, 208, WIDTH - label - 8, 34, rounded=5, fill="yellow", opacity=0.4)
    scene.text(
        (label + WIDTH) / 2,
        225,
        f"all-reduce: the sum of {ranks} gradients, divided by {ranks}",
        anchor="middle",
        bold=True,
    )
    for rank, (x, words, gradient) in enumerate(zip(middle, windows, gradients)):
        colour = RANKS[rank]
        window = box(scene, x, 19, wide - 14, 30, " ".join(words), colour=colour)
        model = box(scene, x, 84, 96, 44, "W", f"rank {rank}", colour="grey", shared=True)
        own = box(scene, x, 166, 96, 30, _vector(gradient), colour=colour)
        arrow(scene, window.bottom, model.top, label="tokens")
        arrow(scene, model.bottom, own.top, label="backward")
        arrow(scene, own.bottom, (x, 207))
        whole = box(scene, x, 278, 96, 30, shown, colour="yellow")
        arrow(scene, (x, 243), whole.top)
        step = box(scene, x, 346, 118, 36, "W − η · mean", colour="grey", shared=True)
        arrow(scene, whole.bottom, step.top)
    return scene


def _vector(values: Sequence[float]) -> str:
    return "(" + ", ".join(number(value) for value in values) + ")"
