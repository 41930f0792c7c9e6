"""The load-balancing simulator: what the bias rule does at other speeds and for other routers."""

from __future__ import annotations

from functools import lru_cache

import ipywidgets

from dsv3.training.simulation import BalanceRun, simulate
from dsv3.viz.balance_scene import balance_scene
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control

EXPERTS, TOP_K = 16, 4  # as in the small model
STEPS = 160
GAMMAS = [0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]
TOKENS = [64, 128, 256, 512]
# Steps of the runs that only a mean is taken of.
_FEW = 20


@lru_cache(maxsize=64)
def _run(gamma: float, skew: float, tokens: int, steps: int = STEPS) -> BalanceRun:
    """Shorter runs are beginnings of longer ones, so the number of steps shown costs nothing."""
    return simulate(experts=EXPERTS, k=TOP_K, tokens=tokens, gamma=gamma, skew=skew, steps=steps)


class LoadBalanceSimulator(Panel):
    """Choose the bias speed, how unequal the experts are, tokens a step and how many steps."""

    title = "Load-balancing simulator"

    def __init__(self):
        slider = ipywidgets.SelectionSlider
        self.gamma = control(
            slider, "Bias speed γ", value=1e-3, options=[(f"{gamma:g}", gamma) for gamma in GAMMAS]
        )
        self.skew = control(
            ipywidgets.FloatSlider, "Skew of experts", value=0.5, max=2.0, step=0.25
        )
        self.tokens = control(
            slider, "Tokens a step", value=256, options=[(str(tokens), tokens) for tokens in TOKENS]
        )
        self.steps = control(ipywidgets.IntSlider, "Steps", value=STEPS, min=20, max=STEPS, step=20)
        super().__init__([self.gamma, self.skew, self.tokens, self.steps])

    def scene(self) -> Scene:
        skew, tokens, gamma = self.skew.value, self.tokens.value, self.gamma.value
        equal = _run(0.0, 0.0, tokens, _FEW)
        return balance_scene(
            _run(gamma, skew, tokens),
            _run(0.0, skew, tokens, _FEW),
            float(equal.max_violation.mean()),
            self.steps.value,
            gamma,
            TOP_K,
        )
