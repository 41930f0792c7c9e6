"""A training run at one of its moments: what its log says, as curves, bars and a text.

Above, the losses: of the text that was learned from, and of text that was held out. In the middle,
what the schedules said and how uneven the experts' loads were; below, the loads of one moment, and
what the model wrote then. What comes after the moment is grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dsv3.training.log import RunLog
from dsv3.training.samples import Sample
from dsv3.viz.scene import Scene
from dsv3.viz.written import draw_text, millions

WIDTH, LEFT, RIGHT, COLUMN = 920, 104, 760, 772
LOSSES = (72, 190)  # upper edge and height
BATCH = "this step's batch"  # what loads are of, beside the domains
PALETTE = ("orange", "green", "purple", "yellow", "vermillion")  # of the domains
_LINES = 160  # of a longer log, at most so many points are drawn, and the moment
_PARTS = 60  # places to point at

Point = tuple[float, float]


@dataclass(frozen=True)
class _Strip:
    """A small curve below the losses: its words, height and colour, and the value of a line."""

    name: str
    height: int
    colour: str
    value: Callable[[dict], float | None]
    words: Callable[[dict], str]
    steps: bool = True  # whether it stays as it is from line to line


def router_name(router: str) -> str:
    """What a reader calls it: "layers.2.ffn.gate" is layer 2."""
    kind, number = router.split(".")[:2]
    return f"layer {number}" if kind == "layers" else f"MTP module {int(number) + 1}"


def run_scene(
    log: RunLog,
    step: int,
    *,
    router: str | None = None,
    load_of: str = BATCH,
    samples: Sequence[Sample] = (),
) -> Scene:
    """step: the moment, any from the first line with a loss on; each figure is the last that was
    logged up to it. router: whose loads are shown, None for a model without one; load_of: on which
    text, ``BATCH`` or a held-out domain. samples: texts of one prompt, in order of their steps;
    without any, the bars have their room."""
    now = _Now(log, step, router, load_of, samples)
    strips = _strips(now)
    top = sum(LOSSES) + 40
    bars = top + sum(strip.height + 10 for strip in strips) + 26
    below = router is not None or bool(samples)
    scene = Scene(WIDTH, bars + (238 if samples else 176) if below else bars - 20, _alt(now))
    scene.text(0, 12, _headline(now), bold=True, size=14)
    scene.text(0, 35, _second(now), fill="soft")
    _losses(scene, now)
    for strip in strips:
        _draw_strip(scene, now, strip, top)
        top += strip.height + 10
    _cursor(scene, now, top - 10)
    if router is not None:
        _bars(scene, now, bars, 440 if samples else WIDTH)
    if samples:
        draw_text(scene, samples, now.sample, 470 if router is not None else 0, bars)
    return scene


class _Now:
    """A moment of a log: its lines, and what is shown of them."""

    def __init__(
        self, log: RunLog, step: int, router: str | None, load_of: str, samples: Sequence[Sample]
    ):
        self.log, self.step, self.router, self.load_of = log, step, router, load_of
        self.line, self.held_out = log.step_at(step), log.held_out_at(step)
        self.samples = samples
        self.sample = ([None] + [each for each in samples if each.step <= step])[-1]
        self.last = log.moments[-1]
        self.seq_len = [each.seq_len for each in log.stretches if each.first <= step][-1]
        kept = log.steps[:: -(-len(log.steps) // _LINES)]
        every = {line["step"]: line for line in (*kept, self.line, log.steps[-1])}
        self.shown = [every[step] for step in sorted(every)]

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / self.last

    def load(self) -> list[int] | None:
        """Tokens of each expert of the router, on the text that was asked for."""
        if self.load_of == BATCH:
            return self.line.get("load", {}).get(self.router)
        by_domain = (self.held_out or {}).get("load_by_domain", {})
        return by_domain.get(self.load_of, {}).get(self.router)

    def violation(self, load: Sequence[int]) -> float:
        """MaxVio: how much more than the mean the busiest expert gets."""
        return max(load) * len(load) / max(1, sum(load)) - 1


# In words -------------------------------------------------------------------------------------


def _headline(now: _Now) -> str:
    mtp = f", MTP loss {now.line['mtp_loss']:.3f}" if "mtp_loss" in now.line else ""
    tokens = max(each["tokens"] for each in (now.line, now.held_out or now.line))
    return (
        f"Step {now.step:,} of {now.last:,}, {millions(tokens)} tokens read: "
        f"loss {now.line['loss']:.3f}{mtp}"
    )


def _second(now: _Now) -> str:
    if now.held_out is None:
        return "No look at held-out text yet."
    figures = ", ".join(
        f"{name} {values['loss']:.3f}" for name, values in now.held_out["held_out"].items()
    )
    return f"Held out, nats per token, at step {now.held_out['step']:,}: {figures}"


def _alt(now: _Now) -> str:
    schedules = ", ".join(f"{strip.name} {strip.words(now.line)}" for strip in _strips(now))
    said = [_headline(now), _second(now).rstrip("."), f"At this step: {schedules}"]
    said += [
        f"Between steps {new.before:,} and {new.first:,} the windows grow from {old.seq_len:,} to "
        f"{new.seq_len:,} tokens"
        for old, new in pairwise(now.log.stretches)
    ]
    load = now.load()
    if load is not None:
        said.append(f"Loads of the experts in {_load_title(now, load)}")
    if now.sample is not None:
        start = " ".join((now.sample.prompt + now.sample.text).split())
        said.append(f"Written at step {now.sample.step:,}: {start[:80]}{' …' * (len(start) > 80)}")
    return ". ".join(said) + "."


def _load_title(now: _Now, load: Sequence[int]) -> str:
    text = now.load_of if now.load_of == BATCH else f"held-out {now.load_of}"
    return f"{router_name(now.router or '')}, {text}: MaxVio {now.violation(load):.2f}"


def _short(value: float) -> str:
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")


# The losses -----------------------------------------------------------------------------------


def _losses(scene: Scene, now: _Now) -> None:
    top, height = LOSSES
    held = [values["loss"] for each in now.log.held_out for values in each["held_out"].values()]
    trained = [line[name] for line in now.shown for name in ("loss", "mtp_loss") if name in line]
    most = max([value for value in (*held, *trained) if math.isfinite(value)], default=1.0)
    tick = _tick(most)
    most = tick * math.ceil(most / tick)

    def at(step: float, value: float) -> Point:
        return now.x(step), top + height * (1 - value / most)

    scene.text(LEFT - 9, top - 16, "nats per token", anchor="end", size=11, fill="soft")
    for number in range(round(most / tick) + 1):
        y = at(0, number * tick)[1]
        scene.line((LEFT - 5, y), (RIGHT, y), stroke_width=0.5 if number else 1.2)
        scene.text(LEFT - 9, y, f"{number * tick:g}", anchor="end", size=11, fill="soft")
    apart = _tick(now.last, 6)
    y = top + height + 14
    for step in range(0, now.last + 1, max(1, round(apart))):
        scene.text(now.x(step), y, f"{step:,}", size=11, anchor="middle", fill="soft")
    scene.text(LEFT - 9, y, "step", size=11, anchor="end", fill="soft")
    y = top + 4.0
    trained = {"loss": ("blue", "loss"), "mtp_loss": ("sky", "MTP loss")}
    for name, (colour, words) in trained.items():
        if name in now.line:
            _swatch(scene, y, colour, f"{words} {now.line[name]:.3f}")
            y += 20
    for name, (colour, _) in reversed(trained.items()):  # the loss itself in front
        points = [(line["step"], line[name]) for line in now.shown if name in line]
        _curve(scene, now, points, colour, at)
        if math.isfinite(now.line.get(name, math.nan)):
            scene.circle(*at(now.line["step"], now.line[name]), 4, fill=colour)
    if now.log.domains:
        scene.text(COLUMN, y + 6, "held out", size=11, fill="soft")
        y += 26
    for number, name in enumerate(now.log.domains):
        colour = PALETTE[number % len(PALETTE)]
        points = [
            (each["step"], each["held_out"][name]["loss"])
            for each in now.log.held_out
            if name in each["held_out"]
        ]
        chosen = name == now.load_of
        _curve(scene, now, points, colour, at, 3.5 if chosen else 2)
        for step, value in points:
            if math.isfinite(value):
                fill = colour if step <= now.step else "line"
                scene.circle(*at(step, value), 4.5 if chosen else 3, fill=fill)
        figures = (now.held_out or {"held_out": {}})["held_out"].get(name)
        value = f" {figures['loss']:.3f}" if figures else ""
        _swatch(scene, y, colour, f"{name}{value}", chosen)
        y += 20


def _curve(
    scene: Scene,
    now: _Now,
    values: Sequence[tuple[float, float | None]],
    colour: str,
    at: Callable[[float, float], Point],
    width: float = 1.8,
    steps: bool = False,
) -> None:
    """What was until now in its colour, what comes after it in grey. Values that are no numbers
    leave a gap; steps: each value holds from the line before it on."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for step, value in values:
        if value is None or not math.isfinite(value):
            pieces.append([])
        elif steps and pieces[-1] and pieces[-1][-1][1] != value:
            pieces[-1] += [(pieces[-1][-1][0], value), (step, value)]
        elif steps and len(pieces[-1]) > 1 and pieces[-1][-2][1] == value:
            pieces[-1][-1] = (step, value)
        else:
            pieces[-1].append((step, value))
    for piece in pieces:
        count = sum(step <= now.step for step, _ in piece)
        before, after = piece[:count], piece[max(0, count - 1) :]
        if steps and len(after) > 1 and before and before[-1][0] < now.step:
            before.append((now.step, before[-1][1]))
            after[0] = before[-1]
        for stroke, part in (("line", after), (colour, before)):
            if len(part) > 1:
                scene.line(*(at(*point) for point in part), stroke=stroke, stroke_width=width)


