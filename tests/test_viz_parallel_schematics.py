"""Chapter 7's schematics: what they say of ranks, bytes and sums is right.

That nothing on them is cut or covered is held for all schematics in ``test_viz_schematics``.
"""

import queue
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig
from dsv3.costs import REPORT, V3_LAYOUT, Layout, training_memory
from dsv3.costs.experts import EFFECTIVE_LINKS, combine_bytes, dispatch_bytes
from dsv3.fp8 import quantize_activation
from dsv3.parallel import collectives
from dsv3.parallel.timeline import Durations
from dsv3.viz import cluster_schematics as cluster
from dsv3.viz import cut_schematics as cut
from dsv3.viz import layout_schematics as layouts
from dsv3.viz import parallel_schematics as parallel
from dsv3.viz import pipeline_schematics as pipeline
from dsv3.viz import shard_schematics as shard
from dsv3.viz.scene import Line, Rect, Scene, Text

MINI = Path(__file__).parents[1] / "assets" / "dsv3-mini"


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, Text)]


def rects(scene: Scene, **look) -> list[Rect]:
    return [
        mark
        for mark in scene.marks
        if isinstance(mark, Rect) and all(getattr(mark, k) == v for k, v in look.items())
    ]


# Collectives ------------------------------------------------------------------------------------


class Threads(collectives.Mail):
    """Messages between threads: the package's collectives without processes."""

    def __init__(self, rank: int, size: int, boxes: list[queue.Queue]):
        self.rank, self.size, self.boxes = rank, size, boxes

    def send(self, x, to):
        self.boxes[to].put((self.rank, x.clone()))

    def receive(self, like, source):
        sender, x = self.boxes[self.rank].get(timeout=20)
        assert sender == source
        return x

    def swap(self, x, to, like, source):
        if to == source == self.rank:
            return x.clone()
        self.send(x, to)
        return self.receive(like, source)


def on_ranks(run, size: int = 4) -> list[torch.Tensor]:
    boxes, results = [queue.Queue() for _ in range(size)], [torch.empty(0)] * size

    def rank(number: int) -> None:
        results[number] = run(Threads(number, size, boxes))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def test_what_the_picture_has_afterwards_is_what_the_package_computes():
    whole = torch.tensor(parallel.vectors())
    run = {
        "broadcast": lambda mail: collectives.broadcast(mail, whole[mail.rank]),
        "all-reduce": lambda mail: collectives.all_reduce(mail, whole[mail.rank].clone()),
        "reduce-scatter": lambda mail: collectives.reduce_scatter(mail, whole[mail.rank].clone()),
        "all-gather": lambda mail: collectives.all_gather(
            mail, whole[mail.rank][mail.rank :][:1], whole[0]
        ),
    }
    for name, collective in run.items():
        _, after = parallel.collective(name)
        got = [row.tolist() for row in on_ranks(collective)]
        assert got == [[value for value in row if value is not None] for row in after], name
    _, after = parallel.collective("all-to-all")
    assert torch.tensor(after).equal(whole.T)
    with pytest.raises(ValueError, match="no such collective: 'gossip'"):
        parallel.collective("gossip")


def test_what_a_rank_sends_stands_under_each_collective():
    shown = texts(parallel.collectives())
    assert shown.count("a rank sends 3/4 of a vector") == 3
    assert shown.count("a rank sends 2 · 3/4 of a vector") == 1  # all-reduce: both its halves
    assert shown.count("a rank sends 3/4 of a vector on average") == 1
    assert "1,111" in shown and "4,444" in shown


def test_the_ring_moves_one_chunk_a_rank_and_ends_in_the_sums():
    steps = parallel.ring_steps()
    assert len(steps) == 6
    total = [1111, 2222, 3333, 4444]
    before = parallel.vectors()
    for moves, held in steps:
        assert sorted(target for target, _ in moves) == [0, 1, 2, 3]
        changed = {(r, c) for r in range(4) for c in range(4) if held[r][c] != before[r][c]}
        assert changed <= set(moves)  # nothing changes without a message
        before = held
    assert all(steps[2][1][rank][rank] == total[rank] for rank in range(4))  # reduce-scatter
    assert before == [total] * 4
    shown = parallel.ring_all_reduce()
    heavy = rects(shown, stroke_width=2.4)
    assert len(heavy) == 6 * 4  # a received chunk for each rank in each step
    assert texts(shown).count("4,444") == sum(
        held[r].count(4444) for _, held in steps for r in range(4)
    )


