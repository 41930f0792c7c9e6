"""Hard values for E4M3, worked out from the definition of the format in Python's own floats."""

from __future__ import annotations

import itertools
import math

import torch

TILE, BLOCK = (1, 128), (128, 128)


def e4m3_value(code: int) -> float:
    """The number that a code stands for, from the definition: sign, exponent, mantissa."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        size = math.ldexp(mantissa, -9)
    else:
        size = math.ldexp(8 + mantissa, exponent - 10)
    return -size if sign else size


def nearest_code(value: float) -> int:
    """The E4M3 code of a float by search: nearest, then even; beyond 448 the largest."""
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    if math.isnan(value):
        return sign | 0x7F
    size = min(abs(value), 448.0)
    return sign | min(range(127), key=lambda code: (abs(e4m3_value(code) - size), code & 1))


def hard_values() -> torch.Tensor:
    """FP32: every finite code, every tie between neighbours, one step to each side of both,
    far beyond the range, infinities, NaN of both signs, the smallest floats, both zeros."""
    finite = [e4m3_value(code) for code in range(127)]
    ties = [(low + high) / 2 for low, high in itertools.pairwise(finite)]
    points = torch.tensor(finite + ties + [464.0, 480.0], dtype=torch.float32)
    sides = [torch.nextafter(points, torch.tensor(way)) for way in (0.0, math.inf)]
    beyond = torch.tensor([465.0, 512.0, 1e9, 3.4e38, math.inf, math.nan, 1e-45, 1e-38, 2.0**-11])
    positive = torch.cat([points, *sides, beyond])
    return torch.cat([positive, torch.copysign(positive, torch.tensor(-1.0))])


def adversarial_rows(rows: int, cols: int) -> torch.Tensor:
    """FP32 rows whose sizes run over the whole range of floats, with special tiles mixed in."""
    generator = torch.Generator().manual_seed(7)
    sizes = torch.logspace(-44, 38, rows, dtype=torch.float64)[:, None]
    x = (torch.randn(rows, cols, generator=generator, dtype=torch.float64) * sizes).float()
    x[0] = 0.0
    x[1, 5] = math.inf
    x[2, 130] = -math.nan
    x[3] = -0.0
    # In FP32 log2 of this tile's scale, 1024 * (1 + 2^-23), is 10; its ceiling must be 11.
    x[4] = 1.0
    x[4, 3] = -448.0 * 1024 * (1 + 2.0**-23)
    x[5] = 448.0  # the scale is exactly 1
    x[6] = 3.4e38
    return x


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal byte for byte; NaNs of FP32 count as equal whatever their payload."""
    if a.dtype == torch.float32 and b.dtype == torch.float32:
        a, b = (torch.where(t.isnan(), torch.nan, t) for t in (a, b))
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def product_error(y: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """Largest relative error of a row of y against x w^T in float64, in the Euclidean norm."""
    exact = x.double() @ w.double().T
    return ((y.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def to_nearest(v: torch.Tensor, mantissa: int, smallest: int) -> torch.Tensor:
    """float64 numbers to ``mantissa`` bits after the leading one; steps shrink down to
    2^(smallest - mantissa). torch.round takes ties to even."""
    exponent = torch.frexp(v).exponent - 1
    step = 2.0 ** (exponent.clamp(min=smallest) - mantissa).double()
    return torch.round(v / step) * step


def rounded(x: torch.Tensor, block: tuple[int, int], scale_format: str) -> torch.Tensor:
    """x in E4M3 by blocks, block after block, from the definition and in float64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for row in range(0, x.shape[0], block[0]):
        for col in range(0, x.shape[1], block[1]):
            where = slice(row, row + block[0]), slice(col, col + block[1])
            part = x[where].float()
            scale = (part.abs().max() / 448).clamp(min=1e-12).item()
            if scale_format == "ue8m0":
                mantissa, exponent = math.frexp(scale)
                scale = math.ldexp(1.0, exponent - (mantissa == 0.5))
            out[where] = to_nearest((part / scale).double(), 3, -6) * scale
    return out
