"""What is often read about attention, put into the package for a moment: an oracle must notice.

Each test makes one mistake of chapter 1's table with ``mutated``. The check passes without it and
fails with it, so nothing here could turn into the common error unseen.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_oracle import CASES, gap, random_pair, tokens

from dsv3 import ModelConfig, costs
from dsv3.attention import Attention, KVCache, attend, causal_mask
from dsv3.book import mutated
from dsv3.rope import rotate

pytestmark = pytest.mark.slow


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "old, new, times",
    [
        (" * self.layers", "", 61),  # one layer taken for the model
        (
            "self.values_per_token_and_layer",  # keys without values
            "(self.kv_heads * self.key_dim)",
            2,
        ),
    ],
)
def test_misread_kv_arithmetic(old, new, times):  # fact 9
    """The formula against a cache that is made and counted."""
    shape = costs.as_mha(ModelConfig.deepseek_v3())
    real = KVCache(
        shape.layers, 1, 8, shape.kv_heads, shape.key_dim, shape.value_dim, device="meta"
    ).bytes_per_token
    assert shape.bytes_per_token() == real == 3_997_696
    with mutated(costs.CacheShape.bytes_per_token, old, new):
        assert shape.bytes_per_token() * times == real


def seen_by_torch(q, k, v) -> torch.Tensor:
    """Causal attention as torch computes it; shapes as in ``attend``."""
    o = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    )
    return o.transpose(1, 2)


@torch.no_grad()
def test_misread_causal():
    """Every token to every other: torch's causal attention disagrees, and the past would move."""
    q, k, v = random(2, 9, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    layer, x = Attention(16, 4, 2, 4), random(1, 9, 16)
    longer = torch.cat([x, random(1, 1, 16, seed=3)], 1)

    def past_moves() -> float:
        return gap(layer(longer)[:, :9], layer(x))

    assert gap(attend(q, k, v), seen_by_torch(q, k, v)) < 2e-6
    assert past_moves() < 2e-6
    with mutated(causal_mask, "<= last[:, None]", "<= keys + 0 * last[:, None]"):
        assert gap(attend(q, k, v), seen_by_torch(q, k, v)) > 0.1
        assert past_moves() > 0.01


@torch.no_grad()
def test_misread_causal_behind_a_cache():
    """A square mask in the upper left corner passes for a whole prompt, and fails in chunks."""
    layer, x = Attention(16, 4, 2, 4), random(1, 9, 16)
    whole = layer(x)

    def chunks() -> torch.Tensor:
        cache, parts = layer.new_cache(1, 9), []
        for part in x.split([4, 5], 1):
            parts.append(layer(part, cache))
            cache.advance(part.shape[1])
        return torch.cat(parts, 1)

    assert gap(chunks(), whole) < 2e-6
    with mutated(causal_mask, "arange(keys - queries, keys, ", "arange(0, queries, "):
        assert torch.equal(layer(x), whole)
        assert gap(chunks(), whole) > 0.1


@torch.inference_mode()
def test_misread_half_split_rope(tmp_path):
    """Value j with j + d/2: transformers' DeepSeek-V3 with the same weights says other things."""
    theirs, ours = random_pair(tmp_path, CASES["yarn past the original length"])
    text = tokens(ours, 2, 48)
    wanted = theirs(text).logits
    assert gap(ours(text), wanted) < 2e-5
    with mutated(
        rotate,
        "x.float().contiguous().unflatten(-1, (-1, 2))",
        "x.float().unflatten(-1, (2, -1)).mT.contiguous()",
    ):
        assert gap(ours(text), wanted) > 0.05