def test_the_ranks_take_the_mean_of_their_gradients():
    shown = texts(parallel.data_parallel(gradients=((4, 0), (2, -2), (0, 4), (3, 2))))
    assert shown.count("(2.25, 1)") == 4
    assert len({text for text in shown if text.startswith("rank ")}) == 4
    with pytest.raises(ValueError, match="2 to 4 windows"):
        parallel.data_parallel((("a",),), ((1,),))


# Cuts -------------------------------------------------------------------------------------------


def test_both_cuts_are_worked_out_as_torch_does():
    x, a, b = (torch.tensor(m).double() for m in (cut.X, cut.FIRST, cut.SECOND))
    y = (x @ a).relu() @ b
    wrong = (x[:1] @ a[:1]).relu() + (x[1:] @ a[1:]).relu()
    assert not wrong.equal((x @ a).relu())  # or the picture would show nothing
    scene = cut.column_row_cut()
    assert f"one sum gives ({y[0]:.0f}, {y[1]:.0f})" in scene.alt
    assert "(" + ", ".join(f"{v:.0f}" for v in wrong) + ")" in scene.alt
    red = rects(scene, fill="vermillion")
    assert len(red) == 4
    values = [
        m.text
        for m in scene.marks
        if isinstance(m, Text) and m.y == red[0].y + red[0].height / 2 and m.x > red[0].x
    ]
    assert values == [f"{v:.0f}" for v in wrong]
    with pytest.raises(ValueError, match="2 by 4"):
        cut.column_row_cut((1, 2, 3))


def test_a_bias_before_the_sum_is_in_it_twice():
    x, a, b = (torch.tensor(m).double() for m in (cut.X, cut.FIRST, cut.SECOND))
    y, bias = (x @ a).relu() @ b, torch.tensor([7.0, -30.0]).double()
    scene = cut.where_bias_goes((7, -30))
    for fill, right in (("vermillion", y + 2 * bias), ("green", y + bias)):
        cells = rects(scene, fill=fill)
        got = [
            m.text
            for cell in cells
            for m in scene.marks
            if isinstance(m, Text) and cell.x < m.x < cell.x + cell.width
            if cell.y < m.y < cell.y + cell.height
        ]
        assert got == [f"{v:.0f}".replace("-", "−") for v in right]


# Shards -----------------------------------------------------------------------------------------


def test_671_billion_parameters_fill_134_gpus():
    scene = shard.what_one_gpu_cannot_hold()
    weights = [t for t in layout(ModelConfig.deepseek_v3()) if t.part == "main" and not t.scale_of]
    needed = 16 * sum(tensor.numel for tensor in weights) / 80e9
    assert f"on GPUs of 80 GB: {needed:.1f} of them" in texts(scene)
    assert "671 billion parameters × 16 bytes = 10.7 TB" in texts(scene)
    gpus = rects(scene, fill="paper")
    assert len(gpus) == 135  # the last hardly begun
    filled = {
        colour: sum(m.width for m in rects(scene, fill=colour, opacity=0.6))
        for colour in ("blue", "orange", "green", "purple")
    }
    box = gpus[0].width
    assert sum(filled.values()) / box == pytest.approx(needed)
    assert filled["purple"] == pytest.approx(4 * filled["blue"])
    small = ModelConfig.from_pretrained(MINI)
    with pytest.raises(ValueError, match="2 to 270 GPUs"):
        shard.what_one_gpu_cannot_hold(small)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_zero_keeps_what_the_costs_say(ranks):
    """The bars against ``costs``, for a model whose ranks hold the same weights."""
    config = ModelConfig.from_pretrained(MINI)
    scene = shard.zero_shards(ranks, REPORT)
    bars = [m for m in rects(scene, height=30) if m.fill != "pale"]
    assert len(bars) == 4 * 4 * ranks
    one = training_memory(config, Layout(), REPORT)[0]
    unit = sum(m.width for m in bars[:4]) / one.total
    tops = sorted({m.y for m in bars})
    for zero, top in enumerate(tops):
        memory = training_memory(config, Layout(dp=ranks, zero=zero), REPORT)[0]
        row = [m for m in bars if m.y == top]
        for colour, part in zip(
            ("blue", "orange", "green", "purple"),
            (memory.weights, memory.gradients, memory.master, memory.moments),
        ):
            own = [m for m in row if m.fill == colour]
            assert [m.width for m in own] == pytest.approx([part * unit] * ranks)
    with pytest.raises(ValueError, match="2 to 4 ranks"):
        shard.zero_shards(1)


