"""Looking inside a model while it reads: the tensors that chapters measure."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.mla import Step
from dsv3.model import Transformer


def attention_inputs(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """h of every layer, (s, d): what its attention reads, behind the norm.

    tokens: one text, (1, s).
    """
    count = tokens.shape[1]
    step = Step.make(model.config, [0], [count], count, model.device)
    x, inputs = model.embed(tokens), []
    for layer in model.layers:
        inputs.append(layer.attn_norm(x)[0])
        x = layer(x, step)
    return inputs


def effective_rank(singular_values: Tensor, share: float) -> int:
    """Fewest directions that hold ``share`` of a matrix's energy, the sum of the squares."""
    energy = singular_values.double().square()
    held = energy.sort(descending=True).values.cumsum(0) / energy.sum()
    return int((held < share).sum()) + 1
