"""The model against transformers' DeepSeek-V3 on small random configs, one per hard branch.

transformers writes its random model to disk under the released names; ours reads that folder. So
each case also tests names, spellings of the config and the loader. Bound: the largest logit
difference is under 2e-5 of the largest logit. The other families meet their own class, and their
config.json is spelled as it is published.
"""

import itertools
import json
import math

import pytest
import torch

from dsv3 import ModelConfig, load_model
from dsv3.generation.loop import generate

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

BOUND = 2e-5
BASE = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    kv_lora_rank=32,
    q_lora_rank=48,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=512,
    num_nextn_predict_layers=0,
)
YARN = dict(type="yarn", factor=8, original_max_position_embeddings=16, beta_fast=32, beta_slow=1)

EQUAL_BETAS = dict(YARN, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)
ONE_GROUP = dict(n_group=1, topk_group=1)
GLM = dict(
    architecture="Glm4MoeLiteForCausalLM",
    qk_nope_head_dim=24,
    v_head_dim=40,
    routed_scaling_factor=1.8,
    mlp_layer_types=["dense", "dense", "sparse"],
)

CASES = {
    "strongly negative bias": dict(bias=(-6.0, 1.0)),
    "bias larger than the scores": dict(bias=(0.0, 3.0)),
    "yarn past the original length": dict(rope_scaling=dict(YARN, mscale=1.0, mscale_all_dim=1.0)),
    "yarn with two temperatures": dict(rope_scaling=dict(YARN, mscale=0.7, mscale_all_dim=1.2)),
    "yarn without temperatures": dict(rope_scaling=YARN, rope_theta=500.0),
    "queries not compressed": dict(q_lora_rank=None),
    "tied embeddings": dict(tie_word_embeddings=True),
    "two groups, all open": dict(n_group=2, topk_group=2, num_experts_per_tok=8),
    "one group": dict(n_group=1, topk_group=1, norm_topk_prob=False, routed_scaling_factor=1.0),
    "odd sizes": dict(
        hidden_size=76,
        intermediate_size=100,
        moe_intermediate_size=36,
        kv_lora_rank=27,
        q_lora_rank=33,
        qk_nope_head_dim=14,
        v_head_dim=30,
        qk_rope_head_dim=10,
        num_attention_heads=3,
        num_key_value_heads=3,
        n_routed_experts=12,
        n_group=3,
        topk_group=1,
        num_experts_per_tok=3,
    ),
    "values wider than keys, two shared experts": dict(
        v_head_dim=40, n_shared_experts=2, rms_norm_eps=1e-3
    ),
    "dense only": dict(first_k_dense_replace=3),
    "yarn over 6 tokens, fewer than 2 pi": dict(
        rope_scaling=dict(
            YARN, original_max_position_embeddings=6, beta_fast=1, mscale=1.0, mscale_all_dim=1.0
        )
    ),
    "yarn over 2 tokens": dict(
        rope_theta=50.0, rope_scaling=dict(YARN, original_max_position_embeddings=2)
    ),
    "kimi_k2": dict(
        ONE_GROUP,
        n_routed_experts=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        routed_scaling_factor=2.827,
        rope_theta=50000.0,
        rope_scaling=EQUAL_BETAS,
        published=dict(
            model_type="kimi_k2",
            rope_parameters=None,
            rope_theta=50000.0,
            rope_scaling=EQUAL_BETAS,
            num_nextn_predict_layers=0,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            seq_aux=True,
            aux_loss_alpha=0.001,
        ),
    ),
    "moonlight": dict(
        ONE_GROUP,
        q_lora_rank=None,
        n_shared_experts=2,
        num_experts_per_tok=6,
        rms_norm_eps=1e-5,
        routed_scaling_factor=2.446,
        rope_theta=50000.0,
        published=dict(rope_parameters=None, rope_theta=50000.0, rope_scaling=None),
    ),
    "glm4_moe_lite": dict(
        ONE_GROUP | GLM,
        rope_theta=1e6,
        published=dict(
            mlp_layer_types=None,
            first_k_dense_replace=2,
            rope_parameters=None,
            rope_theta=1000000,
            rope_scaling=None,
            partial_rotary_factor=1.0,
            topk_method="noaux_tc",
            bos_token_id=None,
            eos_token_id=[2, 3],
        ),
    ),
    "glm4_moe_lite as transformers writes it": dict(
        ONE_GROUP | GLM,
        q_lora_rank=None,
        mlp_layer_types=["dense", "sparse", "sparse"],
        rope_scaling=dict(YARN, mscale=0.7, mscale_all_dim=1.2),
    ),
}


