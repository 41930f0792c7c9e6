"""MHA, GQA and MQA against three others: loops in float64, torch's own attention, transformers'.

Then what must hold by itself: a cache changes nothing, grouped heads are repeated heads, and what
the cache says it holds is what it holds.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dsv3.attention import Attention, KVCache, attend, causal_mask
from dsv3.errors import DSV3Error
from dsv3.rope import plain_frequencies, rotate, rotations

# d, heads, kv_heads, d_h, d_v, tokens: ragged sizes, and each of MHA, GQA and MQA
SIZES = [(24, 4, 4, 8, 8, 7), (33, 6, 2, 10, 14, 19), (20, 5, 1, 6, 4, 13), (8, 1, 1, 2, 3, 1)]
BOUND = 2e-6


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(d, heads, kv_heads, d_h, d_v, theta=10000.0, dtype=torch.float32) -> Attention:
    """Random weights such that scores are a few units wide."""
    layer = Attention(d, heads, kv_heads, d_h, d_v, rope_theta=theta, dtype=dtype)
    with torch.no_grad():
        for number, weight in enumerate(layer.parameters()):
            weight.copy_(random(*weight.shape, seed=number) * (2 / weight.shape[1]) ** 0.5)
    return layer


def gap(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def by_loops(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """The definition, in float64: one text, token by token, head by head, pair by pair."""
    wq, wk, wv, wo = (w.double() for w in layer.parameters())

    def turned(vector, position):
        vector = vector.clone()
        for j in range(len(vector) // 2):
            angle = position * layer.rope_theta ** (-2 * j / len(vector))
            a, b = float(vector[2 * j]), float(vector[2 * j + 1])
            vector[2 * j] = a * math.cos(angle) - b * math.sin(angle)
            vector[2 * j + 1] = a * math.sin(angle) + b * math.cos(angle)
        return vector

    def part(vector, head, width):
        return vector[head * width : (head + 1) * width]

    answers = []
    for i, token in enumerate(x.double()):
        mixed = []
        for head in range(layer.heads):
            shared = head // (layer.heads // layer.kv_heads)
            q = turned(part(wq @ token, head, layer.head_dim), i)
            scores = torch.stack(
                [
                    q @ turned(part(wk @ other, shared, layer.head_dim), j) / layer.head_dim**0.5
                    for j, other in enumerate(x[: i + 1].double())
                ]
            )
            weights = scores.exp() / scores.exp().sum()
            mixed.append(
                sum(
                    w * part(wv @ other, shared, layer.v_head_dim)
                    for w, other in zip(weights, x[: i + 1].double())
                )
            )
        answers.append(wo @ torch.cat(mixed))
    return torch.stack(answers)


@pytest.mark.parametrize("d, heads, kv_heads, d_h, d_v, s", SIZES)
@torch.no_grad()
def test_equals_the_definition_by_loops(d, heads, kv_heads, d_h, d_v, s):
    layer = module(d, heads, kv_heads, d_h, d_v, theta=100.0)
    x = random(2, s, d)
    wanted = torch.stack([by_loops(layer, row) for row in x])
    assert gap(layer(x), wanted.float()) < BOUND


@pytest.mark.parametrize("d, heads, kv_heads, d_h, d_v, s", SIZES)
def test_the_sum_equals_torch(d, heads, kv_heads, d_h, d_v, s):
    q, k = random(2, s, heads, d_h), random(2, s, kv_heads, d_h, seed=1)
    v = random(2, s, kv_heads, d_v, seed=2)
    wanted = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    assert gap(attend(q, k, v), wanted.transpose(1, 2)) < BOUND


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@torch.no_grad()
def test_equals_transformers_when_its_halves_are_our_neighbours(kv_heads):
    """Its Llama turns values j and j + d_h / 2 together, ours 2j and 2j + 1: reorder the rows."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=42,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        head_dim=10,
        rope_theta=500.0,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    theirs, rotary = llama.LlamaAttention(config, 0), llama.LlamaRotaryEmbedding(config)
    ours = module(42, 6, kv_heads, 10, 10, theta=500.0)
    order = torch.cat([torch.arange(0, 10, 2), torch.arange(1, 10, 2)])
    for name in ("wq", "wk"):
        rows = getattr(ours, name).weight.unflatten(0, (-1, 10))[:, order].flatten(0, 1)
        getattr(theirs, f"{name[1]}_proj").weight.copy_(rows)
    theirs.v_proj.weight.copy_(ours.wv.weight)
    theirs.o_proj.weight.copy_(ours.wo.weight)
    x = random(2, 37, 42)
    mask = torch.zeros(37, 37).masked_fill(~causal_mask(37, 37), float("-inf"))[None, None]
    wanted, _ = theirs(x, rotary(x, torch.arange(37)[None]), mask)
    assert gap(ours(x), wanted) < 5e-6


