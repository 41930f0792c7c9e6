"""Chapter 7's widgets without a browser: what they draw, and what their controls do."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from dsv3.errors import DSV3Error
from dsv3.parallel.replicas import plan
from dsv3.parallel.schedules import SCHEDULES
from dsv3.parallel.timeline import Durations, Timeline, simulate
from dsv3.viz import scene as scenes
from dsv3.viz.pipeline_scene import LEFT, RIGHT, pipeline_scene, pipelines_scene
from dsv3.viz.placement_scene import in_order
from dsv3.viz.scene import Scene, still
from dsv3.viz.widgets import PlacementExplorer, TimelineExplorer
from dsv3.viz.widgets.placement import GPUS, PUBLISHED


def texts(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, scenes.Text)]


def timeline(name: str, ranks: int, micro: int, durations: Durations | None = None) -> Timeline:
    return simulate(SCHEDULES[name](ranks, micro), durations or Durations())


def area(scene: Scene, **look) -> float:
    """Width times height of all rectangles that look so."""
    return sum(
        mark.width * mark.height
        for mark in scene.marks
        if isinstance(mark, scenes.Rect)
        and mark.height > 6 and mark.rounded == 0 and mark.width != 11  # none of the legend
        and all(getattr(mark, name) == value for name, value in look.items())
    )  # fmt: skip


# A pipeline's picture ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, ranks, micro, bubble, peak",
    [
        ("1F1B", 4, 8, "bubble (PP − 1)(F + B) = 9", "PP = 4"),
        ("ZB1P", 8, 20, "bubble (PP − 1)(F + B − 2W) = 7", "PP = 8"),
        ("DualPipe", 8, 20, "bubble (PP/2 − 1)(F&B + B − 3W) = 6", "PP + 1 = 9"),
        ("DualPipeV", 4, 20, "bubble (PP/2 − 1)(F&B + B − 3W) = 6", "PP + 1 = 9"),
    ],
)
def test_a_pipelines_words_are_those_of_table_2(name, ranks, micro, bubble, peak):
    line = timeline(name, ranks, micro)
    shown = texts(pipeline_scene(line, Durations(), rank=1))
    assert f"{bubble}, activations {peak}" in shown[1]
    assert f"bubble {bubble.rpartition(' ')[2]} of {line.end:g} " in shown[0]
    assert f"at most {peak.rpartition(' ')[2]} activations" in shown[0]


@pytest.mark.parametrize("name, ranks, micro", [("1F1B", 3, 5), ("ZB1P", 4, 6), ("DualPipe", 4, 8)])
def test_every_step_has_its_box_and_every_wait_its_colour(name, ranks, micro):
    durations = Durations(1, 2.5, 1, 3)
    line = timeline(name, ranks, micro, durations)
    scene = pipeline_scene(line, durations)
    said = scene.labels()
    unit = (RIGHT - LEFT) / line.end
    for rank, events in enumerate(line.events):
        for event in events:
            (label,) = (
                label
                for label in said
                if label.startswith(f"rank {rank}: ")
                and label.endswith(f"from {event.start:.3g} to {event.end:.3g}")
            )
            assert all(f"{work.kind}, " in label for work in event.step)
    waits = [mark.width for mark in scene.marks if mark.label and " waits " in mark.label]
    assert sum(waits) / unit == pytest.approx(sum(map(line.idle, range(ranks))))
    # The whole rows, less what is waited, are covered once by F, I and W.
    covered = sum(area(scene, fill=fill) for fill in ("sky", "green", "yellow"))
    assert covered / 26 == pytest.approx(unit * ranks * line.end - sum(waits))


def test_a_whole_backward_is_drawn_in_its_two_parts_where_they_are_known():
    durations = Durations(1, 4, 1)
    line = timeline("1F1B", 2, 4, durations)
    known, unknown = pipeline_scene(line, durations), pipeline_scene(line)
    assert area(known, fill="green") == pytest.approx(3 * area(known, fill="yellow"))
    assert area(unknown, fill="yellow") == 0
    assert area(unknown, fill="green") == pytest.approx(4 * area(unknown, fill="sky"))


def test_micro_batches_of_the_other_end_are_fainter_and_numbered_on():
    scene = pipeline_scene(timeline("DualPipe", 4, 8), Durations())
    pale, full = (area(scene, fill="sky", opacity=opacity) for opacity in (0.4, None))
    assert pale == pytest.approx(full) and pale > 0
    said = "\n".join(scene.labels())
    assert "rank 3: F, forward, of micro-batch 4 on stage 0\nfrom 0 to 1" in said
    assert "rank 0: F, forward, of micro-batch 0 on stage 0\nfrom 0 to 1" in said
    frames = [mark for mark in scene.marks if mark.label and " together with " in mark.label]
    pairs = sum(len(event.step) == 2 for row in timeline("DualPipe", 4, 8).events for event in row)
    assert len(frames) == pairs and {frame.stroke for frame in frames} == {"ink"}
    assert 0.4 not in [mark.opacity for mark in pipeline_scene(timeline("1F1B", 4, 8)).marks]


def test_the_memory_curve_is_that_of_the_timeline():
    line = timeline("1F1B", 4, 8)
    scene = pipeline_scene(line, Durations(), rank=2)
    curves = {
        mark.stroke: mark.points
        for mark in scene.marks
        if isinstance(mark, scenes.Line) and len(mark.points) > 4
    }
    unit = (RIGHT - LEFT) / line.end
    floor = curves["vermillion"][0][1]
    step = (floor - min(y for _, y in curves["vermillion"])) / 4  # the fullest rank holds 4
    for stroke, rank in (("vermillion", 0), ("blue", 2)):
        below = sum(
            (floor - y) / step * (right - left) / unit
            for (left, y), (right, _) in zip(curves[stroke], curves[stroke][1:])
        )
        spans = {(event.step[0].kind, event.step[0].micro): event for event in line.events[rank]}
        held = sum(spans["B", micro].end - spans["F", micro].start for micro in range(8))
        assert below == pytest.approx(held)


def test_a_measured_timeline_stands_beside_the_simulated_on_one_axis():
    """Of unequal durations, in a unit, without a formula."""
    simulated = timeline("DualPipeV", 2, 4, Durations(10, 20, 9, 26))
    events = tuple(
        tuple(replace(event, start=1.3 * event.start, end=1.3 * event.end) for event in row)
        for row in simulated.events
    )
    measured = Timeline(simulated.schedule, events)
    scene = pipelines_scene({"simulated": simulated, "measured": measured}, unit="ms")
    shown = texts(scene)
    for name, line in (("simulated", simulated), ("measured", measured)):
        assert any(
            text.startswith(f"{name}: DualPipeV, 2 ranks, 4 micro-batches: bubble")
            and f"of {line.end:.3g} ms" in text
            for text in shown
        )
    ends = sorted({round(mark.x + mark.width) for mark in scene.marks if mark.label})
    assert ends[-1] == RIGHT
    last = max(
        mark.x + mark.width
        for mark in scene.marks
        if mark.label and mark.label.endswith(f" to {simulated.end:.3g} ms")
    )
    assert last - LEFT == pytest.approx((RIGHT - LEFT) / 1.3, rel=1e-3)
    still(scene)
    assert "formula" not in texts(pipeline_scene(measured, unit="ms"))[1].lower()


def test_the_legend_of_several_timelines_names_what_any_of_them_shows():
    scene = pipelines_scene({name: timeline(name, 4, 8) for name in ("1F1B", "ZB1P", "DualPipe")})
    legend = texts(scene)[: texts(scene).index("waits: the bubble") + 3]
    assert {"of the weights W", "fainter: 4 and up, from the other end", "overlap"} <= set(legend)
    still(scene)


def test_durations_of_nothing_are_drawn():
    """A W of 0, and an I of 0 where W is the whole backward."""
    for durations in (Durations(1, 2, 0), Durations(1, 1, 1), Durations(0, 0, 0)):
        for name in ("ZB1P", "DualPipe"):
            still(pipeline_scene(timeline(name, 2, 4, durations), durations, rank=0))


# The timeline explorer --------------------------------------------------------------------------


@pytest.fixture
def explorer():
    return TimelineExplorer()


@pytest.mark.parametrize(
    "control, value",
    [
        ("schedule", "ZB1P"),
        ("schedule", "DualPipe"),
        ("schedule", "DualPipeV"),
        ("ranks", 4),
        ("micro_batches", 9),
        ("forward", 1.5),
        ("backward", 3.0),
        ("weights", 0.5),
        ("rank", 2),
    ],
)
def test_each_control_of_the_timeline_changes_the_picture(explorer, control, value):
    before = explorer.drawing.scene
    getattr(explorer, control).value = value
    assert explorer.drawing.scene != before
    assert explorer.drawing.scene == explorer.scene().as_dict()
    assert explorer.message() == ""


def test_an_overlap_shortens_the_pairs_of_dualpipe(explorer):
    explorer.schedule.value, explorer.micro_batches.value = "DualPipe", 16
    assert "66" not in explorer.alt and explorer.timeline().end == 54
    explorer.overlap.value = 100
    assert explorer.durations().both == 2 and "F&B = 2: bubble" in explorer.alt
    assert explorer.timeline().end < 54 and explorer.message() == ""
    explorer.schedule.value = "ZB1P"
    assert "the overlap changes nothing here" in explorer.message()


@pytest.mark.parametrize(
    "schedule, asked, shown, said",
    [
        ("DualPipe", (7, 20), (8, 20), "an even number of them: 8 are shown, not 7"),
        ("DualPipe", (4, 9), (4, 10), "half of its micro-batches each way: 10"),
        ("DualPipe", (8, 11), (8, 16), "needs 2 for each rank to fill it: 16 micro-batches"),
        ("DualPipeV", (7, 13), (7, 14), "needs 2 for each rank to fill it: 14 micro-batches"),
        ("DualPipeV", (7, 15), (7, 15), ""),
        ("ZB1P", (7, 3), (7, 7), "needs 1 for each rank to fill it: 7 micro-batches"),
        ("1F1B", (7, 1), (7, 1), ""),
    ],
)
def test_what_a_schedule_cannot_run_is_said_and_the_nearest_is_shown(
    explorer, schedule, asked, shown, said
):
    explorer.schedule.value = schedule
    explorer.ranks.value, explorer.micro_batches.value = asked
    assert f"{schedule}, {shown[0]} ranks, {shown[1]} micro-batches" in explorer.alt
    assert said in explorer.message() and bool(said) == bool(explorer.message())
    assert explorer._note.value.count("⚠") == bool(said)


def test_whatever_is_asked_for_something_is_drawn():
    """Every schedule at random settings: each end of each control among them."""
    chance, ends = random.Random(0), dict(forward=0.25, backward=0.25, weights=0.0)
    for turn in range(32):
        times = {
            name: chance.choice([least, 4.0, chance.randint(1, 16) / 4])
            for name, least in ends.items()
        }
        explorer = TimelineExplorer(
            list(SCHEDULES)[turn % 4],
            chance.choice([2, 16, chance.randint(2, 8)]),
            chance.choice([1, 40, chance.randint(1, 20)]),
            overlap=chance.choice([0, 50, 100]),
            **times,
        )
        line = explorer.timeline()
        assert f"at most {line.peak_activations} activations" in explorer.drawing.scene["alt"]
        assert line.schedule.micro_batches >= explorer.micro_batches.value
        assert line.schedule.ranks >= explorer.ranks.value


def test_w_is_a_part_of_b(explorer):
    explorer.backward.value, explorer.weights.value = 1.0, 3.0
    assert "W is a part of B: it is taken as 1, all of B, not 3." in explorer.message()
    assert explorer.durations().weights == 1


def test_a_rank_is_chosen_by_its_key(explorer):
    assert explorer.scene().keys() == [f"rank {rank}" for rank in range(8)]
    explorer.drawing._hear(None, {"chosen": "rank 6"}, None)
    assert explorer.rank.value == 6 and "rank 6 at most 2" in explorer.alt
    for junk in ({"chosen": "rank 99"}, {"chosen": 3}, {}, "rank 1", {"chosen": "x"}):
        explorer.drawing._hear(None, junk, None)
    assert explorer.rank.value == 6


def test_stored_pictures_stay_small():
    for widget in (TimelineExplorer("DualPipe", 8, 20, overlap=50), PlacementExplorer()):
        data, _ = widget._repr_mimebundle_()
        assert len(data["image/png"]) < 150_000


# The placement explorer -------------------------------------------------------------------------


OURS = {"ours": [5.0, 90, 14, 3, 60, 8, 8, 41, 7, 2, 19, 4, 11, 0, 30, 6]}


def pieces(scene: Scene) -> dict[tuple[int, int], float]:
    """(GPU, expert) -> load, of the right side's bars as their labels say them."""
    found: dict[tuple[int, int], float] = {}
    for mark in scene.marks:
        if mark.label and mark.label.startswith("expert ") and mark.x > 480:
            expert, gpu, load = re.match(
                r"expert (\d+) of group \d+ on GPU (\d+): ([\d.,]+)", mark.label
            ).groups()
            load = float(load.rstrip(",").replace(",", ""))
            key = int(gpu), int(expert)
            found[key] = found.get(key, 0.0) + load
    return found