def random_pair(folder, changes: dict, seed: int = 0):
    """transformers' random model, and ours read from what it wrote.

    changes: of BASE; and bias, mean and spread of the routers' biases; architecture, the class;
    published, what config.json says instead (None: nothing)."""
    changes = dict(changes)
    mean, spread = changes.pop("bias", (0.0, 0.5))
    published = changes.pop("published", {})
    model_class = getattr(transformers, changes.pop("architecture", "DeepseekV3ForCausalLM"))
    torch.manual_seed(seed)
    config = model_class.config_class(**(BASE | changes), attn_implementation="eager")
    theirs = model_class(config).eval()
    with torch.no_grad():
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(mean, spread)
            elif "norm" in name:
                tensor.normal_(1.0, 0.2)
            elif "inv_freq" not in name:
                tensor.normal_(0.0, 1.0 / math.sqrt(tensor.shape[-1]))
    theirs.save_pretrained(folder)
    if published:
        file = folder / "config.json"
        fields = json.loads(file.read_text()) | published
        file.write_text(
            json.dumps(
                {
                    k: v
                    for k, v in fields.items()
                    if v is not None or k in ("q_lora_rank", "rope_scaling")
                }
            )
        )
    return theirs, load_model(folder, precision="fp32")


@pytest.fixture(params=list(CASES), scope="module")
def pair(request, tmp_path_factory):
    return random_pair(tmp_path_factory.mktemp("oracle"), CASES[request.param])


def tokens(model, rows: int, length: int) -> torch.Tensor:
    return torch.randint(
        model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1)
    )


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def test_logits_equal_transformers(pair):
    # eq. 1-11; fact 14
    # eq. 12-16; fact 14
    theirs, ours = pair
    text = tokens(ours, 2, 96)
    assert gap(ours(text), theirs(text).logits) < BOUND


