"""The notation of the book: one data file, from which every table and every check is made.

``notation.json`` lists each symbol of the report with its meaning and with what it is in this
house: a field of the config, a weight (with the rows and columns that are its share), a vector
that flows through the model, an index. Sizes are not written there. They are computed from a
config, so that the small model's and the large one's stand side by side and cannot go stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

from IPython.display import Markdown

from dsv3.checkpoint.layout import TABLE, Row
from dsv3.config import ModelConfig

# In the order in which a full table shows them, with what stands above each part.
KINDS = {
    "size": "Sizes",
    "weight": "Weights",
    "vector": "Vectors of one token",
    "index": "Indices",
    "setting": "Settings of training",
}


@dataclass(frozen=True, kw_only=True)
class Symbol:
    """One entry. symbol: as code and docstrings write it; tex: as formulas do.

    field: of the config. weight: short name of the tensor it is part of, without ".weight" and
    without its layer. shape: one product of symbols for each dimension, such as "n_h d_h".
    """

    symbol: str
    tex: str
    kind: str
    meaning: str
    field: str | None = None
    weight: str | None = None
    shape: tuple[str, ...] = ()

    @property
    def row(self) -> Row | None:
        """The line of ``dsv3.checkpoint.layout.TABLE`` that the weight is part of."""
        if self.weight is None:
            return None
        ends = (self.weight, self.weight + ".weight")
        return next(
            row
            for row in TABLE
            if any(row.name == end or row.name.endswith("." + end) for end in ends)
        )

    def sizes(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape in numbers; for a size, its value; () for an index."""
        if self.field is not None:
            value = getattr(config, self.field)
            return () if value is None else (value,)
        return tuple(_product(dimension, config) for dimension in self.shape)


def notation() -> dict[str, Symbol]:
    """All entries by symbol, in the order of the file."""
    data = json.loads(files("dsv3.book").joinpath("notation.json").read_text(encoding="utf-8"))
    entries = [Symbol(**{**entry, "shape": tuple(entry.get("shape", ()))}) for entry in data]
    return {entry.symbol: entry for entry in entries}


def notation_table(symbols: Iterable[str] | None = None) -> Markdown:
    """The table for some symbols, in the order given, or for all of them, part by part.

    Columns: the report's symbol, its name in config.json or in a checkpoint (short name first,
    the released one behind it), its meaning, its size in the book's model and in the 671B model.
    Raises KeyError for a symbol that the notation does not have.
    """
    entries = notation()
    if symbols is not None:
        return Markdown(_table([entries[symbol] for symbol in symbols]))
    parts = [
        f"**{title}**\n\n" + _table([e for e in entries.values() if e.kind == kind])
        for kind, title in KINDS.items()
    ]
    return Markdown("\n\n".join(parts))


def _product(dimension: str, config: ModelConfig) -> int:
    """The number that "n_h d_h" stands for."""
    entries, result = notation(), 1
    for word in dimension.split():
        result *= int(word) if word.isdigit() else entries[word].sizes(config)[0]
    return result


def _table(entries: list[Symbol]) -> str:
    small, large = ModelConfig.mini(), ModelConfig.deepseek_v3()
    if all(entry.kind in ("index", "setting") for entry in entries):
        return markdown_table(
            ("symbol", "meaning"), [(f"${entry.tex}$", entry.meaning) for entry in entries]
        )
    return markdown_table(
        ("paper", "here", "meaning", "our model", "671B"),
        [
            (
                f"${entry.tex}$",
                _name(entry),
                entry.meaning,
                _shape(entry, small),
                _shape(entry, large),
            )
            for entry in entries
        ],
    )


def _name(entry: Symbol) -> str:
    if entry.field:
        return f"`{entry.field}`"
    if entry.row is None:
        return ""
    released = entry.row.hf.removesuffix(".weight").replace("model.layers.{L}.", "")
    return f"`{entry.weight}`, released `{released}`"


def _shape(entry: Symbol, config: ModelConfig) -> str:
    return " × ".join(f"{size:,}" for size in entry.sizes(config))


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; bars inside a cell are escaped."""

    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    head = list(head)
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])
