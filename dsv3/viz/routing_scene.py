"""How one token is routed, number by number: the picture of the routing explorer.

From above: the tokens of the text; for the chosen one each expert's score, the bias on top of it
and the sum that decides (eq. 16), group by group, with the groups that are out hatched; the
weights of the chosen experts (eq. 13); and below, in the same columns, how often each expert is
chosen by all tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsv3.training.balance import max_violation
from dsv3.viz.chips import Chips, short
from dsv3.viz.scene import Scene

WIDTH, LEFT, RIGHT = 920, 66, 914
WIDE, MEDIUM = 38, 14  # pixels a column needs for its numbers; for its name


@dataclass(frozen=True)
class Routing:
    """One layer's choices for n tokens, as plain tensors.

    scores (n, N_r): s_i,t; bias (N_r): b_i; sums (n, G): of each group's two best biased scores;
    open (n, G): the groups that a token may reach; chosen (n, k), weights (n, k): its experts and
    their weights g_i,t.
    """

    scores: torch.Tensor
    bias: torch.Tensor
    sums: torch.Tensor
    open: torch.Tensor
    chosen: torch.Tensor
    weights: torch.Tensor

    @property
    def load(self) -> torch.Tensor:
        """(N_r): how many tokens chose each expert."""
        return torch.bincount(self.chosen.flatten(), minlength=self.scores.shape[1])

    @property
    def max_violation(self) -> float:
        """Load of the busiest expert over the mean load, minus 1."""
        return max_violation(self.load.float())


def routing_scene(routing: Routing, token: int, texts: Sequence[str], layer: int) -> Scene:
    """texts: of all tokens; token, layer: the numbers of those that are shown."""
    chips = Chips(texts, token, WIDTH)
    top = 34 + chips.height
    scene = Scene(WIDTH, top + 492, _alt(routing, token, texts, layer))
    chips.draw(scene, lambda each: f"experts {_listed(sorted(routing.chosen[each].tolist()))}")
    _headline(scene, routing, token, texts, layer, top + 22)
    places = _Columns(routing)
    _groups(scene, routing, token, places, top + 66)
    _scores(scene, routing, token, places, top + 106)
    _numbers(scene, routing, token, places, top + 280)
    _load(scene, routing, places, top + 380)
    _experts(scene, routing, token, places, top + 102, top + 366)
    return scene


def _alt(routing: Routing, token: int, texts: Sequence[str], layer: int) -> str:
    chosen = _winners(routing, token)
    winners = ", ".join(f"{expert} with weight {weight:.1f}" for expert, weight in chosen)
    groups = routing.open[token].nonzero().flatten().tolist()
    return (
        f"Routing of token {token}, “{texts[token]}”, in layer {layer}: bars of the scores of "
        f"{routing.scores.shape[1]} experts with the bias on top; open groups "
        f"{_listed(groups)}; chosen experts {winners}. Below, how often all "
        f"{len(texts)} tokens choose each expert: MaxVio {routing.max_violation:.2f}."
    )


def _winners(routing: Routing, token: int) -> list[tuple[int, float]]:
    return sorted(zip(routing.chosen[token].tolist(), routing.weights[token].tolist()))


def _listed(numbers: Sequence[int]) -> str:
    words = [str(number) for number in numbers]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# Tokens ---------------------------------------------------------------------------------------


def _headline(
    scene: Scene, routing: Routing, token: int, texts: Sequence[str], layer: int, y: float
) -> None:
    chosen = _winners(routing, token)
    where = f"{len(chosen)} experts"
    if len(chosen) <= 12:
        where = f"expert{'s' * (len(chosen) > 1)} {_listed([expert for expert, _ in chosen])}"
    scene.text(
        0,
        y,
        f"Token {token} “{short(texts[token])}” in layer {layer} → {where}",
        bold=True,
        size=14,
    )
    x = 0
    for colour, width, word in (
        ("blue", 205, "score of a chosen expert"),
        ("grey", 150, "score of another"),
        ("orange", 60, "bias"),
    ):
        scene.rect(x, y + 17, 11, 11, fill=colour)
        scene.text(x + 16, y + 22.5, word, fill="soft")
        x += width
    scene.line((x, y + 22.5), (x + 14, y + 22.5), stroke="ink", stroke_width=2.5)
    scene.text(x + 19, y + 22.5, "score + bias, which decides", fill="soft")
    scene.rect(x + 210, y + 17, 22, 11, hatched=True, stroke="line")
    scene.text(x + 237, y + 22.5, "group closed to this token", fill="soft")


# Experts --------------------------------------------------------------------------------------


class _Columns:
    """Where each expert and each group stands; the parts below share it."""

    def __init__(self, routing: Routing):
        self.experts, self.groups = routing.scores.shape[1], routing.sums.shape[1]
        self.per_group = self.experts // self.groups
        self.gap = 12 if self.groups <= 16 else 2
        self.width = (RIGHT - LEFT - self.gap * (self.groups - 1)) / self.experts

    def left(self, expert: int) -> float:
        return LEFT + expert * self.width + expert // self.per_group * self.gap

    def middle(self, expert: int) -> float:
        return self.left(expert) + self.width / 2

    def group(self, group: int) -> tuple[float, float]:
        """Left edge and width."""
        return self.left(group * self.per_group), self.per_group * self.width

    def bar(self, share: float) -> float:
        return max(0.8, share * self.width)


def _groups(scene: Scene, routing: Routing, token: int, places: _Columns, y: float) -> None:
    best = (routing.scores[token] + routing.bias).unflatten(0, (places.groups, -1))
    for group in range(places.groups):
        x, width = places.group(group)
        is_open, total = bool(routing.open[token, group]), float(routing.sums[token, group])
        two = best[group].topk(min(2, places.per_group)).values.tolist()
        terms = " + ".join(f"{value:.2f}" for value in two)
        if is_open:
            scene.rect(x, y, width, 210, fill="pale", rounded=3)
        else:
            scene.rect(x, y, width, 210, hatched=True, stroke="line", rounded=3)
            scene.rect(x, y, width, 36, fill="paper", rounded=3, stroke="line")
        if places.groups == 1 or width < MEDIUM:
            continue
        state = "✓ open" if is_open else "✗ closed"
        name = f"group {group}" if width > 110 else f"{group}"
        scene.text(
            x + width / 2,
            y + 11,
            f"{name} {state}" if width > 55 else name,
            bold=is_open,
            anchor="middle",
            fill="ink" if is_open else "soft",
        )
        sums = f"two best: {terms} = {total:.2f}" if width > 170 else f"{total:.2f}"
        if width > 30:
            scene.text(
                x + width / 2,
                y + 27,
                sums,
                anchor="middle",
                size=11,
                fill="ink" if is_open else "soft",
            )
        scene.rect(
            x,
            y,
            width,
            36,
            rounded=3,
            label=f"group {group}: {terms} = {total:.3f}\n"
            + ("open: among the best sums" if is_open else "closed: its experts are out (−∞)"),
        )


def _range(routing: Routing) -> tuple[float, float]:
    """Of the axis: all scores and sums of the layer, rounded outwards to quarters."""
    both = torch.cat([routing.scores, routing.scores + routing.bias])
    return (
        min(0.0, math.floor(4 * float(both.min())) / 4),
        max(1.0, math.ceil(4 * float(both.max())) / 4),
    )


def _scores(
    scene: Scene, routing: Routing, token: int, places: _Columns, y: float, height: float = 162
) -> None:
    low, high = _range(routing)

    def at(value: float) -> float:
        return y + height * (high - value) / (high - low)

    step = 0.25 if high - low <= 1.25 else 0.5 if high - low <= 3 else 1.0
    for tick in range(math.ceil(low / step), math.floor(high / step) + 1):
        scene.line(
            (LEFT - 5, at(tick * step)),
            (RIGHT, at(tick * step)),
            stroke="line",
            stroke_width=1.2 if tick == 0 else 0.5,
        )
        scene.text(
            LEFT - 9,
            at(tick * step),
            f"{tick * step:g}".replace("-", "−"),
            anchor="end",
            size=11,
            fill="soft",
        )
    chosen = set(routing.chosen[token].tolist())
    for expert, (score, bias) in enumerate(
        zip(routing.scores[token].tolist(), routing.bias.tolist())
    ):
        middle, both = places.middle(expert), score + bias
        width, thin, tick = places.bar(0.62), places.bar(0.26), places.bar(0.8)
        scene.rect(
            middle - width / 2,
            at(score),
            width,
            at(0) - at(score),
            fill="blue" if expert in chosen else "grey",
        )
        if bias:
            scene.rect(
                middle - thin / 2,
                at(max(score, both)),
                thin,
                abs(at(both) - at(score)),
                fill="orange",
            )
        scene.line(
            (middle - tick / 2, at(both)),
            (middle + tick / 2, at(both)),
            stroke="ink",
            stroke_width=2.5 if places.width > MEDIUM else 1.2,
        )


def _numbers(scene: Scene, routing: Routing, token: int, places: _Columns, y: float) -> None:
    """Rows below the bars: the expert's number, s, b, s + b, and the weight."""
    chosen = dict(_winners(routing, token))
    rows = ["expert", "score s", "bias b", "s + b", "weight g"]
    if places.width < WIDE:
        rows = ["expert", "weight g"]
    ys = [y + 8, y + 25, y + 41, y + 57, y + 74] if len(rows) == 5 else [y + 8, y + 50]
    for row, at in zip(rows, ys):
        scene.text(LEFT - 9, at, row, anchor="end", size=11, fill="soft")
    tallest = max(routing.weights.max().item(), 1e-9)
    for expert in range(places.experts):
        middle, on = places.middle(expert), expert in chosen
        if places.width >= MEDIUM or expert % places.per_group == 0:
            scene.text(
                middle, ys[0], str(expert), anchor="middle", bold=on, fill="ink" if on else "soft"
            )
        if places.width >= WIDE:
            score, bias = float(routing.scores[token, expert]), float(routing.bias[expert])
            values = [f"{score:.3f}", f"{bias:+.3f}", f"{score + bias:.3f}"]
            for value, at in zip(values, ys[1:]):
                scene.text(
                    middle,
                    at,
                    value.replace("-", "−"),
                    anchor="middle",
                    size=11,
                    fill="ink" if on else "soft",
                )
            if on:
                scene.rect(middle - 19, ys[4] - 8, 38, 16, rounded=3, fill="green")
                scene.text(
                    middle,
                    ys[4],
                    f"{chosen[expert]:.3f}",
                    anchor="middle",
                    bold=True,
                    fill="white",
                    size=11,
                )
        elif on:
            tall, width = 40 * chosen[expert] / tallest, places.bar(0.8)
            scene.rect(middle - width / 2, ys[1] + 14 - tall, width, tall, fill="green")


