"""Chapter 7's schematics: what they say of ranks, bytes and sums is right.

That nothing on them is cut or covered is held for all schematics in ``test_viz_schematics``.
"""

import queue
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig
from dsv3.costs import REPORT, Layout, training_memory
from dsv3.fp8 import quantize_activation
from dsv3.parallel import collectives
from dsv3.viz import cluster_schematics as cluster
from dsv3.viz import cut_schematics as cut
from dsv3.viz import parallel_schematics as parallel
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
    there, back = cluster.token_bytes(config)
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
