"""Wrong answers to chapter 4's exercises, each with what the check must say to it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl


def no_subnormals(code):
    if code & 127 == 127:
        return math.nan
    size = (8 + code % 8) / 8 * 2.0 ** (code // 8 % 16 - 7)
    return size * (-1) ** (code >> 7)


def lower_subnormals(code):
    e = code >> 3 & 15
    if code & 127 == 127:
        return math.nan
    return (-1) ** (code >> 7) * 2.0 ** (e - 7) * ((e > 0) + code % 8 / 8)


def no_nan(code):
    e = code >> 3 & 15
    return (-1) ** (code >> 7) * 2.0 ** (max(e, 1) - 7) * ((e > 0) + code % 8 / 8)


def no_sign(code):
    return math.nan if code & 127 == 127 else abs(no_nan(code))


def no_bias(code):
    e = code >> 3 & 15
    if code & 127 == 127:
        return math.nan
    return (-1) ** (code >> 7) * 2.0 ** max(e, 1) * ((e > 0) + code % 8 / 8)


def tiles_of(x, width=128):
    filled = torch.zeros(x.shape[0], -(-x.shape[1] // width) * width)
    filled[:, : x.shape[1]] = x
    return filled.view(x.shape[0], -1, width)


def fp8(x):
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def mx(width=32, power=lambda amax: torch.floor(torch.log2(amax)) - 8):
    def blocks(x):
        cut = tiles_of(x, width)
        amax = cut.abs().amax(2, keepdim=True)
        scale = torch.where(amax > 0, 2.0 ** power(amax.clamp(1e-30)), 1.0)
        return (fp8(cut / scale) * scale).view(x.shape[0], -1)[:, : x.shape[1]]

    return blocks


def unsaturated(x):
    cut = tiles_of(x, 32)
    amax = cut.abs().amax(2, keepdim=True)
    scale = torch.where(amax > 0, 2.0 ** (torch.floor(torch.log2(amax.clamp(1e-30))) - 8), 1.0)
    beyond = cut.abs() > 448 * scale
    kept = torch.where(beyond, (cut / scale / 32).round() * 32, fp8(cut / scale)) * scale
    return kept.view(x.shape[0], -1)[:, : x.shape[1]]


@triton.jit
def signed_kernel(x, scale, cols, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * cols + c, mask=c < cols, other=0.0)
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(v) / 448)


@triton.jit
def unmasked_kernel(x, scale, cols, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.abs(tl.load(x + tl.program_id(0) * cols + c))
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(v) / 448)


@triton.jit
def undivided_kernel(x, scale, cols, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.abs(tl.load(x + tl.program_id(0) * cols + c, mask=c < cols, other=0.0))
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(v))


@triton.jit
def first_token_kernel(x, scale, cols, BLOCK: tl.constexpr):
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    v = tl.abs(tl.load(x + c, mask=c < cols, other=0.0))
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(v) / 448)


@triton.jit
def first_tile_kernel(x, scale, cols, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    v = tl.abs(tl.load(x + tl.program_id(0) * cols + c, mask=c < cols, other=0.0))
    tl.store(scale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(v) / 448)


def product(of_x=lambda s: s, of_w=lambda s: s, x_blocks=False, w_rows=False, drop=False):
    """The reader's loop, with a slip in it."""

    def rebuild(x, w):
        (m, k), n = x.shape, len(w)
        blocks = k // 128 if drop else -(-k // 128)
        y = torch.zeros(m, n)
        for b in range(blocks):
            xb, wb = x[:, 128 * b : 128 * b + 128], w[:, 128 * b : 128 * b + 128]
            sx = xb.abs().amax(1, keepdim=True) / 448
            if x_blocks:
                sx = sx.max().expand(m, 1)
            high = -(-n // 128) * 128
            sw = F.pad(wb.abs().amax(1), (0, high - n)).view(-1, 128)
            sw = sw.amax(1).repeat_interleave(128)[:n] / 448
            if w_rows:
                sw = wb.abs().amax(1) / 448
            part = fp8(xb / sx) @ fp8(wb / sw[:, None]).T
            y += part * of_x(sx) * of_w(sw)
        return y

    return rebuild


CLAIMS = {
    "one channel 1000 times larger ruins the others in E4M3": False,
    "weight_scale_inv multiplies the code": True,
    "casting FP8 weights to BF16 brings back what rounding took": False,
    "Hopper sums all FP8 products of a dot product in FP32": False,
    "V3 keeps its embedding and its router in FP8": False,
    "fprop and dgrad can use the same codes of W": True,
    "E5M2 has more numbers between 1 and 2 than E4M3": False,
    "re-tiling with power-of-two scales keeps the mantissas": True,
}


def believing(*statements):
    return {key: truth != (key in statements) for key, truth in CLAIMS.items()}


PLANTED = {
    "decode": [
        (no_subnormals, "the leading 1 is missing there"),
        (lower_subnormals, "2^-6, not 2^-7"),
        (no_nan, "are NaN, not 480"),
        (no_sign, "the sign bit is not used"),
        (no_bias, "take 7 off"),
        (
            lambda c: math.copysign(math.inf, 0.5 - (c > 127)) if c % 128 == 127 else no_nan(c),
            "no infinity",
        ),
    ],
    "tile_scales": [
        (lambda x: (tiles_of(x).amax(2) / 448).clamp(1e-12), "take abs()"),
        (lambda x: tiles_of(x).abs().amax(2).clamp(1e-12), "divide them by 448"),
        (lambda x: tiles_of(x).abs().amax(2) / 448, "needs a scale above 0"),
        (lambda x: 448 / tiles_of(x).abs().amax(2).clamp(448e-12), "amax / 448"),
        (lambda x: (tiles_of(x).abs().amax(2) / 240).clamp(1e-12), "here it is 448"),
        (
            lambda x: x.abs().amax(1, keepdim=True).repeat(1, tiles_of(x).shape[1]) / 448,
            "for a whole token",
        ),
        (lambda x: torch.full(tiles_of(x).shape[:2], x.abs().max() / 448), "the whole tensor"),
    ],
    "fp8_claims": [
        (believing("weight_scale_inv multiplies the code"), "max|w| / 448"),
        (
            believing(
                "V3 keeps its embedding and its router in FP8",
                "E5M2 has more numbers between 1 and 2 than E4M3",
            ),
            "three make eight",
        ),
        (believing("Hopper sums all FP8 products of a dot product in FP32"), "about 14 bits"),
    ],
    "underflow": [
        (18, "half of the smallest step"),
        (14, "where the damage begins"),
        (10, "next to nothing"),
        (2**19, "exponent"),
    ],
    "wrong_line": [
        (6, "w's columns"),
        (7, "would halve"),
        (3, "off by factors"),
        (1, "one block along K"),
    ],
    "mx_blocks": [
        (mx(width=128), "32 wide"),
        (mx(power=lambda amax: torch.ceil(torch.log2(amax)) - 8), "this is the ceiling"),
        (mx(power=lambda amax: torch.log2(amax / 448)), "V3's scale"),
        (mx(power=lambda amax: torch.ceil(torch.log2(amax / 448))), "V3.1"),
        (mx(power=lambda amax: torch.floor(torch.log2(amax)) - 7), "take 8 off"),
        (unsaturated, "must saturate"),
    ],
    "scale_kernel": [
        (signed_kernel, "tl.abs"),
        (unmasked_kernel, "mask the load"),
        (undivided_kernel, "divide by 448"),
        (first_token_kernel, "first token"),
        (first_tile_kernel, "first tile"),
    ],
    "rebuild": [
        (product(lambda s: 1 / s, lambda s: 1 / s), "you divide by both"),
        (product(of_w=lambda s: 1 / s), "the scales of w divide"),
        (product(of_x=torch.ones_like), "scales of x are missing"),
        (product(of_w=torch.ones_like), "scales of w are missing"),
        (product(x_blocks=True), "x is grouped in blocks"),
        (product(w_rows=True), "w has a scale for each row"),
        (product(drop=True), "the last block along K"),
        (lambda x, w: x @ w.T, "nothing is rounded"),
        (
            lambda x, w: (
                fp8(x / x.abs().max() * 448)
                @ fp8(w / w.abs().max() * 448).T
                * (x.abs().max() * w.abs().max() / 448**2)
            ),
            "and one for the whole of w",
        ),
    ],
}
