"""The placement explorer: which experts get copies, which GPU holds them, what that evens out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import ipywidgets

from dsv3.errors import DSV3Error
from dsv3.parallel.replicas import Plan, plan
from dsv3.viz.placement_scene import placement_scene
from dsv3.viz.scene import Scene
from dsv3.viz.widgets.panel import Panel, control

# The example that is published with DeepSeek's EPLB: loads of 12 experts in two layers.
PUBLISHED = {
    "published example, layer 0": (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    "published example, layer 1": (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
}
POLICIES = ("hierarchical", "global")
GPUS, NODES, GROUPS = (2, 4, 8, 16, 32), (1, 2, 4, 8), (1, 2, 4, 8)
_POINTS = 8  # numbers of replicas to choose from


@lru_cache(maxsize=128)
def _plan(loads: tuple[float, ...], replicas: int, groups: int, nodes: int, gpus: int) -> Plan:
    return plan(loads, replicas, groups, nodes, gpus)


class PlacementExplorer(Panel):
    """Choose loads, GPUs, nodes, groups and the policy; drag the number of replicas.

    measured: name -> loads of the experts of one layer, beside the published example. Raises
    DSV3Error for loads of which no plan can be made.
    """

    title = "Placement explorer"
    hint = (
        "Drag the number of replicas, or click it in the lower picture; point at a piece of a bar "
        "to read it. Or Tab into the picture, use the arrow keys, and choose with Enter."
    )

    def __init__(
        self,
        measured: Mapping[str, Sequence[float]] | None = None,
        *,
        replicas: int = 16,
        gpus: int = 8,
        nodes: int = 2,
        groups: int = 4,
        policy: str = "hierarchical",
    ):
        self._loads = {name: _checked(name, loads) for name, loads in (measured or {}).items()}
        self._loads = PUBLISHED | self._loads
        self._busy = False
        dropdown = ipywidgets.Dropdown
        self.loads = control(dropdown, "Loads", options=list(self._loads))
        self.policy = control(dropdown, "Policy", options=POLICIES, value=policy)
        self.gpus = control(dropdown, "GPUs", options=GPUS, value=gpus)
        self.nodes = control(dropdown, "Nodes", options=NODES, value=nodes)
        self.groups = control(dropdown, "Groups", options=GROUPS, value=groups)
        self.replicas = control(ipywidgets.IntSlider, "Replicas", value=replicas, min=1, max=4096)
        self._follow()
        super().__init__(
            [self.loads, self.policy, self.gpus, self.nodes, self.groups, self.replicas]
        )
        self.drawing.on_choose(self._choose)

    def plan(self, policy: str | None = None, replicas: int | None = None) -> Plan:
        """That of the picture, or by another policy or with another number of replicas."""
        loads, (groups, nodes) = self._loads[self.loads.value], self._sizes()
        if (policy or self.policy.value) == "global":
            groups = nodes = 1
        return _plan(loads, replicas or self.replicas.value, groups, nodes, self.gpus.value)

    def scene(self) -> Scene:
        loads, (groups, nodes) = self._loads[self.loads.value], self._sizes()
        counts = range(self.replicas.min, self.replicas.max + 1, self.replicas.step)
        curves = {
            policy: [(count, self.plan(policy, count).imbalance(loads)) for count in counts]
            for policy in POLICIES
        }
        return placement_scene(
            loads, self.plan(), groups=groups, nodes=nodes, policy=self.policy.value, curves=curves
        )

    def message(self) -> str:
        said, (groups, nodes) = [], self._sizes()
        if groups != self.groups.value:
            said.append(
                f"{len(self._loads[self.loads.value])} experts make no {self.groups.value} equal "
                f"groups: {groups} are shown."
            )
        if nodes != self.nodes.value:
            said.append(
                f"{self.gpus.value} GPUs are no more than {nodes} nodes: {nodes} are shown, not "
                f"{self.nodes.value}."
            )
        if groups % nodes and self.policy.value == "hierarchical":
            said.append(
                f"{groups} groups cannot be shared out evenly over {nodes} nodes: the hierarchical "
                "policy does as the global one."
            )
        return " ".join(said)

    def _sizes(self) -> tuple[int, int]:
        """Groups and nodes nearest to those asked for that fit the experts and the GPUs."""
        experts = len(self._loads[self.loads.value])
        groups = max(each for each in GROUPS if each <= self.groups.value and experts % each == 0)
        return groups, min(self.nodes.value, self.gpus.value)

    def _follow(self) -> None:
        """The slider goes in steps of one replica on each GPU, from as few as hold all experts."""
        experts, gpus = len(self._loads[self.loads.value]), self.gpus.value
        least = -(-experts // gpus) * gpus
        most = max(least, min(least + (_POINTS - 1) * gpus, experts * gpus))
        value = min(max(-(-self.replicas.value // gpus) * gpus, least), most)
        with self.replicas.hold_sync():  # else the browser answers to what is only on the way
            self.replicas.min, self.replicas.max = 1, 4096  # first room for the new value
            self.replicas.value, self.replicas.step = value, gpus
            self.replicas.min, self.replicas.max = least, most

    def _changed(self, change) -> None:
        if self._busy:
            return
        self._busy = True
        try:
            self._follow()
        finally:
            self._busy = False
        self.refresh()

    def _choose(self, key: str) -> None:
        self.replicas.value = int(key.removeprefix("replicas "))


def _checked(name: str, loads: Sequence[float]) -> tuple[float, ...]:
    """Loads as plain numbers; DSV3Error where there are too few or none has work."""
    plain = tuple(map(float, loads))
    if len(plain) < 2 or min(plain) < 0 or not 0 < sum(plain) < float("inf"):
        raise DSV3Error(
            "no loads to plan for",
            where=name,
            found=plain if len(plain) < 9 else f"{len(plain)} loads, sum {sum(plain)}",
            expected="two numbers or more, none below 0 and not all 0",
        )
    return plain
