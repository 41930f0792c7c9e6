"""Who proposed which token, and one pass of drafting and verifying in four stages."""

from __future__ import annotations

from collections.abc import Callable

from dsv3.viz.chips import short
from dsv3.viz.drafted import Chance, Drafted, Place, Round
from dsv3.viz.scene import Scene, columns

WIDTH, LINE, LETTER = 920, 48, 7.4
STAGES = ("draft", "verify", "decide", "roll back")
LOOKS = {
    "prefill": ("pale", "ink", "from the prompt's pass"),
    "accepted": ("green", "white", "draft, accepted"),
    "replaced": ("vermillion", "white", "the model's, for a rejected draft"),
    "extra": ("blue", "white", "the model's, after the drafts"),
}


def draft_scene(drafted: Drafted, number: int, stage: int, word: Callable[[int], str]) -> Scene:
    """number: of the pass that is shown, from 0; stage: how far it has come, 0 to 3; word: a
    token's text."""
    lines = _lines(drafted, word)
    top = 92 + LINE * len({y for _, y, _ in lines})
    scene = Scene(WIDTH, top + 378, _alt(drafted, number, word))
    scene.text(0, 12, _headline(drafted), bold=True, size=14)
    ends = ["…"] * (len(drafted.prompt) > 12) + [word(id) for id in drafted.prompt[-12:]]
    scene.text(0, 36, f"after {' '.join(ends)}", fill="soft")
    x = 0.0
    for fill, _, words in LOOKS.values():
        scene.rect(x, 54, 11, 11, fill=fill, stroke="line")
        scene.text(x + 16, 59.5, words, fill="soft")
        x += 32 + 6.2 * len(words)
    scene.text(WIDTH, 59.5, "struck: the draft", fill="soft", anchor="end")
    _chips(scene, drafted, number, lines, word)
    if not drafted.rounds:
        scene.text(0, top + 20, "One token: the prompt's own pass gave it, nothing to draft.")
        return scene
    now = drafted.rounds[number]
    _stages(scene, drafted, number, stage, top + 6)
    width = min(300, WIDTH / len(now.places))
    for at, place in enumerate(now.places):
        _place(scene, place, at, stage, (at * width, top + 64, width - 14), word)
    _cache(scene, now, stage, top + 314, word)
    return scene


def _headline(drafted: Drafted) -> str:
    tokens, passes = len(drafted.ids), len(drafted.rounds)
    return (
        f"{tokens - 1} tokens in {passes} passes, {drafted.per_pass:.2f} a pass; plain decoding "
        f"takes {tokens - 1}. {100 * drafted.acceptance:.0f}% of {drafted.drafts} drafts accepted"
    )


def _alt(drafted: Drafted, number: int, word: Callable[[int], str]) -> str:
    if not drafted.rounds:
        return f"{_headline(drafted)}."
    now = drafted.rounds[number]
    places = "; ".join(f"{_said(place, word)}" for place in now.places if place.state != "dropped")
    return f"{_headline(drafted)}. Pass {number + 1} of {len(drafted.rounds)}: {places}."


def _said(place: Place, word: Callable[[int], str]) -> str:
    assert place.chosen is not None
    text = word(place.chosen.id)
    if place.state == "accepted":
        return f"draft “{text}” accepted"
    if place.draft is not None:
        return f"draft “{word(place.draft.id)}” rejected, “{text}” instead"
    return f"“{text}” by the model"


# The text -------------------------------------------------------------------------------------


def _lines(drafted: Drafted, word: Callable[[int], str]) -> list[tuple[float, float, float]]:
    """Left edge, top and width of each new token's chip."""
    places, x, y = [], 0.0, 92.0
    for id in drafted.ids:
        width = max(26, 14 + LETTER * columns(short(word(id))))
        if x and x + width > WIDTH:
            x, y = 0.0, y + LINE
        places.append((x, y, width))
        x += width + 4
    return places


