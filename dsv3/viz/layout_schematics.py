"""Chapter 7, drawn: whole clusters, the one that trained DeepSeek-V3 and those that serve it.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed by
``dsv3.costs``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from dsv3.config import ModelConfig
from dsv3.costs import V3_LAYOUT, Layout, stage_layers, training_memory
from dsv3.costs.serving import DEPLOYMENTS, Deployment
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, WIDTH, arrow, bracket, headline, legend, number

PER_NODE = 8
OWN, EXPERTS, NETWORK, OTHER = "blue", "green", "orange", "purple"
STRONG = 0.6

# Training ---------------------------------------------------------------------------------------

_LEFT, _ROW, _HIGH = 108, 18, 14  # of the grid, its rows and boxes


def layout_2048(
    layout: Layout = V3_LAYOUT, home: int = 3, config: ModelConfig | None = None
) -> Scene:
    """All nodes of a training run: stages side by side, in each the groups of nodes that have all
    experts; and the way of one token through the stages, with nodes of its experts in each.

    home: the node of each stage that has the token's micro-batch. Which nodes its experts are on
    is drawn by lot, once for each stage: as many as the config allows.
    """
    config = config or ModelConfig.deepseek_v3()
    nodes, group = layout.dp // PER_NODE, layout.ep // PER_NODE
    if layout.tp > 1 or layout.dp % PER_NODE or layout.ep % PER_NODE:
        raise ValueError(f"whole nodes of {PER_NODE} GPUs and no tensor parallelism, not {layout}")
    if not (2 <= layout.pp <= 16 and 1 <= nodes <= 16 and 0 <= home < nodes):
        raise ValueError(f"2 to 16 stages of 1 to 16 nodes, and one of those as home; not {layout}")
    gap, top = 16, 78
    tops = [top + _ROW * node + gap * (node // group) for node in range(nodes)]
    low = tops[-1] + _ROW
    scene = Scene(WIDTH, low + 74, _layout_alt(layout, config, nodes, home))
    headline(
        scene,
        f"{number(layout.ranks)} GPUs = {layout.pp} stages × {layout.dp}; a box is a node of "
        f"{PER_NODE}",
    )
    _groups(scene, layout, config, tops)
    room = (WIDTH - _LEFT) / layout.pp
    wide = room - 12
    chance = random.Random(0)
    moe = _with_experts(config, layout.pp)
    for stage in range(layout.pp):
        left = _LEFT + room * stage
        middle = left + wide / 2
        scene.text(middle, top - 16, str(stage), anchor="middle", size=SMALL, bold=True)
        if layout.dualpipe:
            opposite = str(layout.pp - 1 - stage)
            scene.text(middle, top - 32, opposite, anchor="middle", size=SMALL, fill="soft")
        first = home // group * group
        others = [node for node in range(first, first + group) if node != home]
        lit = chance.sample(others, min(config.topk_group, len(others))) if moe[stage] else []
        for node, y in enumerate(tops):
            colour = OWN if node == home else EXPERTS if node in lit else None
            look = {"fill": colour, "opacity": STRONG, "stroke": colour} if colour else {}
            scene.rect(
                left, y, wide, _HIGH, rounded=2, **(look or {"fill": "pale", "stroke": "line"})
            )
        _sent(scene, left + wide, [tops[home]], [tops[node] for node in lit])
        if stage < layout.pp - 1:
            y = tops[home] + _HIGH / 2
            arrow(scene, (left + wide, y), (left + room, y), colour=OWN, width=2)
    scene.text(_LEFT - 12, top - 16, "stage", anchor="end", size=SMALL, bold=True)
    if layout.dualpipe:
        scene.text(_LEFT - 12, top - 32, "DualPipe, also", anchor="end", size=SMALL, fill="soft")
    legend(
        scene,
        _LEFT,
        low + 18,
        [
            (OWN, STRONG, "the token's own node"),
            (EXPERTS, STRONG, "nodes of its experts in one layer (at random here)"),
            (NETWORK, STRONG, "sent between nodes"),
        ],
    )
    for line, words in enumerate(_on_each(layout, config)):
        scene.text(_LEFT, low + 46 + 18 * line, words, fill="soft")
    return scene


def _groups(scene: Scene, layout: Layout, config: ModelConfig, tops: Sequence[float]) -> None:
    """Brackets around the nodes that have all experts of a layer between them."""
    size = layout.ep // PER_NODE
    for first in range(0, len(tops), size):
        words = f"{layout.ep} GPUs\nwith all {config.n_routed_experts}\nexperts"
        last = tops[first + size - 1] + _HIGH
        bracket(scene, tops[first], last, _LEFT - 6, words if size > 2 else "", "left")


def _with_experts(config: ModelConfig, pp: int) -> list[bool]:
    return [any(config.is_moe(layer) for layer in layers) for layers in stage_layers(config, pp)]


def _sent(scene: Scene, x: float, start: Sequence[float], ends: Sequence[float]) -> None:
    """Copies from a node to others of its column: a line beside it, with a stub to each."""
    if not ends:
        return
    heights = [y + _HIGH / 2 for y in (*start, *ends)]
    scene.line((x + 5, min(heights)), (x + 5, max(heights)), stroke=NETWORK, stroke_width=2)
    for y in heights:
        scene.line((x, y), (x + 5, y), stroke=NETWORK, stroke_width=2)


def _on_each(layout: Layout, config: ModelConfig) -> tuple[str, ...]:
    """What a GPU has, in lines."""
    totals = [memory.total / 1e9 for memory in training_memory(config, layout)]
    least, most = f"{min(totals):.0f}", f"{max(totals):.0f}"
    amount = least if least == most else f"{least} to {most}"
    layers = [len(layers) for layers in stage_layers(config, layout.pp)]
    each = config.n_routed_experts // layout.ep
    several = f"{min(layers)} or {max(layers)}" if min(layers) < max(layers) else f"{max(layers)}"
    sharing = f"With ZeRO-{layout.zero}" if layout.zero else "Without ZeRO"
    return (
        f"A stage has {several} layers; each GPU has {each} of the {config.n_routed_experts} "
        "experts of every layer, and all the rest of it.",
        f"{sharing} that is {amount} GB for each GPU before the first activation.",
    )


def _layout_alt(layout: Layout, config: ModelConfig, nodes: int, home: int) -> str:
    others = min(config.topk_group, layout.ep // PER_NODE - 1)
    without = [str(stage) for stage, moe in enumerate(_with_experts(config, layout.pp)) if not moe]
    return (
        f"A grid of {layout.pp * nodes} nodes of {PER_NODE} GPUs: {layout.pp} stages side by side, "
        f"{nodes} nodes in each. Every {layout.ep // PER_NODE} nodes of a stage have all "
        f"{config.n_routed_experts} experts between them. A token passes all stages on node {home} "
        f"of each and is sent to {others} of the other nodes of its group in every stage with "
        "experts"
        + (f"; stage {' and '.join(without)} has none. " if without else ". ")
        + " ".join(_on_each(layout, config))
    )


# Serving ----------------------------------------------------------------------------------------

_GPU = 13


def prefill_decode(
    deployments: Sequence[Deployment] = DEPLOYMENTS, config: ModelConfig | None = None
) -> Scene:
    """GPUs that read prompts and GPUs that write answers, as published at two dates.

    deployments: pairs of one for prefill and one for decoding.
    """
    config = config or ModelConfig.deepseek_v3()
    pairs = list(zip(deployments[::2], deployments[1::2]))
    if not pairs or len(deployments) % 2 or max(one.nodes for one in deployments) > 40:
        raise ValueError("pairs of deployments of 40 nodes or fewer")
    tall = 206
    scene = Scene(
        WIDTH,
        tall * len(pairs) - 4,
        "Nodes of eight GPUs as columns. "
        + " ".join(
            f"{one.name}, {one.source}: {', '.join(_words(one, config))}." for one in deployments
        )
        + " From prefill to decoding the latents of a prompt are sent.",
    )
    for place, (prefill, decoding) in enumerate(pairs):
        y = tall * place
        if place:
            scene.line((0, y - 8), (WIDTH, y - 8), stroke="line")
        headline(scene, prefill.source.split(", ")[-1], y + 10)
        for one, x in ((prefill, 0), (decoding, 240)):
            scene.text(x, y + 36, one.name, bold=True)
            _gpus(scene, x, y + 48, one, config)
            words = _words(one, config)
            wide = _GPU * one.nodes
            if wide > 400:
                for line, part in enumerate((words[:3], words[3:])):
                    text = "; ".join(part)
                    scene.text(x, y + 168 + 17 * line, text, size=SMALL, fill="soft")
                continue
            for line, text in enumerate(words):
                scene.text(x + wide + 12, y + 57 + 17 * line, text, size=SMALL, fill="soft")
        arrow(scene, (70, y + 36), (232, y + 36), label="latents", colour=NETWORK)
    legend(
        scene,
        0,
        scene.height - 8,
        [
            (OWN, STRONG, "a GPU with experts"),
            (OTHER, STRONG, "a GPU with copies of busy experts or the shared one only"),
        ],
    )
    return scene


def _gpus(scene: Scene, x: float, y: float, one: Deployment, config: ModelConfig) -> None:
    apart = one.spare(config) if one.slots == 1 and not one.shared else 0
    for gpu in range(one.gpus):
        node, local = divmod(gpu, PER_NODE)
        colour = OTHER if gpu >= one.gpus - apart else OWN
        scene.rect(
            x + _GPU * node, y + _GPU * local, _GPU - 2, _GPU - 2, fill=colour, opacity=STRONG
        )


def _words(one: Deployment, config: ModelConfig) -> tuple[str, ...]:
    """A deployment in lines."""
    spare, experts = one.spare(config), config.n_routed_experts
    attention = f"TP{one.tp} × DP{one.dp}" if one.tp > 1 else f"DP{one.dp}"
    if one.slots == 1 and not one.shared:
        held = (f"one expert each: {experts} routed, {spare} copies and shared",)
    else:
        shared = " + shared" if one.shared else ""
        held = (f"{one.slots} experts{shared} on each", f"{experts} routed, {spare} copies")
    return (
        f"{one.nodes} nodes, {one.gpus} GPUs",
        f"attention {attention}",
        f"experts EP{one.gpus}",
        *held,
        one.source.split(", ")[0],
    )
