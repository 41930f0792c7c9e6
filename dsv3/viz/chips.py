"""A text's tokens as chips to choose from, in lines, and in pages where the lines are too many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsv3.viz.scene import Scene, columns

HEIGHT, LINES, LETTER = 30, 3, 7.4  # of a line; lines of a page; width of a letter


def short(text: str) -> str:
    """A token's text, cut where it would fill a line."""
    return text if columns(text) <= 24 else f"{text[:12]}…"


class Chips:
    """The page on which ``token`` is. width: of the picture; height: of the lines of this page."""

    def __init__(self, texts: Sequence[str], token: int, width: float):
        self.texts, self.token, self.width = texts, token, width
        self.pages = _pages(texts, width - 110)
        self.number = next(n for n, page in enumerate(self.pages) if token in page)
        self.page = self.pages[self.number]
        self.height = HEIGHT * len({line for line, _ in self.page.values()})

    def draw(self, scene: Scene, says: Callable[[int], str]) -> None:
        """The heading, the chips and the doors to the pages beside it.

        says: what a token's label adds to its number and text.
        """
        scene.text(0, 12, f"The text's {len(self.texts)} tokens", bold=True, size=13)
        for each, (line, x) in self.page.items():
            text, y, on = self.texts[each], 28 + HEIGHT * line, each == self.token
            width = _width(text)
            scene.rect(
                x,
                y,
                width,
                HEIGHT - 6,
                rounded=4,
                fill="blue" if on else "pale",
                stroke="ink" if on else "line",
                stroke_width=1.5 if on else 1,
                key=f"token {each}",
                chosen=on,
                label=f"token {each}: “{text}”\n{says(each)}",
            )
            scene.text(
                x + width / 2,
                y + HEIGHT / 2 - 3,
                short(text),
                code=True,
                anchor="middle",
                fill="white" if on else "ink",
            )
        self._door(scene, self.number - 1, -1, 28, "◀ earlier")
        self._door(scene, self.number + 1, 0, 58, "later ▶")

    def _door(self, scene: Scene, page: int, to: int, y: float, word: str) -> None:
        """A button that chooses the first or last token of another page, if there is that page."""
        if not 0 <= page < len(self.pages):
            return
        goal = list(self.pages[page])[to]
        scene.rect(
            self.width - 96,
            y,
            92,
            HEIGHT - 6,
            rounded=4,
            fill="paper",
            stroke="line",
            key=f"token {goal}",
            label=f"go to token {goal} of {len(self.texts)}",
        )
        scene.text(self.width - 50, y + HEIGHT / 2 - 3, word, anchor="middle")


def _width(text: str) -> float:
    return max(26, 14 + LETTER * columns(short(text)))


def _pages(texts: Sequence[str], right: float) -> list[dict[int, tuple[int, float]]]:
    """Pages of at most LINES lines of chips that end at ``right``: token -> (line, left edge)."""
    pages: list[dict[int, tuple[int, float]]] = [{}]
    line, x = 0, 0.0
    for token, text in enumerate(texts):
        width = _width(text)
        if x and x + width > right:
            line, x = line + 1, 0.0
        if line == LINES:
            pages.append({})
            line = 0
        pages[-1][token] = line, x
        x += width + 5
    return pages
