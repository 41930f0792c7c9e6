"""The two forms of latent attention in float64, and the cache in FP8."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from dsv3 import ModelConfig, Transformer, cli, costs
from dsv3.cache import Step
from dsv3.errors import DSV3Error
from dsv3.fp8 import quantize_activation
from dsv3.fp8.latent import LatentFormat
from dsv3.mla import MLA
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

CPU = torch.device("cpu")


@torch.no_grad()
def test_absorbed_equals_expanded_in_float64():
    # fact 11; eq. 2, 4, 5, 9, 10
    config = ModelConfig.mini().but(
        qk_nope_head_dim=48,
        v_head_dim=80,
        kv_lora_rank=96,
        qk_rope_head_dim=64,
        num_attention_heads=4,
    )
    precision = replace(Precision.of("fp32", config), exact=True)
    attention = MLA(config, precision, TensorGroup.single())
    draw = torch.Generator().manual_seed(0)
    for weight in attention.parameters():
        weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[-1] ** 0.5)
    for queries, keys in ((1, 700), (9, 40), (300, 300)):
        step = Step.make(config, [keys - queries], [queries], queries, CPU)
        q_nope, q_rope, seen = (
            torch.randn(*shape, generator=draw, dtype=torch.float64)
            for shape in ((1, queries, 4, 48), (1, queries, 4, 64), (1, keys, 96 + 64))
        )
        expanded, absorbed = (
            form(q_nope, q_rope, seen, step) for form in (attention.expanded, attention.absorbed)
        )
        assert (expanded - absorbed).abs().max() < 1e-12 * expanded.abs().max()


def test_a_token_packs_into_656_bytes_a_layer():
    """FlashMLA's FP8 format: 512 E4M3 codes, 4 float32 scales, 64 bfloat16 of rotated key."""
    # fact 10
    draw = torch.Generator().manual_seed(0)
    new = torch.randn(7, 576, generator=draw).bfloat16()
    layout = LatentFormat(512, 64)
    rows = layout.pack(new)
    assert layout.bytes == 656 and rows.shape == (7, 656) and rows.dtype == torch.uint8
    layers = ModelConfig.deepseek_v3().num_hidden_layers
    assert 656 * layers == 40_016 < costs.latent_bytes_per_token(ModelConfig.deepseek_v3())
    codes, scales, rotated = (part.contiguous() for part in rows.split([512, 16, 128], 1))
    assert torch.equal(rotated.view(torch.bfloat16), new[:, 512:])
    scales = scales.view(torch.float32)
    assert (torch.frexp(scales).mantissa == 0.5).all()
    values = (codes.view(torch.float8_e4m3fn).float().view(7, 4, 128) * scales[..., None]).flatten(
        1
    )
    assert float((values - new[:, :512]).norm() / new[:, :512].float().norm()) < 0.027
    whole = torch.cat([values, new[:, 512:]], 1)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):  # exact in all of them
        assert torch.equal(layout.unpack(rows, dtype).double(), whole.double())


@pytest.mark.parametrize("latent, rope", [(96, 16), (130, 2), (128, 32), (1, 64)])
def test_packing_any_sizes(latent, rope):
    draw = torch.Generator().manual_seed(latent)
    new = 1e3 * torch.randn(2, 5, latent + rope, generator=draw)
    new[0, 1], new[1, 2, 0], new[1, 3, 0], new[1, 4, 0] = 0.0, torch.nan, torch.inf, 3.4e38
    layout = LatentFormat(latent, rope)
    rows = layout.pack(new)
    assert rows.shape == (2, 5, layout.bytes) and layout.bytes % 4 == 0
    read = layout.unpack(rows, torch.float32)
    assert torch.equal(read[..., latent:], new[..., latent:].bfloat16().float())
    tile = min(latent, 128)
    assert read[1, 2:4, :tile].isnan().all() and read[1, 4, 0] > 3e38
    assert (read[0, 1] == 0).all()
    values = quantize_activation(new[..., :latent].contiguous(), "ue8m0").dequantize()
    assert torch.equal(read[..., :latent].nan_to_num(7.0), values.nan_to_num(7.0))


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.mini().but(
        vocab_size=64, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4
    )
    source = Transformer(config).init_weights(0, by_width=True)
    model = Transformer(config, "fp8")
    model.load_state_dict(source.state_dict())
    return model


