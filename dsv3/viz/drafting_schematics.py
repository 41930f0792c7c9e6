"""Chapter 5, drawn: how drafts are made, checked and paid for.

Each function returns a ``Scene`` for ``viz.draw``. The MTP module itself is in
``dsv3.viz.mtp_schematics``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3 import costs
from dsv3.config import ModelConfig
from dsv3.viz.scene import Scene, text_width
from dsv3.viz.schematic import SMALL, WIDTH, arrow, bracket, headline, legend, number

TEXT_SO_FAR = ("To", " be", ",", " or", " not", " to")
STRONG = 0.35  # tint of tokens and latents

# Draft and verify -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Where the tokens of the text stand."""

    left: float
    wide: float

    def middle(self, position: int) -> float:
        return self.left + (position + 0.5) * self.wide


def draft_and_verify(
    tokens: Sequence[str] = TEXT_SO_FAR,
    drafts: Sequence[str] = (" be",),
    chosen: Sequence[str] = (" be", "."),
) -> Scene:
    """One pass with drafts in four frames: draft, verify, accept, roll back.

    tokens: the text, of which the last has been chosen and not been fed; drafts: the guesses at
    what follows; chosen: what the pass gave, the accepted drafts and one more (``Pass.chosen``).
    """
    k, accepted = len(drafts), len(chosen) - 1
    if len(tokens) < 2 or not 1 <= k <= 4:
        raise ValueError(f"2 tokens of text or more and 1 to 4 drafts, not {len(tokens)} and {k}")
    if not 0 <= accepted <= k or list(chosen[:accepted]) != list(drafts[:accepted]):
        raise ValueError(
            f"chosen: some of the first drafts and one more token, not {list(chosen)} after the "
            f"drafts {list(drafts)}"
        )
    if accepted < k and chosen[-1] == drafts[accepted]:
        raise ValueError(f"the draft {drafts[accepted]!r} is the model's choice: it is accepted")
    shown = list(tokens)[-(9 - k) :]
    n = len(shown) - 1  # the position of the token that is not fed yet
    left = 176
    columns = _Columns(left, min(74.0, (WIDTH - left) / (n + k + 2)))
    # Tops of the frames; the first needs more room where the draft cache holds guesses.
    verify = 108 if k == 1 else 126
    accept, roll_back, end = verify + 114, verify + 208, verify + 332
    scene = Scene(WIDTH, end, _drafting_alt(tokens, drafts, chosen))
    text = list(zip(range(n + 1), shown))
    guesses = list(zip(range(n + 1, n + 1 + k), drafts))
    _draft(scene, 0, columns, text, guesses)
    _verify(scene, verify, columns, text, guesses)
    _accept(scene, accept, columns, text, guesses, chosen)
    _roll_back(scene, roll_back, columns, text, guesses, chosen)
    legend(
        scene,
        left,
        end - 9,
        [
            ("blue", STRONG, "text and its latents"),
            ("orange", STRONG, "guess"),
            ("green", STRONG, "certain after this pass"),
        ],
    )
    return scene


def _frame(scene: Scene, top: float, step: str, *rows: tuple[float, str]) -> None:
    if top:
        scene.line((0, top - 10), (WIDTH, top - 10), stroke="line")
    scene.text(0, top + 13, step, bold=True)
    for y, words in rows:
        scene.text(168, y, words, anchor="end", size=SMALL, fill="soft")


def _token(scene: Scene, columns: _Columns, at: int, y: float, words: str, colour: str) -> None:
    """A cell of the text; of its blanks one sees those that stand alone."""
    x, wide = columns.middle(at) - columns.wide / 2 + 2, columns.wide - 4
    scene.rect(x, y, wide, 26, rounded=3, fill=colour, opacity=STRONG, stroke=colour)
    shown = words.strip() or repr(words)[1:-1].replace(" ", "␣")
    while text_width(shown, 12) > wide - 4 and len(shown) > 2:
        shown = shown.removesuffix("…")[:-1] + "…"
    scene.text(x + wide / 2, y + 13, shown, anchor="middle")