@pytest.mark.parametrize(
    "layer, loads",
    [
        (0, [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152]),
        (1, [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5]),
    ],
)
def test_the_published_example_is_drawn_as_published(layer, loads):
    placement = PlacementExplorer()
    placement.loads.index = layer
    shown, by_gpu = pieces(placement.scene()), [0.0] * 8
    for (gpu, _), load in shown.items():
        by_gpu[gpu] += load
    assert by_gpu == pytest.approx(loads, abs=0.2)
    assert f"Loads of the GPUs after: {', '.join(f'{load:g}' for load in loads)}." in placement.alt
    ratio = max(loads) * 8 / sum(loads)
    assert f"{ratio:.3f} after" in texts(placement.scene())[0]
    placement.policy.value = "global"
    assert f"{(139 * 8 / 1033, 1.190)[layer]:.3f} after" in texts(placement.scene())[0]


def test_before_every_expert_is_there_once_and_in_order():
    assert in_order(12, 4) == [(0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11)]
    assert list(map(len, in_order(12, 8))) == [2, 2, 2, 2, 1, 1, 1, 1]
    assert sum(in_order(256, 32), ()) == tuple(range(256))
    placement = PlacementExplorer(OURS, gpus=4)
    placement.loads.value = "ours"
    loads = OURS["ours"]
    totals = [sum(loads[4 * gpu : 4 * gpu + 4]) for gpu in range(4)]
    assert f"{max(totals) * 4 / sum(loads):.3f} times the mean before" in placement.alt


