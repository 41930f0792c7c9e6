"""What is often read about FP8, put into the package for a moment: something must notice.

Each test makes one mistake of chapter 4's table with ``mutated`` or by hand. The check passes
without it and fails with it. The oracles are float64 and the definition of the format.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dsv3 import ModelConfig, fp8, load_model, load_tokenizer
from dsv3.book import held_out, mutated
from dsv3.checkpoint.layout import layout
from dsv3.fp8 import Fp8Recipe, quantize, training
from dsv3.fp8.accumulation import Accumulator
from dsv3.fp8.formats import block_scale
from dsv3.fp8.quantize import COLUMN_BLOCK, QuantizedTensor, dequantize_rows, quantized_values
from dsv3.fp8.training import dgrad
from dsv3.model import Transformer
from dsv3.precision import Precision

pytestmark = pytest.mark.slow

MINI = "assets/dsv3-mini"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@torch.inference_mode()
def test_misread_divide_by_scale():
    """A dequantised weight is near what was quantised, and the shipped model reads; divided, the
    weights are a million times too large and the model is as good as one that guesses."""
    w = 0.05 * random(200, 300)

    def distance() -> float:
        return off(fp8.quantize_weight(w).dequantize(), w)

    tokens = held_out.read(load_tokenizer(MINI), 65)[0][::8]

    def loss() -> float:
        model = load_model(MINI, "fp8")
        logits = model(tokens[:, :-1])
        return float(F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()))

    assert distance() < 0.03 and loss() < 4
    # Both kinds of shape: whole blocks, and ragged ones.
    for old, new in (
        ("mul_(scale[:, None, :, None])", "div_(scale[:, None, :, None])"),
        ("mul_(wide[-1])", "div_(wide[-1])"),
    ):
        with mutated(dequantize_rows, old, new):
            if "wide" in old:
                assert distance() > 10
            else:
                assert loss() > 7


def test_misread_per_tensor_e5m2():
    """A quiet token's gradient arrives with the recipe, and not with one scale for all; E5M2 has
    twice the error; and embedding, head and router are in no FP8 precision's hands."""
    dy = random(256, 256, seed=1)
    dy[::2] *= 2.0**-20
    w = fp8.quantize_weight(random(256, 128, seed=2))
    exact = dy.double() @ w.dequantize().double()

    def worst_token() -> float:
        dx = dgrad(dy, w, Fp8Recipe()).double()
        return float(((dx - exact).norm(dim=1) / exact.norm(dim=1)).max())

    right = worst_token()
    assert right < 0.05
    with mutated(
        dgrad,
        'block = ACTIVATION_BLOCK if recipe.gradients == "tile" else WEIGHT_BLOCK',
        "block = tuple(dy.shape)",
    ):
        assert training.dgrad is not dgrad
        dx = training.dgrad(dy, w, Fp8Recipe())
        assert float((dx[::2].double() - exact[::2]).norm() / exact[::2].norm()) > 0.9
    x = random(512, 128, seed=3)
    s = x.abs().max() / 57344
    e5m2 = (x / s).to(torch.float8_e5m2).float() * s
    assert off(e5m2, x) > 1.9 * off(quantized_values(x.clone(), (1, 128), "float32"), x)

    plain = {t.hf_name for t in layout(ModelConfig.deepseek_v3()) if t.dtype != torch.float8_e4m3fn}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.5.mlp.gate.weight"):
        assert name in plain
    made = Transformer(ModelConfig.mini(), Precision.of("fp8", ModelConfig.mini()))
    kinds = {name: value.dtype for name, value in made.state_dict().items()}
    assert kinds["embed.weight"] == kinds["head.weight"] == torch.bfloat16
    assert torch.float8_e4m3fn in kinds.values()
    assert all(kinds[n] != torch.float8_e4m3fn for n in kinds if "norm" in n or "gate." in n)


def test_misread_fp32_accumulation():
    """If the sums had FP32's bits they would be exact to a millionth; with 13 they are not, unless
    they are promoted."""
    x, w = (
        (448 * torch.rand(4, 4096, generator=torch.Generator().manual_seed(seed))).to(
            torch.float8_e4m3fn
        )
        for seed in (0, 1)
    )
    exact = x.double() @ w.double().T

    def worst(**how) -> float:
        return float((Accumulator(**how).matmul(x, w) / exact - 1).abs().max())

    for reading in ("accumulator", "products"):
        few = worst(fraction_bits=13, aligned_with=reading)
        assert few > 1e-3
        # 34 bits hold 32 products exactly (TR 3.5.2); FP32's 23 hold the sum to 1e-4.
        assert worst(fraction_bits=34, aligned_with=reading) < 1e-6
        assert worst(fraction_bits=13, aligned_with=reading, promote_every=128) < few / 24
        with mutated(Accumulator._cut, "self.fraction_bits", "34"):
            assert worst(fraction_bits=13, aligned_with=reading) < 1e-6


def test_misread_powers_of_two_always():
    """The defaults are as the paper has them, and each choice shows in numbers."""
    recipe = Fp8Recipe()
    assert recipe.activation_scales == "ue8m0"
    assert recipe.gradient_scales == recipe.weight_scales == "float32"
    assert ModelConfig.deepseek_v3().scale_fmt == "float32"
    x = random(256, 256, seed=4)

    def retiled() -> float:
        once = quantized_values(x.clone(), (1, 128), "ue8m0")
        return off(quantize.quantized_values(once.clone(), COLUMN_BLOCK, "ue8m0"), once)

    assert retiled() < 1e-6
    with mutated(block_scale, 'if scale_format == "ue8m0"', 'if scale_format == "never"'):
        with pytest.raises(Exception, match="scale format"):
            quantized_values(x.clone(), (1, 128), "ue8m0")
    with mutated(block_scale, "scale = next_power_of_two(scale)", "pass"):
        assert retiled() > 0.02
    # And a power of two is not free: the first rounding is worse.
    fine, coarse = (
        off(quantized_values(x.clone(), (1, 128), name), x) for name in ("float32", "ue8m0")
    )
    assert coarse > 1.01 * fine


def test_misread_dequantising_restores():
    """Decoded to BF16 a block has no more values than codes, and quantised again the same codes."""
    w = random(128, 128, seed=5)
    q = fp8.quantize_weight(w)
    wide = q.dequantize(torch.bfloat16)
    codes = q.data.view(torch.uint8)
    assert len(wide.float().unique()) == len(q.data.float().unique()) <= 253
    assert len(w.bfloat16().float().unique()) > 1000
    assert torch.equal(fp8.quantize_weight(wide.float()).data.view(torch.uint8), codes)
    # What would look like restored detail: values between the grid's.
    with mutated(
        QuantizedTensor.dequantize,
        "return out",
        "return out + torch.rand_like(out) * self.scale.max()",
    ):
        assert len(q.dequantize(torch.bfloat16).float().unique()) > 253
    assert math.isclose(off(wide, w), off(q.dequantize(), w), rel_tol=0.02)