def _latents(scene: Scene, columns: _Columns, places, y: float, colour: str, out=False) -> None:
    """Cells of a cache; out: taken back."""
    for at in places:
        x, wide = columns.middle(at) - columns.wide / 2 + 2, columns.wide - 4
        if out:
            scene.rect(x, y, wide, 14, fill="paper", stroke="vermillion")
            scene.line((x, y + 14), (x + wide, y), stroke="vermillion", stroke_width=1.4)
            scene.line((x, y), (x + wide, y + 14), stroke="vermillion", stroke_width=1.4)
        else:
            scene.rect(x, y, wide, 14, fill=colour, opacity=STRONG, stroke=colour)


def _begun(scene: Scene, top: float, columns: _Columns, name: str, text, guesses) -> None:
    """What the first two frames share: the text with its guesses, and room for the caches."""
    _frame(
        scene, top, name, (top + 13, "text"), (top + 49, "main cache"), (top + 75, "draft cache")
    )
    for at, words in text:
        _token(scene, columns, at, top, words, "blue")
    for at, words in guesses:
        _token(scene, columns, at, top, words, "orange")


def _draft(scene: Scene, top: float, columns: _Columns, text, guesses) -> None:
    n, k = len(text) - 1, len(guesses)
    _begun(scene, top, columns, "1  draft", text, guesses)
    _latents(scene, columns, range(n), top + 42, "blue")
    _latents(scene, columns, range(n), top + 68, "blue")
    _latents(scene, columns, range(n, n + k - 1), top + 68, "orange")
    end, y = columns.middle(n + k - 1) - columns.wide / 2, top + 75
    x = columns.middle(n + k)
    arrow(scene, (end + 3, y), (x, y), (x, top + 28), colour="orange")
    scene.text(x + 8, top + 52, "module" if k == 1 else f"{k} × module", size=SMALL, fill="soft")
    if k > 1:
        first, last = columns.middle(n) - columns.wide / 2, end
        bracket(scene, first + 3, last - 3, top + 86, "taken back at once", "below")


def _verify(scene: Scene, top: float, columns: _Columns, text, guesses) -> None:
    n, k = len(text) - 1, len(guesses)
    _begun(scene, top, columns, "2  verify", text, guesses)
    for at in range(n, n + k + 1):
        arrow(scene, (columns.middle(at), top + 27), (columns.middle(at), top + 41), width=1.3)
    _latents(scene, columns, range(n + 1), top + 42, "blue")
    _latents(scene, columns, range(n + 1, n + k + 1), top + 42, "orange")
    _latents(scene, columns, range(n), top + 68, "blue")
    start = columns.middle(n) - columns.wide / 2
    end = columns.middle(n + k) + columns.wide / 2
    bracket(scene, start + 3, end - 3, top + 60, f"{k + 1} tokens fed in one pass", "below")


def _accept(scene: Scene, top: float, columns: _Columns, text, guesses, chosen) -> None:
    n, k, accepted = len(text) - 1, len(guesses), len(chosen) - 1
    step = (
        "3  accept" if accepted == k else "3  reject" if accepted == 0 else f"3  accept {accepted}"
    )
    _frame(scene, top, step)
    for y, words in ((top + 13, "draft"), (top + 57, "model says")):
        x = columns.middle(n + 1) - columns.wide / 2 - 8
        scene.text(x, y, words, anchor="end", size=SMALL, fill="soft")
    for at, words in guesses:
        _token(scene, columns, at, top, words, "orange")
    for j in range(k + 1):
        at, x = n + 1 + j, columns.middle(n + 1 + j)
        if j <= accepted:
            _token(scene, columns, at, top + 44, chosen[j], "green")
        else:
            scene.text(x, top + 57, "not used", anchor="middle", size=SMALL, fill="soft")
        if j < min(k, accepted + 1):
            sign, colour = ("=", "green") if j < accepted else ("≠", "vermillion")
            scene.text(x, top + 35, sign, anchor="middle", size=15, bold=True, fill=colour)


