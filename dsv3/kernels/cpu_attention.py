"""Absorbed attention on a CPU: each query reads the cache as it lies there, once per pass.

    q^L_i = W^UK_i^T q^C_i;   score_ij = (q^L_i . c_j + q^R_i . k^R_j) * scale          (eq. 2, 10)
    o_i   = W^UV_i sum_j softmax_j(score_ij) c_j                                        (eq. 5, 10)

In torch's operations a step of decoding is a dozen small products, which cost less to compute than
to call, and the cache is widened into a copy before they read it. A softmax of a few hundred
numbers wakes threads that take longer to come than it takes. One loop does all of it, head by head.
Sums are taken in the dtype of the result: float64 in fp8, float32 else. The plain form is
``MLA.absorbed``.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from dsv3.kernels.cpu import ANY_ORDER, array, in_threads, loop, number


@njit(inline="always")
def _widen(keys, first, count, run):
    """Four keys as numbers; where there are fewer left, the last one stands again."""
    for i in range(4):
        key = keys[min(first + i, count - 1)]
        for c in range(run.shape[1]):
            run[i, c] = number(key[c])


@njit(fastmath=ANY_ORDER)
def _scores(q, q_rope, keys, reach, w, scale, absorbed, run, scores):
    """Of each head and each of the ``reach`` keys that the query sees."""
    heads, latent = w.shape[0], w.shape[2]
    for head in range(heads):
        into = absorbed[head]
        into[:] = 0.0
        for d in range(q.shape[1]):
            value = number(q[head, d]) * scale
            for c in range(latent):
                into[c] += value * w[head, d, c]
        for r in range(q_rope.shape[1]):
            into[latent + r] = number(q_rope[head, r]) * scale
    for j in range(0, reach, 4):
        _widen(keys, j, reach, run)
        for head in range(heads):
            into = absorbed[head]
            a = b = c = d = scores.dtype.type(0.0)
            for k in range(run.shape[1]):
                a += into[k] * run[0, k]
                b += into[k] * run[1, k]
                c += into[k] * run[2, k]
                d += into[k] * run[3, k]
            for i, score in enumerate((a, b, c, d)):
                if j + i < reach:
                    scores[head, j + i] = score


@njit(error_model="numpy")
def _softmax(scores, reach):
    """Of each head, in place. Where a score is not a number, none of its head's weights is one."""
    for head in range(scores.shape[0]):
        mine = scores[head]
        largest, total = mine.dtype.type(-np.inf), mine.dtype.type(0.0)
        for j in range(reach):
            largest = max(largest, mine[j])
        for j in range(reach):
            mine[j] = math.exp(mine[j] - largest)
            total += mine[j]
        for j in range(reach):
            mine[j] /= total


@njit(fastmath=ANY_ORDER)
def _values(weights, keys, reach, w, above, mixed, run, out):
    """Each head's mixture of the latents, and on to its values. above: rows of W^UK, which stand
    above those of W^UV in w."""
    heads = w.shape[0]
    zero = out.dtype.type(0.0)
    mixed[:] = 0.0
    for j in range(0, reach, 4):
        _widen(keys, j, reach, run)
        for head in range(heads):
            into, weight = mixed[head], weights[head]
            a = weight[j]
            b = weight[j + 1] if j + 1 < reach else zero
            c = weight[j + 2] if j + 2 < reach else zero
            d = weight[j + 3] if j + 3 < reach else zero
            for k in range(mixed.shape[1]):
                into[k] += a * run[0, k] + b * run[1, k] + c * run[2, k] + d * run[3, k]
    for head in range(heads):
        into = mixed[head]
        for v in range(out.shape[1]):
            total = zero
            for k in range(mixed.shape[1]):
                total += into[k] * w[head, above + v, k]
            out[head, v] = total


@loop()
def _attend(q, q_rope, keys, reach, w, scale, out, first, last):
    """Heads ``first`` to ``last`` of every query."""
    heads, per_text, latent = last - first, q.shape[0] // keys.shape[0], w.shape[2]
    absorbed = np.empty((heads, keys.shape[2]), out.dtype)
    mixed = np.empty((heads, latent), out.dtype)
    whole, run = np.empty((4, keys.shape[2]), out.dtype), np.empty((4, latent), out.dtype)
    scores = np.empty((heads, keys.shape[1]), out.dtype)
    mine = w[first:last]
    for row in range(q.shape[0]):
        text, seen = keys[row // per_text], reach[row]
        asks, turned = q[row, first:last], q_rope[row, first:last]
        _scores(asks, turned, text, seen, mine, scale, absorbed, whole, scores)
        _softmax(scores, seen)
        _values(scores, text, seen, mine, q.shape[2], mixed, run, out[row, first:last])


def attention(
    q_nope: Tensor,
    q_rope: Tensor,
    seen: Tensor,
    reach: Tensor,
    w: Tensor,
    scale: float,
    sums: torch.dtype,
) -> Tensor:
    """Each head's average of its values, (b, s, heads, d_v) in ``sums``.

    q_nope (b, s, heads, d_h), q_rope (b, s, heads, d_r); seen (b, t, d_c + d_r): the cache; reach
    (b, s): how many keys each query sees, where what comes out for one that sees none means
    nothing; w (heads, d_h + d_v, d_c) float32: W^UK and W^UV of each head.
    """
    b, s, heads = q_nope.shape[:3]
    rows = (b * s, heads)
    w = w.float()
    out = seen.new_empty(*rows, w.shape[1] - q_nope.shape[3], dtype=sums)
    queries = [array(each.reshape(*rows, -1)) for each in (q_nope, q_rope)]
    inputs = (*queries, array(_whole(seen)), array(reach.view(-1)), array(w), scale, array(out))
    work = 2 * b * s * heads * seen.shape[1] * seen.shape[2]
    in_threads(lambda *heads: _attend(*inputs, *heads), heads, 1, work)
    return out.view(b, s, heads, -1)


def _whole(seen: Tensor) -> Tensor:
    """The cache whose first keys these are: it lies in one piece, they may not."""
    _, t, width = seen.shape
    if seen.is_contiguous() or seen.stride()[1:] != (width, 1) or seen.stride(0) < t * width:
        return seen
    return seen.as_strided((len(seen), seen.stride(0) // width, width), seen.stride())
