"""How much attention has to remember: the picture of the KV-cache calculator.

One bar a model, as long as its cache is large, against the memory that is set aside for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3 import costs
from dsv3.config import ModelConfig
from dsv3.viz.scene import Scene

WIDTH, LEFT, RIGHT = 920, 330, 700
ROW = 46


@dataclass(frozen=True)
class CacheRow:
    """One way to remember: per_layer: values for one token in one layer; layers: how many."""

    name: str
    what: str
    per_layer: int
    layers: int

    def per_token(self, itemsize: float) -> float:
        """Bytes for one token in all layers."""
        return self.per_layer * self.layers * itemsize


def cache_rows(config: ModelConfig | None = None) -> list[CacheRow]:
    """DeepSeek-V3 as it is, as it would be with other attention, and two models of its size."""
    c = config or ModelConfig.deepseek_v3()
    rows = [
        CacheRow(
            "DeepSeek-V3, MLA",
            f"a latent of {c.kv_lora_rank} and one rotated key of {c.qk_rope_head_dim}",
            c.latent_dim,
            c.num_hidden_layers,
        )
    ]
    others = [
        ("DeepSeek-V3 as MQA", costs.as_gqa(c, 1)),
        ("DeepSeek-V3 as GQA", costs.as_gqa(c, 8)),
        ("DeepSeek-V3 as MHA", costs.as_mha(c)),
        ("DeepSeek-V3 as MHA, wide keys", costs.as_mha(c, with_position=True)),
        ("Qwen2.5-72B, GQA", costs.PEERS["Qwen2.5-72B"]),
        ("LLaMA-3.1-405B, GQA", costs.PEERS["LLaMA-3.1-405B"]),
    ]
    for name, shape in others:
        heads = f"{shape.kv_heads} KV head{'s' * (shape.kv_heads > 1)}"
        rows.append(
            CacheRow(
                name,
                f"{heads}: keys of {shape.key_dim}, values of {shape.value_dim}",
                shape.values_per_token_and_layer,
                shape.layers,
            )
        )
    return rows


def cache_scene(
    tokens: int, texts: int, itemsize: float, memory: float, rows: list[CacheRow]
) -> Scene:
    """tokens: of each text; texts: at a time; itemsize: bytes of a value; memory: bytes set
    aside for the cache. rows: the first is the one that the others are compared with."""
    top = 62
    bottom = top + ROW * len(rows)
    scene = Scene(WIDTH, bottom + 40, _alt(tokens, texts, itemsize, memory, rows))
    scene.text(
        0,
        12,
        f"Cache of {texts:,} text{'s' * (texts > 1)} of {tokens:,} tokens, "
        f"{itemsize:g} byte{'s' * (itemsize != 1)} a value",
        bold=True,
        size=14,
    )
    for x, words, anchor in (
        (0, "attention", "start"),
        (LEFT - 14, "bytes a token", "end"),
        (RIGHT + 114, "cache", "end"),
        (WIDTH - 4, "texts that fit", "end"),
    ):
        scene.text(x, 44, words, fill="soft", anchor=anchor)
    end = 1.25 * memory
    scale = (RIGHT - LEFT) / end
    limit = LEFT + memory * scale
    _axis(scene, end, top - 4, bottom)
    for number, row in enumerate(rows):
        _row(
            scene,
            row,
            rows[0],
            tokens * row.per_token(itemsize),
            texts,
            itemsize,
            memory,
            top + ROW * number,
            scale,
        )
    scene.line((limit, top - 8), (limit, bottom), stroke="ink", stroke_width=2, dashed=True)
    scene.text(limit, 44, f"{size(memory)} set aside", anchor="middle", bold=True)
    return scene


def _axis(scene: Scene, end: float, top: float, bottom: float) -> None:
    step = next(
        base * 10**power
        for power in range(6, 16)
        for base in (1, 2, 5)
        if end / (base * 10**power) <= 7
    )
    for tick in range(int(end / step) + 1):
        x = LEFT + (RIGHT - LEFT) * tick * step / end
        scene.line((x, top), (x, bottom), stroke="line", stroke_width=1.2 if tick == 0 else 0.5)
        scene.text(
            x,
            bottom + 14,
            size(tick * step) if tick else "0",
            anchor="middle",
            size=11,
            fill="soft",
        )


def _row(
    scene: Scene,
    row: CacheRow,
    first: CacheRow,
    one: float,
    texts: int,
    itemsize: float,
    memory: float,
    y: float,
    scale: float,
) -> None:
    """one: bytes of one text; y: the row's upper edge."""
    total, fit = one * texts, int(memory // one)
    fits, is_first = total <= memory, row is first
    colour = "blue" if is_first else "sky"
    scene.text(0, y + 14, row.name, bold=True)
    scene.text(0, y + 30, row.what, size=11, fill="soft")
    per_token = row.per_token(itemsize)
    scene.text(LEFT - 14, y + 14, f"{per_token:,.0f}", anchor="end", bold=is_first)
    if not is_first:
        ratio = per_token / first.per_token(itemsize)
        scene.text(LEFT - 14, y + 30, f"× {times(ratio)}", anchor="end", size=11, fill="soft")
    room, length = RIGHT - LEFT, total * scale
    scene.rect(LEFT, y + 8, max(1.0, min(length, room)), ROW - 18, fill=colour)
    if length > room:  # the bar goes on beyond the page
        for x in (RIGHT - 16, RIGHT - 10):
            scene.line((x - 3, y + ROW - 8), (x + 3, y + 6), stroke="paper", stroke_width=2.5)
    scene.text(RIGHT + 114, y + 22, size(total), anchor="end", bold=is_first)
    scene.text(WIDTH - 4, y + 22, f"{fit:,} {'✓' if fits else '✗'}", anchor="end", bold=is_first)
    how_much = (
        f"{total / memory:.1%} of the memory"
        if fits
        else f"{times(total / memory)} times the memory: does not fit"
    )
    scene.rect(
        0,
        y + 2,
        WIDTH,
        ROW - 6,
        rounded=3,
        label=(
            f"{row.name}: {row.what}\n"
            f"{row.per_layer:,} values × {row.layers} layers × {itemsize:g} B = "
            f"{per_token:,.0f} B a token\n"
            f"{size(one)} a text, {size(total)} in all: {how_much}\n"
            f"{fit:,} texts of this length fit"
        ),
    )


def size(bytes: float) -> str:
    """Bytes in the unit that suits them, three digits; KB, MB, GB and TB are powers of 1000."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if bytes >= 0.9995 * factor:
            value = bytes / factor
            digits = max(0, 2 - (value >= 9.995) - (value >= 99.95))
            text = f"{value:,.{digits}f}"
            return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {unit}"
    return f"{bytes:,.0f} B"


def times(ratio: float) -> str:
    """How many times, three digits, never as a power of ten."""
    return f"{ratio:,.0f}" if ratio >= 99.95 else f"{ratio:.3g}"


def _alt(tokens: int, texts: int, itemsize: float, memory: float, rows: list[CacheRow]) -> str:
    totals = "; ".join(
        f"{row.name} {size(row.per_token(itemsize) * tokens * texts)}" for row in rows
    )
    return (
        f"Bars of the cache of {texts:,} text{'s' * (texts > 1)} of {tokens:,} tokens at "
        f"{itemsize:g} byte{'s' * (itemsize != 1)} a value, against {size(memory)} of "
        f"memory: {totals}."
    )