def test_copies_of_one_expert_have_one_colour_and_bars_are_as_high_as_their_loads():
    placement = PlacementExplorer(OURS, replicas=24, gpus=4, groups=1, nodes=1)
    placement.loads.value = "ours"
    plan, loads = placement.plan(), OURS["ours"]
    looks: dict[int, set] = {}
    heights: dict[tuple[int, int], float] = {}
    for mark in placement.scene().marks:
        if mark.label and mark.label.startswith("expert "):
            expert, gpu = map(int, re.match(r"expert (\d+).* on GPU (\d+)", mark.label).groups())
            looks.setdefault(expert, set()).add((mark.fill, mark.opacity))
            if mark.x > 480:
                heights[gpu, expert] = mark.height
    assert all(len(look) == 1 for look in looks.values())
    copied = [expert for expert in range(16) if plan.experts.count(expert) > 1]
    colours = [look for expert in copied for look in looks[expert]]
    assert len(set(colours)) == len(copied) > 3
    assert all(looks[expert] == {("pale", None)} for expert in range(16) if expert not in copied)
    shares = {
        expert: load / max(1, plan.experts.count(expert)) for expert, load in enumerate(loads)
    }
    tallest = max(heights.values()) / max(shares.values())
    for gpu in range(4):
        for expert in plan.on(gpu):
            assert heights[gpu, expert] == pytest.approx(tallest * shares[expert])


