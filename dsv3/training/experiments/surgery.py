"""Models that a config cannot describe: plain attention in a block, a mixture without a shared
expert."""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.attention import Attention
from dsv3.block import Block
from dsv3.cache import OneLayer, Step
from dsv3.model import Transformer
from dsv3.moe import MoE
from dsv3.precision import Precision
from dsv3.training.experiments.arms import Arm


class PlainAttention(nn.Module):
    """``dsv3.attention.Attention`` at the place of latent attention; without a cache."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(
        self, x: Float[Tensor, "b s d"], step: Step, kept: OneLayer | None = None
    ) -> Float[Tensor, "b s d"]:
        assert kept is None, "this one is for training"
        return self.attention(x)


class NoShared(nn.Module):
    """In the place of shared experts: adds nothing."""

    def partial_sum(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return torch.zeros_like(x)


def build(arm: Arm, seed: int) -> Transformer:
    """The arm's model before training. Parts that are the same in two arms begin the same."""
    config = arm.model
    model = Transformer(config, Precision.training(arm.precision, arm.fp8))
    for block in (module for module in model.modules() if isinstance(module, Block)):
        if arm.kv_heads is not None:
            block.register_module(
                "attn",
                PlainAttention(
                    Attention(
                        config.hidden_size,
                        config.num_attention_heads,
                        kv_heads=arm.kv_heads,
                        head_dim=arm.head_dim,
                        rope_theta=config.rope_theta,
                    )
                ),
            )
        if not arm.shared and isinstance(block.ffn, MoE):
            block.ffn.register_module("shared_experts", NoShared())
    return start(model, seed)


@torch.no_grad()
def start(model: Transformer, seed: int) -> Transformer:
    """First values by the rule of ``init_weights(by_width=True)``, but each tensor from a generator
    of its own: one that is new, or has another shape, moves none of the others."""
    model.init_weights(seed, embedding_std=0.3, by_width=True)  # norms and biases stay as it says
    depth = 2 * model.config.num_hidden_layers
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and name != "embed.weight":
            adds = name.removesuffix(".weight").rpartition(".")[2] in ("wo", "w2")
            std = (weight.shape[-1] * (depth if adds else 1)) ** -0.5
            random = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            weight.normal_(0.0, std, generator=random)
    return model
