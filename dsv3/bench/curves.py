"""How costs grow: time and memory against context, length of a prompt, tokens and experts.

Each curve has a few points, one quantity against one size, all else fixed, in fp32 and fp8 in turn.
Its slope in a log-log plot is the exponent: 0 where the size does not matter, 1 where the cost is
proportional to it, 2 where each of n meets each of n. Costs are sums, and a sum is ruled by its
largest term: at small sizes by what is always paid (the weights are read whatever the context), so
the slope at the upper end says more than the one through all points, and both are told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from dsv3.bench.memory import apart
from dsv3.bench.models import CONFIG, Models, moe_layer
from dsv3.bench.rounds import Clock, Spread, in_turn
from dsv3.config import ModelConfig
from dsv3.precision import Precision

CONTEXTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TOKENS = (1, 4, 16, 64, 256, 1024)
EXPERTS = (8, 16, 32, 64, 128)
MEMORY = {"write": (512, 2048, 8192), "read": (512, 1024, 2048, 4096), "experts": (8, 32, 128)}
FIXED_EXPERTS, FIXED_TOKENS = 32, 64
PRECISIONS = ("fp32", "fp8")
AT_THE_END = 3  # points that the last slope goes through


@dataclass(frozen=True)
class Curve:
    """points: (size, low, middle, high), the quartiles of a quantity at each size.

    group: the panel it is drawn in; size, quantity: what is counted, with its unit.
    """

    group: str
    name: str
    size: str
    quantity: str
    points: tuple[tuple[float, float, float, float], ...]
    rounds: int = 1

    def slopes(self) -> tuple[float, float]:
        """Exponents: through all points, and through the last few."""
        pairs = [(size, middle) for size, _, middle, _ in self.points]
        return slope(pairs), slope(pairs[-AT_THE_END:])

    def in_words(self) -> str:
        overall, last = self.slopes()
        size, _, middle, _ = self.points[-1]
        return (
            f"{self.group}, {self.name}: {middle:.3g} {self.quantity} at {size:,.0f} {self.size}; "
            f"slope {overall:.2f}, at the end {last:.2f}"
            + f"; {self.rounds} rounds a point"
            * (self.rounds > 1)
        )

    def to_dict(self) -> dict:
        told = asdict(self)
        told["points"] = [[float(f"{x:.4g}") for x in point] for point in self.points]
        overall, last = self.slopes()
        fitted = min(AT_THE_END, len(self.points))
        return told | {
            "slope": round(overall, 3),
            "slope_at_the_end": round(last, 3),
            "fitted": fitted,
        }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent a of the line y = b x^a that is nearest in a log-log plot, by least squares."""
    xs, ys = ([math.log(value) for value in axis] for axis in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    wide = sum((value - x) ** 2 for value in xs)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / wide if wide else 0.0


def measure(
    suite: str, minutes: float, say: Callable[[str], None], config: ModelConfig = CONFIG
) -> Iterator[Curve]:
    """All curves. A point may take half of the minutes that are left; most take far less."""
    device = torch.device("cuda" if suite == "gpu" else "cpu")
    models, clock = Models(device, config), Clock(device)
    panels = (
        ("decoding", "tokens of context", CONTEXTS, partial(_writer, models)),
        ("prefill", "tokens", LENGTHS, partial(_reader, models)),
        (f"MoE layer, {FIXED_EXPERTS} experts", "tokens", TOKENS,
         partial(_layer, models, FIXED_EXPERTS)),
        (f"MoE layer, {FIXED_TOKENS} tokens", "experts", EXPERTS,
         lambda p, experts: _layer(models, experts, p, FIXED_TOKENS)),
    )  # fmt: skip
    end = time.monotonic() + 60 * minutes
    for group, size, sizes, make in panels:
        points: dict[str, list] = {precision: [] for precision in PRECISIONS}
        least = math.inf
        for number in sizes:
            say(f"{group}: {number:,} {size}")
            with torch.inference_mode():
                calls = {precision: make(precision, number) for precision in PRECISIONS}
                times = in_turn(calls, clock, max(end - time.monotonic(), 0) / 2)
            for precision, taken in times.items():
                told = Spread.of(taken).each(lambda seconds: 1e3 * seconds)
                points[precision].append((number, told.low, told.middle, told.high))
                least = min(least, len(taken))
        for precision, found in points.items():
            yield Curve(group, precision, size, "ms", tuple(found), int(least))
    if device.type == "cpu":
        yield from memory(say)


def memory(say: Callable[[str], None]) -> Iterator[Curve]:
    """Peaks of anonymous memory, each point in a process of its own, in fp32."""
    for kind, name, size in (
        ("write", "writing one token, with its cache", "tokens of context"),
        ("read", "prefill, with its cache", "tokens"),
        ("experts", f"MoE layer, {FIXED_TOKENS} tokens, with its weights", "experts"),
    ):
        points = []
        for number in MEMORY[kind]:
            say(f"memory, {name}: {number:,} {size}")
            other = FIXED_TOKENS if kind == "experts" else "fp32"
            megabytes = apart(kind, number, other)["peak"] / 1e6
            points.append((number, megabytes, megabytes, megabytes))
        yield Curve("memory", name, size, "MB", tuple(points))
    points = []
    for number in TOKENS[2:]:
        say(f"memory, MoE layer: {number:,} tokens")
        megabytes = apart("tokens", FIXED_EXPERTS, number)["peak"] / 1e6
        points.append((number, megabytes, megabytes, megabytes))
    yield Curve("memory", "MoE layer, its pass", "tokens", "MB", tuple(points))


def _writer(models: Models, precision: str, context: int) -> Callable[[], object]:
    """One token behind a cache of random latents: what is in it costs no time."""
    model = models.ours(precision)
    cache = model.new_cache(1, context)
    cache.data.normal_()
    cache.advance([context - 1])
    token = models.text(1)

    def write() -> None:
        model(token, cache=cache, last_only=True)
        cache.truncate([context - 1])

    return write


def _reader(models: Models, precision: str, length: int) -> Callable[[], object]:
    model, text = models.ours(precision), models.text(length)
    return lambda: model(text, cache=model.new_cache(1, length), last_only=True)


def _layer(models: Models, experts: int, precision: str, tokens: int) -> Callable[[], object]:
    """An MoE layer of so many experts, as many chosen for each token as ever."""
    moe, dtype = (
        moe_layer(models.config, experts, precision),
        Precision.of(precision, models.config).dtype,
    )
    random = torch.Generator().manual_seed(tokens)
    u = torch.randn(1, tokens, models.config.hidden_size, generator=random).to(dtype)
    moe, u = moe.to(models.device), u.to(models.device)
    return lambda: moe(u)