@pytest.mark.parametrize(
    "control, value",
    [
        ("loads", "ours"),
        ("policy", "global"),
        ("gpus", 4),
        ("nodes", 1),
        ("groups", 2),
        ("replicas", 24),
    ],
)
def test_each_control_of_the_placement_changes_the_picture(control, value):
    placement = PlacementExplorer(OURS)
    before = placement.drawing.scene
    getattr(placement, control).value = value
    assert placement.drawing.scene != before
    assert placement.drawing.scene == placement.scene().as_dict()
    assert placement.message() == ""


def test_the_lower_picture_says_what_other_numbers_bring_and_chooses_them():
    placement = PlacementExplorer()
    loads = next(iter(PUBLISHED.values()))
    said = placement.scene().labels()
    assert placement.scene().keys() == [f"replicas {count}" for count in range(16, 73, 8)]
    for count in (16, 40, 72):
        ratios = plan(loads, count, 4, 2, 8), plan(loads, count, 1, 1, 8)
        assert (
            f"{count} replicas: hierarchical {ratios[0].imbalance(loads):.3f}, "
            f"global {ratios[1].imbalance(loads):.3f}"
        ) in said
    placement.drawing._hear(None, {"chosen": "replicas 40"}, None)
    assert placement.replicas.value == 40 and "40 replicas of 12 experts" in placement.alt