def _roll_back(scene: Scene, top: float, columns: _Columns, text, guesses, chosen) -> None:
    n, k, accepted = len(text) - 1, len(guesses), len(chosen) - 1
    _frame(
        scene,
        top,
        "4  go on" if accepted == k else "4  roll back",
        (top + 13, "text"),
        (top + 49, "main cache"),
        (top + 75, "draft cache"),
    )
    for at, words in text:
        _token(scene, columns, at, top, words, "blue")
    for j, words in enumerate(chosen):
        _token(scene, columns, n + 1 + j, top, words, "green")
    _latents(scene, columns, range(n + 1), top + 42, "blue")
    _latents(scene, columns, range(n + 1, n + 1 + accepted), top + 42, "green")
    _latents(scene, columns, range(n + 1 + accepted, n + 1 + k), top + 42, "orange", out=True)
    _latents(scene, columns, range(n), top + 68, "blue")
    gained = f"{len(chosen)} token{'s' * (len(chosen) > 1)} from one pass"
    scene.text(
        columns.middle(n + k + 1) + columns.wide / 2, top + 75, gained, anchor="end", bold=True
    )


def _drafting_alt(tokens, drafts, chosen) -> str:
    accepted = len(chosen) - 1
    out = len(drafts) - accepted
    return (
        f"Four frames of one pass after {''.join(tokens)!r}. The module drafts "
        f"{''.join(drafts)!r}; {len(drafts) + 1} tokens are fed in one pass, and their latents "
        f"enter the main cache; the model says {''.join(chosen)!r}, so {accepted} of {len(drafts)} "
        f"drafts are accepted; "
        + (
            f"{out} latents of guesses leave the main cache."
            if out
            else "the cache stays as it is."
        )
    )


# The rule ---------------------------------------------------------------------------------------


def rejection_rule(
    p: Sequence[float] = (0.5, 0.3, 0.2),
    q: Sequence[float] = (0.2, 0.6, 0.2),
    words: Sequence[str] = ("yes", "no", "maybe"),
) -> Scene:
    """Why drafts leave the chances as they are: what is kept, rejected and missing of each word.

    p, q: chances of the words with the model and with the module, each with the sum 1.
    """
    if not len(p) == len(q) == len(words) or not 2 <= len(words) <= 5:
        raise ValueError(f"2 to 5 words with p and q each, not {len(words)}, {len(p)}, {len(q)}")
    for name, chances in (("p", p), ("q", q)):
        if min(chances) < 0 or abs(sum(chances) - 1) > 1e-6:
            raise ValueError(f"{name}: chances with the sum 1, not {list(chances)}")
    kept = [min(pair) for pair in zip(p, q)]
    missing = [a - b for a, b in zip(p, kept)]
    rejected = [a - b for a, b in zip(q, kept)]
    floor, tall = 262, 210
    group = 580 / len(words)
    scene = Scene(WIDTH, floor + 66, _rule_alt(words, p, q, kept, missing))
    headline(scene, "module q, model p")
    for index, word in enumerate(words):
        x = group * (index + 0.5)
        _pair(scene, x, floor, tall, kept[index], rejected[index], missing[index])
        scene.text(x, floor + 30, word, anchor="middle", bold=True)
    x = 680
    scene.line((600, 0), (600, floor + 40), stroke="line", dashed=True)
    _pair(scene, x, floor, tall, sum(kept), sum(rejected), sum(missing), side=False)
    scene.text(x, floor + 30, "all words", anchor="middle", bold=True)
    high = floor - tall - 2
    if sum(missing) > 1e-9:
        points = ((x - 25, high), (x - 25, high - 14), (x + 25, high - 14), (x + 25, high))
        arrow(scene, *points, label="drawn again", side="above", at=1)
    legend(
        scene,
        0,
        floor + 56,
        [
            ("green", STRONG, "kept: min(p, q)"),
            ("grey", STRONG, "rejected: max(q − p, 0)"),
            ("orange", STRONG, "missing: max(p − q, 0)"),
        ],
    )
    return scene


