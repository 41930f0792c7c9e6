"""Absorbed attention over the latent cache (eq. 10), for few queries and many keys.

All heads of a token read the same 576 numbers of each key: 512 of the latent, which are its value
too, and 64 of the rotated key. So heads are the rows of a product on tensor cores, and one load of
a run of keys serves the scores and the sum:

    scores = q_latent @ c^T + q_rope @ r^T;   o += softmax(scores) @ c

One program goes over a part of the keys for a tile of rows (16 heads or more, of one query or of
several drafted ones, each of which sees as many keys as ``reach`` says). A text is cut into parts
because one program for each text would leave most multiprocessors idle. Each part leaves its own
softmax average o_j and the logarithm of its sum of exponentials L_j, and a second kernel adds them
up in their order:

    o = sum_j 2^(L_j - max L) o_j / sum_j 2^(L_j - max L)

**A text is cut at fixed places**: parts of 256 keys, after sixteen of them sixteen of 512, and so
on, so that 128,000 keys are 81 parts. Neither the other rows of the batch nor the number of keys
nor the chip moves a cut, and a tile always has 32 rows and runs of as many keys. So a query's
numbers are the same, bit for bit, alone and beside others, in a pass of one token and in one that
verifies drafts (as far as the compiler adds up each row of a tile in one order). The price: many
texts at once are cut although they would fill the chip uncut, and what the parts leave (with 128
heads as many bytes as 256 keys have) is written and read again. With 64 rows a tile, the sums of
512 channels would no longer fit into registers beside the two parts of the queries.

Queries and weights are float32 numbers in two bfloat16 parts (``bf16_parts``); sums are float32.

The cache may be packed (``dsv3.fp8.latent``): E4M3 codes and scales that are powers of two, so
code times scale is a bfloat16 number, and no bit is lost on the way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.kernels.bf16_parts import operand, rest_of, to_bf16
from dsv3.kernels.launch import INTERPRETING, cdiv, check_input, power_of_two

# Keys of the first parts, and how many parts are of one length.
PART, ALIKE = 256, 16
# Rows of a tile. 16 would do for few heads, but sums would be taken in another order.
_ROWS = 32


def mla_decode_spec(
    q: torch.Tensor, seen: torch.Tensor, reach: torch.Tensor, scale: float, latent: int
) -> torch.Tensor:
    """What the kernel computes, in plain torch: q (b, s, heads, d), seen (b, t, d) -> the values'
    averages (b, s, heads, latent). reach (b, s): keys that a query sees; for none, zeros."""
    scores = torch.einsum("bshd,btd->bsht", q, seen.to(q.dtype)) * scale
    hidden = torch.arange(seen.shape[1], device=q.device) >= reach[:, :, None, None]
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bsht,btd->bshd", weights, seen[..., :latent].to(q.dtype))


# Numbers that change from call to call must not recompile the kernel.
@triton.jit(do_not_specialize=["rows", "heads", "splits"])
def mla_decode_kernel(
    q_ptr,
    seen_ptr,
    scale_ptr,
    rope_ptr,
    reach_ptr,
    out_ptr,
    total_ptr,
    rows,
    heads,
    splits,
    row_stride,
    key_stride,
    softmax_scale,
    FIRST_PART: tl.constexpr,
    PARTS_ALIKE: tl.constexpr,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_WIDE: tl.constexpr,
    ROPE_WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    split, text = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel, pair = tl.arange(0, LATENT_WIDE), tl.arange(0, ROPE_WIDE)
    tile = tl.arange(0, TILES)
    has_channel, has_pair = channel < LATENT, pair < ROPE
    q_at = q_ptr + (text * rows + row[:, None]) * (LATENT + ROPE)
    is_row = (row < rows)[:, None]
    qc = tl.load(q_at + channel[None, :], mask=is_row & has_channel[None, :], other=0.0)
    qr = tl.load(q_at + LATENT + pair[None, :], mask=is_row & has_pair[None, :], other=0.0)
    qc_high, qr_high = to_bf16(qc, INTERPRETED), to_bf16(qr, INTERPRETED)
    qc_low, qr_low = rest_of(qc, qc_high, INTERPRETED), rest_of(qr, qr_high, INTERPRETED)

    queries = rows // heads
    reach = tl.load(reach_ptr + text * queries + row // heads, mask=row < rows, other=0)
    reach = reach.to(tl.int32)
    longest = tl.max(reach, axis=0)
    double = split // PARTS_ALIKE
    part = FIRST_PART << double
    begin = (((PARTS_ALIKE << double) - PARTS_ALIKE) * FIRST_PART) + split % PARTS_ALIKE * part
    reach = tl.minimum(reach, begin + part)
    end = tl.minimum(begin + part, longest)

    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    acc = tl.zeros((ROWS, LATENT_WIDE), dtype=tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        is_key = (key < end)[:, None]
        key_at = text * row_stride + key.to(tl.int64)[:, None] * key_stride
        c = tl.load(seen_ptr + key_at + channel, mask=is_key & has_channel, other=0)
        if PACKED:  # a code's bits, seven places to the left, are a float16 that is 2^8 too small
            code = c.to(tl.int16)
            half = ((code & 0x80) << 8) | ((code & 0x7F) << 7)
            value = half.to(tl.float16, bitcast=True).to(tl.float32)
            scale = tl.load(
                scale_ptr + key_at // 4 + tile, mask=is_key & (tile * BLOCK < LATENT), other=0.0
            )
            value = tl.reshape(value, (KEYS, TILES, LATENT_WIDE // TILES))
            value = value * (scale * 256.0)[:, :, None]
            c = to_bf16(tl.reshape(value, (KEYS, LATENT_WIDE)), INTERPRETED)
            r = tl.load(rope_ptr + key_at // 2 + pair, mask=is_key & has_pair, other=0.0)
        else:
            c = operand(c, INTERPRETED)
            r = tl.load(rope_ptr + key_at + pair, mask=is_key & has_pair, other=0.0)
        r = operand(r, INTERPRETED)
        scores = tl.dot(qc_high, tl.trans(c))
        scores = tl.dot(qr_high, tl.trans(r), scores)
        if PARTS == 2:
            scores = tl.dot(qc_low, tl.trans(c), scores)
            scores = tl.dot(qr_low, tl.trans(r), scores)
        scores *= softmax_scale * 1.4426950408889634  # exp(x) is 2^(x log2 e)
        scores = tl.where(key[None, :] < reach[:, None], scores, float("-inf"))

        new_best = tl.maximum(best, tl.max(scores, axis=1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(best - base)
        total = total * fade + tl.sum(weights, axis=1)
        high = to_bf16(weights, INTERPRETED)
        acc = tl.dot(high, c, acc * fade[:, None])
        if PARTS == 2:
            acc = tl.dot(rest_of(weights, high, INTERPRETED), c, acc)
        best = new_best

    some = total > 0.0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    at = (text * splits + split) * rows + row
    tl.store(out_ptr + at[:, None] * LATENT + channel, acc, mask=is_row & has_channel)
    tl.store(
        total_ptr + at,
        tl.where(some, best + tl.log2(tl.where(some, total, 1.0)), float("-inf")),
        mask=row < rows,
    )


@triton.jit(do_not_specialize=["rows", "splits"])
def mla_combine_kernel(
    part_ptr, total_ptr, out_ptr, rows, splits, LATENT: tl.constexpr, LATENT_WIDE: tl.constexpr
):
    row, text = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, LATENT_WIDE)
    first = text * splits * rows + row
    best = float("-inf")
    for split in range(splits):
        best = tl.maximum(best, tl.load(total_ptr + first + split * rows))
    best = tl.where(best == float("-inf"), 0.0, best)
    acc = tl.zeros((LATENT_WIDE,), dtype=tl.float32)
    weights = 0.0
    for split in range(splits):
        at = first + split * rows
        weight = tl.exp2(tl.load(total_ptr + at) - best)
        acc += weight * tl.load(part_ptr + at * LATENT + channel, mask=channel < LATENT, other=0.0)
        weights += weight
    acc = acc / tl.where(weights > 0.0, weights, 1.0)
    tl.store(out_ptr + (text * rows + row) * LATENT + channel, acc, mask=channel < LATENT)


def splits_of(keys: int) -> int:
    """Into how many parts so many keys are cut."""
    splits, part = 0, PART
    while keys > part * ALIKE:
        splits, keys, part = splits + ALIKE, keys - part * ALIKE, 2 * part
    return splits + cdiv(keys, part)


def mla_decode(
    q: torch.Tensor,
    seen: torch.Tensor,
    reach: torch.Tensor,
    scale: float,
    latent: int,
    *,
    parts: int = 2,
) -> torch.Tensor:
    """Averages of the latents by each head's softmax: (b, s, heads, latent) float32.

    q: (b, s, heads, latent + rope) float32, queries carried into the latent space. seen: (b, t,
    latent + rope) bfloat16, or (b, t, bytes) uint8 as ``dsv3.fp8.latent`` packs them. reach: (b, s)
    integers on the device, how many keys each query sees, 0 to t. parts: bfloat16 parts of a
    float32 number, 1 or 2.
    """
    check_input(q, "mla_decode", (torch.float32,))
    check_input(seen, "mla_decode", (torch.bfloat16, torch.uint8))
    (b, s, heads, width), t = q.shape, seen.shape[1]
    rope, packed = width - latent, seen.dtype == torch.uint8
    scales_at = cdiv(latent, 4) * 4
    rope_at = scales_at + 4 * cdiv(latent, BLOCK)
    expected = (b, t, rope_at + 2 * rope if packed else width)
    if tuple(seen.shape) != expected or tuple(reach.shape) != (b, s):
        raise DSV3Error(
            "shapes do not fit",
            where="mla_decode",
            found=[tuple(x.shape) for x in (q, seen, reach)],
            expected=[tuple(q.shape), expected, (b, s)],
        )
    out = q.new_empty(b, s, heads, latent)
    if out.numel() == 0 or t == 0:
        return out.zero_()
    if seen.stride(2) != 1:
        seen = seen.contiguous()
    rows = s * heads
    splits = splits_of(t)
    parts_out = out if splits == 1 else q.new_empty(b, splits, rows, latent)
    totals = q.new_empty(b, splits, rows)
    if packed:
        scales = seen[..., scales_at:rope_at].view(torch.float32)
        rotated = seen[..., rope_at:].view(torch.bfloat16)
    else:
        scales, rotated = seen, seen[..., latent:]
    wide = dict(LATENT=latent, LATENT_WIDE=max(16, power_of_two(latent)))
    mla_decode_kernel[(cdiv(rows, _ROWS), splits, b)](
        q.contiguous(),
        seen,
        scales,
        rotated,
        reach.contiguous(),
        parts_out,
        totals,
        rows,
        heads,
        splits,
        seen.stride(0),
        seen.stride(1),
        scale,
        FIRST_PART=PART,
        PARTS_ALIKE=ALIKE,
        **wide,
        ROPE=rope,
        ROPE_WIDE=max(16, power_of_two(rope)),
        ROWS=_ROWS,
        KEYS=32 if packed else 64,
        PARTS=parts,
        PACKED=packed,
        TILES=cdiv(wide["LATENT_WIDE"], BLOCK),
        BLOCK=BLOCK,
        INTERPRETED=INTERPRETING,
        num_warps=8,
        num_stages=2,
    )
    if splits > 1:
        mla_combine_kernel[(rows, b)](parts_out, totals, out, rows, splits, **wide)
    return out
