"""Other families' checkpoints through convert, cast and loading: they keep their name and work."""

import json

import pytest
import torch
from checkpoints import random_tensors, tiny_config, write_checkpoint
from test_config import GLM, KIMI_K2, MOONLIGHT

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.loading import load_model
from dsv3.config import ModelConfig, YarnScaling
from dsv3.families import FAMILIES, FIXED
from dsv3.translation import spell, translate

SMALL = {
    "kimi_k2": tiny_config(
        model_type="kimi_k2",
        n_group=1,
        num_nextn_predict_layers=0,
        rope_theta=50000.0,
        rope_scaling=YarnScaling(
            factor=4,
            original_max_position_embeddings=32,
            beta_fast=1.0,
            beta_slow=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
    ),
    "glm4_moe_lite": tiny_config(model_type="glm4_moe_lite", n_group=1, v_head_dim=256),
}


@pytest.mark.parametrize("name", SMALL)
@torch.inference_mode()
def test_a_family_stays_itself_through_cast_and_convert(tmp_path, name):
    config = SMALL[name]
    write_checkpoint(tmp_path / "fp8", config)
    cast(tmp_path / "fp8", tmp_path / "bf16", to="bf16", progress=False)
    cast(tmp_path / "bf16", tmp_path / "again", to="fp8", progress=False)
    convert(tmp_path / "fp8", tmp_path / "one", 1, progress=False)
    text = torch.randint(64, (1, 90), generator=torch.Generator().manual_seed(0))
    wanted = load_model(tmp_path / "fp8", precision="fp32")(text)
    for folder in ("bf16", "again", "one"):
        fields = json.loads((tmp_path / folder / "config.json").read_text())
        assert fields["model_type"] == name
        assert fields["architectures"] == [FAMILIES[name].architecture]
        model = load_model(tmp_path / folder, precision="fp32")
        assert model.config.but(quantization_config=config.quantization_config) == config
        # bfloat16 rounds codes times scales, and moves a token to another expert now and then
        gap = (model(text) - wanted).abs() / wanted.abs().max()
        assert gap.max() == 0 if folder == "one" else gap.median() < 0.02


@pytest.mark.parametrize(
    "published", [KIMI_K2, MOONLIGHT, GLM], ids=["kimi_k2", "moonlight", "glm-4.7-flash"]
)
@torch.inference_mode()
def test_a_folder_as_it_is_published_loads(tmp_path, published):
    """The published config.json, made small; beside the weights what the publishers left there:
    rotary tables of another length and, in Moonlight, router biases in bfloat16."""
    sizes = dict(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=8,
        kv_lora_rank=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    fields = published | sizes
    config = ModelConfig.from_dict(fields)
    tensors = random_tensors(config)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].bfloat16()
    for layer in range(2):
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(56)
    write_checkpoint(tmp_path, config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = load_model(tmp_path, precision="fp32")
    assert model.config == config and len(model.mtp) == fields["num_nextn_predict_layers"]
    assert model(torch.arange(20)[None]).isfinite().all()


def test_every_family_spells_and_reads_its_own_presets():
    """Reading what is written changes nothing, and every fixed field may say what it must."""
    for preset in (
        ModelConfig.deepseek_v3,
        ModelConfig.kimi_k2,
        ModelConfig.moonlight,
        ModelConfig.glm_4_7_flash,
        ModelConfig.mini,
    ):
        written = preset().to_dict()
        assert spell(written) == written
        for name, values in FIXED.items():
            for value in (None, *values):
                said = written | {name: value}
                assert ModelConfig.from_dict(said) == preset(), (name, value)
        assert set(translate(written)) <= set(written) | {"rope_scaling", "quantization_config"}