@torch.inference_mode()
def test_chunks_and_single_steps_equal_transformers(pair):
    """Chunked prefill, then decoding, through both forms of attention."""
    # fact 12
    # fact 12
    theirs, ours = pair
    text = tokens(ours, 2, 80)
    cache = ours.new_cache(2, 80)
    cuts = [0, 50, 57, *range(58, 81)]
    parts = [ours(text[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)]
    assert gap(torch.cat(parts, 1), theirs(text).logits) < BOUND
    assert cache.lengths == [80, 80]


@torch.inference_mode()
def test_ragged_rows_equal_transformers_row_by_row(pair):
    theirs, ours = pair
    text = tokens(ours, 3, 60)
    cache = ours.new_cache(3, 70)
    lengths = [60, 1, 33]
    last = ours(text, cache=cache, lengths=lengths, last_only=True)
    more = tokens(ours, 3, 4)
    next_two = ours(more, cache=cache, lengths=[2, 4, 1])
    for row, length in enumerate(lengths):
        alone = torch.cat([text[row, :length], more[row]])[None]
        wanted = theirs(alone).logits[0]
        new = [2, 4, 1][row]
        assert gap(last[row], wanted[length - 1]) < BOUND
        assert gap(next_two[row, :new], wanted[length : length + new]) < BOUND


@pytest.mark.parametrize(
    "case",
    [
        "strongly negative bias",
        "yarn past the original length",
        "queries not compressed",
        "glm4_moe_lite",
    ],
)
def test_greedy_ids_equal_transformers_over_64_tokens(tmp_path, case):
    theirs, ours = random_pair(tmp_path, CASES[case], seed=3)
    prompt = tokens(ours, 1, 7)
    with torch.inference_mode():
        wanted = theirs.generate(
            prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    found = generate(ours, prompt.tolist(), max_new_tokens=64, temperature=0.0, eos_ids=())
    assert found[0] == wanted[0, 7:].tolist()
    assert len(set(found[0])) > 8, "a text that repeats itself proves little"


@torch.inference_mode()
def test_bf16_is_as_near_to_fp32_as_transformers_bf16(tmp_path):
    """On dense layers: with experts, one near-tie of the router sends a token elsewhere."""
    theirs, ours = random_pair(tmp_path, CASES["dense only"])
    low = load_model(tmp_path, precision="bf16")
    text = tokens(ours, 2, 64)
    exact = ours(text)
    mine = float((low(text) - exact).norm() / exact.norm())
    other = float((theirs.bfloat16()(text).logits.float() - exact).norm() / exact.norm())
    assert 1e-3 < mine < 1.2 * other


def test_preset_and_new_spelling_give_transformers_frequencies():
    """YaRN at the released size: 32 frequencies, the ramp from pair 10 to 23, mscale^2."""
    # fact 15
    # fact 15
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3RotaryEmbedding,
        yarn_apply_mscale,
    )

    from dsv3.rope import (
        inverse_frequencies,
        rotation_scale,
        softmax_scale,
        yarn_range,
        yarn_temperature,
    )

    config = ModelConfig.deepseek_v3()
    theirs = transformers.DeepseekV3Config(**config.to_dict())
    rotary = DeepseekV3RotaryEmbedding(theirs)
    torch.testing.assert_close(inverse_frequencies(config), rotary.inv_freq, rtol=1e-6, atol=0)
    assert rotation_scale(config) == rotary.attention_scaling == 1.0
    assert softmax_scale(config) == pytest.approx(
        yarn_apply_mscale(theirs.rope_parameters, 192**-0.5), rel=1e-7
    )
    assert softmax_scale(config) * 192**0.5 == pytest.approx(1.87385, rel=1e-5)
    assert yarn_range(config) == (10, 23)
    assert yarn_temperature(40, 1.0) == pytest.approx(1.36889, abs=5e-6)
    assert (
        ModelConfig.from_dict(theirs.to_dict()).but(quantization_config=config.quantization_config)
        == config
    )


@pytest.mark.parametrize("original", [1, 2, 5, 6, 7, 32, 150, 201, 202, 4096])
@pytest.mark.parametrize("betas", [(1.0, 1.0), (32.0, 1.0), (4.0, 4.0), (0.5, 0.25)])
@pytest.mark.parametrize("dim, theta", [(64, 50000.0), (8, 30.0)])
def test_every_ramp_is_transformers(original, betas, dim, theta):
    """Equal betas, and contexts in which no pair turns beta_slow times, or none beta_fast."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

    from dsv3.config import YarnScaling
    from dsv3.rope import inverse_frequencies

    config = ModelConfig.kimi_k2().but(
        qk_rope_head_dim=dim,
        rope_theta=theta,
        rope_scaling=YarnScaling(
            factor=32,
            original_max_position_embeddings=original,
            beta_fast=betas[0],
            beta_slow=betas[1],
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    )
    rotary = DeepseekV3RotaryEmbedding(transformers.DeepseekV3Config(**config.to_dict()))
    torch.testing.assert_close(inverse_frequencies(config), rotary.inv_freq, rtol=1e-6, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("case", ["kimi_k2", "glm4_moe_lite"])
def test_transformers_reads_a_family_that_we_write(tmp_path, case):
    """save_model keeps the published name; and transformers' own class loads the folder. It does
    not know the name kimi_k2, so there it is told deepseek_v3, as Kimi K2's card says."""
    from dsv3.checkpoint.saving import save_model

    _, ours = random_pair(tmp_path / "theirs", CASES[case])
    save_model(ours, tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields.pop("model_type") == case
    model_class = getattr(transformers, CASES[case].get("architecture", "DeepseekV3ForCausalLM"))
    theirs = model_class.from_pretrained(
        tmp_path / "ours",
        config=model_class.config_class(**fields),
        dtype=torch.float32,
        attn_implementation="eager",
    ).eval()
    again = load_model(tmp_path / "ours", precision="fp32")
    assert again.config == ours.config
    text = tokens(ours, 1, 40)
    assert gap(again(text), theirs(text).logits) < BOUND
