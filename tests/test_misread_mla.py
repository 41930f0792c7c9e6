"""What is often read about latent attention, put into the package: the oracle notices each time.

One attention with random weights, ours and that of transformers, on the branch where mistakes
show: YaRN with two temperatures, 60 tokens on an original length of 16, chunks that take the
expanded and the absorbed form, a cache on both sides. Each test runs the comparison as the
package is, then with one line of it exchanged.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsv3 import ModelConfig, costs
from dsv3.book import mutated
from dsv3.cache import LatentCache, Step
from dsv3.config import YarnScaling
from dsv3.mla import MLA, LatentUpProjection
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.rope import inverse_frequencies

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

BOUND = 2e-5  # of the largest output
SEEN = 100 * BOUND  # a mistake has to stand far out
CPU = torch.device("cpu")
CUTS = (10, 54, 5, 1)
CONFIG = ModelConfig.mini().but(
    hidden_size=64,
    num_attention_heads=4,
    kv_lora_rank=32,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    max_position_embeddings=128,
    rope_scaling=YarnScaling(
        factor=8, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=1.2
    ),
)
NAMES = {
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
}


def random_pair(config: ModelConfig = CONFIG) -> tuple[torch.nn.Module, MLA]:
    """(transformers' attention, ours) with the same weights."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    torch.manual_seed(0)
    theirs = DeepseekV3Attention(
        transformers.DeepseekV3Config(**config.to_dict(), attn_implementation="eager"), layer_idx=0
    )
    for name, value in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(value, 1.0, 0.2)
        else:
            torch.nn.init.normal_(value, 0.0, 1.5 / math.sqrt(value.shape[-1]))
    ours = MLA(config, Precision.of("fp32", config), TensorGroup.single())
    ours.load_state_dict(
        {
            NAMES[name.split(".")[0]] + ".weight": value
            for name, value in theirs.state_dict().items()
        }
    )
    return theirs, ours


def read(ours: MLA, h: torch.Tensor) -> torch.Tensor:
    """Ours, chunk by chunk with a cache."""
    kept, out, start = LatentCache(ours.config, 1, 2, 80, torch.float32, CPU).one(0), [], 0
    for piece in h.split(CUTS, 1):
        count = piece.shape[1]
        step = Step.make(ours.config, [start] * 2, [count] * 2, count, CPU)
        out.append(ours(piece, step, kept))
        start += count
    return torch.cat(out, 1)


@pytest.fixture(
    params=[24, None], ids=["queries compressed", "queries not compressed"], scope="module"
)
def oracle(request):
    """A function that says how far ours is from transformers, of the largest output."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    theirs, ours = random_pair(CONFIG.but(q_lora_rank=request.param))
    h = torch.randn(2, sum(CUTS), 64, generator=torch.Generator().manual_seed(1))
    rotary, cache, parts, start = (
        DeepseekV3RotaryEmbedding(theirs.config),
        transformers.DynamicCache(),
        [],
        0,
    )
    with torch.no_grad():
        for piece in h.split(CUTS, 1):
            at = torch.arange(start, start + piece.shape[1])
            start += piece.shape[1]
            hidden = torch.arange(start) > at[:, None]
            mask = torch.zeros(hidden.shape).masked_fill(hidden, -math.inf)[None, None]
            parts.append(theirs(piece, rotary(piece, at[None]), mask, cache)[0])
    wanted = torch.cat(parts, 1)

    @torch.no_grad()
    def gap() -> float:
        return float((read(ours, h) - wanted).abs().max() / wanted.abs().max())

    gap.ours, gap.h = ours, h
    return gap


def test_chunks_take_both_forms(oracle):
    forms = [oracle.ours.prefers_expanded(count) for count in CUTS]
    assert True in forms and False in forms


def test_misread_head_weighting(oracle):
    assert oracle() < BOUND
    with mutated(
        MLA.forward,
        "o.flatten(2)",
        "(o * o.shape[2] * o.norm(dim=-1, keepdim=True).softmax(2)).flatten(2)",
    ):
        assert oracle() > SEEN  # heads weighed by a softmax over heads
    with mutated(MLA.absorbed, "scores.softmax(-1)", "scores.softmax(2).nan_to_num()"):
        assert oracle() > SEEN  # heads compete, instead of tokens


def test_misread_query_compression(oracle):
    """The narrow place is in every pass; its two matrices are not one product at inference."""
    if oracle.ours.config.q_lora_rank is None:
        assert not hasattr(oracle.ours, "wq_a") and oracle() < BOUND
        return
    calls = []
    listening = oracle.ours.wq_a.register_forward_hook(lambda *_: calls.append(1))
    assert oracle() < BOUND
    listening.remove()
    assert len(calls) == len(CUTS)
    with mutated(
        MLA.queries,
        "self.wq_b(self.precision.normed(self.q_norm, self.wq_a(h)))",
        "F.linear(h, self.wq_b.weight @ self.wq_a.weight)",
    ):
        assert oracle() > SEEN


def test_misread_cache_contents(oracle):
    large = ModelConfig.deepseek_v3()
    assert LatentCache(large, 61, 1, 1, torch.bfloat16, "meta").data.nbytes == 70_272  # fact 7
    assert 2 * 61 * 512 == 62_464 and 2 * 61 * (512 + 128 * 64) == 1_061_888  # often read
    assert oracle() < BOUND
    with mutated(
        MLA.latents,
        "rotate(k_rope, step.rotation)",
        "rotate(self.kv_norm(c)[..., :k_rope.shape[-1]], step.rotation)",
    ):
        assert oracle() > SEEN  # rotated key made from the latent
    with mutated(
        LatentUpProjection.forward,
        "k_rope[:, None].expand(-1, self.heads, -1, -1)",
        "torch.stack([k_rope.roll(head, -1) for head in range(self.heads)], 1)",
    ):
        assert oracle() > SEEN  # a rotated key for each head


def test_misread_decoupled_rope(oracle):
    """A rotation in the latent's way is wrong, and one between W^UQ and W^UK cannot be absorbed."""
    assert oracle() < BOUND
    with mutated(
        MLA.latents,
        "torch.cat([self.kv_norm(c),",
        "torch.cat([rotate(self.kv_norm(c), step.rotation.repeat(1, 1, 4)),",
    ):
        assert oracle() > SEEN
    ours, count = oracle.ours, 30
    step = Step.make(ours.config, [0], [count], count, CPU)
    with torch.no_grad():
        q, seen = ours.queries(oracle.h[:1, :count], step), ours.latents(oracle.h[:1, :count], step)
        absorbed = ours.absorbed(*q, seen, step)
        size = absorbed.abs().max()
        assert (ours.expanded(*q, seen, step) - absorbed).abs().max() < BOUND * size
        with mutated(
            LatentUpProjection.forward,
            "torch.cat([k_nope, k_rope], -1)",
            "torch.cat([rotate(k_nope, torch.polar(*torch.broadcast_tensors(torch.ones(()), "
            "torch.arange(k_nope.shape[2])[:, None] / 1e4 ** torch.linspace(0, 1, "
            "k_nope.shape[3] // 2)))), k_rope], -1)",
        ):
            turned = ours.expanded(*q, seen, step)
        assert (turned - absorbed).abs().max() > SEEN * size


def test_misread_one_scale(oracle):
    assert oracle() < BOUND
    with mutated(
        MLA.queries,
        "return q_nope, rotate(",
        "return q_nope * (24 / 16) ** 0.5, (24 / 8) ** 0.5 * rotate(",
    ):
        assert oracle() > SEEN


def test_misread_decompress_for_use(oracle, without_numba):
    """Decoding by expansion gives the same numbers; what gives it away is the count of FLOPs, which
    is taken of torch's operations."""
    ours, seen = oracle.ours, 60

    @torch.no_grad()
    def flops_of_decoding() -> int:
        step = Step.make(ours.config, [seen - 1], [1], 1, CPU)
        kept = LatentCache(ours.config, 1, 1, seen, torch.float32, CPU).one(0)
        with FlopCounterMode(display=False) as counter:
            ours(oracle.h[:1, :1], step, kept)
        c = ours.config
        inputs = c.hidden_size * 4 * 24 if c.q_lora_rank is None else (64 + 4 * 24) * 24
        outside = 2 * (inputs + c.hidden_size * c.latent_dim + 4 * c.v_head_dim * c.hidden_size)
        return counter.get_total_flops() - outside

    assert oracle() < BOUND
    assert flops_of_decoding() == costs.latent_core(ours.config, 1, seen, "absorbed").flops
    with mutated(MLA.prefers_expanded, "queries > break_even_queries(self.config)", "True"):
        assert oracle() < BOUND
        assert flops_of_decoding() > 5 * costs.latent_core(ours.config, 1, seen, "absorbed").flops


def test_misread_latent_norms(oracle):
    assert oracle() < BOUND
    with mutated(MLA.latents, "self.kv_norm(c)", "c"):
        assert oracle() > SEEN
    with mutated(MLA.latents, "rotate(k_rope,", "rotate(F.rms_norm(k_rope, k_rope.shape[-1:]),"):
        assert oracle() > SEEN  # the rotated key is not normalised
    if oracle.ours.config.q_lora_rank is not None:
        with mutated(
            MLA.queries, "self.precision.normed(self.q_norm, self.wq_a(h))", "self.wq_a(h)"
        ):
            assert oracle() > SEEN


def test_misread_yarn_positions(oracle):
    assert oracle() < BOUND
    with mutated(Step.make, "first[:, None] + columns", "(first[:, None] + columns).clamp(max=15)"):
        assert oracle() > SEEN
    with mutated(
        Step.make,
        "inverse_frequencies(config)",
        "inverse_frequencies(config if total > 16 else config.but(rope_scaling=None))",
    ):
        assert oracle() > SEEN  # the first chunk is short: its keys are cached with other angles
    with mutated(inverse_frequencies, "ramp.clamp(0, 1)", "torch.ones_like(ramp)"):
        assert oracle() > SEEN  # every pair slowed down