def _chips(
    scene: Scene, drafted: Drafted, number: int, lines: list, word: Callable[[int], str]
) -> None:
    owners: list[tuple[int | None, Place | None]] = [(None, None)]
    for turn, each in enumerate(drafted.rounds):
        owners += [(turn, place) for place in each.places if place.chosen]
    for at, (id, (x, y, width), state, (turn, place)) in enumerate(
        zip(drafted.ids, lines, drafted.states(), owners)
    ):
        fill, ink, what = LOOKS[state]
        on = turn == number
        scene.rect(
            x,
            y,
            width,
            24,
            rounded=4,
            fill=fill,
            stroke="ink" if on else "line",
            stroke_width=2.5 if on else 1,
            key=None if turn is None else f"token {at}",
            chosen=on and place is drafted.rounds[number].places[0],
            label=f"token {at + 1}: “{word(id)}”, {what}{_numbers(place, turn, word)}",
        )
        scene.text(x + width / 2, y + 12, short(word(id)), code=True, anchor="middle", fill=ink)
        if place and place.state == "replaced" and place.draft:
            text = short(word(place.draft.id))
            half = 3.2 * columns(text)
            scene.text(x + width / 2, y - 9, text, code=True, anchor="middle", fill="soft", size=10)
            scene.line(
                (x + width / 2 - half, y - 9), (x + width / 2 + half, y - 9), stroke="vermillion"
            )


def _numbers(place: Place | None, turn: int | None, word: Callable[[int], str]) -> str:
    if place is None or place.chosen is None:
        return ""
    said = f"\npass {turn + 1}" if turn is not None else ""
    if place.draft is None:
        return said + (f", p = {place.chosen.p:.3f}" if place.likely else "")
    draft = place.draft
    said += (
        f", draft “{word(draft.id)}”: q = {draft.q:.3f}, p = {draft.p:.3f}\n"
        f"accepted with probability min(1, p/q) = {place.accepting:.3f}"
    )
    if place.state == "replaced":
        said += f"\nrejected; in its place p = {place.chosen.p:.3f}, q = {place.chosen.q:.3f}"
    return said


# One pass -------------------------------------------------------------------------------------


def _stages(scene: Scene, drafted: Drafted, number: int, stage: int, y: float) -> None:
    """The number of the pass, and its four stages to choose from."""
    scene.text(0, y + 12, f"Pass {number + 1} of {len(drafted.rounds)}", bold=True, size=13)
    x = 130.0
    for at, name in enumerate(STAGES):
        on = at == stage
        scene.rect(
            x,
            y,
            104,
            24,
            rounded=12,
            fill="blue" if on else "pale",
            stroke="ink" if on else "line",
            key=f"stage {at}",
            chosen=on,
            label=f"stage {at + 1}: {name}",
        )
        scene.text(
            x + 52, y + 12, f"{at + 1} {name}", anchor="middle", fill="white" if on else "ink"
        )
        if at < 3:
            scene.text(x + 116, y + 12, "→", anchor="middle", fill="soft")
        x += 128
    for key, words, there, at in (
        ("earlier", "◀ pass", number > 0, 720.0),
        ("later", "pass ▶", number + 1 < len(drafted.rounds), 814.0),
    ):
        if there:
            scene.rect(
                at, y, 84, 24, rounded=4, fill="paper", stroke="line", key=key, label=f"{key} pass"
            )
            scene.text(at + 42, y + 12, words, anchor="middle")
    scene.text(0, y + 42, _does(stage), fill="soft")
    for x, colour, words in ((796, "orange", "q: the draft"), (796, "blue", "p: the model")):
        down = 30 if colour == "orange" else 44
        scene.rect(x, y + down, 11, 11, fill=colour)
        scene.text(x + 16, y + down + 5.5, words, fill="soft", size=11)


def _does(stage: int) -> str:
    return (
        "The MTP module guesses: d is drawn from q. The model has not been asked yet.",
        "One pass of the model over all guesses gives p in every place at once.",
        "From left to right: keep d with probability min(1, p(d) / q(d)); at the first that is "
        "rejected draw from max(p − q, 0) and stop.",
        "What was fed behind the last token kept is taken out of the cache again.",
    )[stage]


