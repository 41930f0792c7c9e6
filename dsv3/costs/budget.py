"""Money and machines: what was published about training and serving, and what follows from it.

The published figures are data, each table with its source; everything that can be computed from a
config or from other figures is a function beside them, so that one can check the other. Two
things must be said whenever they are quoted. The $5.576 million are GPU hours at a rent of $2, of
the final run alone: no research, no failed runs, nobody's salary. And MFU, the share of a GPU's
peak that is useful work, depends on what is counted as useful: all scores of attention, or only
those that the causal mask keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.costs.parameters import activated_parameters
from dsv3.costs.roofline import H800_FLOPS

HOURS, DAY_SECONDS = 24, 86_400


@dataclass(frozen=True)
class TrainingBudget:
    """GPU hours of each phase of a training run, what one costs, and how many GPUs ran."""

    source: str
    hours: dict[str, float]
    dollars_per_hour: float
    gpus: int

    @property
    def dollars(self) -> dict[str, float]:
        """What each phase costs."""
        return {name: hours * self.dollars_per_hour for name, hours in self.hours.items()}

    @property
    def days(self) -> dict[str, float]:
        """How long each phase takes with all GPUs."""
        return {name: hours / self.gpus / HOURS for name, hours in self.hours.items()}


V3_BUDGET = TrainingBudget(
    "TR table 1, December 2024",
    {"pre-training": 2664e3, "context extension": 119e3, "post-training": 5e3},
    2.0,
    2048,
)
HOURS_PER_TRILLION = 180e3  # TR 1: GPU hours of pre-training for 10^12 tokens
PRETRAINING_TOKENS = 14.8e12  # TR 4.1
TOKENS_PER_STEP = 15_360 * 4_096  # TR 4.2: texts in a batch, after its ramp, and their length


@dataclass(frozen=True)
class MeasuredStep:
    """A training step as it was measured: seconds in all and by what the pipeline does in them,
    each where it does nothing else; tokens a day; TFLOP/s of one GPU and share of the peak, by
    all of attention's scores and by the causal half."""

    source: str
    gpus: int
    tokens_per_day: float
    seconds: float
    parts: dict[str, float]
    tflops: dict[str, float]
    mfu: dict[str, float]

    @property
    def tokens(self) -> float:
        """Tokens of a step."""
        return self.tokens_per_day / DAY_SECONDS * self.seconds

    def flops_per_token(self, counted: str) -> float:
        """What each GPU's TFLOP/s come to for a token. counted: "causal" or "non-causal"."""
        return self.tflops[counted] * 1e12 * self.gpus / (self.tokens_per_day / DAY_SECONDS)


V3_STEP = MeasuredStep(
    "ISCA table 4, May 2025: the multi-plane network",
    2048,
    272.80e9,
    19.926,
    {
        "forward": 1.13,
        "bubble": 2.06,
        "backward of inputs": 1.99,
        "backward of weights": 0.48,
        "forward and backward": 13.95,
        "optimizer": 0.29,
    },
    {"non-causal": 432, "causal": 385},
    {"non-causal": 0.4373, "causal": 0.3894},
)


def training_flops(config: ModelConfig, length: int = 4096, *, causal: bool = True) -> float:
    """FLOPs to train on one token of a text of ``length``: 250 billion (ISCA table 2).

    Two for each parameter that works for a token, and as many again for the gradient of what it
    reads and of itself; the same for attention's scores and sums, half of them if ``causal``.
    """
    c = config
    keys = length / 2 if causal else length
    scores = keys * c.num_attention_heads * (c.qk_head_dim + c.v_head_dim) * c.num_hidden_layers
    return 6 * (activated_parameters(c, embedding=False) + scores)


def mfu(
    flops_per_token: float, tokens_per_second: float, gpus: int, peak: float = H800_FLOPS
) -> float:
    """Share of the GPUs' peak that is useful work, against BF16's peak by default."""
    return flops_per_token * tokens_per_second / gpus / peak


@dataclass(frozen=True)
class ServingDay:
    """A day of serving as it was published. Tokens of prompts that were found on disk and that
    were read, and of answers, with their prices for a million; nodes on average; tokens a second
    of one node (prompts, found or read, while it prefills; answers while it decodes); tokens a
    second of one text, lowest and highest; tokens in the cache for each that is written."""

    source: str
    nodes: float
    gpus_per_node: int
    dollars_per_hour: float
    tokens: dict[str, float]
    prices: dict[str, float]
    prefill_rate: float
    decoding_rate: float
    speed: tuple[float, float]
    cached: float

    @property
    def cost(self) -> float:
        """Rent of the GPUs in dollars."""
        return self.nodes * self.gpus_per_node * HOURS * self.dollars_per_hour

    @property
    def income(self) -> float:
        """Dollars, if all tokens had been sold at those prices."""
        return sum(count / 1e6 * self.prices[name] for name, count in self.tokens.items())

    @property
    def margin(self) -> float:
        """What is left over, relative to the cost: 5.45 is "545%"."""
        return self.income / self.cost - 1

    @property
    def busy_nodes(self) -> dict[str, float]:
        """Nodes that the day's tokens keep busy at the published rates."""
        prompts = self.tokens["found"] + self.tokens["read"]
        return {
            "prefill": prompts / self.prefill_rate / DAY_SECONDS,
            "decoding": self.tokens["written"] / self.decoding_rate / DAY_SECONDS,
        }

    @property
    def texts_per_gpu(self) -> tuple[float, float]:
        """Texts that a decoding GPU works on at a time, at the highest and lowest speed."""
        rate = self.decoding_rate / self.gpus_per_node
        return rate / self.speed[1], rate / self.speed[0]


DAY = ServingDay(
    "day 6 of open-infra-index: 27 to 28 February 2025",
    226.75,
    8,
    2.0,
    {"found": 342e9, "read": 266e9, "written": 168e9},
    {"found": 0.14, "read": 0.55, "written": 2.19},  # DeepSeek-R1's
    73.7e3,
    14.8e3,
    (20, 22),
    4989,
)
PRINTED_INCOME, PRINTED_MARGIN = 562_027, 5.45  # from token counts that are not rounded
