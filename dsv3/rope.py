"""Rotary position embedding (RoPE) and its extension YaRN.

Attention by itself does not know where a token stands. RoPE turns each pair of values of a query
or key by an angle that grows with the position, a different speed for each pair. The dot product
of a query at position m and a key at position n then depends on m - n alone (TR eq. 3 and 8).

The pairs are neighbours: (x0, x1), (x2, x3), ... Seen as complex numbers x0 + i x1, the rotation
is one multiplication by e^{i m theta_j}. Another convention pairs x_j with x_{j + d/2}. Trained
from scratch either works; the released weights only work with neighbours.

YaRN (TR 4.3) stretches the context after training. Fast pairs, which turn many times within the
original context, tell neighbours apart and are left alone; slow pairs, which never finish a turn,
are slowed down by ``factor`` so that no unseen angle occurs; between them lies a ramp. The config
alone decides this, never the length of the text: a model must not change as a text grows.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Complex64, Float, Float32, Int
from torch import Tensor

from dsv3.config import ModelConfig


def plain_frequencies(dim: int, theta: float) -> Float32[Tensor, " pairs"]:
    """Angle per position of each pair of a dim-wide head, theta^(-2j / dim), in radians."""
    return 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)


def inverse_frequencies(config: ModelConfig) -> Float32[Tensor, " pairs"]:
    """Angle per position of each pair, theta_j = rope_theta^(-2j / d_h^R), after YaRN.

    In radians per position, for the qk_rope_head_dim / 2 pairs of a head.
    """
    dim = config.qk_rope_head_dim
    frequency = plain_frequencies(dim, config.rope_theta)
    yarn = config.rope_scaling
    if yarn is None:
        return frequency
    low, high = yarn_range(config)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low or 1e-3)
    slowed = ramp.clamp(0, 1)  # 0: fast pair, left alone; 1: slow pair, divided by factor
    return frequency / yarn.factor * slowed + frequency * (1 - slowed)


def yarn_range(config: ModelConfig) -> tuple[int, int]:
    """First and last pair of YaRN's ramp: (10, 23) for the released config.

    A pair with angle theta turns L theta / 2 pi times within the original context of L tokens.
    The ramp starts at the pair that turns beta_fast times and ends at that of beta_slow. Equal
    betas (Kimi K2) leave a ramp of one pair. In a context below 2 pi beta_slow tokens not even
    the fastest pair turns so often; the end then lies before the start, and no pair is slowed:
    strange, but what the released code does, and a model trained with it needs.
    """
    yarn, dim = config.rope_scaling, config.qk_rope_head_dim
    assert yarn is not None  # without YaRN there is no ramp to ask for

    def pair_that_turns(times: float) -> float:
        length = yarn.original_max_position_embeddings
        return dim * math.log(length / (2 * math.pi * times)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    return low, high


def yarn_temperature(factor: float, coefficient: float) -> float:
    """m(x) = 0.1 x ln(s) + 1 for a context stretched s times: 1.36889 for s = 40, x = 1."""
    return 0.1 * coefficient * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotation_scale(config: ModelConfig) -> float:
    """What YaRN multiplies cos and sin with: m(mscale) / m(mscale_all_dim), or m(1).

    It is 1 for the released config, whose two coefficients are equal.
    """
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_temperature(yarn.factor, yarn.mscale) / yarn_temperature(
            yarn.factor, yarn.mscale_all_dim
        )
    return yarn_temperature(yarn.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """Factor on every attention score: (d_h + d_h^R)^-1/2 (eq. 10), times m(mscale_all_dim)^2.

    The square does not show in eq. 10. It is 1.87385 for the released config.
    """
    scale = config.qk_head_dim**-0.5  # eq. 10
    yarn = config.rope_scaling
    if yarn is not None and yarn.mscale_all_dim:
        scale *= yarn_temperature(yarn.factor, yarn.mscale_all_dim) ** 2
    return scale


def rotations(
    positions: Int[Tensor, "*lead"], frequencies: Float32[Tensor, " pairs"], scale: float
) -> Complex64[Tensor, "*lead pairs"]:
    """One complex number scale * e^{i m theta_j} per position m and pair j.

    Made once per forward pass and shared by all layers.
    """
    angles = positions[..., None].to(torch.float32) * frequencies
    return torch.polar(torch.full_like(angles, scale), angles)


def rotate(
    x: Float[Tensor, "*lead d_r"],
    rotation: Complex64[Tensor, "*#lead d_r//2"] | Float32[Tensor, "*#lead d_r//2 2"],
) -> Float[Tensor, "*lead d_r"]:
    """Turn each neighbouring pair of the last dimension (eq. 3, 8).

    rotation is broadcast over x's leading dimensions. Computed in float32, returned in x's dtype.
    Compilers know no complex numbers, so rotation may come as cos and sin side by side, too.
    """
    if not rotation.is_complex():
        (x0, x1), (cos, sin) = x.float().unflatten(-1, (-1, 2)).unbind(-1), rotation.unbind(-1)
        turned = torch.stack([x0 * cos - x1 * sin, x0 * sin + x1 * cos], -1)
        return turned.flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)  # eq. 3, 8