def passes(model, cache, text: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    return torch.cat([model(text[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)], 1)


@torch.inference_mode()
def test_a_text_in_a_packed_cache_does_not_depend_on_how_it_was_cut(model, monkeypatch):
    text = torch.randint(64, (2, 14), generator=torch.Generator().manual_seed(0))
    whole = passes(model, model.new_cache(2, 14, dtype="fp8"), text, [0, 14])
    steps = passes(model, model.new_cache(2, 14, dtype="fp8"), text, [0, 5, *range(6, 15)])
    alone = passes(model, model.new_cache(1, 20, dtype="fp8"), text[1:], [0, 14])
    monkeypatch.setattr(MLA, "prefers_expanded", lambda self, queries: True)
    expanded = passes(model, model.new_cache(2, 14, dtype="fp8"), text, [0, 9, 14])
    for other in (steps, expanded):
        assert torch.allclose(other, whole, rtol=1e-6, atol=1e-6)
    assert torch.allclose(alone, whole[1:], rtol=1e-6, atol=1e-6)
    # What a plain cache gives is near, and something else.
    plain = passes(model, model.new_cache(2, 14), text, [0, 14])
    assert 1e-4 < float((whole - plain).abs().mean() / plain.std()) < 0.2


@torch.inference_mode()
def test_a_packed_cache_is_a_cache(model, monkeypatch):
    """Memory, cutting back, copies, rows that end, and drafts."""
    plain = model.precision
    monkeypatch.setattr(model, "precision", replace(plain, cache="fp8"))
    cache, drafts = model.new_cache(2, 10), model.new_draft_cache(2, 10)
    assert model.new_cache(2, 10, dtype="plain").format is None
    monkeypatch.setattr(model, "precision", plain)
    layout = LatentFormat(model.config.kv_lora_rank, model.config.qk_rope_head_dim)
    assert cache.data.nbytes == 2 * 2 * 10 * layout.bytes == 2 * drafts.data.nbytes
    assert model.new_cache(2, 10).data.nbytes == 2 * 2 * 10 * 2 * model.config.latent_dim
    text = torch.arange(16).view(2, 8)
    whole = model(text, cache=cache)[:, -1]
    cache.truncate([6, 7])
    again = model(text[:, 6:], cache=cache.copies(1, 12), lengths=[2, 2])
    assert torch.allclose(again[0, 1], whole[0], atol=1e-6)
    cache.keep([1])
    assert torch.allclose(model(text[1:, 7:], cache=cache)[0, -1], whole[1], atol=1e-6)


def test_what_a_packed_cache_cannot_do(model):
    with pytest.raises(DSV3Error, match="dtype: unknown kind of cache.*int4.*plain or fp8"):
        model.new_cache(1, 4, dtype="int4")
    trained = Transformer(model.config).init_weights(0)
    cache = trained.new_cache(1, 4, dtype="fp8")
    logits = trained(torch.ones(1, 2).long(), cache=cache)
    with pytest.raises(DSV3Error, match="no gradient goes back through a cache in FP8"):
        logits.sum().backward()
    with pytest.raises(DSV3Error, match="another model's"):
        model(torch.ones(1, 1).long(), cache=cache)


def test_generate_writes_from_a_packed_cache(capsys):
    words = "generate dsv3-mini --prompt 1 --max-new-tokens 2 --precision fp32".split()
    assert cli.main([*words, "--cache", "fp8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cache"] == "fp8"
    assert cli.main([*words, "--cache", "fp8"]) == 0
    packed = capsys.readouterr().err
    assert cli.main(words) == 0
    # a prompt of one token or two behind the begin token, 4 layers: 196 bytes for 640
    assert " in FP8, peak" in packed and " in FP8, peak" not in capsys.readouterr().err
