"""Chapter 7, drawn: nodes of eight GPUs, the two networks that join them, and what tokens pay.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed. In all of them
NVLink is blue and InfiniBand orange.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.config import ModelConfig
from dsv3.costs.experts import (
    REPORT_LINKS,
    Links,
    combine_bytes,
    dispatch_bytes,
    experts_at_no_cost,
)
from dsv3.parallel.traffic import BETWEEN, INSIDE, Topology, Traffic
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, WIDTH, Box, arrow, bracket, headline, legend, number

LINK = {INSIDE: "blue", BETWEEN: "orange"}
NAME = {INSIDE: "NVLink", BETWEEN: "InfiniBand"}
PER_NODE = 8
STRONG = 0.6  # tint of a GPU that has something to do

# Two networks -----------------------------------------------------------------------------------


def _speed(links: Links, link: str) -> str:
    rate = links.inside if link == INSIDE else links.between
    return f"{NAME[link]}, {number(rate / 1e9)} GB/s for each GPU"


def two_networks(links: Links = REPORT_LINKS, config: ModelConfig | None = None) -> Scene:
    """Two nodes of eight GPUs, the fast network inside each and the slow one between them; lines
    are as wide as they are fast. Below, how long a token's bytes take on either."""
    config = config or ModelConfig.deepseek_v3()
    size = dispatch_bytes(config)
    times = {INSIDE: 1e9 * size / links.inside, BETWEEN: 1e9 * size / links.between}
    scene = Scene(
        WIDTH,
        326,
        f"Two nodes of {PER_NODE} GPUs. Inside each, all are joined by {_speed(links, INSIDE)}; "
        f"every GPU also has its own line to the network between nodes, "
        f"{_speed(links, BETWEEN)}, {number(links.ratio)} times slower. A token of {number(size)} "
        f"bytes takes {times[INSIDE]:.0f} ns on the one and {times[BETWEEN]:.0f} on the other.",
    )
    wide, unit = 366, 2.2e-11  # pixels of a line for a byte a second
    for node in (0, 1):
        left = (WIDTH - wide) * node
        scene.rect(left, 0, wide, 138, rounded=6, fill="paper", stroke="line")
        scene.text(left + 12, 14, f"node {node}", bold=True)
        middles = [left + wide * (gpu + 0.5) / PER_NODE for gpu in range(PER_NODE)]
        for x in middles:
            scene.line(
                (x, 54), (x, 86), stroke=LINK[INSIDE], stroke_width=unit * links.inside * 1.8
            )
            scene.line(
                (x, 116), (x, 166), stroke=LINK[BETWEEN], stroke_width=unit * links.between * 1.8
            )
        scene.rect(left + 4, 30, wide - 8, 26, rounded=4, fill=LINK[INSIDE])
        scene.text(
            left + wide / 2, 43, _speed(links, INSIDE), anchor="middle", fill="white", bold=True
        )
        for gpu, x in enumerate(middles):
            scene.rect(x - 19, 84, 38, 36, rounded=3, fill="paper")
            scene.rect(x - 19, 84, 38, 36, rounded=3, fill="pale", stroke="ink")
            for line, words in enumerate(("GPU", str(gpu))):
                scene.text(x, 95 + 14 * line, words, anchor="middle", size=SMALL)
    scene.rect(4, 164, WIDTH - 8, 26, rounded=4, fill=LINK[BETWEEN])
    scene.text(WIDTH / 2, 177, _speed(links, BETWEEN), anchor="middle", bold=True)
    scene.text(0, 222, f"How long a token of {number(size)} bytes takes", bold=True)
    for row, link in enumerate((INSIDE, BETWEEN)):
        y = 240 + 30 * row
        scene.text(0, y + 10, NAME[link])
        length = 480 * times[link] / times[BETWEEN]
        scene.rect(90, y, length, 20, fill=LINK[link], opacity=STRONG, stroke=LINK[link])
        longer = f", {number(links.ratio)} × as long" if link == BETWEEN else ""
        scene.text(98 + length, y + 10, f"{times[link]:.0f} ns{longer}", bold=True)
    scene.text(0, 316, f"speeds: {links.source}", size=SMALL, fill="soft")
    return scene


