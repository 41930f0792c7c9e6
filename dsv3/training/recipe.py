"""All choices of a training run that are not sizes of the model."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from dsv3.errors import DSV3Error
from dsv3.training.schedules import Schedules

# What JSON makes of a field.
_JSON_KINDS = {
    int: (int,),
    float: (float, int),
    bool: (bool,),
    str: (str,),
    dict: (dict,),
    tuple: (list,),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run in two phases: pre-training, and an extension of the context with YaRN (TR 4.3).

    tokens, seq_len: of pre-training. extension_tokens, extension_seq_len, extension_batch,
    extension_rate, extension_shares: of the second phase (it is left out for a model whose config
    has no YaRN). Its learning rate falls on a straight line to a tenth, and it reads another
    mixture of text, with plain functions in it; in the report both stay as they were.
    batch_first, batch_last: windows a step at the beginning and after the ramp; micro_batch:
    tokens that go through the model at once. learning_rate: the peak; warmup: steps.
    embedding_std: of the embedding's first values; all others start at the config's
    initializer_range. In a narrow model at a high rate the layers soon add a thousand times what
    an embedding of 0.02 holds, and the token is drowned in the stream. sequence_weight: alpha.
    shares: of the domains, by tokens; fim_rate: of code with a hole to fill in. precision:
    "fp32", "bf16" or "fp8"; moments: of AdamW, "fp32" or "bf16"; recompute: save memory by
    computing norms and up-projections again in the backward pass. log_every, eval_every: steps;
    eval_windows: held-out windows of each domain looked at during a run; save_minutes: time
    between checkpoints.
    """

    tokens: int = 5_200_000
    seq_len: int = 256
    batch_first: int = 3
    batch_last: int = 6
    micro_batch: int = 4096
    learning_rate: float = 2.5e-3
    warmup: int = 100
    embedding_std: float = 0.3
    extension_tokens: int = 1_000_000
    extension_seq_len: int = 1024
    extension_batch: int = 2
    extension_rate: float = 8e-4
    extension_shares: dict[str, float] = field(
        default_factory=lambda: {"plays": 0.3, "functions": 0.5, "arithmetic": 0.2}
    )
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    sequence_weight: float = 1e-4
    shares: dict[str, float] = field(
        default_factory=lambda: {"plays": 0.42, "code": 0.28, "arithmetic": 0.3}
    )
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
        for name in (
            "tokens",
            "seq_len",
            "batch_first",
            "batch_last",
            "micro_batch",
            "extension_seq_len",
            "extension_batch",
            "log_every",
            "eval_every",
            "eval_windows",
        ):
            if getattr(self, name) < 1:
                raise DSV3Error(
                    "bad value", where=name, found=getattr(self, name), expected="1 or more"
                )
        if self.extension_tokens < 0:
            raise DSV3Error(
                "bad value",
                where="extension_tokens",
                found=self.extension_tokens,
                expected="0 or more",
            )

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

    def check_ranks(self, ranks: int, extends: bool) -> None:
        """Raise DSV3Error unless every rank gets a window of each step. extends: whether there is
        a second phase."""
        for what in ("batch_first", "batch_last", *["extension_batch"] * extends):
            if getattr(self, what) < ranks:
                raise DSV3Error(
                    "fewer windows in a step than ranks",
                    where=what,
                    found=getattr(self, what),
                    expected=f"{ranks} or more",
                    fix="Start fewer ranks",
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
        known = {f.name: f for f in fields(cls)}
        if set(values) != set(known):
            raise DSV3Error(
                "recipe of another version",
                where="checkpoint",
                found=", ".join(sorted(set(known) ^ set(values))[:3]) + " on one side only",
                fix="Give a new --out folder",
            )
        usual = cls()
        for name, value in values.items():
            kinds = _JSON_KINDS[type(getattr(usual, name))]
            if type(value) not in kinds:
                raise DSV3Error(
                    "bad value in a stored recipe",
                    where=name,
                    found=f"{value!r:.60}",
                    expected=" or ".join(kind.__name__ for kind in kinds),
                    fix="Give a new --out folder",
                )
        return cls(**{**values, "betas": tuple(values["betas"])})
