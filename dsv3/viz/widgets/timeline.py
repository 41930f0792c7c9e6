"""The timeline explorer: what each rank of a pipeline computes, when it waits, what it keeps."""

from __future__ import annotations

import ipywidgets

from dsv3.parallel.schedules import SCHEDULES, fewest_micro_batches
from dsv3.parallel.timeline import Durations, Timeline, simulate
from dsv3.viz.pipeline_scene import pipeline_scene
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control

RANKS, MICRO_BATCHES = 16, 40  # the most that can be chosen


class TimelineExplorer(Panel):
    """Choose a schedule, ranks, micro-batches and how long each kind of work takes.

    The overlap is the part of the shorter of F and B that is hidden when both run together: at
    100% the pair takes as long as the longer one. Where a schedule cannot run what is asked for,
    the nearest that it can is shown, and said.
    """

    title = "Timeline explorer"
    hint = (
        "Point at a box or a wait to read it, click a rank to see what it keeps; or Tab into the "
        "picture, use the arrow keys, and choose with Enter."
    )

    def __init__(
        self,
        schedule: str = "1F1B",
        ranks: int = 8,
        micro_batches: int = 20,
        *,
        forward: float = 1.0,
        backward: float = 2.0,
        weights: float = 1.0,
        overlap: int = 0,
    ):
        slider, times = ipywidgets.IntSlider, dict(max=4.0, step=0.25, readout_format=".2f")
        self.schedule = control(
            ipywidgets.Dropdown, "Schedule", options=list(SCHEDULES), value=schedule
        )
        self.ranks = control(slider, "Ranks", value=ranks, min=2, max=RANKS)
        self.micro_batches = control(
            slider, "Micro-batches", value=micro_batches, min=1, max=MICRO_BATCHES
        )
        time = ipywidgets.FloatSlider
        self.forward = control(time, "F: forward", value=forward, min=0.25, **times)
        self.backward = control(time, "B: backward", value=backward, min=0.25, **times)
        self.weights = control(time, "W: its weights", value=weights, min=0.0, **times)
        self.overlap = control(slider, "Overlap, %", value=overlap, max=100, step=10)
        self.rank = control(slider, "Memory of rank", value=ranks // 2, max=ranks - 1)
        super().__init__(
            [
                self.schedule,
                self.ranks,
                self.micro_batches,
                self.forward,
                self.backward,
                self.weights,
                self.overlap,
                self.rank,
            ]
        )
        self.drawing.on_choose(self._choose)

    def durations(self) -> Durations:
        """Those of the picture. W is a part of B and cannot be longer."""
        forward, backward = self.forward.value, self.backward.value
        hidden = self.overlap.value / 100 * min(forward, backward)
        weights = min(self.weights.value, backward)
        return Durations(forward, backward, weights, forward + backward - hidden)

    def timeline(self) -> Timeline:
        """What is drawn."""
        return simulate(SCHEDULES[self.schedule.value](*self._sizes()), self.durations())

    def scene(self) -> Scene:
        return pipeline_scene(self.timeline(), self.durations(), rank=self.rank.value)

    def message(self) -> str:
        said, (ranks, micro_batches) = [], self._sizes()
        name, asked = self.schedule.value, self.micro_batches.value
        if ranks != self.ranks.value:
            said.append(
                f"{name} pairs each rank with its mirror image and needs an even number of them: "
                f"{ranks} are shown, not {self.ranks.value}."
            )
        if micro_batches != asked:
            least = fewest_micro_batches(name, ranks)
            why = (
                f"{name} needs {least // ranks} for each rank to fill it"
                if asked < least
                else f"{name} sends half of its micro-batches each way"
            )
            said.append(f"{why}: {micro_batches} micro-batches are shown, not {asked}.")
        if self.weights.value > self.backward.value:
            said.append(
                f"W is a part of B: it is taken as {self.backward.value:g}, all of B, not "
                f"{self.weights.value:g}."
            )
        if self.overlap.value and not name.startswith("Dual"):
            said.append(f"{name} runs one thing at a time: the overlap changes nothing here.")
        return " ".join(said)

    def _sizes(self) -> tuple[int, int]:
        """Ranks and micro-batches nearest to those asked for that the schedule can run."""
        ranks, micro_batches = self.ranks.value, self.micro_batches.value
        if self.schedule.value == "DualPipe":
            ranks += ranks % 2
            micro_batches += micro_batches % 2
        return ranks, max(micro_batches, fewest_micro_batches(self.schedule.value, ranks))

    def _changed(self, change) -> None:
        self.rank.max = self._sizes()[0] - 1
        super()._changed(change)

    def _choose(self, key: str) -> None:
        self.rank.value = int(key.removeprefix("rank "))