def test_the_shards_of_all_ranks_make_up_the_whole():
    scene = shard.zero_shards(4)
    pale = rects(scene, fill="pale", height=30)
    for colour, place in (("blue", 0), ("orange", 1), ("green", 2), ("purple", 3)):
        last = rects(scene, fill=colour, height=30)[-4:]  # ZeRO-3
        frames = pale[-16:][place::4]
        inside = [(m.x - f.x, m.x - f.x + m.width) for m, f in zip(last, frames)]
        assert inside[0][0] == 0 and inside[-1][1] == pytest.approx(frames[0].width)
        assert all(a[1] == pytest.approx(b[0]) for a, b in pairwise(inside))


# Experts between nodes --------------------------------------------------------------------------


def test_a_token_is_as_many_bytes_as_its_codes_and_scales():
    config = ModelConfig.deepseek_v3()
    there, back = dispatch_bytes(config), combine_bytes(config)
    token = quantize_activation(torch.ones(1, config.hidden_size))
    assert there == token.data.nbytes + token.scale.nbytes == 7392
    assert back == torch.ones(config.hidden_size, dtype=torch.bfloat16).nbytes == 14336


def arrows(scene: Scene, colour: str, top: float, bottom: float) -> int:
    return sum(
        isinstance(m, Line) and m.stroke == colour and all(top < y < bottom for _, y in m.points)
        for m in scene.marks
    )


@pytest.mark.parametrize(
    ("experts", "home", "copies", "nodes", "inside"),
    [
        (cluster.CHOSEN, 3, 8, 4, 6),
        # Two experts on one GPU are one copy; one of a node's is where the copy arrives.
        ((32, 33, 36, 40, 64, 68, 96, 128), 0, 7, 4, 3),
        ((32, 36, 40, 44, 48, 52, 56, 60), 7, 8, 1, 7),
    ],
)
def test_a_copy_for_each_node_and_forwarding_inside(experts, home, copies, nodes, inside):
    scene = cluster.dispatch_between_nodes(experts, home)
    shown = texts(scene)
    for words in (
        f"InfiniBand: {copies} × 7,392 = {copies * 7392:,} bytes",
        f"InfiniBand: {nodes} × 7,392 = {nodes * 7392:,} bytes",
        f"NVLink: {inside} × 7,392 = {inside * 7392:,} bytes",
        f"InfiniBand: {nodes} × 14,336 = {nodes * 14336:,} bytes",
        f"NVLink: {inside} × 14,336 = {inside * 14336:,} bytes",
    ):
        assert shown.count(words) == 1, words
    frames = [m.points[0][1] for m in scene.marks if isinstance(m, Line) and m.stroke == "line"]
    edges = [0, *frames, scene.height]
    drawn = [
        (arrows(scene, "orange", *span), arrows(scene, "blue", *span)) for span in pairwise(edges)
    ]
    assert drawn == [(copies, 0), (nodes, inside), (nodes, inside)]


def test_experts_on_the_tokens_own_node_are_refused():
    with pytest.raises(ValueError, match="other than the token's"):
        cluster.dispatch_between_nodes((0, 40, 80, 90, 100, 110, 120, 125))
    with pytest.raises(ValueError, match="1 to 4 nodes"):
        cluster.dispatch_between_nodes((40, 80, 100, 140, 180, 220, 230, 231))


