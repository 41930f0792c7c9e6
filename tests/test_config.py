"""config.json: two spellings, presets, and refusals that name the field."""

import json

import pytest

from dsv3 import ModelConfig
from dsv3.errors import DSV3Error

# The released file, as published beside the weights (bookkeeping fields left out).
RELEASED = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
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
        "rope_type": "yarn",
        "rope_theta": 50000.0,
    }
    config = ModelConfig.from_dict(new)
    assert config == ModelConfig.deepseek_v3().but(rope_theta=50000.0)
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0}
    assert ModelConfig.from_dict(new) == config.but(rope_theta=300.0, rope_scaling=None)


# Published beside the weights of moonshotai/Kimi-K2-Instruct, moonshotai/Moonlight-16B-A3B and
# zai-org/GLM-4.7-Flash (revision 7dd20894); auto_map left out.
KIMI_K2 = RELEASED | {
    "model_type": "kimi_k2",
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "routed_scaling_factor": 2.827,
    "seq_aux": True,
    "topk_group": 1,
    "transformers_version": "4.48.3",
    "use_cache": True,
    "vocab_size": 163840,
}
MOONLIGHT = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
GLM = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "pad_token_id": 154820,
    "eos_token_id": [154820, 154827, 154829],
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "max_position_embeddings": 202752,
    "model_type": "glm4_moe_lite",
    "moe_intermediate_size": 1536,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_attention_heads": 20,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 47,
    "num_key_value_heads": 20,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "transformers_version": "5.0.0rc0",
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "vocab_size": 154880,
}


@pytest.mark.parametrize(
    "published, preset",
    [
        (KIMI_K2, ModelConfig.kimi_k2),
        (MOONLIGHT, ModelConfig.moonlight),
        (GLM, ModelConfig.glm_4_7_flash),
    ],
)
def test_a_family_is_read_and_written_under_its_name(tmp_path, published, preset):
    config = ModelConfig.from_dict(published)
    assert config == preset()
    (tmp_path / "config.json").write_text(config.to_json())
    assert ModelConfig.from_pretrained(tmp_path) == config
    written = json.loads(config.to_json())
    for name in (
        "model_type",
        "architectures",
        "rope_theta",
        "n_group",
        "vocab_size",
        "routed_scaling_factor",
        "first_k_dense_replace",
    ):
        assert written[name] == published[name], name


def test_dense_layers_by_type():
    types = ["dense"] + ["sparse"] * 46
    assert ModelConfig.glm_4_7_flash().to_dict()["mlp_layer_types"] == types
    without = {k: v for k, v in GLM.items() if k != "first_k_dense_replace"}
    for count in (0, 3, 47):
        read = ModelConfig.from_dict(
            without | {"mlp_layer_types": ["dense"] * count + ["sparse"] * (47 - count)}
        )
        assert read == ModelConfig.glm_4_7_flash().but(first_k_dense_replace=count)


def test_what_says_the_same_twice_is_accepted():
    yarn = RELEASED["rope_scaling"]
    said = RELEASED | {
        "rope_parameters": {
            **yarn,
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "finetuned": False,
            "attention_factor": None,
        },
        "num_mtp_layers": 1,
        "num_local_experts": 256,
        "partial_rotary_factor": 1.0,
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58,
        "layer_types": ["full_attention"] * 61,
        "sliding_window": None,
        "use_qk_norm": False,
        "pretraining_tp": 1,
        "text_config": None,
        "some_field_of_next_year": {"a": 1},
        "head_dim": 64,
    }
    assert ModelConfig.from_dict(said) == ModelConfig.deepseek_v3()
    said["quantization_config"] = said["quantization_config"] | {
        "scale_fmt": "float",
        "dequantize": False,
        "modules_to_convert": None,
        "expert_dtype": "fp8",
        "weight_per_tensor": False,
        "ignored_layers": ["lm_head"],
    }
    config = ModelConfig.from_dict(said)
    assert config.scale_fmt == "float32"
    assert config.to_dict()["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "changes",
    [
        dict(q_lora_rank=None),
        dict(tie_word_embeddings=True),
        dict(gate_bias=False),
        dict(eos_token_id=(1, 7)),
        dict(scoring_func="softmax"),
        dict(quantization_config=None),
    ],
)
def test_there_and_back(tmp_path, changes):
    config = ModelConfig.mini().but(**changes)
    (tmp_path / "config.json").write_text(config.to_json())
    assert ModelConfig.from_pretrained(tmp_path) == config


