"""A training run as an instrument: its log at any moment, and what the model wrote then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ipywidgets

from dsv3.errors import DSV3Error
from dsv3.shipped import model_folder
from dsv3.training.log import RunLog, read_log
from dsv3.training.samples import Sample, read_samples
from dsv3.viz.run_scene import BATCH, router_name, run_scene
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control
from dsv3.viz.written import by_prompt


class TrainingRun(Panel):
    """Drag the step; choose a router, the text whose loads it shows, and the prompt of the texts.

    log: of a run, or its folder; samples: texts of its checkpoints, or the file of them, as
    ``benchmarks/samples.py`` makes it, or None. step: the first moment shown, by default the last
    of the log. Raises DSV3Error for files that are no such log or samples.
    """

    title = "Training run"
    hint = (
        "Drag the step, or click a place in the curves; point at a bar to read it. Or Tab into the "
        "picture, use the arrow keys, and choose with Enter."
    )

    def __init__(
        self,
        log: RunLog | str | Path,
        samples: Sequence[Sample] | str | Path | None = None,
        *,
        step: int | None = None,
        router: str | None = None,
        load_of: str = BATCH,
    ):
        self.run = log if isinstance(log, RunLog) else read_log(model_folder(log))
        given = read_samples(samples) if isinstance(samples, (str, Path)) else samples or ()
        self._samples = by_prompt(given)
        moments, dropdown = self.run.moments, ipywidgets.Dropdown
        self.step = control(
            ipywidgets.SelectionSlider,
            "Step",
            options=[(f"{moment:,}", moment) for moment in moments],
            value=moments[-1] if step is None else self._nearest(step),
        )
        routers, texts = self.run.routers, [BATCH, *self.run.domains]
        self._check("router", router, [None, *routers])
        self._check("load_of", load_of, texts)
        self.router = control(
            dropdown,
            "Router",
            options=[(router_name(name), name) for name in routers],
            value=router or next(iter(routers), None),
        )
        self.load_of = control(dropdown, "Loads of", options=texts, value=load_of)
        self.prompt = control(
            dropdown,
            "Prompt",
            options=[(" ".join(prompt.split()), prompt) for prompt in self._samples],
        )
        controls = [self.step]
        controls += [self.router, self.load_of] if routers else []
        super().__init__(controls + ([self.prompt] if self._samples else []))
        self.drawing.on_choose(self._choose)

    def scene(self) -> Scene:
        return run_scene(
            self.run,
            self.step.value,
            router=self.router.value,
            load_of=self.load_of.value,
            samples=self._samples.get(self.prompt.value, ()),
        )

    def message(self) -> str:
        first = next((each["step"] for each in self.run.held_out), None)
        if self.load_of.value != BATCH and first is not None and self.step.value < first:
            return f"The first look at held-out text was at step {first:,}: no loads before it."
        return ""

    def _nearest(self, step: int) -> int:
        return min(self.run.moments, key=lambda moment: abs(moment - step))

    def _check(self, name: str, value: str | None, known: list) -> None:
        if value not in known:
            raise DSV3Error(
                "not in this log",
                where=name,
                found=value,
                expected="one of " + ", ".join(map(str, filter(None, known))),
            )

    def _choose(self, key: str) -> None:
        self.step.value = int(key.removeprefix("step "))
