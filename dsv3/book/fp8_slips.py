"""What chapter 4's exercises ask for, and the same with the mistakes that readers make.

Each function is right as it is called without options; an option makes one mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3 import fp8


def e4m3(x: Tensor) -> Tensor:
    """The values of the codes of x."""
    return fp8.decode_e4m3(fp8.encode_e4m3(x))


def decoded(
    code: int,
    *,
    bias: int = 7,
    subnormals: str = "right",
    leading: int = 1,
    nan: bool = True,
    infinity: bool = False,
    sign: bool = True,
    mantissas: bool = True,
) -> float:
    """An E4M3 code as a number."""
    exponent, mantissa = code >> 3 & 15, code & 7 if mantissas else 0
    value = 2.0 ** (exponent - bias) * (leading + mantissa / 8)
    if exponent == 0 and subnormals != "normal":
        value = 2.0 ** ((1 if subnormals == "right" else 0) - bias) * mantissa / 8
    if nan and code & 0x7F == 0x7F:
        value = math.inf if infinity else math.nan
    return -value if sign and code & 0x80 else value


def tile_scales(
    x: Tensor, width: int = 128, largest: float = 448.0, absolute: bool = True, floor: float = 1e-12
) -> Tensor:
    """x (tokens, channels) -> scales (tokens, tiles)."""
    tiles = F.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width))
    amax = tiles.abs().amax(-1) if absolute else tiles.amax(-1)
    return (amax / largest).clamp(floor)


def mx_blocks(
    x: Tensor, width: int = 32, rounding: str = "floor", shift: int = 8, saturate: bool = True
) -> Tensor:
    """x (rows, columns) -> its values after MXFP8. rounding "ceil", "v3" and "none" make another
    scale: the power of two above, that of V3.1, and no power of two."""
    blocks = F.pad(x, (0, -x.shape[1] % width)).unflatten(1, (-1, width))
    amax = blocks.abs().amax(-1, keepdim=True)
    mantissa, exponent = torch.frexp(amax)
    power = exponent - 1 - shift
    if rounding == "ceil":
        power = power + (mantissa > 0.5).int()
    scale = torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), power), 1.0)
    if rounding == "none":
        scale = torch.where(amax > 0, amax / 448, 1.0)
    elif rounding == "v3":
        fits = torch.frexp(amax / 448)
        power = fits.exponent - (fits.mantissa == 0.5).int()
        scale = torch.where(amax > 0, torch.ldexp(torch.ones_like(amax), power), 1.0)
    scaled = blocks / scale
    codes = e4m3(scaled)
    if not saturate:  # beyond 448 the grid would go on in steps of 32
        codes = torch.where(scaled.abs() > 448, (scaled / 32).round() * 32, codes)
    return (codes * scale).flatten(1)[:, : x.shape[1]]


def by_blocks(
    x: Tensor,
    w: Tensor,
    *,
    x_scale: Callable = lambda s: s,
    w_scale: Callable = lambda s: s,
    x_group: tuple[int, int] = (1, 128),
    w_group: tuple[int, int] = (128, 128),
) -> Tensor:
    """x (M, K), w (N, K) -> x w^T of quantised values; 0 in a group means the whole axis."""

    def values(t: Tensor, group: tuple[int, int], scaled: Callable) -> Tensor:
        rows, cols = (g or n for g, n in zip(group, t.shape))
        blocks = F.pad(t, (0, -t.shape[1] % cols, 0, -t.shape[0] % rows))
        blocks = blocks.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))
        scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).clamp(1e-12)
        codes = e4m3(blocks / scale)
        return (codes * scaled(scale)).flatten(2).flatten(0, 1)[: t.shape[0], : t.shape[1]]

    return values(x, x_group, x_scale) @ values(w, w_group, w_scale).T