def test_whatever_is_chosen_a_plan_is_drawn():
    """All sizes: what does not fit is made to, and said."""
    placement = PlacementExplorer(OURS)
    for gpus, nodes, groups in [
        (gpus, *pair) for gpus in GPUS for pair in ((1, 4), (2, 1), (8, 8))
    ]:
        placement.gpus.value, placement.nodes.value, placement.groups.value = gpus, nodes, groups
        placement.loads.index = (gpus + groups) % 3
        experts = 16 if placement.loads.value == "ours" else 12
        assert placement.replicas.value % gpus == 0 and placement.replicas.value >= experts
        assert f"replicas of {experts} experts on {gpus} GPUs" in placement.alt
        assert ("make no 8 equal groups" in placement.message()) == (groups == 8 and experts == 12)
        assert ("no more than" in placement.message()) == (nodes > gpus)
    placement.groups.value, placement.nodes.value = 1, 2
    assert "cannot be shared out evenly over 2 nodes" in placement.message()


@pytest.mark.parametrize(
    "before, gpus, after", [((4, 20), 8, 24), ((2, 14), 4, 16), ((8, 72), 2, 24), ((2, 12), 32, 32)]
)
def test_other_gpus_take_the_next_number_of_replicas_that_fills_them(before, gpus, after):
    placement = PlacementExplorer(gpus=before[0], replicas=before[1])
    placement.gpus.value = gpus
    slider = placement.replicas
    assert (slider.value, slider.step) == (after, gpus)
    assert f"{after} replicas of 12 experts on {gpus} GPUs" in placement.alt


@pytest.mark.parametrize("loads", [[], [3], [0, 0, 0], [4, -1, 3], [1, float("nan"), 2]])
def test_loads_without_work_are_refused(loads):
    with pytest.raises(DSV3Error, match="no loads to plan for"):
        PlacementExplorer({"mine": loads})