def experts_for_free(config: ModelConfig | None = None, links: Links = REPORT_LINKS) -> Scene:
    """How many copies NVLink forwards while InfiniBand carries one to each node: the experts that
    a token has, and those it could have at the same cost."""
    config = config or ModelConfig.deepseek_v3()
    nodes, chosen = config.topk_group, config.num_experts_per_tok
    free = experts_at_no_cost(config, links)
    if not chosen <= free <= 40:
        raise ValueError(f"from {chosen} to 40 experts at no cost, not {number(free)}")
    left, top, high = 112, 52, 34
    slot = (WIDTH - left) / nodes
    scene = Scene(
        WIDTH,
        206,
        f"Two rows over the same time. Above, InfiniBand carries a copy to each of {nodes} nodes. "
        f"Below, NVLink has time to forward {number(links.ratio)} copies for each of them, "
        f"{number(free)} in all; the {chosen} that the token needs are filled.",
    )
    headline(scene, f"One copy to each of {nodes} nodes, while NVLink could forward {number(free)}")
    for row, link in enumerate((BETWEEN, INSIDE)):
        scene.text(0, top + row * (high + 22) + high / 2, NAME[link])
    needed = [chosen // nodes + (node < chosen % nodes) for node in range(nodes)]
    for node in range(nodes):
        x = left + slot * node
        look = {"fill": LINK[BETWEEN], "opacity": STRONG, "stroke": LINK[BETWEEN]}
        scene.rect(x + 2, top, slot - 4, high, **look)
        words = f"to node {chr(65 + node)}"
        scene.text(x + slot / 2, top + high / 2, words, anchor="middle")
        y, step, at = top + high + 22, (slot - 4) / links.ratio, 0.0
        while at < links.ratio - 1e-9:
            width = min(1.0, links.ratio - at) * step
            used = at < needed[node]
            colour = LINK[INSIDE]
            scene.rect(
                x + 2 + at * step,
                y,
                width,
                high,
                fill=colour if used else "paper",
                opacity=STRONG if used else None,
                stroke=colour,
            )
            at += 1
        words = f"{number(links.ratio)} experts"
        bracket(scene, x + 2, x + slot - 2, y + high + 4, words, "below")
    y = top + 2 * high + 22 + 54
    legend(scene, left, y, [(LINK[INSIDE], STRONG, f"the {chosen} that are chosen")])
    scene.rect(left + 220, y - 6, 12, 12, rounded=2, stroke=LINK[INSIDE])
    scene.text(left + 238, y, "at no cost", size=SMALL, fill="soft")
    about = "" if free == round(free) else f", about {round(free)}"
    words = f"{nodes} × {number(links.ratio)} = {number(free)} experts{about}"
    scene.text(WIDTH, y, words, anchor="end", bold=True)
    return scene


# A token's way to its experts -------------------------------------------------------------------

# Of the 256 experts on 64 GPUs, four on each: eight on four nodes, as the router chooses them.
CHOSEN = (35, 44, 59, 101, 117, 142, 201, 222)
_GPU = 20  # width of one in a node


def dispatch_between_nodes(
    experts: Sequence[int] = CHOSEN, home: int = 3, config: ModelConfig | None = None
) -> Scene:
    """A token's way to its experts and back: a copy for each expert; a copy for each node, which
    is forwarded inside; and the results, summed on each node before they return.

    experts: those that the router chose, on 1 to 4 nodes other than the token's; home: its GPU.
    """
    config = config or ModelConfig.deepseek_v3()
    topology = Topology(8 * PER_NODE, PER_NODE)
    each = config.n_routed_experts // topology.ranks
    gpus = sorted({expert // each for expert in experts})
    nodes = sorted({topology.node(gpu) for gpu in gpus})
    if not 1 <= len(nodes) <= 4 or topology.node(home) in nodes:
        raise ValueError(f"experts on 1 to 4 nodes other than the token's, not on {nodes}")
    there, back = dispatch_bytes(config), combine_bytes(config)
    counts = [Traffic(topology) for _ in range(3)]
    for gpu in gpus:
        counts[0].count(home, gpu, there)
    for node in nodes:
        gate = topology.rank(node, topology.local(home))
        counts[1].count(home, gate, there)
        counts[2].count(gate, home, back)
        for gpu in (gpu for gpu in gpus if topology.node(gpu) == node):
            counts[1].count(gate, gpu, there)
            counts[2].count(gpu, gate, back)
    titles = (
        "a copy for each expert's GPU",
        "a copy for each node",
        "and back: one sum for each node",
    )
    tall = 204
    scene = Scene(
        WIDTH, 3 * tall - 18, _dispatch_alt(experts, nodes, topology, home, counts, titles)
    )
    for place, (title, traffic) in enumerate(zip(titles, counts)):
        y = tall * place
        if place:
            scene.line((0, y - 12), (WIDTH, y - 12), stroke="line")
        headline(scene, title, y + 10)
        size = back if place == 2 else there
        for line, link in enumerate((BETWEEN, INSIDE)):
            sent = traffic.messages[link]
            words = f"{NAME[link]}: {sent} × {number(size)} = {number(traffic.bytes[link])} bytes"
            if sent:
                scene.rect(0, y + 30 + 20 * line, 12, 12, fill=LINK[link], opacity=STRONG)
                scene.text(18, y + 36 + 20 * line, words, size=SMALL)
        _way(scene, y, topology, home, gpus, nodes, place, size)
    return scene


def _way(
    scene: Scene, y: float, topology: Topology, home: int, gpus, nodes, place: int, size: int
) -> None:
    """One frame: the token's node above, those of its experts below, and arrows."""
    wide, pitch = _GPU * PER_NODE + 12, (WIDTH - _GPU * PER_NODE - 12) / 3
    source = _node(scene, 470, y + 30, topology.node(home), {topology.local(home)}, "purple", False)
    start = source[topology.local(home)]
    left = (3 - (len(nodes) - 1)) * pitch / 2
    for column, node in enumerate(nodes):
        lit = {topology.local(gpu) for gpu in gpus if topology.node(gpu) == node}
        places = _node(scene, left + pitch * column + wide / 2, y + 136, node, lit, "green")
        gate = places[topology.local(home)]
        if place == 0:
            for local in sorted(lit):
                arrow(scene, start.bottom, places[local].top, colour=LINK[BETWEEN])
            continue
        ends = (start.bottom, gate.top) if place == 1 else (gate.top, start.bottom)
        arrow(scene, *ends, colour=LINK[BETWEEN], width=2.4)
        if node == nodes[-1]:
            middle = ((start.x + gate.x) / 2, (start.bottom[1] + gate.top[1]) / 2)
            words = f"{number(size)} bytes each"
            scene.text(middle[0] + 12, middle[1] - 8, words, size=SMALL, fill="soft")
        for local in sorted(lit - {topology.local(home)}):
            target, low = places[local], gate.bottom[1] + 14
            path = [gate.bottom, (gate.x, low), (target.x, low), target.bottom]
            arrow(scene, *(path if place == 1 else path[::-1]), colour=LINK[INSIDE])


def _node(
    scene: Scene, x: float, y: float, node: int, lit: set[int], colour: str, below=True
) -> list[Box]:
    """Eight GPUs in a frame, centred on (x, y); the lit ones in a colour. below: its number is
    under it, else beside it."""
    width = _GPU * PER_NODE
    label = (x - width / 2 - 4, y + 40) if below else (x + width / 2 + 12, y)
    scene.rect(x - width / 2 - 6, y - 18, width + 12, 36, rounded=5, fill="paper", stroke="line")
    scene.text(*label, f"node {node}", size=SMALL, fill="soft")
    places = []
    for local in range(PER_NODE):
        middle = x - width / 2 + _GPU * (local + 0.5)
        look = (
            {"fill": colour, "opacity": STRONG, "stroke": colour}
            if local in lit
            else {"fill": "pale", "stroke": "line"}
        )
        scene.rect(middle - _GPU / 2 + 1.5, y - 12, _GPU - 3, 24, rounded=2, **look)
        scene.text(middle, y, str(local), anchor="middle", size=SMALL)
        places.append(Box(middle, y, _GPU - 3, 24))
    return places


def _dispatch_alt(experts, nodes, topology, home, counts, titles) -> str:
    frames = "; ".join(
        f"{title}: "
        + ", ".join(
            f"{traffic.messages[link]} messages of {number(traffic.bytes[link])} bytes over "
            f"{NAME[link]}"
            for link in (BETWEEN, INSIDE)
            if traffic.messages[link]
        )
        for title, traffic in zip(titles, counts)
    )
    return (
        f"A token on GPU {topology.local(home)} of node {topology.node(home)} has {len(experts)} "
        f"experts on {len(nodes)} nodes, {', '.join(map(str, nodes))}. Three frames. {frames}. "
        "Between nodes a message goes to the GPU with the same number; inside it is forwarded."
    )