def _pair(scene: Scene, x, floor, tall, kept, rejected, missing, side=True) -> None:
    """The bar of q, kept and rejected, and that of p, kept and missing."""
    wide = 44
    for centre, name, above, colour in (
        (x - 25, "module q", rejected, "grey"),
        (x + 25, "model p", missing, "orange"),
    ):
        bottom = floor
        for share, fill in ((kept, "green"), (above, colour)):
            if share < 1e-9:
                continue
            high = share * tall
            scene.rect(
                centre - wide / 2, bottom - high, wide, high, fill=fill, opacity=STRONG, stroke=fill
            )
            if high >= 13:
                scene.text(centre, bottom - high / 2, number(share, 2), anchor="middle")
            bottom -= high
        if side:
            total = number(kept + above, 2)
            scene.text(centre, bottom - 10, f"{name[-1]} = {total}", anchor="middle", size=SMALL)
        scene.text(centre, floor + 11, name[-1], anchor="middle", size=SMALL, fill="soft")
    scene.line((x - 52, floor), (x + 52, floor), stroke="ink")


def _rule_alt(words, p, q, kept, missing) -> str:
    each = "; ".join(
        f"{word}: q {number(b, 2)}, p {number(a, 2)}, kept {number(c, 2)}"
        for word, a, b, c in zip(words, p, q, kept)
    )
    return (
        f"Two bars for each word, the module's chance q and the model's p. {each}. Of all drafts "
        f"{number(sum(kept), 2)} are kept; the {number(sum(missing), 2)} that are rejected are "
        "just what is missing of p and are drawn again from it."
    )


# What it costs ----------------------------------------------------------------------------------


def busy_batch(batches: Sequence[int] = (1, 256, 4096), config: ModelConfig | None = None) -> Scene:
    """A pass with one and with two tokens for each text: reading the weights against arithmetic.

    batches: numbers of texts that are decoded together; config: the 671B model's by default.
    """
    if not 1 <= len(batches) <= 4 or min(batches) < 1:
        raise ValueError(f"1 to 4 numbers of texts from 1 on, not {list(batches)}")
    config = config or ModelConfig.deepseek_v3()
    each = costs.pass_milliseconds(config, [n * texts for texts in batches for n in (1, 2)])
    times = list(zip(each[::2], each[1::2]))
    ratios = [max(two) / max(one) for one, two in times]
    longest = max(max(pair) for both in times for pair in both)
    left, room, step = 206, 320, 104
    scene = Scene(WIDTH, step * len(batches) + 18, _busy_alt(batches, times, ratios))
    for group, (texts, both, ratio) in enumerate(zip(batches, times, ratios)):
        top = step * group
        if group:
            scene.line((0, top - 9), (WIDTH, top - 9), stroke="line")
        scene.text(0, top + 40, f"{texts:,} text{'s' * (texts > 1)}", bold=True, size=14)
        for n, pair in enumerate(both):
            y = top + 44 * n
            scene.text(left - 12, y + 18, f"{n + 1} token{'s' * n} each", anchor="end", fill="soft")
            for bar, (time, colour) in enumerate(zip(pair, ("blue", "orange"))):
                wide, at = max(2.0, time / longest * room), y + 2 + 17 * bar
                slower = time == max(pair)
                scene.rect(
                    left, at, wide, 14, fill=colour, opacity=0.75 if slower else 0.3, stroke=colour
                )
                scene.text(
                    left + wide + 8,
                    at + 7,
                    f"{number(time, 2)} ms",
                    size=SMALL,
                    bold=slower,
                    fill="ink" if slower else "soft",
                )
        full = both[1][1] > both[1][0]
        reason = "arithmetic is full" if full else "more experts" if ratio > 1.05 else "read anyway"
        scene.text(
            WIDTH,
            top + 29,
            f"a pass takes × {ratio:.1f}",
            anchor="end",
            bold=True,
            fill="vermillion" if ratio > 1.05 else "green",
        )
        scene.text(WIDTH, top + 50, reason, anchor="end", fill="soft")
    legend(
        scene,
        left,
        scene.height - 8,
        [("blue", 0.75, "reading the weights"), ("orange", 0.75, "arithmetic")],
    )
    return scene


def _busy_alt(batches, times, ratios) -> str:
    parts = "; ".join(
        f"{texts:,}: reading {number(one[0], 2)} ms and arithmetic {number(one[1], 2)} ms, with "
        f"two tokens {number(two[0], 2)} and {number(two[1], 2)} ms, {ratio:.1f} times as long"
        for texts, (one, two), ratio in zip(batches, times, ratios)
    )
    return f"Bars of the least time of a pass, by how many texts share it. {parts}."