def test_v31_scales():
    changed = RELEASED | {
        "quantization_config": RELEASED["quantization_config"] | {"scale_fmt": "ue8m0"}
    }
    assert ModelConfig.from_dict(changed).scale_fmt == "ue8m0"


# field, a value that cannot be, words of the message
NONSENSE = [
    ("model_type", "qwen2", ["distilled", "qwen2"]),
    ("model_type", "llama", ["distilled"]),
    ("model_type", "gpt2", ["deepseek_v3", "gpt2"]),
    ("model_type", None, ["missing", "deepseek_v3"]),
    ("model_type", [], ["model_type", "[]"]),
    ("model_type", "deepseek_v32", ["indexer", "kimi_k2", "glm4_moe_lite"]),
    ("model_type", "axk1", ["post_mlp_layernorm"]),
    ("model_type", "mistral4", ["gate_up_proj"]),
    ("model_type", "deepseek_v2", ["scoring_func", "topk_method"]),
    ("model_type", "kimi_k25", ["text_config"]),
    ("text_config", {"model_type": "kimi_k2"}, ["text_config"]),
    ("architectures", ["DeepseekV3ForSequenceClassification"], ["architectures", "SequenceCl"]),
    ("architectures", "DeepseekV3ForCausalLM", ["architectures", "list"]),
    ("index_topk", 2048, ["index_topk", "2048"]),
    ("use_qk_norm", True, ["use_qk_norm"]),
    ("sliding_window", 4096, ["sliding_window"]),
    ("layer_types", ["sliding_attention"], ["layer_types", "full_attention"]),
    ("mlp_layer_types", ["sparse", "dense"], ["mlp_layer_types", "61"]),
    ("mlp_layer_types", ["dense"] + ["sparse"] * 60, ["mlp_layer_types", "first_k_dense_replace"]),
    ("pretraining_tp", 2, ["pretraining_tp"]),
    ("final_logit_softcapping", 30.0, ["final_logit_softcapping"]),
    ("partial_rotary_factor", 0.5, ["partial_rotary_factor"]),
    ("num_mtp_layers", 2, ["num_mtp_layers", "contradict"]),
    ("moe_layer_freq", True, ["moe_layer_freq"]),
    ("n_group", None, ["n_group", "missing"]),
    ("routed_scaling_factor", None, ["routed_scaling_factor", "missing"]),
    ("quantization", {"group_size": 64, "bits": 4}, ["quantization", "group_size"]),
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
    ("rope_theta", 1, ["rope_theta"]),
    ("hidden_size", 2**32, ["hidden_size", "at most"]),
    ("num_hidden_layers", 2**32, ["num_hidden_layers", "at most"]),
    ("num_hidden_layers", 1000, ["n_routed_experts", "65,536"]),
    ("max_position_embeddings", 10**12, ["max_position_embeddings"]),
    ("rms_norm_eps", 10**400, ["rms_norm_eps"]),
    (
        "rope_scaling",
        {"type": "yarn", "factor": 1e308, "original_max_position_embeddings": 4096},
        ["rope_scaling.factor", "1e+308"],
    ),
    ("rope_scaling", RELEASED["rope_scaling"] | {"beta_slow": 1e308}, ["rope_scaling.beta_slow"]),
    ("rope_scaling", RELEASED["rope_scaling"] | {"beta_slow": 33}, ["beta_fast", "beta_slow"]),
    ("rope_scaling", RELEASED["rope_scaling"] | {"mscale": -40}, ["rope_scaling.mscale"]),
    ("rope_scaling", RELEASED["rope_scaling"] | {"attention_factor": 1.5}, ["attention_factor"]),
    ("rope_scaling", RELEASED["rope_scaling"] | {"truncate": False}, ["truncate"]),
    ("rope_scaling", RELEASED["rope_scaling"] | {"attn_factor": 1.0}, ["attn_factor"]),
    ("rope_scaling", RELEASED["rope_scaling"] | {"rope_type": "default"}, ["type", "contradict"]),
    (
        "rope_scaling",
        {"factor": 40, "original_max_position_embeddings": 4096},
        ["rope_scaling.type", "missing"],
    ),
    (
        "rope_parameters",
        {"rope_type": "llama3", "factor": 8.0},
        ["rope_parameters.rope_type", "llama3"],
    ),
    (
        "rope_parameters",
        {"rope_type": "default", "rope_theta": 10000.0},
        ["rope_parameters", "rope_scaling", "contradict"],
    ),
    ("rope_parameters", RELEASED["rope_scaling"] | {"rope_theta": 500.0}, ["rope_theta", "500"]),
    ("rope_scaling", {"type": "linear", "factor": 2}, ["rope_scaling.type", "linear"]),
    ("rope_scaling", {"type": "yarn", "factor": 40}, ["original_max_position_embeddings"]),
    (
        "rope_scaling",
        {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
        ["rope_scaling.factor", "0.5"],
    ),
    ("rope_scaling", 40, ["rope_scaling"]),
    ("eos_token_id", 129280, ["eos_token_id", "129280"]),
    ("bos_token_id", -1, ["bos_token_id"]),
    ("quantization_config", {"group_size": 64, "bits": 4}, ["quant_method", "missing", "bits"]),
    ("quantization_config", {"bits": 4, "quant_method": "awq"}, ["quant_method", "awq"]),
    ("quantization_config", {"quant_method": "fp8"}, ["weight_block_size", "missing"]),
    (
        "quantization_config",
        RELEASED["quantization_config"] | {"activation_scheme": "static"},
        ["activation_scheme", "static"],
    ),
    (
        "quantization_config",
        RELEASED["quantization_config"] | {"expert_dtype": "fp4"},
        ["expert_dtype", "fp4"],
    ),
    (
        "quantization_config",
        RELEASED["quantization_config"] | {"kv_cache_scheme": {"bits": 8}},
        ["kv_cache_scheme"],
    ),
    (
        "quantization_config",
        RELEASED["quantization_config"] | {"modules_to_not_convert": [1]},
        ["modules_to_not_convert"],
    ),
    ("quantization_config", {"quant_method": "gptq"}, ["quant_method", "gptq", "fp8"]),
    (
        "quantization_config",
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        ["weight_block_size", "[64, 64]"],
    ),
    ("quantization_config", {"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e5m2"]),
    ("quantization_config", {"quant_method": "fp8", "scale_fmt": "log"}, ["scale_fmt", "log"]),
]


@pytest.mark.parametrize(
    "field, value, words",
    NONSENSE,
    ids=[f"{field}={str(value)[:40]}" for field, value, _ in NONSENSE],
)
def test_nonsense_is_refused_by_name(tmp_path, field, value, words):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(RELEASED | {field: value}))
    with pytest.raises(DSV3Error) as caught:
        ModelConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(file) in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not JSON"),
        ("[1]", "not a JSON object"),
        ('{"model_type": "deepseek_v3"}', "vocab_size"),
        ("\xff", "not a text in UTF-8"),
        ('{"model_type": "gpt2", "model_type": "deepseek_v3"}', "twice"),
        ("[" * 10**5, "brackets"),
        ('{"model_type": ' + "9" * 5000 + "}", "is not JSON"),
        ("", "empty"),
        ("version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
    ],
    ids=lambda value: value[:20],
)
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
    from dsv3.checkpoint.layout import check_sharding

    config = ModelConfig.mini()
    assert config.n_shared_experts == 1 and config.n_routed_experts >= 16
    assert config.n_group == 4 and config.num_nextn_predict_layers == 1
    assert config.latent_dim % 128 and config.latent_dim > 128
    check_sharding(config, 2)
