"""One layer of the transformer: attention and feed-forward around the residual stream.

    u = x + MLA(RMSNorm(x));   x' = u + FFN(RMSNorm(u))

Each half reads a normalised copy and *adds* what it found. The stream itself is never rescaled,
so the first layer's words still reach the last one. The first ``first_k_dense_replace`` layers
have a dense feed-forward, the others a mixture of experts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.cache import OneLayer, Step
from dsv3.config import ModelConfig
from dsv3.layers import RMSNorm, SwiGLU
from dsv3.mla import MLA
from dsv3.moe import MoE
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.recompute import ATTENTION, PRODUCTS, recomputed


class Block(nn.Module):
    """Layer number ``layer`` of the model."""

    def __init__(
        self, config: ModelConfig, layer: int, precision: Precision, group: TensorGroup, device=None
    ):
        super().__init__()
        self.precision = precision
        self.attn_norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, device, exact=precision.exact
        )
        self.attn = MLA(config, precision, group, device)
        self.ffn_norm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, device, exact=precision.exact
        )
        if config.is_moe(layer):
            self.ffn = MoE(config, precision, group, device, layer)
        else:
            self.ffn = SwiGLU(
                config.hidden_size,
                config.intermediate_size,
                precision,
                group,
                what="intermediate_size",
                device=device,
            )

    def forward(
        self, x: Float[Tensor, "b s d"], step: Step, kept: OneLayer | None = None
    ) -> Float[Tensor, "b s d"]:
        """kept: what this layer's cache keeps of earlier tokens; those of x join them."""
        if self.precision.recompute and torch.is_grad_enabled():
            u = x + recomputed(ATTENTION, self.attend, x, step, kept)
            return u + recomputed(PRODUCTS, self.feed_forward, u)
        u = x + self.attend(x, step, kept)
        return u + self.feed_forward(u)  # eq. 12

    def attend(
        self, x: Float[Tensor, "b s d"], step: Step, kept: OneLayer | None = None
    ) -> Float[Tensor, "b s d"]:
        """What attention adds to the stream."""
        return self.attn(self.precision.normed(self.attn_norm, x), step, kept)

    def feed_forward(self, u: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        """What the feed-forward adds to the stream."""
        return self.ffn(self.precision.normed(self.ffn_norm, u))