def _swatch(scene: Scene, y: float, colour: str, words: str, bold: bool = False) -> None:
    scene.rect(COLUMN, y - 5, 11, 11, fill=colour)
    scene.text(COLUMN + 17, y + 0.5, words, bold=bold)


def _tick(most: float, count: int = 8) -> float:
    """A round distance of at most so many lines up to ``most``."""
    least = most / count
    power = 10.0 ** math.floor(math.log10(least))
    return next(each * power for each in (1, 2, 5, 10) if each * power >= least * (1 - 1e-9))


# Schedules, and the moment --------------------------------------------------------------------


def _strips(now: _Now) -> list[_Strip]:
    def said(name: str) -> Callable[[dict], float | None]:
        return lambda line: line.get(name)

    def maxvio(line: dict) -> float | None:
        return line.get("max_violation", {}).get(now.router)

    def number(name: str) -> Callable[[dict], str]:
        return lambda line: _short(line[name])

    def batch(line: dict) -> str:
        return f"{line['windows']} × {now.seq_len:,} tokens"

    strips = [
        _Strip("learning rate", 44, "blue", said("lr"), number("lr"), steps=False),
        _Strip("λ (MTP)", 18, "blue", said("mtp_weight"), number("mtp_weight")),
        _Strip("γ (bias)", 18, "blue", said("bias_speed"), number("bias_speed")),
        _Strip("batch", 18, "blue", said("windows"), batch),
        _Strip("gradient norm", 30, "green", said("grad_norm"), number("grad_norm"), steps=False),
        _Strip("MaxVio", 44, "vermillion", maxvio, lambda line: f"{maxvio(line):.2f}", steps=False),
    ]
    return [strip for strip in strips if strip.value(now.line) is not None]