def _load(scene: Scene, routing: Routing, places: _Columns, y: float, height: float = 72) -> None:
    load, tokens = routing.load.tolist(), len(routing.scores)
    mean, most = sum(load) / len(load), max(load)
    scene.text(
        0, y, f"Load: how many of the {tokens} tokens choose each expert", bold=True, size=13
    )
    scene.text(
        RIGHT,
        y,
        f"busiest {most}, mean {mean:.2f}: MaxVio = {most} / {mean:.2f} − 1 = "
        f"{routing.max_violation:.2f}",
        anchor="end",
    )
    top, bottom = y + 28, y + 28 + height
    for expert, count in enumerate(load):
        tall, width = height * count / most, places.bar(0.62)
        middle = places.middle(expert)
        scene.rect(middle - width / 2, bottom - tall, width, tall, fill="sky")
        if places.width >= MEDIUM:
            scene.text(middle, bottom - tall - 8, str(count), anchor="middle", size=11)
        scene.rect(
            places.left(expert),
            top - 14,
            places.width,
            height + 16,
            rounded=2,
            label=(f"load of expert {expert}: {count} of {tokens} tokens\nthe mean is {mean:.2f}"),
        )
    level = bottom - height * mean / most
    scene.line((LEFT - 5, level), (RIGHT, level), stroke="ink", dashed=True)
    scene.line((LEFT - 5, bottom), (RIGHT, bottom), stroke="line", stroke_width=1.2)
    scene.text(LEFT - 9, level, "mean", anchor="end", size=11, fill="soft")
    for place, word in ((bottom, "0"), (top, str(most))):
        if abs(place - level) > 12:
            scene.text(LEFT - 9, place, word, anchor="end", size=11, fill="soft")


def _experts(
    scene: Scene, routing: Routing, token: int, places: _Columns, top: float, bottom: float
) -> None:
    """Over all columns, unseen: what each says of itself."""
    chosen, load = dict(_winners(routing, token)), routing.load.tolist()
    for expert in range(places.experts):
        score, bias = float(routing.scores[token, expert]), float(routing.bias[expert])
        if expert in chosen:
            state = f"chosen, weight {chosen[expert]:.3f}"
        elif routing.open[token, expert // places.per_group]:
            state = "not chosen"
        else:
            state = "out: its group is closed"
        scene.rect(
            places.left(expert),
            top,
            places.width,
            bottom - top,
            rounded=2,
            label=(
                f"expert {expert} of group {expert // places.per_group}: {state}\n"
                f"score {score:.3f}, bias {bias:+.3f}, sum {score + bias:.3f}\n"
                f"chosen by {load[expert]} of {len(routing.scores)} tokens"
            ).replace("-", "−"),
        )
