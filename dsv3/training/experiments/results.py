"""What an experiment's runs say: differences within pairs, and how far they scatter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from dsv3.files import read_json

STORED = Path(__file__).parents[3] / "assets" / "experiments"


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds: mean, least, most, and standard deviation."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def deviation(self) -> float:
        return stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.deviation:.3f}"


@dataclass(frozen=True)
class Results:
    """An experiment with its runs, as ``run_experiment`` returns them."""

    told: dict

    @property
    def arms(self) -> list[str]:
        """In their order, the one to compare with first."""
        names = list(dict.fromkeys(run["arm"] for run in self.told["runs"]))
        return sorted(names, key=lambda name: name != self.told["base"])

    def of(self, arm: str, figure: Callable[[dict], float] = lambda run: run["loss"]) -> Spread:
        """A figure of an arm's runs, by default the loss on held-out text."""
        return Spread(tuple(figure(run) for run in self._runs(arm)))

    def against(
        self, arm: str, figure: Callable[[dict], float] = lambda run: run["loss"]
    ) -> Spread:
        """The figure less that of the base arm from the same seed."""
        base = {run["seed"]: figure(run) for run in self._runs(self.told["base"])}
        return Spread(tuple(figure(run) - base[run["seed"]] for run in self._runs(arm)))

    def _runs(self, arm: str) -> list[dict]:
        return sorted(
            (run for run in self.told["runs"] if run["arm"] == arm), key=lambda run: run["seed"]
        )

    def table(self) -> str:
        """The arms, one a line: parameters, loss, difference to the base arm with its spread."""
        lines = [f"{'arm':26}{'params':>10}{'active':>10}{'loss':>8}   difference (nats a token)"]
        for arm in self.arms:
            size, loss = self._runs(arm)[0]["size"], self.of(arm).mean
            gap = "" if arm == self.told["base"] else f"{self.against(arm)}"
            lines.append(
                f"{arm:26}{size['parameters']:>10,}{size['activated']:>10,}{loss:8.3f}   {gap}"
            )
        return "\n".join(lines)


def read_results(name: str, folder: Path = STORED) -> Results:
    """Stored results of an experiment. Raises DSV3Error where there are none."""
    return Results(read_json(folder / f"{name}.json"))
