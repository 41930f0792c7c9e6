"""The whole model in one picture, with sizes from a config and the reader's place lit.

Three columns: the model from tokens to logits; one layer's attention (MLA); one layer's mixture
of experts. Chapters light the parts that they are about and leave the others grey.
"""

from __future__ import annotations

from collections.abc import Iterable

from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from dsv3.config import ModelConfig
from dsv3.viz.figure import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LIGHT,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    new_figure,
    styled,
)

COLOURS = {
    "embed": BLUE,
    "attention": ORANGE,
    "cache": VERMILLION,
    "router": PURPLE,
    "experts": GREEN,
    "norm": GREY,
    "mtp": SKY,
    "head": BLUE,
}
PARTS = tuple(COLOURS)


@styled
def model_map(config: ModelConfig, lit: Iterable[str] = PARTS) -> Figure:
    """The map of a model of this config; ``lit`` names the parts that keep their colour."""
    unknown = set(lit) - set(PARTS)
    if unknown:
        raise ValueError(f"no such part: {sorted(unknown)}; there are {PARTS}")
    figure, axes = new_figure(11, 6.6)
    axes.set(xlim=(0, 110), ylim=(0, 66))
    axes.axis("off")
    page = _Page(axes, set(lit))
    _whole(page, config)
    _attention(page, config)
    _experts(page, config)
    return figure


class _Page:
    """Boxes and arrows on axes of 110 x 66; a box is given by its centre."""

    def __init__(self, axes, lit: set[str]):
        self.axes, self.lit = axes, lit

    def box(self, x, y, width, height, text, part, size=8):
        colour = COLOURS[part] if part in self.lit else GREY
        face = colour + ("38" if part in self.lit else "10")
        self.axes.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                facecolor=face,
                edgecolor=colour,
                linewidth=1.4,
                boxstyle="round,pad=0,rounding_size=0.7",
            )
        )
        self.text(x, y, text, size, BLACK if part in self.lit else GREY)

    def text(self, x, y, text, size=8, colour=BLACK, **options):
        self.axes.text(
            x,
            y,
            text,
            **{
                "fontsize": size,
                "color": colour,
                "ha": "center",
                "va": "center",
                "linespacing": 1.25,
                **options,
            },
        )

    def arrow(self, *points, colour=BLACK):
        """Straight strokes through the points, with a head at the last one."""
        self.axes.plot(*zip(*points[:-1]), color=colour, linewidth=1.1, solid_joinstyle="miter")
        self.axes.annotate(
            "",
            points[-1],
            points[-2],
            arrowprops=dict(
                arrowstyle="-|>",
                color=colour,
                linewidth=1.1,
                shrinkA=0,
                shrinkB=0,
                mutation_scale=8,
            ),
        )

    def plus(self, x, y):
        self.text(
            x, y, "+", 10, bbox=dict(boxstyle="circle,pad=0.12", facecolor="white", edgecolor=BLACK)
        )

    def panel(self, left, right, title):
        self.axes.add_patch(
            Rectangle(
                (left, 0.5), right - left, 65, facecolor="none", edgecolor=LIGHT, linewidth=1.5
            )
        )
        self.text(left + 1.2, 63.4, title, 10, ha="left", weight="bold")


def _whole(page: _Page, c: ModelConfig) -> None:
    """Left: tokens to logits, and the MTP modules behind the final norm."""
    page.panel(0.5, 36, "The model")
    x = 10.5
    dense = min(c.first_k_dense_replace, c.num_hidden_layers)
    rows = [
        (6, f"embed  {c.vocab_size:,} × {c.hidden_size:,}", "embed"),
        (29, f"{c.num_hidden_layers - dense} ×\nattention\n+ experts", "experts"),
        (41, "norm", "norm"),
        (49, f"head  {c.hidden_size:,} × {c.vocab_size:,}", "head"),
    ]
    if dense:
        rows.insert(1, (16.5, f"{dense} ×\nattention\n+ dense", "attention"))
    tall = {"experts": 8, "attention": 8}
    page.text(x, 1.8, "tokens (b, s)", 8)
    below = 2.7
    for y, text, part in rows:
        height = tall.get(part, 4)
        page.arrow((x, below), (x, y - height / 2))
        page.box(x, y, 17, height, text, part)
        below = y + height / 2
    page.arrow((x, below), (x, 55.3))
    page.text(x, 57.5, f"logits (b, s, {c.vocab_size:,})\nof the next token", 8)
    page.text(x + 0.6, 22.7, f"x (b, s, {c.hidden_size:,})", 7, ha="left")
    if c.num_nextn_predict_layers:
        _mtp(page, c)


