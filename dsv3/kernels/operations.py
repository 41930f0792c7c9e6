"""What stands between the products, as operations: each is a kernel on a GPU, or a loop on a CPU.

Whoever wants one names it here. Triton, or Numba, is loaded when the first is called, and a
compiler takes each for one operation (``dsv3.opaque``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv3.fields import BLOCK
from dsv3.opaque import opaque

# Compute capabilities, to the point: Hopper, and the Blackwell chips of data centres.
_ROOMY = (9, 10)


def has_room(device: torch.device) -> bool:
    """Whether a multiprocessor there has the shared memory that these kernels ask for: up to 180
    KiB. Hopper and Blackwell have 227; Ada has 99, and so have the Blackwell chips on desks."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in _ROOMY


@opaque(
    "mla_decode(Tensor q, Tensor seen, Tensor reach, float scale, int latent) -> Tensor",
    like=lambda q, seen, reach, scale, latent: q.new_empty(*q.shape[:-1], latent),
)
def mla_decode(q: Tensor, seen: Tensor, reach: Tensor, scale: float, latent: int) -> Tensor:
    """Each head's average of the latents (``kernels.mla_decode``)."""
    from dsv3.kernels import mla_decode

    return mla_decode.mla_decode(q, seen, reach, scale, latent)


@opaque(
    "mla_prefill(Tensor q_nope, Tensor q_rope, Tensor kv, Tensor k_rope, Tensor reach, float scale)"
    " -> Tensor",
    like=lambda q_nope, q_rope, kv, k_rope, reach, scale: q_nope.new_empty(
        (*q_nope.shape[:-1], kv.shape[-1] - q_nope.shape[-1]), dtype=torch.float32
    ),
)
def mla_prefill(
    q_nope: Tensor, q_rope: Tensor, kv: Tensor, k_rope: Tensor, reach: Tensor, scale: float
) -> Tensor:
    """Each head's average of its values (``kernels.mla_prefill``)."""
    from dsv3.kernels import mla_prefill

    return mla_prefill.mla_prefill(q_nope, q_rope, kv, k_rope, reach, scale)


def _like_norm(x, weight, eps, scale_format):
    tiles = -(-x.shape[-1] // BLOCK)
    return (
        x.new_empty(x.shape, dtype=torch.float8_e4m3fn),
        x.new_empty((*x.shape[:-1], tiles), dtype=torch.float32),
        x.new_empty(x.shape),
    )


@opaque(
    "norm_quant(Tensor x, Tensor weight, float eps, str scale_format) -> (Tensor, Tensor, Tensor)",
    like=_like_norm,
)
def norm_quant(
    x: Tensor, weight: Tensor, eps: float, scale_format: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales of the norm, and the norm itself (``kernels.norm_quant``)."""
    from dsv3.kernels import norm_quant

    data, scale, y = norm_quant.norm_quant(x, weight, eps, scale_format, keeps=True)
    assert y is not None
    return data, scale, y


@opaque(
    "router(Tensor u, Tensor weight, Tensor? bias, int groups, int open_groups, int k, str scoring,"
    " bool normalized, float scaling) -> (Tensor, Tensor)",
    like=lambda u, weight, bias, groups, open_groups, k, scoring, normalized, scaling: (
        u.new_empty((*u.shape[:-1], k), dtype=torch.float32),
        u.new_empty((*u.shape[:-1], k), dtype=torch.int64),
    ),
)
def router(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    open_groups: int,
    k: int,
    scoring: str,
    normalized: bool,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Weights and numbers of each token's experts (``kernels.router``)."""
    from dsv3.kernels import router

    choice = router.Choice(groups, open_groups, k, scoring, normalized, scaling)
    return router.router(u, weight, bias, choice)


@opaque(
    "combine(Tensor y, Tensor weights, Tensor order, Tensor used) -> Tensor",
    like=lambda y, weights, order, used: y.new_empty(
        (len(weights), y.shape[1]), dtype=torch.float32
    ),
)
def combine(y: Tensor, weights: Tensor, order: Tensor, used: Tensor) -> Tensor:
    """Each token's weighted sum of the rows that its choices came to lie in; order: which choice
    comes where (``kernels.combine``)."""
    from dsv3.kernels import combine

    places = combine.where_stands(order, weights.numel()).view(weights.shape)
    return combine.combine(y, weights, places, used)


@opaque(
    "combine_loops(Tensor y, Tensor weights, Tensor order, Tensor used) -> Tensor",
    like=lambda y, weights, order, used: y.new_empty((len(weights), y.shape[1])),
)
def combine_loops(y: Tensor, weights: Tensor, order: Tensor, used: Tensor) -> Tensor:
    """The same on a CPU, for y in float32 or float64 (``kernels.cpu_combine``)."""
    from dsv3.kernels import cpu_combine

    return cpu_combine.combine(y, weights, order, used)


@opaque(
    "mla_loops(Tensor q_nope, Tensor q_rope, Tensor seen, Tensor reach, Tensor w, float scale,"
    " ScalarType sums) -> Tensor",
    like=lambda q_nope, q_rope, seen, reach, w, scale, sums: q_nope.new_empty(
        (*q_nope.shape[:-1], w.shape[1] - q_nope.shape[-1]), dtype=sums
    ),
)
def mla_loops(
    q_nope: Tensor,
    q_rope: Tensor,
    seen: Tensor,
    reach: Tensor,
    w: Tensor,
    scale: float,
    sums: torch.dtype,
) -> Tensor:
    """Each head's average of its values, on a CPU (``kernels.cpu_attention``)."""
    from dsv3.kernels import cpu_attention

    return cpu_attention.attention(q_nope, q_rope, seen, reach, w, scale, sums)


@opaque(
    "wide_product(Tensor x, Tensor w, ScalarType sums) -> Tensor",
    like=lambda x, w, sums: x.new_empty((*x.shape[:-1], len(w)), dtype=sums),
)
def wide_product(x: Tensor, w: Tensor, sums: torch.dtype) -> Tensor:
    """x W^T of few rows in ``sums``, on a CPU (``kernels.cpu_linear``)."""
    from dsv3.kernels import cpu_linear

    return cpu_linear.product(x, w, sums)
