"""The plain formulas that fast forms are measured against, in eager torch, a line each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int
from torch import Tensor

from dsv3.fields import BLOCK


def dequantize(
    codes: Float8e4m3fn[Tensor, "rows cols"],
    scale: Float32[Tensor, "row_blocks col_blocks"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows cols"]:
    """code * scale of its block of 128 x 128, in FP32, rounded once to ``dtype``."""
    rows, cols = codes.shape
    spread = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :cols]
    return (codes.float() * spread).to(dtype)


def quantize(
    x: Float[Tensor, "rows cols"],
) -> tuple[Float8e4m3fn[Tensor, "rows cols"], Float32[Tensor, "rows col_blocks"]]:
    """Codes, and one scale for each row and 128 columns: max |x| / 448, at least 1e-12."""
    tiles = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = (tiles.abs().amax(-1) / 448).clamp(min=1e-12)
    codes = (tiles / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes.flatten(-2)[..., : x.shape[-1]], scale


def through_fp8(x: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """What is left of x when it has been quantised and dequantised."""
    codes, scale = quantize(x)
    return (codes.float() * scale.repeat_interleave(BLOCK, -1)[:, : x.shape[-1]]).to(x.dtype)


def swiglu(
    x: Float[Tensor, "n d"],
    w1: Float[Tensor, "inner d"],
    w3: Float[Tensor, "inner d"],
    w2: Float[Tensor, "d inner"],
    rounded: Callable[[Tensor], Tensor] = lambda x: x,
) -> Float[Tensor, "n d"]:
    """w2( silu(w1 x) * w3 x ). rounded: what happens to the input of each product."""
    x = rounded(x)
    return F.linear(rounded(F.silu(F.linear(x, w1)) * F.linear(x, w3)), w2)


def experts_in_a_loop(
    x: Float[Tensor, "n d"],
    weights: Float[Tensor, "n k"],
    chosen: Int[Tensor, "n k"],
    count: int,
    expert: Callable[[int, Tensor], Tensor],
) -> Float[Tensor, "n d"]:
    """One expert after the other: whose tokens are these, compute them, add them in.

    expert: from a number and rows to that expert's answer.
    """
    out = torch.zeros_like(x)
    visits = chosen.flatten().bincount(minlength=count).tolist()
    for number in range(count):
        if visits[number]:
            token, place = torch.where(chosen == number)
            out[token] += expert(number, x[token]) * weights[token, place, None].to(x.dtype)
    return out


def attend(
    q: Float[Tensor, "b heads s d"],
    k: Float[Tensor, "b heads s d"],
    v: Float[Tensor, "b heads s d_v"],
    scale: float,
) -> Float[Tensor, "b heads s d_v"]:
    """Causal attention in float32, head by head, so that few scores are held at a time."""
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    out = torch.empty(*q.shape[:-1], v.shape[-1], device=q.device)
    for head in range(q.shape[1]):
        scores = q[:, head].float() @ k[:, head].float().transpose(1, 2) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[:, head] = weights @ v[:, head].float()
    return out