def test_lines_and_bars_are_as_the_speeds():
    scene = cluster.two_networks()
    widths = {
        colour: {m.stroke_width for m in scene.marks if isinstance(m, Line) and m.stroke == colour}
        for colour in ("blue", "orange")
    }
    (fast,), (slow,) = widths["blue"], widths["orange"]
    assert fast / slow == pytest.approx(160 / 50)
    short, long = (rects(scene, fill=colour, height=20)[0].width for colour in ("blue", "orange"))
    assert long / short == pytest.approx(3.2)
    shown = texts(scene)
    assert shown.count("NVLink, 160 GB/s for each GPU") == 2 and shown.count("GPU") == 16
    assert "46 ns" in shown and "148 ns, 3.2 × as long" in shown  # 7,392 / 160 and / 50
    other = texts(cluster.two_networks(EFFECTIVE_LINKS))
    assert "InfiniBand, 40 GB/s for each GPU" in other and "185 ns, 4 × as long" in other


def test_the_fast_network_fills_the_time_of_the_slow_one():
    scene = cluster.experts_for_free()
    slots = rects(scene, fill="orange")
    copies = [m for m in rects(scene, height=34) if m.stroke == "blue"]
    assert len(slots) == 4 and sum(m.fill == "blue" for m in copies) == 8
    assert sum(m.width for m in copies) == pytest.approx(sum(m.width for m in slots))
    assert slots[0].width / copies[0].width == pytest.approx(3.2)
    assert "4 × 3.2 = 12.8 experts, about 13" in texts(scene)
    assert "4 × 4 = 16 experts" in texts(cluster.experts_for_free(links=EFFECTIVE_LINKS))
    with pytest.raises(ValueError, match="from 8 to 40"):
        cluster.experts_for_free(links=type(EFFECTIVE_LINKS)(50e9, 50e9, "nowhere"))


# Pipelines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "micro_batches"), [(4, 4), (2, 3), (3, 1)])
def test_bubbles_are_those_of_the_formula(ranks, micro_batches):
    durations = Durations(1, 2.5, 1)
    shown = texts(pipeline.pipeline_cut(ranks, micro_batches, durations))
    for n in {1, micro_batches}:
        # (PP - 1)(F + B) of (PP - 1 + N)(F + B), whatever F and B are
        share = f"{100 * (ranks - 1) / (ranks - 1 + n):.0f}% waiting"
        assert sum(share in text and text.startswith(f"{n} micro") for text in shown) == 1
    scene = pipeline.pipeline_cut(ranks, micro_batches, durations)
    forward = rects(scene, fill="sky", height=24)
    backward = rects(scene, fill="green", height=24)
    assert len(forward) == len(backward) == ranks * sum({1, micro_batches})
    assert backward[0].width / forward[0].width == pytest.approx(2.5)
    red = rects(scene, fill="vermillion", height=24)
    assert len(red) == ranks * len({1, micro_batches})


def test_every_layer_is_in_one_stage():
    shown = texts(pipeline.pipeline_cut())
    spans = [
        tuple(map(int, text.removeprefix("layers ").split(" to ")))
        for text in shown
        if text.startswith("layers ")
    ]
    assert [layer for a, b in spans for layer in range(a, b + 1)] == list(range(61))
    assert "head and MTP" in shown and "states (b, s, 7,168)" in shown


def test_stages_are_where_the_schedules_have_them():
    scene = pipeline.stage_placement()
    stages = [m for m in scene.marks if isinstance(m, Text) and m.text.startswith("stage ")]
    columns = sorted({m.x for m in stages})
    rows: dict[float, list[str]] = {}
    for mark in sorted(stages, key=lambda m: m.x):
        rows.setdefault(mark.y, []).append(mark.text.removeprefix("stage "))
    assert len(columns) == 4
    assert [rows[y] for y in sorted(rows)] == [
        list("0123"),  # 1F1B
        list("0123"),  # DualPipe, one way
        list("3210"),  # and the other
        list("0123"),  # DualPipeV, there
        list("7654"),  # and back
    ]
    assert "each has 2 of 4, so all twice" in texts(scene)
    with pytest.raises(ValueError, match="2 or 4 ranks"):
        pipeline.stage_placement(3)