def _place(
    scene: Scene,
    place: Place,
    at: int,
    stage: int,
    box: tuple[float, float, float],
    word: Callable[[int], str],
) -> None:
    """Bars of q and p of the likeliest tokens of one place, and what became of its draft."""
    x, y, width = box
    dropped = place.state == "dropped" and stage >= 2
    scene.rect(x, y, width, 230, rounded=4, fill=None if dropped else "pale", stroke="line")
    draft = f"draft {at + 1}: {short(word(place.draft.id))}" if place.draft else "after the drafts"
    scene.text(x + 10, y + 16, draft, bold=True, fill="soft" if dropped else "ink")
    room = width - 20
    for row, chance in enumerate(place.likely):
        top = y + 30 + 38 * row
        drafted = place.draft is not None and chance.id == place.draft.id
        name = short(word(chance.id)) + ("  ← d" if drafted else "")
        scene.text(x + 10, top + 6, name, code=True, size=11, bold=drafted)
        bars = [("q", chance.q, "orange", chance.q is not None), ("p", chance.p, "blue", stage > 0)]
        for line, (letter, value, colour, shown) in enumerate(bars):
            if shown and value is not None:
                scene.rect(
                    x + 10, top + 14 + 11 * line, max(1, (room - 42) * value), 8, fill=colour
                )
                scene.text(
                    x + width - 8, top + 18 + 11 * line, f"{letter} {value:.2f}", size=10,
                    anchor="end", fill="soft",
                )  # fmt: skip
        scene.rect(x + 4, top, width - 8, 37, rounded=2, label=_chance_says(chance, stage, word))
    if not place.likely:
        scene.text(x + 10, y + 44, "room for one token: plain", fill="soft", size=11)
    if stage >= 2:
        _verdict(scene, place, x, y + 198, width, word)


def _chance_says(chance: Chance, stage: int, word: Callable[[int], str]) -> str:
    q = "" if chance.q is None else f"\nq = {chance.q:.4f}, the draft's probability"
    p = f"\np = {chance.p:.4f}, the model's" if stage else ""
    return f"“{word(chance.id)}”{q}{p}"


def _verdict(
    scene: Scene, place: Place, x: float, y: float, width: float, word: Callable[[int], str]
) -> None:
    if place.state == "dropped":
        scene.text(x + 10, y + 8, "not looked at", fill="soft", size=11)
        return
    assert place.chosen is not None
    fill, ink, what = LOOKS[place.state]
    chosen = short(word(place.chosen.id))
    sign = {"accepted": f"✓ {chosen}", "replaced": f"✗ → {chosen}"}.get(place.state, f"+ {chosen}")
    scene.rect(x + 8, y + 8, width - 16, 20, rounded=3, fill=fill, label=f"{sign}: {what}")
    scene.text(x + width / 2, y + 18, sign, anchor="middle", fill=ink, bold=True, size=11)
    if place.draft is not None:
        words = f"min(1, p/q) = {place.accepting:.2f}"
        scene.text(x + 10, y - 4, words, size=11)


def _cache(scene: Scene, now: Round, stage: int, y: float, word: Callable[[int], str]) -> None:
    """The cache's entries: what it held, what the pass fed, what is taken back."""
    before, fed, after = now.held
    scene.text(0, y, "Cache of the model, in tokens", bold=True, size=13)
    held = before if stage == 0 else fed if stage < 3 else after
    scene.text(WIDTH, y, _lengths(now, stage), anchor="end")
    scene.rect(0, y + 16, 200, 26, rounded=3, fill="blue", label=f"{before} tokens held before")
    scene.text(100, y + 29, f"{before} held before", anchor="middle", fill="white", bold=True)
    drafts = [place.draft.id for place in now.places if place.draft]
    for at in range(fed - before):
        x, name = 204 + 124 * at, "last token" if at == 0 else short(word(drafts[at - 1]))
        inside, read = before + at < after, stage > 0
        gone = stage == 3 and not inside
        scene.rect(
            x,
            y + 16,
            120,
            26,
            rounded=3,
            fill="blue" if read and not gone else None,
            stroke="line",
            hatched=gone,
            label=f"entry {before + at + 1}: "
            + ("taken back" if gone else "read by the model" if read else "not read yet"),
        )
        scene.text(
            x + 60, y + 29, name, anchor="middle", code=at > 0,
            fill="white" if read and not gone else "soft",
        )  # fmt: skip
    scene.text(0, y + 56, f"{held} entries now", fill="soft", size=11)


def _lengths(now: Round, stage: int) -> str:
    before, fed, after = now.held
    steps = [f"{before} before", f"{fed} after reading", f"{after} after the cut"]
    return " → ".join(steps[: (1, 2, 2, 3)[stage]])
