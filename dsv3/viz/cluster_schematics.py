"""Chapter 7, drawn: nodes of eight GPUs, the two networks that join them, and what tokens pay.

Each function returns a ``Scene`` for ``viz.draw``; the numbers on it are computed. In all of them
NVLink is blue and InfiniBand orange.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv3.config import ModelConfig
from dsv3.parallel.traffic import BETWEEN, INSIDE, Topology, Traffic
from dsv3.viz.scene import Scene
from dsv3.viz.schematic import SMALL, WIDTH, Box, arrow, headline, number

LINK = {INSIDE: "blue", BETWEEN: "orange"}
NAME = {INSIDE: "NVLink", BETWEEN: "InfiniBand"}
SPEED = {INSIDE: 160e9, BETWEEN: 50e9}  # bytes a second and GPU (TR 3.2.2)
PER_NODE = 8
STRONG = 0.6  # tint of a GPU that has something to do

# A token's way to its experts -------------------------------------------------------------------

# Of the 256 experts on 64 GPUs, four on each: eight on four nodes, as the router chooses them.
CHOSEN = (35, 44, 59, 101, 117, 142, 201, 222)
_GPU = 20  # width of one in a node


def token_bytes(config: ModelConfig) -> tuple[int, int]:
    """What one token is on the way to an expert, in FP8 with a scale of 4 bytes per tile of 128,
    and on the way back, in BF16 (TR 3.3.3): 7,392 and 14,336 bytes for the released width."""
    tiles = -(-config.hidden_size // 128)
    return config.hidden_size + 4 * tiles, 2 * config.hidden_size


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
    there, back = token_bytes(config)
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