@pytest.mark.parametrize(("slower", "factor"), [(0, 1), (1, 3), (0, 3)])
def test_nothing_of_an_overlap_begins_before_what_it_needs(slower, factor):
    """Also where one of the streams takes longer, so that the other has to wait for it."""
    parts = [
        replace(part, time=part.time * (factor if part.stream == slower else 1))
        for part in pipeline.PARTS
    ]
    times = pipeline.streams(parts)
    for part in parts:
        for name in part.after:
            assert times[name][1] <= times[part.name][0]
    for stream in (0, 1):
        spans = sorted(times[p.name] for p in parts if p.stream == stream)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    # Each chunk's own order, that of the model: there and back.
    forward = ["dispatch F", "MLP F", "combine F", "attention F"]
    backward = ["MLP B", "dispatch B", "attention B", "combine B"]
    for chunk in (forward, backward):
        assert all(times[a][1] <= times[b][0] for a, b in pairwise(chunk))


def test_overlapped_two_chunks_take_half_the_time():
    scene = pipeline.overlap()
    assert "6 units of time" in texts(scene) and "12 units of time" in texts(scene)
    boxes = rects(scene, height=40)
    last = [max(m.x + m.width for m in boxes if (m.y < 180) == upper) for upper in (True, False)]
    assert (last[1] - boxes[0].x) / (last[0] - boxes[0].x) == pytest.approx(2)
    stuck = (pipeline.Part("MLP B", "B", 0, 1, ("dispatch B",)),) + (
        pipeline.Part("dispatch B", "B", 1, 1, ("MLP B",)),
    )
    with pytest.raises(ValueError, match="wait for each other"):
        pipeline.streams(stuck)


# Clusters ---------------------------------------------------------------------------------------


def test_a_token_passes_all_stages_and_four_nodes_in_each_with_experts():
    scene = layouts.layout_2048()
    nodes = rects(scene, height=14)
    assert len(nodes) * 8 == V3_LAYOUT.ranks == 2048
    columns = sorted({m.x for m in nodes})
    assert len(columns) == 16
    for stage, x in enumerate(columns):
        column = sorted((m for m in nodes if m.x == x), key=lambda m: m.y)
        assert [place for place, m in enumerate(column) if m.fill == "blue"] == [3]
        lit = [place for place, m in enumerate(column) if m.fill == "green"]
        # Layers 0 to 2 are dense and make up the first stage.
        assert len(lit) == (0 if stage == 0 else 4) and all(place < 8 for place in lit)
    memory = [m.total / 1e9 for m in training_memory(ModelConfig.deepseek_v3(), V3_LAYOUT)]
    words = f"With ZeRO-1 that is {min(memory):.0f} to {max(memory):.0f} GB for each GPU"
    assert sum(text.startswith(words) for text in texts(scene)) == 1
    assert "2,048 GPUs = 16 stages × 128; a box is a node of 8" in texts(scene)
    with pytest.raises(ValueError, match="whole nodes"):
        layouts.layout_2048(Layout(4, 4, 4))
    with pytest.raises(ValueError, match="2 to 16 stages"):
        layouts.layout_2048(Layout(32, 64, 64))


def test_gpus_that_serve_are_counted():
    scene = layouts.prefill_decode()
    gpus = rects(scene, width=11, height=11)
    assert len(gpus) == 32 + 320 + 32 + 144
    assert sum(m.fill == "purple" for m in gpus) == 64 == 320 - 256
    shown = texts(scene)
    assert "one expert each: 256 routed, 64 copies and shared; TR 3.4.2" in shown
    assert shown.count("256 routed, 32 copies") == 3  # 32 x 9 and 144 x 2 are 288
    with pytest.raises(ValueError, match="pairs"):
        layouts.prefill_decode(layouts.DEPLOYMENTS[:3])
