"""What a model wrote at the checkpoints of its run, for the picture of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsv3.training.samples import Sample
from dsv3.viz.scene import Scene, columns

_LETTER, _ROW, _ROWS = 7.0, 15, 14  # of the box: width of a letter, height of a line, lines


def millions(tokens: int) -> str:
    """A number of tokens in words."""
    return f"{tokens / 1e6:.1f} million" if tokens >= 1e5 else f"{tokens:,}"


def by_prompt(samples: Sequence[Sample]) -> Mapping[str, list[Sample]]:
    """Samples of each prompt, by their steps."""
    prompts: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.step):
        prompts.setdefault(sample.prompt, []).append(sample)
    return prompts


def draw_text(
    scene: Scene, samples: Sequence[Sample], sample: Sample | None, left: float, top: float
) -> None:
    """What the model wrote, in a box from ``left`` to the edge; the prompt is paler. sample: the
    one to show, None where the first of them is still to come."""
    if sample is None:
        first = samples[0].step
        scene.text(left, top, f"No text yet: the first is of step {first:,}.", fill="soft")
        return
    title = f"Written at step {sample.step:,} ({millions(sample.tokens)} tokens)"
    scene.text(left, top, title, bold=True, size=13)
    room = int((scene.width - left - 20) / _LETTER)
    rows = wrapped(sample.prompt, sample.text, room)
    shown = rows if len(rows) <= _ROWS else [*rows[: _ROWS - 1], ("", "…")]
    label = f"the prompt, then what was written at step {sample.step:,}"
    scene.rect(
        left, top + 14, scene.width - left, _ROWS * _ROW + 10, rounded=4, fill="pale", label=label
    )
    for row, (given, written) in enumerate(shown):
        y = top + 14 + 5 + (row + 0.5) * _ROW
        for x, words, fill in ((0, given, "soft"), (columns(given) * _LETTER, written, "ink")):
            if words.strip():
                scene.text(left + 10 + x, y, words, size=11, code=True, fill=fill)


def wrapped(prompt: str, text: str, room: int) -> list[tuple[str, str]]:
    """Lines of at most ``room`` letters (2 or more), cut at a space where there is one, each as the
    part that belongs to the prompt and the part that was written. Bytes that are no letters, of
    which young models write many, become boxes."""
    prompt, text = map(_shown, (prompt, text))
    whole, given = prompt + text, len(prompt)
    rows, start = [], 0
    for line in whole.split("\n"):
        end = start + len(line)
        at = start
        while True:
            stop = at
            while stop < end and columns(whole[at : stop + 1]) <= room:
                stop += 1
            if stop < end:
                space = whole.rfind(" ", at + 1, stop + 1)
                stop = space if space > 0 and whole[at:space].strip() else stop
            middle = min(max(given, at), stop)
            rows.append((whole[at:middle], whole[middle:stop]))
            at = stop + 1 if stop < end and whole[stop] == " " else stop
            if at >= end:
                break
        start = end + 1
    return rows


def _shown(text: str) -> str:
    return "".join(
        letter if letter == "\n" or letter.isprintable() else "▯"
        for letter in text.replace("\t", "    ")
    )
