"""Row 15: a step of training, beside transformers' model of the same weights.

A step is what it is in ``dsv3 train`` without the extras that transformers has not: forward, loss,
backward, the gradient clipped, AdamW in one call over float32 weights. In bf16 each side rounds as
it does: ours takes rounded copies for its products, transformers' runs under torch's autocast. The
models have the sizes of the small model without its MTP module. Both are trained for a few steps
first: the losses agree only if forward pass, gradients and update do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.bench.models import in_transformers
from dsv3.bench.row import Check, Row, Trial, Workbench, gap, peer, timed
from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.precision import Precision

CONFIG = ModelConfig.mini().but(num_nextn_predict_layers=0, quantization_config=None)
WINDOWS, LENGTH = 6, 256
CHECKED = 3  # steps
GOAL = 1.3
# Of the losses. In bfloat16 the two round in different places.
GAPS = {"fp32": 1e-5, "bf16": 1e-2}


class Learner:
    """A model that is trained. loss: of tokens (b, s + 1), with a gradient."""

    def __init__(self, model: nn.Module, logits: Callable[[Tensor], Tensor], rate: float = 3e-4):
        self.logits = logits
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=rate, fused=True)

    def step(self, text: Tensor) -> Tensor:
        """One step; the loss before it."""
        logits = self.logits(text[:, :-1]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, text[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def pair(config: ModelConfig, precision: str, device: torch.device) -> tuple[Learner, Learner]:
    """Ours and transformers', from the same weights. Raises Missing."""
    ours = Transformer(config, Precision.training(precision), device=device).init_weights(0)
    theirs = in_transformers(config, ours.state_dict()).to(device).train()
    rounding = partial(torch.autocast, device.type, torch.bfloat16)

    def their_logits(text: Tensor) -> Tensor:
        with rounding() if precision == "bf16" else nullcontext():
            return theirs(text, use_cache=False).logits

    return Learner(ours, ours), Learner(theirs, their_logits)


def step(config: ModelConfig, precision: str, windows: int, length: int, bench: Workbench) -> Trial:
    ours, theirs = pair(config, precision, bench.device)
    random = torch.Generator().manual_seed(0)
    text = torch.randint(config.vocab_size, (windows, length + 1), generator=random)
    text = text.to(bench.device)

    def losses(of: Learner) -> Tensor:
        return torch.stack([of.step(text) for _ in range(CHECKED)])

    def alike() -> Check:
        return gap(losses(ours), losses(theirs), GAPS[precision])

    goal = GOAL if bench.device.type == "cpu" else None
    name = "transformers" + ", autocast to bfloat16" * (precision == "bf16")
    against = peer(name, lambda: partial(theirs.step, text), goal)
    return Trial(partial(ours.step, text), [against], alike, tokens=windows * length)


def rows(suite: str) -> list[Row]:
    return [
        Row(15, "training step", f"{precision}, {WINDOWS} windows of {LENGTH}",
            timed(partial(step, CONFIG, precision, WINDOWS, LENGTH), learns=True), weight=6)
        for precision in GAPS
    ]  # fmt: skip
