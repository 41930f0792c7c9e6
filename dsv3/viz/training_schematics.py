"""Chapter 6, drawn: text becomes windows, and a window becomes a step.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed. What a step does
to weights and to the routing bias is drawn larger in ``dsv3.viz.step_schematics``, the whole run in
``dsv3.viz.run_schematics``.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.training.schedules import Schedules
from dsv3.training.step import StepValues
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import (
    HEAD,
    SMALL,
    WIDTH,
    arrow,
    box,
    bracket,
    cells,
    headline,
    legend,
    lines,
    number,
    plus,
    power,
)

STRONG = 0.35
FORWARD, BACKWARD, RULE = "ink", "vermillion", "green"  # of arrows

# From text to windows ---------------------------------------------------------------------------

COLOURS = ("blue", "orange", "green", "purple")
DOCUMENTS = (
    ("BOS", "To", "be", ",", "or", "not", "to", "be", "EOS"),
    ("BOS", "2", "+", "3", "=", "5", "EOS"),
    ("BOS", "def", "f", "(", "x", ")", ":", "EOS"),
)


def packing(
    documents: Sequence[Sequence[str]] = DOCUMENTS, length: int = 7, targets: int = 2, at: int = 1
) -> Scene:
    """Documents end to end, cut into windows; what one window reads and is asked for; and which
    tokens see tokens of another document, since no mask stands between them.

    length: tokens that the model reads of a window; targets: tokens that follow, 1 + MTP modules;
    at: the window shown below, from 0.
    """
    stream = [(word, number) for number, words in enumerate(documents) for word in words]
    start, count = at * length, len(stream) // length
    if not 2 <= len(documents) <= 4 or targets != 2 or start + length + targets > len(stream):
        raise ValueError("2 to 4 documents and a window in them with its 2 targets")
    window = stream[start : start + length + targets]
    crossing = sum(
        window[row][1] != window[column][1] for row in range(length) for column in range(row)
    )
    scene = Scene(
        WIDTH,
        398,
        f"{len(documents)} documents end to end in one row of {len(stream)} tokens, cut into "
        f"windows of {length} wherever they fall. Window {at} reads "
        f"{' '.join(word for word, _ in window[:length])}; each position is asked for the next "
        "token, and the MTP module for the one after it, so the window carries two tokens more. "
        f"A grid shows who sees whom: everything before, {crossing} times across a border of "
        "documents.",
    )
    wide = WIDTH / len(stream)
    headline(scene, "Documents end to end")
    cells(
        scene,
        0,
        28,
        [[word for word, _ in stream]],
        width=wide,
        height=26,
        look=lambda _, place: _of(stream[place][1]),
    )
    for window_number in range(count):
        left = wide * length * window_number + 2
        bracket(
            scene, left, left + wide * length - 4, 60, f"window {window_number}", "below",
            colour="ink" if window_number == at else "soft",
        )  # fmt: skip
    _asked(scene, window, length, at)
    _seen(scene, window, length)
    legend(
        scene,
        0,
        scene.height - 10,
        [(COLOURS[i], STRONG, f"document {i}") for i in range(len(documents))],
    )
    return scene


def _of(document: int) -> dict:
    """The look of a document's tokens."""
    return {"fill": COLOURS[document], "opacity": STRONG, "stroke": COLOURS[document]}


def _asked(scene: Scene, window: Sequence[tuple[str, int]], length: int, at: int) -> None:
    """What a window's positions read, and what they are asked for."""
    top, left, wide, high = 152, 104, 300 / length, 28
    scene.text(0, top - 22, f"Window {at}", bold=True, size=HEAD)
    for row, (title, words) in enumerate(
        (("input tᵢ", ""), ("target tᵢ₊₁", "and fed to MTP"), ("MTP's target", "tᵢ₊₂"))
    ):
        y = top + (high + 26) * row
        lines(scene, 0, y + high / 2 - 7 * bool(words), title, words, step=15, size=SMALL)
        part = window[row : row + length]
        cells(
            scene,
            left,
            y,
            [[word for word, _ in part]],
            width=wide,
            height=high,
            look=lambda _, place, part=part: _of(part[place][1]),
        )
        for place, (_, document) in enumerate(part):
            if document != window[place][1]:
                scene.rect(left + wide * place, y, wide, high, stroke="ink", stroke_width=2)
            if row:
                arrow(
                    scene,
                    (left + wide * (place + 0.5), y - 24),
                    (left + wide * (place + 0.5), y - 3),
                    width=1.1,
                    colour="soft",
                )
    y = top + 3 * (high + 26) - 8
    lines(
        scene,
        0,
        y,
        f"{length} inputs, so {length} + 2 tokens are cut out",
        "black border: asked for a token of the next document",
        fill="soft",
        size=SMALL,
    )


