"""config.json: two spellings, presets, and refusals that name the field."""

import json

import pytest

from dsv3 import ModelConfig
from dsv3.errors import DSV3Error

# The released file, as published beside the weights (bookkeeping fields left out).
RELEASED = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
                     "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
                     "type": "yarn"},
    "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
}


def test_the_preset_is_the_released_file():
    assert ModelConfig.from_dict(RELEASED) == ModelConfig.deepseek_v3()


def test_the_released_spelling_is_written():
    written = ModelConfig.deepseek_v3().to_dict()
    for name, value in RELEASED.items():
        if name != "ep_size":
            assert written[name] == value, name


def test_the_newer_spelling_says_the_same():
    new = {k: v for k, v in RELEASED.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = {k: v for k, v in RELEASED["rope_scaling"].items() if k != "type"} | {
        "rope_type": "yarn", "rope_theta": 50000.0}
    config = ModelConfig.from_dict(new)
    assert config == ModelConfig.deepseek_v3().but(rope_theta=50000.0)
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0}
    assert ModelConfig.from_dict(new) == config.but(rope_theta=300.0, rope_scaling=None)


@pytest.mark.parametrize("changes", [
    dict(q_lora_rank=None), dict(tie_word_embeddings=True), dict(gate_bias=False),
    dict(eos_token_id=(1, 7)), dict(scoring_func="softmax"), dict(quantization_config=None)])
def test_there_and_back(tmp_path, changes):
    config = ModelConfig.mini().but(**changes)
    (tmp_path / "config.json").write_text(config.to_json())
    assert ModelConfig.from_pretrained(tmp_path) == config


def test_v31_scales():
    changed = RELEASED | {"quantization_config": RELEASED["quantization_config"]
                          | {"scale_fmt": "ue8m0"}}
    assert ModelConfig.from_dict(changed).scale_fmt == "ue8m0"


# field, a value that cannot be, words of the message
NONSENSE = [
    ("model_type", "qwen2", ["distilled", "qwen2"]),
    ("model_type", "llama", ["distilled"]),
    ("model_type", "gpt2", ["deepseek_v3", "gpt2"]),
    ("model_type", None, ["deepseek_v3"]),
    ("attention_bias", True, ["attention_bias", "True", "False"]),
    ("hidden_act", "gelu", ["hidden_act", "gelu", "silu"]),
    ("topk_method", "greedy", ["topk_method", "greedy", "noaux_tc"]),
    ("moe_layer_freq", 2, ["moe_layer_freq", "2"]),
    ("rope_interleave", False, ["rope_interleave"]),
    ("num_key_value_heads", 8, ["num_key_value_heads", "8"]),
    ("scoring_func", "tanh", ["scoring_func", "tanh"]),
    ("hidden_size", 0, ["hidden_size", "0"]),
    ("hidden_size", -7168, ["hidden_size"]),
    ("hidden_size", "7168", ["hidden_size", "'7168'"]),
    ("hidden_size", 7168.0, ["hidden_size"]),
    ("hidden_size", True, ["hidden_size"]),
    ("num_hidden_layers", [61], ["num_hidden_layers"]),
    ("q_lora_rank", 0, ["q_lora_rank"]),
    ("qk_rope_head_dim", 63, ["qk_rope_head_dim", "even"]),
    ("first_k_dense_replace", -1, ["first_k_dense_replace"]),
    ("n_group", 7, ["n_routed_experts", "n_group"]),
    ("n_group", 256, ["n_group", "2 experts"]),
    ("topk_group", 9, ["topk_group", "n_group"]),
    ("num_experts_per_tok", 129, ["num_experts_per_tok", "128"]),
    ("norm_topk_prob", "yes", ["norm_topk_prob", "true or false"]),
    ("routed_scaling_factor", float("nan"), ["routed_scaling_factor", "finite"]),
    ("rms_norm_eps", 0, ["rms_norm_eps"]),
    ("rope_theta", "10000", ["rope_theta"]),
    ("rope_scaling", {"type": "linear", "factor": 2}, ["rope_scaling.type", "linear"]),
    ("rope_scaling", {"type": "yarn", "factor": 40}, ["original_max_position_embeddings"]),
    ("rope_scaling", {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
     ["rope_scaling.factor", "0.5"]),
    ("rope_scaling", 40, ["rope_scaling"]),
    ("eos_token_id", 129280, ["eos_token_id", "129280"]),
    ("bos_token_id", -1, ["bos_token_id"]),
    ("quantization_config", {"quant_method": "gptq"}, ["quant_method", "gptq", "fp8"]),
    ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]},
     ["weight_block_size", "[64, 64]"]),
    ("quantization_config", {"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e5m2"]),
    ("quantization_config", {"quant_method": "fp8", "scale_fmt": "log"}, ["scale_fmt", "log"]),
]


@pytest.mark.parametrize("field, value, words", NONSENSE,
                         ids=[f"{field}={value}" for field, value, _ in NONSENSE])
def test_nonsense_is_refused_by_name(tmp_path, field, value, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED | {field: value}))
    with pytest.raises(DSV3Error) as caught:
        ModelConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("text, words", [
    ("{", "is not JSON"), ("[1]", "not a JSON object"), ('{"model_type": "deepseek_v3"}',
                                                         "vocab_size"), ("\xff", "cannot be read")])
def test_files_that_are_no_config(tmp_path, text, words):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(DSV3Error, match=words):
        ModelConfig.from_pretrained(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(DSV3Error, match="no such file"):
        ModelConfig.from_pretrained(tmp_path / "nowhere")


def test_the_mini_model_has_every_mechanism():
    """What the shipped model must have: one shared and 16 routed experts in 4 groups, MTP,
    a ragged FP8 block in wkv_a, and cuts at block boundaries over 2 ranks."""
    from dsv3.layout import check_sharding
    config = ModelConfig.mini()
    assert config.n_shared_experts == 1 and config.n_routed_experts >= 16
    assert config.n_group == 4 and config.num_nextn_predict_layers == 1
    assert config.latent_dim % 128 and config.latent_dim > 128
    check_sharding(config, 2)