def _mtp(page: _Page, c: ModelConfig) -> None:
    x = 28.5
    page.box(x, 27, 12.5, 8, f"MTP × {c.num_nextn_predict_layers}\none more\nlayer", "mtp")
    page.box(x, 16.5, 12.5, 4, "norms, eh_proj", "mtp")
    page.arrow((x, 18.5), (x, 23))
    page.arrow((19, 41), (21.2, 41), (21.2, 16.5), (x - 6.25, 16.5))
    page.arrow((19, 6), (x, 6), (x, 14.5))
    page.text(x + 0.6, 10.5, "embedding\nof the next\ntoken", 7, ha="left")
    page.arrow((x, 31), (x, 49), (19, 49))
    page.text(x + 0.6, 41, "same\nhead", 7, ha="left")
    page.text(x - 0.5, 57.5, "from MTP: of the\ntoken after it", 8)


def _attention(page: _Page, c: ModelConfig) -> None:
    """Middle: latent attention with its cache."""
    page.panel(37, 73, "Attention of a layer (MLA)")
    x, q, kv = 55, 47, 64
    page.text(x, 1.8, f"x (b, s, {c.hidden_size:,})", 8)
    page.box(x, 7, 14, 3.6, "norm", "norm")
    page.arrow((x, 2.7), (x, 5.2))
    page.arrow((x, 8.8), (x, 10.4), (q, 10.4), (q, 12.2))
    page.arrow((x, 10.4), (kv, 10.4), (kv, 12.2))
    heads, width = c.num_attention_heads, f"{c.qk_nope_head_dim} + {c.qk_rope_head_dim}"
    _queries(page, c, q, f"{heads} × ({width})")
    _remembered(page, c, kv)
    page.text(q - 0.2, 30.6, "queries", 7, ha="right")
    page.arrow((q, 28.4), (q, 33))
    page.arrow((kv, 28.4), (kv, 33))
    page.box(
        x,
        37,
        30,
        8,
        f"{heads} heads: softmax over a token and those before it\n"
        "keys and values from the latent by wkv_b\n(expanded, or absorbed into the queries)",
        "attention",
        7,
    )
    page.arrow((x, 41), (x, 46))
    page.box(
        x, 48.2, 15, 4.4, f"wo\n{heads} × {c.v_head_dim} → {c.hidden_size:,}", "attention", 7.5
    )
    page.arrow((x, 50.4), (x, 55.2))
    page.plus(x, 56.3)
    page.arrow((x, 3.8), (38.2, 3.8), (38.2, 56.3), (x - 1.2, 56.3))
    page.arrow((x, 57.4), (x, 60.5))
    page.text(x + 1, 59.4, "u", 8, ha="left")


def _queries(page: _Page, c: ModelConfig, x: float, width: str) -> None:
    """From below: down to the latent and its norm, up to the heads, RoPE on the last part."""
    if c.q_lora_rank is None:
        page.box(x, 16.7, 15, 9, f"wq\n{c.hidden_size:,} → {width}", "attention", 7.5)
    else:
        page.box(
            x, 14.2, 15, 4, f"wq_a, norm\n{c.hidden_size:,} → {c.q_lora_rank:,}", "attention", 7.5
        )
        page.arrow((x, 16.2), (x, 18.3))
        page.box(x, 20.3, 15, 4, f"wq_b\n→ {width}", "attention", 7.5)
    page.arrow((x, 22.3 if c.q_lora_rank else 21.2), (x, 24.4))
    page.box(x, 26.4, 15, 4, f"RoPE\non the last {c.qk_rope_head_dim}", "attention", 7.5)