@pytest.mark.parametrize("cuts", [[0, 23], [0, 9, 23], [0, 1, 2, 10, 11, 23], [*range(24)]])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@torch.no_grad()
def test_chunks_and_single_steps_equal_one_pass(kv_heads, cuts):
    layer = module(16, 4, kv_heads, 6, 10)
    x = random(3, 23, 16)
    cache = layer.new_cache(3, 23)
    parts = []
    for start, end in itertools.pairwise(cuts):
        parts.append(layer(x[:, start:end], cache))
        cache.advance(end - start)
    assert gap(torch.cat(parts, 1), layer(x)) < BOUND


@pytest.mark.parametrize("kv_heads", [1, 2])
@torch.no_grad()
def test_shared_heads_are_repeated_heads(kv_heads):
    """GQA and MQA equal MHA whose key and value weights stand there once for every head."""
    shared, each = module(20, 4, kv_heads, 6, 8), module(20, 4, 4, 6, 8)
    each.wq.weight.copy_(shared.wq.weight)
    each.wo.weight.copy_(shared.wo.weight)
    for name in ("wk", "wv"):
        rows = getattr(shared, name).weight.unflatten(0, (kv_heads, -1))
        getattr(each, name).weight.copy_(rows.repeat_interleave(4 // kv_heads, 0).flatten(0, 1))
    x = random(2, 11, 20)
    assert gap(shared(x), each(x)) < BOUND


@torch.no_grad()
def test_what_comes_later_changes_nothing():
    layer = module(16, 2, 1, 8, 8)
    x = random(1, 9, 16)
    other = x.clone()
    other[:, 5:] = random(1, 4, 16, seed=9)
    assert torch.equal(layer(x)[:, :5], layer(other)[:, :5])


@torch.no_grad()
def test_only_distances_count():  # fact 13
    """Behind any number of tokens that nobody can see, the same text gives the same answers."""
    layer = module(16, 2, 2, 8, 8)
    x = random(1, 12, 16)
    q, k = layer.wq(x).unflatten(-1, (2, -1)), layer.wk(x).unflatten(-1, (2, -1))
    v = layer.wv(x).unflatten(-1, (2, -1))

    def at(start):
        turn = rotations(torch.arange(start, start + 12), plain_frequencies(8, 10000.0), 1.0)
        return attend(rotate(q, turn[:, None]), rotate(k, turn[:, None]), v)

    assert gap(at(0), at(700)) < 1e-4  # float32 angles of a few hundred radians
    assert gap(at(0), at(3)) < BOUND


def test_a_query_of_a_long_bfloat16_text_is_summed_wide():
    q, k = random(1, 1, 2, 64).bfloat16(), random(1, 900, 2, 64, seed=1).bfloat16()
    v = random(1, 900, 2, 64, seed=2).bfloat16()
    found = attend(q, k, v)
    wanted = attend(q.double(), k.double(), v.double())
    assert found.dtype == torch.bfloat16
    assert gap(found.double(), wanted) < 2**-8  # rounded once


def test_the_mask_behind_a_cache():
    assert causal_mask(2, 5).tolist() == [[True, True, True, True, False], [True] * 5]
    assert causal_mask(3, 3).tolist() == torch.ones(3, 3).tril().bool().tolist()


def test_the_cache_holds_keys_and_values_of_all_layers():  # fact 9
    """V3's sizes as MHA and as MQA, counted on tensors without bytes."""
    for kv_heads, wanted in ((128, 4_997_120), (1, 39_040)):
        cache = KVCache(61, 1, 4, kv_heads, 192, 128, device="meta")
        assert cache.bytes_per_token == wanted
        assert cache.nbytes == 4 * wanted
    assert KVCache(61, 3, 4, 1, 128, device="meta").bytes_per_token == 31_232


def test_layers_do_not_touch_each_other():
    cache = KVCache(2, 1, 4, 1, 2, dtype=torch.float32)
    cache.append(0, torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2))
    k, v = cache.append(1, torch.full((1, 3, 1, 2), 2.0), torch.full((1, 3, 1, 2), 3.0))
    assert cache.keys[0, 0, :, 0, 0].tolist() == [1, 1, 1, 0]
    assert k.unique().tolist() == [2] and v.unique().tolist() == [3]
    cache.advance(3)
    cache.truncate(1)
    assert cache.append(0, k[:, :1], v[:, :1])[0][0, :, 0, 0].tolist() == [1, 2]


def test_errors_name_the_thing():
    with pytest.raises(DSV3Error, match=r"kv_heads.*3.*divisor of heads \(4\)"):
        Attention(8, 4, 3, 2)
    with pytest.raises(DSV3Error, match="head_dim.*5.*even"):
        Attention(8, 4, 2, 5)
    cache = KVCache(1, 1, 4, 1, 2)
    cache.advance(3)
    with pytest.raises(DSV3Error, match=r"full.*3 \+ 2 tokens.*at most 4"):
        cache.append(0, torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1, 2))
    with pytest.raises(DSV3Error, match="truncating.*4.*0 to 3"):
        cache.truncate(4)