def _draw_strip(scene: Scene, now: _Now, strip: _Strip, top: float) -> None:
    lines = now.log.steps if strip.steps else now.shown  # steps come to a few corners
    values = [(line["step"], strip.value(line)) for line in lines]
    most = max([v for _, v in values if v is not None and math.isfinite(v)], default=0) or 1.0
    bottom, middle = top + strip.height, top + strip.height / 2

    def at(step: float, value: float) -> Point:
        return now.x(step), bottom - strip.height * value / most

    scene.rect(LEFT, top, RIGHT - LEFT, strip.height, fill="pale")
    scene.text(LEFT - 9, middle, strip.name, size=11, anchor="end", fill="soft")
    _curve(scene, now, values, strip.colour, at, steps=strip.steps)
    scene.text(COLUMN, middle, strip.words(now.line), size=12)
    if strip.name == "MaxVio" and now.router:
        words = f"{router_name(now.router)}, batch"
        scene.text(WIDTH, middle, words, size=11, anchor="end", fill="soft")
    elif not strip.steps:
        scene.text(WIDTH, middle, f"highest {_short(most)}", size=11, anchor="end", fill="soft")


def _cursor(scene: Scene, now: _Now, bottom: float) -> None:
    """Phases, the moment's line, and places to point at and to choose."""
    top = LOSSES[0]
    breaks = ((top - 8, top + LOSSES[1]), (top + LOSSES[1] + 40, bottom))  # words between them
    for old, new in pairwise(now.log.stretches):
        x = now.x((new.before + new.first) / 2)
        for start, end in breaks:
            scene.line((x, start), (x, end), stroke="soft", dashed=True)
        words = f"windows of {old.seq_len:,} → {new.seq_len:,} tokens"
        left = x > (LEFT + RIGHT) / 2
        scene.text(x - 5 if left else x + 5, top - 8, words, size=11, fill="soft",
                   anchor="end" if left else "start")  # fmt: skip
    x = now.x(now.step)
    for start, end in breaks:
        scene.line((x, start), (x, end), stroke="ink", stroke_width=1.5)
    most, parts = len(now.log.moments) - 1, min(_PARTS, len(now.log.moments))
    steps = [now.log.moments[round(part * most / max(1, parts - 1))] for part in range(parts)]
    edges = [now.x((a + b) / 2) for a, b in pairwise(steps)]
    nearest = min(steps, key=lambda step: abs(step - now.step))
    for step, left, right in zip(steps, [LEFT, *edges], [*edges, RIGHT]):
        scene.rect(left, top, right - left, bottom - top, key=f"step {step}",
                   chosen=step == nearest, label=_label(now.log, step))  # fmt: skip


