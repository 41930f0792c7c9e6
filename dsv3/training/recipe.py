"""All choices of a training run that are not sizes of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from dsv3.data.domains import READABLE
from dsv3.errors import DSV3Error
from dsv3.fields import bad, number, whole
from dsv3.training.schedules import Schedules

# What is believed of each field: the least and the most of whole numbers and of others, and words.
_WHOLE = {
    "tokens": (1, 2**50),
    "seq_len": (1, 2**24),
    "batch_first": (1, 2**20),
    "batch_last": (1, 2**20),
    "micro_batch": (1, 2**40),
    "warmup": (0, 2**40),
    "extension_tokens": (0, 2**50),
    "extension_seq_len": (1, 2**24),
    "extension_batch": (1, 2**20),
    "reach_first": (1, 2**24),
    "reach_until": (0, 2**50),
    "seed": (0, 2**32),
    "log_every": (1, 2**40),
    "eval_every": (1, 2**40),
    "eval_windows": (1, 2**40),
}
_NUMBERS = {
    "learning_rate": (0, 1e3),
    "embedding_std": (0, 1e3),
    "extension_rate": (0, 1e3),
    "weight_decay": (0, 1e3),
    "clip": (1e-9, 1e9),
    "sequence_weight": (0, 1e3),
    "fim_rate": (0, 1),
    "save_minutes": (0, 1e6),
}
_WORDS = {"precision": ("fp32", "bf16", "fp8"), "moments": ("fp32", "bf16")}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run in two phases: pre-training, and an extension of the context with YaRN (TR 4.3).

    tokens, seq_len: of pre-training. extension_tokens, extension_seq_len, extension_batch,
    extension_rate, extension_shares: of the second phase (it is left out for a model whose config
    has no YaRN). Its learning rate falls on a straight line to a tenth, and it reads another
    mixture of text, with plain functions in it; in the report both stay as they were.
    batch_first, batch_last: windows a step at the beginning and after the ramp; micro_batch:
    tokens that go through the model at once. learning_rate: the peak; warmup: steps.
    embedding_std: of the embedding's first values. In a narrow model at a high rate the layers soon
    add a thousand times what an embedding of 0.02 holds, and the token is drowned in the stream.
    init_by_width: whether the others follow the width of what they read, or are all of the
    config's initializer_range (``Transformer.init_weights``). sequence_weight: alpha.
    shares: of the domains, by tokens; reach_first, reach_until: texts made by rule reach over so
    many tokens at first, and over a whole window after so many; fim_rate: of code with a hole to
    fill in. precision: "fp32", "bf16" or "fp8"; moments: of AdamW, "fp32" or "bf16"; recompute:
    save memory by computing norms and up-projections again in the backward pass. log_every,
    eval_every: steps; eval_windows: held-out windows of each domain looked at during a run;
    save_minutes: time between checkpoints. Raises DSV3Error, naming the field, for a value that no
    run could have.
    """

    tokens: int = 26_000_000
    seq_len: int = 256
    batch_first: int = 32
    batch_last: int = 32
    micro_batch: int = 4096
    learning_rate: float = 2.5e-3
    warmup: int = 100
    embedding_std: float = 0.3
    init_by_width: bool = True
    extension_tokens: int = 3_000_000
    extension_seq_len: int = 1024
    extension_batch: int = 8
    extension_rate: float = 8e-4
    extension_shares: dict[str, float] = field(
        default_factory=lambda: {
            "plays": 0.18,
            "functions": 0.32,
            "arithmetic": 0.08,
            "recall": 0.32,
            "chats": 0.1,
        }
    )
    betas: Sequence[float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    sequence_weight: float = 1e-4
    shares: dict[str, float] = field(
        default_factory=lambda: {
            "plays": 0.25,
            "code": 0.1,
            "functions": 0.08,
            "arithmetic": 0.12,
            "recall": 0.45,
        }
    )
    reach_first: int = 48
    reach_until: int = 3_000_000
    fim_rate: float = 0.1
    precision: str = "bf16"
    moments: str = "fp32"
    recompute: bool = False
    seed: int = 1
    log_every: int = 10
    eval_every: int = 400
    eval_windows: int = 32
    save_minutes: float = 4.0

    def __post_init__(self):
        for name, limits in _WHOLE.items():
            whole(name, getattr(self, name), *limits)
        for name, limits in _NUMBERS.items():
            object.__setattr__(self, name, number(name, getattr(self, name), *limits))
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise bad(name, getattr(self, name), "one of " + ", ".join(words))
        for name in ("recompute", "init_by_width"):
            if not isinstance(getattr(self, name), bool):
                raise bad(name, getattr(self, name), "true or false")
        object.__setattr__(self, "betas", _betas(self.betas))
        for name in ("shares", "extension_shares"):
            object.__setattr__(self, name, _shares(name, getattr(self, name)))

    @property
    def schedules(self) -> Schedules:
        """The report's schedules in the length and at the levels of this run."""
        return Schedules.deepseek_v3().scaled(
            self.tokens,
            peak=self.learning_rate,
            warmup_steps=self.warmup,
            batch_first=self.batch_first,
            batch_last=self.batch_last,
        )

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Fields in which ``other`` differs: name -> (its value, the value here)."""
        return {
            f.name: (getattr(other, f.name), getattr(self, f.name))
            for f in fields(self)
            if getattr(other, f.name) != getattr(self, f.name)
        }

    @classmethod
    def from_dict(cls, values: dict) -> Recipe:
        """The recipe a checkpoint's JSON holds; DSV3Error for one that no recipe could be."""
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise DSV3Error(
                "recipe of another version",
                where="checkpoint",
                found=", ".join(sorted(known ^ set(values))[:3]) + " on one side only",
                fix="Give a new --out folder",
            )
        try:
            return cls(**values)
        except DSV3Error as error:
            raise DSV3Error(
                "bad value in a stored recipe",
                where=error.where,
                found=error.found,
                expected=error.expected,
                fix="Give a new --out folder",
            ) from None


def _betas(betas) -> tuple[float, float]:
    """The two decay rates of AdamW as a tuple; a mean that forgets nothing is none."""
    good = isinstance(betas, (tuple, list)) and len(betas) == 2
    if not good or not all(type(b) in (int, float) and 0 <= b < 1 for b in betas):
        raise bad("betas", betas, "two numbers, each 0 or more and below 1")
    return float(betas[0]), float(betas[1])


def _shares(name: str, shares) -> dict[str, float]:
    """Shares by domain as numbers, of which at least one is more than nothing."""
    if not isinstance(shares, dict):
        raise bad(name, shares, "numbers by domain: " + ", ".join(READABLE))
    for domain in shares:
        if domain not in READABLE:
            raise bad(name, domain, "domains out of " + ", ".join(READABLE))
    result = {domain: number(f"{name}.{domain}", s, 0, 1e6) for domain, s in shares.items()}
    if not sum(result.values()) > 0:
        raise bad(name, shares, "a share above 0")
    return result
