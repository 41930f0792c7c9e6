"""Attention in the expanded form (eq. 10), for many queries: nothing of size s x t is ever stored.

A program takes a tile of one head's queries over their keys, a run at a time, with a running
maximum and a running sum (the "online softmax"). Keys are 192 wide and values 128, and neither is
padded or copied: the 128 numbers that each head has of its own and the values lie as the product
with wkv_b left them, and the 64 rotated ones, which all heads share, are read where they lie.

``reach`` says how many keys each query sees. That is the causal rule behind any number of earlier
chunks, and the length of each row of a ragged batch; a tile stops at its longest reach.

Operands in bfloat16 are multiplied as they are. Of float32 ones both are cut into two bfloat16
parts (``bf16_parts``), and three of the four products are taken: the fourth is below 2^-17 of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.kernels.bf16_parts import operand, rest_of, to_bf16
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input, power_of_two


def mla_prefill_spec(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    reach: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What the kernel computes, in plain torch; shapes as of ``mla_prefill``."""
    k, v = kv.split([q_nope.shape[-1], kv.shape[-1] - q_nope.shape[-1]], -1)
    scores = torch.einsum("bshd,bthd->bsht", q_nope, k)
    scores = (scores + torch.einsum("bshd,btd->bsht", q_rope, k_rope)) * scale
    hidden = torch.arange(kv.shape[1], device=kv.device) >= reach[:, :, None, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bsht,bthd->bshd", weights, v)


@triton.jit
def dot_parts(a, b, acc, PARTS: tl.constexpr, INTERPRETED: tl.constexpr):
    """acc + a @ b; with two parts, of float32 operands."""
    if PARTS == 2:
        a_high, b_high = to_bf16(a, INTERPRETED), to_bf16(b, INTERPRETED)
        acc = tl.dot(rest_of(a, a_high, INTERPRETED), b_high, acc)
        acc = tl.dot(a_high, rest_of(b, b_high, INTERPRETED), acc)
        return tl.dot(a_high, b_high, acc)
    else:
        return tl.dot(operand(a, INTERPRETED), operand(b, INTERPRETED), acc)


@triton.jit(do_not_specialize=["queries", "keys"])
def mla_prefill_kernel(
    qn_ptr,
    qr_ptr,
    kv_ptr,
    kr_ptr,
    reach_ptr,
    out_ptr,
    queries,
    keys,
    heads,
    kr_row_stride,
    kr_key_stride,
    softmax_scale,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    VALUE: tl.constexpr,
    NOPE_WIDE: tl.constexpr,
    ROPE_WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    text, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    # The last tiles have the most keys to see: they start first, those of all heads and texts.
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS + tl.arange(0, ROWS)
    is_row = (row < queries)[:, None]
    nope, rope, value = tl.arange(0, NOPE_WIDE), tl.arange(0, ROPE_WIDE), tl.arange(0, VALUE_WIDE)
    place = (text * queries + row[:, None]) * heads + head
    qn = tl.load(qn_ptr + place * NOPE + nope, mask=is_row & (nope < NOPE), other=0.0)
    qr = tl.load(qr_ptr + place * ROPE + rope, mask=is_row & (rope < ROPE), other=0.0)
    reach = tl.load(reach_ptr + text * queries + row, mask=row < queries, other=0).to(tl.int32)
    end = tl.minimum(tl.max(reach, axis=0), keys)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, VALUE_WIDE), dtype=tl.float32)
    for start in range(0, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = (key < end)[:, None]
        kv_at = kv_ptr + ((text * keys + key[:, None]) * heads + head) * (NOPE + VALUE)
        kr_at = kr_ptr + text * kr_row_stride + key.to(tl.int64)[:, None] * kr_key_stride
        k = tl.load(kv_at + nope, mask=is_key & (nope < NOPE), other=0.0)
        r = tl.load(kr_at + rope, mask=is_key & (rope < ROPE), other=0.0)
        v = tl.load(kv_at + NOPE + value, mask=is_key & (value < VALUE), other=0.0)
        scores = tl.zeros((ROWS, KEYS), dtype=tl.float32)
        scores = dot_parts(qn, tl.trans(k), scores, PARTS, INTERPRETED)
        scores = dot_parts(qr, tl.trans(r), scores, PARTS, INTERPRETED)
        scores *= softmax_scale * 1.4426950408889634  # exp(x) is 2^(x log2 e)
        scores = tl.where(key[None, :] < reach[:, None], scores, float("-inf"))

        new_best = tl.maximum(best, tl.max(scores, axis=1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(weights, axis=1)
        acc *= fade[:, None]
        if PARTS == 1:
            weights = to_bf16(weights, INTERPRETED)
        acc = dot_parts(weights, v, acc, PARTS, INTERPRETED)
        best = new_best
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + place * VALUE + value, acc, mask=is_row & (value < VALUE))


def mla_prefill(
    q_nope: torch.Tensor,
    q_rope: torch.Tensor,
    kv: torch.Tensor,
    k_rope: torch.Tensor,
    reach: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Each head's average of its values, (b, s, heads, d_v) float32.

    q_nope: (b, s, heads, d_h); q_rope: (b, s, heads, d_r); kv: (b, t, heads, d_h + d_v), keys and
    values of each head side by side; k_rope: (b, t, d_r); all float32 or all bfloat16. reach:
    (b, s) integers on the device, keys that each query sees, 0 to t.
    """
    operands = (q_nope, q_rope, kv, k_rope)
    for x in operands:
        check_input(x, "mla_prefill", (q_nope.dtype,))
    check_input(q_nope, "mla_prefill", (torch.float32, torch.bfloat16))
    (b, s, heads, d_h), d_r, t = q_nope.shape, q_rope.shape[-1], kv.shape[1]
    d_v = kv.shape[-1] - d_h
    shapes = [(b, s, heads, d_h), (b, s, heads, d_r), (b, t, heads, d_h + d_v), (b, t, d_r)]
    found = [tuple(x.shape) for x in operands]
    if found != shapes or tuple(reach.shape) != (b, s):
        raise DSV3Error(
            "shapes do not fit",
            where="mla_prefill",
            found=[*found, tuple(reach.shape)],
            expected=[*shapes, (b, s)],
        )
    out = torch.empty(b, s, heads, d_v, dtype=torch.float32, device=kv.device)
    if out.numel() == 0 or t == 0:
        return out.zero_()
    if k_rope.stride(2) != 1:
        k_rope = k_rope.contiguous()
    rows = 64 if INTERPRETING else 128
    # The second number of a grid ends at 65,535: with 128 heads, 512 texts are more.
    mla_prefill_kernel[(b * heads, cdiv(s, rows))](
        q_nope.contiguous(),
        q_rope.contiguous(),
        kv.contiguous(),
        k_rope,
        reach.contiguous(),
        out,
        s,
        t,
        heads,
        k_rope.stride(0),
        k_rope.stride(1),
        scale,
        NOPE=d_h,
        ROPE=d_r,
        VALUE=d_v,
        NOPE_WIDE=max(16, power_of_two(d_h)),
        ROPE_WIDE=max(16, power_of_two(d_r)),
        VALUE_WIDE=max(16, power_of_two(d_v)),
        ROWS=rows,
        KEYS=64,
        PARTS=2 if q_nope.dtype == torch.float32 else 1,
        INTERPRETED=INTERPRETING,
        num_warps=8,
        num_stages=2,
    )
    return out
