"""Absorbed attention on a CPU: each query reads the cache as it lies there, once per pass.

    q^L_i = W^UK_i^T q^C_i;   score_ij = (q^L_i . c_j + q^R_i . k^R_j) * scale          (eq. 2, 10)
    o_i   = W^UV_i sum_j softmax_j(score_ij) c_j                                        (eq. 5, 10)

In torch's operations a step of decoding is a dozen small products, which cost less to compute than
to call, and the cache is widened into a copy before they read it. Two loops do the same: one up to
the scores, one from the weights on. Softmax stands between them, in torch. Sums are taken in the
dtype of the result: float64 in fp8, float32 else. The plain form is ``MLA.absorbed``.
"""

from __future__ import annotations

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


@loop(fastmath=ANY_ORDER)
def _scores(q, q_rope, keys, reach, w, scale, first, last, scores):
    """Of heads ``first`` to ``last``; keys that a query does not reach get -inf."""
    latent = w.shape[2]
    per_text = q.shape[0] // keys.shape[0]
    absorbed = np.empty((last - first, keys.shape[2]), scores.dtype)
    run = np.empty((4, keys.shape[2]), scores.dtype)
    for row in range(q.shape[0]):
        text = keys[row // per_text]
        for head in range(first, last):
            into = absorbed[head - first]
            into[:] = 0.0
            for d in range(q.shape[2]):
                value = number(q[row, head, d]) * scale
                for c in range(latent):
                    into[c] += value * w[head, d, c]
            for r in range(q_rope.shape[2]):
                into[latent + r] = number(q_rope[row, head, r]) * scale
        for j in range(0, reach[row], 4):
            _widen(text, j, reach[row], run)
            for head in range(first, last):
                into = absorbed[head - first]
                a = b = c = d = scores.dtype.type(0.0)
                for k in range(run.shape[1]):
                    a += into[k] * run[0, k]
                    b += into[k] * run[1, k]
                    c += into[k] * run[2, k]
                    d += into[k] * run[3, k]
                for i, score in enumerate((a, b, c, d)):
                    if j + i < reach[row]:
                        scores[row, head, j + i] = score
        scores[row, first:last, reach[row] :] = -np.inf


@loop(fastmath=ANY_ORDER)
def _values(weights, keys, reach, w, first, last, out):
    """Of heads ``first`` to ``last``."""
    latent = w.shape[2]
    per_text = weights.shape[0] // keys.shape[0]
    above = w.shape[1] - out.shape[2]  # rows of W^UK, which stand above those of W^UV
    mixed = np.empty((last - first, latent), out.dtype)
    run = np.empty((4, latent), out.dtype)
    for row in range(weights.shape[0]):
        text = keys[row // per_text]
        mixed[:] = 0.0
        for j in range(0, reach[row], 4):
            _widen(text, j, reach[row], run)
            for head in range(first, last):
                into, weight = mixed[head - first], weights[row, head]
                a = weight[j]
                b = weight[j + 1] if j + 1 < reach[row] else out.dtype.type(0.0)
                c = weight[j + 2] if j + 2 < reach[row] else out.dtype.type(0.0)
                d = weight[j + 3] if j + 3 < reach[row] else out.dtype.type(0.0)
                for k in range(latent):
                    into[k] += a * run[0, k] + b * run[1, k] + c * run[2, k] + d * run[3, k]
        for head in range(first, last):
            into = mixed[head - first]
            for v in range(out.shape[2]):
                total = out.dtype.type(0.0)
                for k in range(latent):
                    total += into[k] * w[head, above + v, k]
                out[row, head, v] = total


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
    keys, seen_by = array(_whole(seen)), array(reach.view(-1))
    rows = (b * s, heads)
    work = b * s * heads * seen.shape[1] * seen.shape[2]
    scores = seen.new_empty(*rows, seen.shape[1], dtype=sums)
    queries = [array(each.reshape(*rows, -1)) for each in (q_nope, q_rope)]
    w = w.float()
    inputs = (*queries, keys, seen_by, array(w), scale)
    in_threads(lambda *heads: _scores(*inputs, *heads, array(scores)), heads, 1, work)
    weights = scores.softmax(-1)  # eq. 10
    out = seen.new_empty(*rows, w.shape[1] - q_nope.shape[3], dtype=sums)
    inputs = (array(weights), keys, seen_by, array(w))
    in_threads(lambda *heads: _values(*inputs, *heads, array(out)), heads, 1, work)
    return out.view(b, s, heads, -1)


def _whole(seen: Tensor) -> Tensor:
    """The cache whose first keys these are: it lies in one piece, they may not."""
    _, t, width = seen.shape
    if seen.is_contiguous() or seen.stride()[1:] != (width, 1) or seen.stride(0) < t * width:
        return seen
    return seen.as_strided((len(seen), seen.stride(0) // width, width), seen.stride())
