"""Chapter 7's widgets without a browser: what they draw, and what their controls do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dsv3.parallel.schedules import SCHEDULES
from dsv3.parallel.timeline import Durations, Timeline, simulate
from dsv3.viz import scene as scenes
from dsv3.viz.pipeline_scene import LEFT, RIGHT, pipeline_scene, pipelines_scene
from dsv3.viz.scene import Scene, still


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


def test_micro_batches_of_the_other_end_are_paler_and_numbered_on():
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


def test_durations_of_nothing_are_drawn():
    """A W of 0, and an I of 0 where W is the whole backward."""
    for durations in (Durations(1, 2, 0), Durations(1, 1, 1), Durations(0, 0, 0)):
        for name in ("ZB1P", "DualPipe"):
            still(pipeline_scene(timeline(name, 2, 4, durations), durations, rank=0))
