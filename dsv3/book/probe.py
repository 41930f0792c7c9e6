"""Looking inside a model while it reads: the tensors that chapters measure."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv3.cache import Step
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


def attention_maps(model: Transformer, tokens: Tensor) -> Tensor:
    """Softmax weights of every head for one text, (layers, heads, s, s), float32.

    The model does not keep them. They are made again from queries and keys in the expanded form,
    with the model's own scale. tokens: (1, s).
    """
    count = tokens.shape[1]
    step = Step.make(model.config, [0], [count], count, model.device)
    ahead = torch.ones(count, count, device=model.device).triu(1).bool()
    maps = []
    for layer, h in zip(model.layers, attention_inputs(model, tokens)):
        q = torch.cat(layer.attn.queries(h[None], step), -1).transpose(1, 2)
        k, _ = layer.attn.wkv_b(
            layer.attn.latents(h[None], step).to(model.precision.core(model.device))
        )
        scores = q.to(k.dtype) @ k.transpose(-1, -2) * layer.attn.scale
        maps.append(scores.masked_fill(ahead, -math.inf).softmax(-1)[0].float())  # eq. 10
    return torch.stack(maps)


def effective_rank(singular_values: Tensor, share: float) -> int:
    """Fewest directions that hold ``share`` of a matrix's energy, the sum of the squares."""
    energy = singular_values.double().square()
    held = energy.sort(descending=True).values.cumsum(0) / energy.sum()
    return int((held < share).sum()) + 1