def _label(log: RunLog, step: int) -> str:
    line = log.step_at(step)
    mtp = f", MTP {line['mtp_loss']:.3f}" if "mtp_loss" in line else ""
    return (
        f"step {step:,}, {millions(line['tokens'])} tokens\nloss {line['loss']:.3f}{mtp}\n"
        f"learning rate {_short(line['lr'])}"
    )


# The loads ----------------------------------------------------------------------


def _bars(scene: Scene, now: _Now, top: float, right: float) -> None:
    load, bottom, height = now.load(), top + 150.0, 118.0
    if load is None or not sum(load):
        words = f"{router_name(now.router or '')}, {now.load_of}: no loads were logged up to here."
        scene.text(0, top, words, fill="soft")
        return
    scene.text(0, top, f"Loads, {_load_title(now, load)}", bold=True, size=13)
    mean, left = sum(load) / len(load), 60.0
    most = max(2 * mean, *load)
    pitch = (right - left) / len(load)
    named = 1 if pitch >= 18 else math.ceil(24 / pitch)
    for expert, tokens in enumerate(load):
        x, tall = left + expert * pitch, height * tokens / most
        scene.rect(x + 0.15 * pitch, bottom - tall, 0.7 * pitch, tall,
                   fill="vermillion" if tokens == max(load) else "sky")  # fmt: skip
        if expert % named == 0:
            middle = x + pitch / 2
            scene.text(middle, bottom + 13, str(expert), size=11, anchor="middle", fill="soft")
        label = f"expert {expert}: {tokens:,} tokens, {tokens / mean:.2f} times the mean"
        scene.rect(x, bottom - height, pitch, height + 22, rounded=2, label=label)
    level = bottom - height * mean / most
    scene.line((left - 5, bottom), (right, bottom), stroke_width=1.2)
    scene.line((left - 5, level), (right, level), stroke="ink", dashed=True)
    words = [(level, "mean"), (bottom + 13, "expert")]
    if bottom - level > 26:  # else one stands on the other
        words += [(level + 13, f"{mean:,.0f}"), (bottom, "0")]
    for y, word in words:
        scene.text(left - 9, y, word, size=11, anchor="end", fill="soft")