def _seen(scene: Scene, window: Sequence[tuple[str, int]], length: int) -> None:
    """The attention grid of a window: causal, and nothing else."""
    side = 196 / length
    left, top = WIDTH - 196 - 8, 152
    scene.text(left - 38, top - 22, "Who sees whom", bold=True, size=HEAD)
    for row in range(length):
        word, document = window[row]
        y = top + side * (row + 0.5)
        scene.text(left - 8, y, word, anchor="end", size=SMALL)
        for column in range(length):
            same = window[column][1] == document
            seen = column <= row
            own = {"fill": COLOURS[document], "opacity": 0.45}
            look = (own if same else {"fill": "ink", "opacity": 0.6}) if seen else {"fill": "paper"}
            scene.rect(left + side * column, top + side * row, side, side, stroke="line", **look)
    scene.rect(left - 38, top + 196 + 12, 12, 12, rounded=2, fill="ink", opacity=0.6)
    scene.text(left - 20, top + 196 + 18, "no mask: sees another document", fill="soft", size=SMALL)


def tens(value: float) -> str:
    """0.00022 as 2.2·10⁻⁴."""
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits.removesuffix('.0')}·{power(int(exponent), '10')}"


# One step ---------------------------------------------------------------------------------------


def one_step(values: StepValues | None = None) -> Scene:
    """The way of a window through one step, and the two ways back: gradients to the weights, and
    loads to the routing bias, which no gradient reaches.

    values: of the step; by default the report's, before 10T tokens.
    """
    if values is None:
        report = Schedules.deepseek_v3()
        values = StepValues(
            learning_rate=report.learning_rate.at(report.learning_rate.warmup_steps, 0),
            mtp_weight=report.mtp_weight.at(0),
            bias_speed=report.bias_speed.at(0),
        )
    mtp, alpha = number(values.mtp_weight), f"{values.sequence_weight:g}".replace("-", "−")
    clip, gamma = number(values.clip), number(values.bias_speed, 1)
    rate = tens(values.learning_rate)
    scene = Scene(
        WIDTH,
        376,
        "One step. A window goes through the model; three losses are added: of the next token, "
        f"{mtp} times MTP's, and {alpha} times the balance loss. Gradients of the sum flow back, "
        f"their norm is clipped to {clip}, AdamW makes new weights. By another way, without a "
        "gradient, the routers count the tokens of each expert, and the bias moves by "
        f"{gamma} up or down.",
    )
    window = box(scene, 62, 62, 112, 50, "window", "s + 2 tokens")
    model = box(scene, 262, 110, 128, 150, "model", "weights W", "", "router bias b", colour="grey")
    losses = [
        box(scene, 492, y, 160, 46, title, words, colour="orange")
        for y, title, words in (
            (44, "L main", "the next token, tᵢ₊₁"),
            (110, "L MTP", "the one after, tᵢ₊₂"),
            (176, "L Bal", "balance in a sequence"),
        )
    ]
    total = plus(scene, 668, 110, "+", 14)
    arrow(scene, window.right, (model.left[0], 62), label="tokens")
    for one, factor in zip(losses, ("1", mtp, alpha)):
        arrow(scene, (model.right[0], one.y), one.left)
        if one.y == total.y:
            arrow(scene, one.right, total.left, label=f"× {factor}")
            continue
        edge = total.top if one.y < total.y else total.bottom
        arrow(scene, one.right, (total.x, one.y), edge)
        side = -11 if one.y < total.y else 12
        scene.text(616, one.y + side, f"× {factor}", anchor="middle", size=SMALL, fill="soft")
    gradients = box(scene, 668, 290, 150, 62, "gradients", "∂L/∂W", "in FP32", colour=BACKWARD)
    clipped = box(scene, 476, 290, 122, 62, "clip", f"norm at most {clip}", colour=BACKWARD)
    adam = box(scene, 294, 290, 122, 62, "AdamW", f"η = {rate}", colour=BACKWARD)
    more = {"colour": BACKWARD, "width": 2.4}
    arrow(scene, (total.right[0], 110), (722, 110), (722, gradients.top[1]), **more)
    lines(scene, 714, 236, "backward", size=SMALL, fill="soft", anchor="end")
    arrow(scene, gradients.left, clipped.right, **more)
    arrow(scene, clipped.left, adam.right, **more)
    arrow(scene, adam.top, (294, model.bottom[1]), label="new W", **more)
    rule = box(
        scene, 90, 290, 172, 62, "bias rule", "b + γ sign(mean − load)", f"γ = {gamma}", colour=RULE
    )
    dashed = {"colour": RULE, "width": 2.0, "dashed": True}
    arrow(scene, (model.left[0], 128), (40, 128), (40, rule.top[1]), **dashed)
    lines(scene, 48, 190, "load of", "each expert", size=SMALL, fill="soft", step=14)
    arrow(scene, (150, rule.top[1]), (150, 166), (model.left[0], 166), **dashed)
    lines(scene, 158, 216, "new b", size=SMALL, fill="soft")
    y, x = 358, 0.0
    for colour, dotted, words, step in (
        (FORWARD, False, "forward", 120),
        (BACKWARD, False, "gradients", 130),
        (RULE, True, "no gradient: a count, and a step of fixed size", 0),
    ):
        arrow(scene, (x, y), (x + 34, y), colour=colour, dashed=dotted, width=2)
        scene.text(x + 42, y, words, size=SMALL, fill="soft")
        x += step
    return scene