def _remembered(page: _Page, c: ModelConfig, x: float) -> None:
    """From below: one projection; the latent gets a norm, the key RoPE, neither the other's."""
    latent, key = x - 3.9, x + 3.9
    page.box(
        x,
        14.2,
        15,
        4,
        f"wkv_a\n{c.hidden_size:,} → {c.kv_lora_rank} + {c.qk_rope_head_dim}",
        "attention",
        7.5,
    )
    for place, what, part in (
        (latent, f"norm\nlatent {c.kv_lora_rank}", "norm"),
        (key, f"RoPE\nkey {c.qk_rope_head_dim}", "attention"),
    ):
        page.arrow((place, 16.2), (place, 18.3))
        page.box(place, 20.3, 7.2, 4, what, part, 6.5)
        page.arrow((place, 22.3), (place, 24.4))
    page.box(x, 26.4, 15, 4, f"cache: latent + key\n{c.latent_dim} values a token", "cache", 7.5)


def _experts(page: _Page, c: ModelConfig) -> None:
    """Right: router, routed experts in their groups, the shared expert."""
    page.panel(74, 109.5, "Experts of a layer")
    x = 92.5
    page.text(x, 1.8, f"u (b, s, {c.hidden_size:,})", 8)
    page.box(x, 7, 14, 3.6, "norm", "norm")
    page.arrow((x, 2.7), (x, 5.2))
    page.arrow((x, 8.8), (x, 13.8))
    page.arrow((x, 11), (80.5, 11), (80.5, 27))
    page.box(
        x + 2,
        17,
        22,
        6,
        f"router: {c.num_experts_per_tok} of {c.n_routed_experts},\n"
        f"from {c.topk_group} of {c.n_group} groups",
        "router",
        7.5,
    )
    page.arrow((x + 2, 20), (x + 2, 24.6))
    page.box(
        80.5,
        33.5,
        8.5,
        13,
        f"{c.n_shared_experts} shared\nexpert" + ("s" if c.n_shared_experts > 1 else ""),
        "experts",
        7.5,
    )
    _grid(page, c, left=86.5, right=108, bottom=26, top=41)
    page.text(97.2, 43.2, f"inner width {c.moe_intermediate_size:,} each", 7)
    page.arrow((97.2, 44.6), (97.2, 48.5), (x + 1.2, 48.5))
    page.arrow((80.5, 40), (80.5, 48.5), (x - 1.2, 48.5))
    page.plus(x, 48.5)
    page.text(99, 50.2, "weighted sum", 7)
    page.arrow((x, 49.6), (x, 55.2))
    page.plus(x, 56.3)
    page.arrow((x, 3.8), (75.2, 3.8), (75.2, 56.3), (x - 1.2, 56.3))
    page.arrow((x, 57.4), (x, 60.5))
    page.text(x + 1, 59.4, "x of the next layer", 8, ha="left")


def _grid(page: _Page, c: ModelConfig, left, right, bottom, top) -> None:
    """One column of cells per group; an example of a token's choice is filled."""
    on = "experts" in page.lit
    per_group = c.n_routed_experts // c.n_group
    width, height = (right - left) / c.n_group, (top - bottom) / per_group
    share = -(-c.num_experts_per_tok // c.topk_group)
    chosen = {
        (group, (5 * group + 3 * k) % per_group)
        for group in range(0, 2 * c.topk_group, 2)
        for k in range(share)
    }
    chosen = {(group % c.n_group, row) for group, row in chosen}
    for group in range(c.n_group):
        for row in range(per_group):
            face = (GREEN if on else GREY) if (group, row) in chosen else "white"
            page.axes.add_patch(
                Rectangle(
                    (left + (group + 0.1) * width, bottom + (row + 0.08) * height),
                    0.8 * width,
                    0.84 * height,
                    facecolor=face,
                    edgecolor=GREEN if on else GREY,
                    linewidth=0.6,
                )
            )
