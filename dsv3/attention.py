"""Attention as most models have it: MHA, GQA and MQA, with a cache of keys and values.

A token asks (its *query*), every token up to it offers (its *key*), and the answer is a mixture
of what they hold (their *values*):

    o_i = sum_{j <= i} softmax_j( q_i . k_j / sqrt(d_h) ) v_j

so a token sees itself and those before it, never those behind. ``heads`` such sums run side by
side. How many *different* keys and values there are for them is the one knob of this module:

    kv_heads = heads    MHA, multi-head attention: every head has its own
    1 < kv_heads < heads    GQA, grouped-query attention: heads / kv_heads heads share one
    kv_heads = 1        MQA, multi-query attention: all heads share one

The knob exists because of the cache. To decode a token, the keys and values of all earlier tokens
are needed; computing them anew for every token would take a whole forward pass over the text. So
they are kept: kv_heads (d_h + d_v) values a token *and layer*, two bytes each in bfloat16. With
128 heads of 192 + 128 and 61 layers, the sizes of DeepSeek-V3, that is 4,997,120 bytes a token.
Decoding reads all of it for one token, so the cache sets the speed as well as the memory. Fewer
KV heads shrink it and cost quality. DeepSeek-V3 takes another way, MLA (``dsv3.mla``); this
module is what that is measured against.

Positions enter by RoPE (``dsv3.rope``), neighbouring pairs, on all of a query and a key. Keys are
cached after their rotation: a key's angle depends on its own position alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dsv3.errors import DSV3Error
from dsv3.rope import plain_frequencies, rotate, rotations


class KVCache:
    """Keys and values of every token so far, layer by layer, for texts of equal length.

    keys (layers, batch, max_seq_len, kv_heads, d_h), rotated; values likewise with d_v. Places
    from ``length`` on hold leftovers that no query looks at.
    """

    def __init__(
        self,
        layers: int,
        batch_size: int,
        max_seq_len: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        shape = (layers, batch_size, max_seq_len, kv_heads)
        self.keys = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, v_head_dim or head_dim, dtype=dtype, device=device)
        self.length = 0

    @property
    def max_seq_len(self) -> int:
        """Tokens a text can have."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache: keys and values, of all layers, texts and places."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token of one text takes, in all layers together."""
        return self.nbytes // (self.keys.shape[1] * self.max_seq_len)

    def append(
        self, layer: int, k: Float[Tensor, "b s kv_heads d_h"], v: Float[Tensor, "b s kv_heads d_v"]
    ) -> tuple[Float[Tensor, "b t kv_heads d_h"], Float[Tensor, "b t kv_heads d_v"]]:
        """Write a layer's new keys and values after the old; return those of all t tokens.

        What is kept is numbers and no history: a gradient reaches the new tokens, no earlier ones.
        Raises DSV3Error when they do not fit.
        """
        total = self.length + k.shape[1]
        if total > self.max_seq_len:
            raise DSV3Error(
                "the cache is full",
                where="KVCache",
                found=f"{self.length} + {k.shape[1]} tokens",
                expected=f"at most {self.max_seq_len}",
                fix="Make the cache longer (max_seq_len)",
            )
        self.keys[layer, :, self.length : total] = k.detach()
        self.values[layer, :, self.length : total] = v.detach()
        keys, values = self.keys[layer, :, :total], self.values[layer, :, :total]
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            # Copies: later passes write into the store, which would spoil the graph.
            keys = torch.cat([keys[:, : self.length], k.to(keys.dtype)], 1)
            values = torch.cat([values[:, : self.length], v.to(values.dtype)], 1)
        return keys, values

    def advance(self, count: int) -> None:
        """Count the tokens of a finished forward pass, when all layers have appended theirs."""
        self.length += count

    def truncate(self, length: int) -> None:
        """Forget the tokens from ``length`` on."""
        if not 0 <= length <= self.length:
            raise DSV3Error(
                "cannot grow a cache by truncating",
                where="KVCache",
                found=length,
                expected=f"0 to {self.length}",
            )
        self.length = length


def causal_mask(queries: int, keys: int, device: torch.device | str = "cpu") -> Bool[Tensor, "s t"]:
    """True where a query may look, when the queries are the last of the keys' tokens.

    The first query stands at position keys - queries, not at 0: behind a cache the mask is a
    rectangle, and its diagonal ends in the lower right corner.
    """
    last = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) <= last[:, None]


def attend(
    q: Float[Tensor, "b s heads d_h"],
    k: Float[Tensor, "b t kv_heads d_h"],
    v: Float[Tensor, "b t kv_heads d_v"],
) -> Float[Tensor, "b s heads d_v"]:
    """Causal softmax attention; each run of heads / kv_heads heads reads one key and value head.

    Scores and softmax are taken in float32 or wider. Keys and values are not copied for their
    heads: queries that share them become rows of one product.
    """
    q = q.unflatten(2, (k.shape[2], -1))  # (b, s, kv_heads, group, d_h)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bsgrd,btgd->bgrst", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    hidden = ~causal_mask(scores.shape[-2], scores.shape[-1], q.device)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    o = torch.einsum("bgrst,btgd->bsgrd", weights, v.to(wide))
    return o.flatten(2, 3).to(v.dtype)


class Attention(nn.Module):
    """MHA, GQA or MQA by the number of KV heads.

    Weights as (out, in) matrices, no biases: wq (heads d_h, d), wk (kv_heads d_h, d),
    wv (kv_heads d_v, d), wo (d, heads d_v). Raises DSV3Error for sizes that do not go together.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        rope_theta: float = 10000.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        if heads % kv_heads:
            raise DSV3Error(
                "bad value",
                where="kv_heads",
                found=kv_heads,
                expected=f"a divisor of heads ({heads})",
            )
        if head_dim % 2:
            raise DSV3Error(
                "bad value",
                where="head_dim",
                found=head_dim,
                expected="an even number, since RoPE turns pairs",
            )
        self.heads, self.kv_heads = heads, kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_head_dim or head_dim
        self.rope_theta = rope_theta
        options = dict(bias=False, dtype=dtype, device=device)
        self.wq = nn.Linear(hidden_size, heads * self.head_dim, **options)
        self.wk = nn.Linear(hidden_size, kv_heads * self.head_dim, **options)
        self.wv = nn.Linear(hidden_size, kv_heads * self.v_head_dim, **options)
        self.wo = nn.Linear(heads * self.v_head_dim, hidden_size, **options)

    def forward(
        self, x: Float[Tensor, "b s d"], cache: KVCache | None = None, layer: int = 0
    ) -> Float[Tensor, "b s d"]:
        """x of the new tokens -> their answers; their keys and values go to the cache.

        The tokens stand after those of the cache, any number of them: a whole prompt, a chunk of
        one, or a single token.
        """
        start = 0 if cache is None else cache.length
        q = self.wq(x).unflatten(-1, (self.heads, -1))  # (b, s, heads, d_h)
        k = self.wk(x).unflatten(-1, (self.kv_heads, -1))
        v = self.wv(x).unflatten(-1, (self.kv_heads, -1))
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        frequencies = plain_frequencies(self.head_dim, self.rope_theta).to(x.device)
        rotation = rotations(positions, frequencies, 1.0)[:, None]  # (s, 1, d_h / 2)
        q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        return self.wo(attend(q, k, v).flatten(2))

    def new_cache(self, batch_size: int, max_seq_len: int, layers: int = 1) -> KVCache:
        """An empty cache for this module, or for ``layers`` of its kind."""
        weight = self.wk.weight
        return KVCache(
            layers,
            batch_size,
            max_seq_len,
            self.kv_heads,
            self.head_dim,
            self.v_head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )
