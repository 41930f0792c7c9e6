"""Chapter 5, drawn: what the MTP module is fed and asked for, and what it is made of.

Each function returns a ``Scene`` for ``viz.draw``. How it drafts is in
``dsv3.viz.drafting_schematics``.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.config import ModelConfig
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, TINT, WIDTH, Box, arrow, box, headline, lines, number

STATE, EMBEDDED = "blue", "orange"
STRONG = 0.35  # tint of the tokens that are followed
_STATE = 26  # width of the half cell for a state
SENTENCE = ("To", "be", ",", "or", "not", "to", "be")


def subscript(index: int) -> str:
    """12 as ₁₂."""
    return str(index).translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))


def time_shift(tokens: Sequence[str] = SENTENCE, at: int = 3, leak: bool = False) -> Scene:
    """What model and module are fed and asked for at each position of a text.

    tokens: t_1, t_2 ...; at: the position whose tokens are coloured, counted from 1; leak: with
    the classic bug, by which the module is fed the token that it is asked for.
    """
    count = len(tokens)
    if not 3 <= count <= 10:
        raise ValueError(f"3 to 10 tokens, not {count}: two are needed behind a position")
    if not 1 <= at <= count - 2:
        raise ValueError(f"at: a position from 1 to {count - 2}, whose targets exist; not {at}")
    shift = 2 if leak else 1
    label, high = 166, 28
    wide = (WIDTH - label) / count
    tops = {"read": 38, "main": 106, "fed": 194, "asked": 262}
    offset = {"read": 0, "main": 1, "fed": shift, "asked": 2}
    scene = Scene(WIDTH, tops["asked"] + high + 30, _shift_alt(tokens, at, leak))

    def middle(position: int) -> float:
        return label + (position - 0.5) * wide

    colours = {at: "blue", at + 1: "orange", at + 2: "green"}
    scene.rect(middle(at) - wide / 2 - 1, 4, wide + 2, scene.height - 28, rounded=6, fill="pale")
    scene.text(0, 16, "position i", fill="soft")
    for position in range(1, count + 1):
        scene.text(middle(position), 16, str(position), anchor="middle", bold=position == at)
    for row, title, words in (
        ("read", "main model", "reads tᵢ"),
        ("main", "", "is asked for tᵢ₊₁"),
        ("fed", "MTP module", f"gets hᵢ and tᵢ₊{subscript(shift)}"),
        ("asked", "", "is asked for tᵢ₊₂"),
    ):
        y = tops[row] + high / 2
        if title:
            scene.text(0, y - 8, title, bold=True)
        scene.text(0, y + 8 * bool(title), words, fill="soft")
    # Arrows: from the row above to where the same token stands in this one.
    for row, above in (("main", "read"), ("fed", "main"), ("asked", "fed")):
        moved = offset[row] - offset[above]
        for position in range(1, count + 1 - offset[row]):
            token = position + offset[row]
            followed = token in (at + 1, at + 2) and position >= at
            wrong = leak and token == at + 2 and row in ("fed", "asked") and position == at
            start = middle(position + moved) + (_STATE / 2 if above == "fed" else 0)
            end = middle(position) + (_STATE / 2 if row == "fed" else 0)
            arrow(
                scene,
                (start, tops[above] + high + 2),
                (end, tops[row] - 3),
                colour="vermillion" if wrong else "ink" if followed else "line",
                width=1.8 if followed else 1.2,
            )
    for row, top in tops.items():
        for position in range(1, count + 1 - offset[row]):
            token = position + offset[row]
            x = middle(position) - wide / 2 + 3
            wrong = leak and position == at and row in ("fed", "asked")
            colour = "vermillion" if wrong else colours.get(token)
            if row == "fed":
                _cell(scene, x, top, _STATE, high, f"h{subscript(position)}", None)
                _cell(scene, x + _STATE, top, wide - 6 - _STATE, high, tokens[token - 1], colour)
            else:
                unread = row == "read" and position == count  # a target and nothing else
                ink = "soft" if unread else "ink"
                _cell(scene, x, top, wide - 6, high, tokens[token - 1], colour, ink)
    fed = tokens[at - 1 + shift]
    words = f"at i = {at} it is fed “{fed}” and asked for “{tokens[at + 1]}”"
    scene.text(label, scene.height - 8, words, fill="vermillion" if leak else "ink", bold=True)
    return scene


def _cell(scene: Scene, x, y, width, height, words: str, colour: str | None, ink="ink") -> None:
    scene.rect(x, y, width, height, fill="paper", stroke="line")
    if colour:
        scene.rect(x, y, width, height, fill=colour, opacity=STRONG, stroke=colour)
    scene.text(
        x + width / 2, y + height / 2, words, anchor="middle", fill=ink, bold=colour is not None
    )


def _shift_alt(tokens: Sequence[str], at: int, leak: bool) -> str:
    words = (
        f"The text {' '.join(tokens)} in rows that shift to the left. At position {at} the main "
        f"model reads {tokens[at - 1]!r} and is asked for {tokens[at]!r}. "
    )
    if leak:
        return words + (
            f"With the leak the module is fed {tokens[at + 1]!r}, in red: the very token that it "
            "is asked for."
        )
    return words + (
        f"The MTP module gets the state of position {at}, is fed {tokens[at]!r} and asked for "
        f"{tokens[at + 1]!r}."
    )


def heads_and_module() -> Scene:
    """Two heads that answer at once, beside a module that is told the first answer."""
    scene = Scene(
        WIDTH,
        430,
        "Left, parallel heads: the state goes into two heads at once, which answer for the next "
        "token and the one after without knowing of each other. Right, the sequential module: the "
        "first answer is embedded and goes with the state into a module, whose answer follows "
        "from both. Embedding and head are shared with the main model.",
    )
    headline(scene, "parallel heads")
    headline(scene, "sequential module", x=400)
    scene.line((372, 0), (372, 424), stroke="line")
    # Left.
    model = _model(scene, 170)
    for x, name, colour, token in (
        (90, "head 1", "green", "tᵢ₊₁"),
        (250, "head 2", "purple", "tᵢ₊₂"),
    ):
        head = box(scene, x, 190, 110, 36, name, colour=colour)
        arrow(
            scene,
            model.bottom,
            (170, 145),
            (x, 145),
            head.top,
            label="hᵢ  (d)" if x > 170 else "",
            at=0,
        )
        answer = _token(scene, x, 260, token, colour)
        arrow(scene, head.bottom, answer.top, label="(V)")
    scene.line((122, 260), (218, 260), stroke="vermillion", dashed=True, stroke_width=1.4)
    lines(
        scene, 170, 296, "neither knows", "what the other says", anchor="middle", fill="vermillion"
    )
    # Right.
    left, right = 470, 650
    model = _model(scene, left)
    head = box(scene, left, 190, 110, 36, "head", colour="green", shared=True)
    arrow(scene, model.bottom, head.top, label="hᵢ  (d)")
    first = _token(scene, left, 260, "tᵢ₊₁", "green")
    arrow(scene, head.bottom, first.top, label="(V)")
    embedding = box(scene, right, 260, 110, 36, "embedding", colour=EMBEDDED, shared=True)
    arrow(scene, first.right, embedding.left, label="chosen")
    module = box(scene, right, 325, 110, 40, "MTP module", colour="purple")
    arrow(scene, embedding.bottom, module.top, label="(d)")
    turn = 738
    arrow(
        scene, model.right, (turn, model.y), (turn, module.y), module.right, label="hᵢ  (d)", at=0
    )
    head = box(scene, left, 325, 110, 36, "head", colour="green", shared=True)
    arrow(scene, module.left, head.right, label="(d)")
    second = _token(scene, left, 395, "tᵢ₊₂", "purple")
    arrow(scene, head.bottom, second.top, label="(V)")
    box(scene, 568, 395, 22, 16, colour="grey", shared=True)
    scene.text(586, 395, "weights of the main model", size=SMALL, fill="soft")
    return scene


def _model(scene: Scene, x: float) -> Box:
    scene.text(x, 42, "t₁ … tᵢ", anchor="middle")
    model = box(scene, x, 95, 130, 44, "main model", colour=STATE)
    arrow(scene, (x, 51), model.top)
    return model


def _token(scene: Scene, x: float, y: float, words: str, colour: str) -> Box:
    return box(scene, x, y, 56, 28, words, colour=colour)


def inside_the_module(config: ModelConfig | None = None) -> Scene:
    """The module's parts in order, with the shapes between them; ``config``: the 671B model's
    unless another is given."""
    config = config or ModelConfig.deepseek_v3()
    d, vocabulary = config.hidden_size, config.vocab_size
    wide, twice, scores = (f"(b, s, {number(n)})" for n in (d, 2 * d, vocabulary))
    emb, state, centre, width = 90, 250, 170, 130
    scene = Scene(
        560,
        516,
        "The MTP module from top to bottom. The next token is embedded and normalised by enorm, "
        f"the state normalised by hnorm; the two are joined, embedding first, to {number(2 * d)} "
        f"channels, multiplied by eh_proj, a matrix of {number(d)} by {number(2 * d)}, go through "
        "one whole layer, a norm and the output head. Embedding and head are those of the main "
        "model.",
    )
    scene.text(emb, 8, "next token tᵢ₊₁", anchor="middle")
    scene.text(state, 8, "state hᵢ", anchor="middle")
    embedding = box(scene, emb, 64, width, 34, "embedding", colour="green", shared=True)
    arrow(scene, (emb, 17), embedding.top, label="(b, s)", side="left")
    enorm = box(scene, emb, 128, width, 34, "enorm", colour=EMBEDDED)
    hnorm = box(scene, state, 128, width, 34, "hnorm", colour=STATE)
    arrow(scene, embedding.bottom, enorm.top, label=wide, side="left")
    arrow(scene, (state, 17), hnorm.top, label=wide)
    top, half, high = 176, 140, 26
    for x, colour, words, norm in (
        (centre - half / 2, EMBEDDED, "embedding", enorm),
        (centre + half / 2, STATE, "state", hnorm),
    ):
        arrow(scene, norm.bottom, (norm.x, top - 2))
        scene.rect(x - half / 2, top, half, high, fill=colour, opacity=STRONG, stroke=colour)
        scene.text(x, top + high / 2, words, anchor="middle")
    scene.text(centre + half + 14, top + high / 2, "joined, embedding first", fill="soft")
    # The matrix: as high as it has outputs, as wide as it has inputs.
    upper, tall = 240, 70
    arrow(scene, (centre, top + high), (centre, upper - 2), label=twice)
    for x, colour in ((centre - half, EMBEDDED), (centre, STATE)):
        scene.rect(x, upper, half, tall, fill=colour, opacity=TINT, stroke=colour)
    scene.rect(centre - 48, upper + tall / 2 - 22, 96, 44, rounded=5, fill="paper")
    scene.text(centre, upper + tall / 2 - 8, "eh_proj", anchor="middle", bold=True)
    scene.text(
        centre, upper + tall / 2 + 10, f"{number(d)} × {number(2 * d)}", anchor="middle", size=SMALL
    )
    lines(
        scene,
        centre + half + 14,
        upper + tall / 2 - 8,
        "its left half reads the embedding,",
        "its right half the state",
        fill="soft",
    )
    layer = box(
        scene, centre, 366, 170, 46, "one whole layer", "attention · experts", colour="purple"
    )
    arrow(scene, (centre, upper + tall), layer.top, label=wide)
    norm = box(scene, centre, 430, width, 30, "norm", colour="purple")
    arrow(scene, layer.bottom, norm.top, label=wide)
    head = box(scene, centre, 488, width, 34, "head", colour="green", shared=True)
    arrow(scene, norm.bottom, head.top, label=wide)
    arrow(scene, head.right, (centre + width / 2 + 120, 488), label=scores)
    scene.text(centre + width / 2 + 126, 488, "scores for tᵢ₊₂")
    box(scene, 357, 20, 24, 18, colour="green", shared=True)
    lines(scene, 376, 12, "double border: weights of", "the main model, not a copy", fill="soft")
    return scene
