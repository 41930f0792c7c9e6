"""Tiles against blocks in dgrad: held to float64 and a backward pass of the test's own."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from training_cases import TINY

from dsv3.fp8 import Fp8Recipe, quantize_weight
from dsv3.model import Transformer
from dsv3.precision import Fp8Training
from dsv3.training.experiments.gradients import (
    GradientError,
    embedding_errors,
    gradient_errors,
    row_errors,
    times_smaller,
)
from dsv3.training.objective import losses

# More than 128 channels and 128 tokens, and multiples of neither; an expert has fewer tokens. With
# so long a latent, attention expands its keys.
CONFIG = TINY.but(
    hidden_size=160,
    moe_intermediate_size=144,
    kv_lora_rank=48,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
)
FLOAT32 = Fp8Training(name="fp8", dtype=torch.float32, weights=torch.float32)
SHAPES = {"tile": (1, 128), "block": (128, 128)}


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(CONFIG)
    model.init_weights(0, embedding_std=0.3, by_width=True)
    return model


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (3, 66), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def found(model, batch) -> list[GradientError]:
    return gradient_errors(model, batch)


def rounded(x: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """There and back in float64: block by block, with torch's cast."""
    out = x.double().clone()
    for r in range(0, x.shape[0], rows):
        for c in range(0, x.shape[1], cols):
            part = x[r : r + rows, c : c + cols].float()
            scale = (part.abs().max() / 448).clamp(min=1e-30)
            codes = (part / scale).to(torch.float8_e4m3fn)
            out[r : r + rows, c : c + cols] = codes.double() * scale.double()
    return out


def by_hand(dy: torch.Tensor, w: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Length of each row of dx, and of its error."""
    w, rough = rounded(w, 128, 128), rounded(dy, *SHAPES[form])
    return (dy.double() @ w).norm(dim=1), ((rough - dy.double()) @ w).norm(dim=1)


def heard_above(model: Transformer, batch: torch.Tensor, mtp: bool):
    """The last feed-forward before a loss, the gradient of what it gives, and its routing. Nothing
    is in FP8 between it and its loss, so an ordinary FP8 backward pass has the same dy there."""
    usual = Transformer(CONFIG, FLOAT32)
    usual.load_state_dict(model.state_dict())
    moe, heard = (usual.mtp[0] if mtp else usual.layers[-1]).ffn, {}
    moe.register_full_backward_hook(lambda module, dx, dy: heard.update(dy=dy[0].flatten(0, 1)))
    moe.gate.register_forward_hook(lambda module, given, told: heard.update(routed=told[:2]))
    main, extra = losses(usual, batch)
    (main + 0.7 * extra[0] if mtp else main).backward()
    return moe, heard["dy"], [x.detach().flatten(0, 1) for x in heard["routed"]]


@pytest.mark.parametrize("mtp", [True, False], ids=["mtp", "main"])
def test_errors_of_a_product_are_those_taken_by_hand(model, batch, mtp):
    """In float64; experts one by one, each with blocks of its own rows."""
    found = {one.name: one for one in gradient_errors(model, batch, mtp_weight=0.7 * mtp)}
    assert any(name.startswith("mtp") for name in found) == mtp, "none is told that learns nothing"
    where = "mtp.0.ffn" if mtp else "layers.1.ffn"
    moe, dy, (weights, chosen) = heard_above(model, batch, mtp)
    parts = []
    for expert in range(CONFIG.n_routed_experts):
        token, choice = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            rows = weights[token, choice, None] * dy[token]
            parts.append((rows, moe.experts.w2[expert].detach()))
    for name, some in (
        (f"{where}.shared_experts.w2", [(dy, moe.shared_experts.w2.weight.detach())]),
        (f"{where}.experts.w2", parts),
    ):
        assert found[name].tokens == sum(len(rows) for rows, _ in some)
        for form in SHAPES:
            sizes, off = map(torch.cat, zip(*(by_hand(*part, form) for part in some)))
            harm = getattr(found[name], form)
            assert harm.whole == pytest.approx(float(off.norm() / sizes.norm()), rel=1e-3)
            assert harm.token == pytest.approx(float((off / sizes).mean()), rel=1e-3)


def test_products_are_told_in_order(model, found):
    names = [one.name for one in found]
    order = [name.removesuffix(".weight") for name, _ in model.named_parameters()]
    assert names == [name for name in order if name in names]
    assert {"layers.0.attn.wq_a", "layers.0.attn.wkv_b", "layers.1.ffn.experts.w13"} <= set(names)
    assert not any(name.endswith(("gate", "eh_proj", "embed", "head", "norm")) for name in names)


def test_with_scales_of_powers_of_two_both_forms_round_alike(model, batch, found):
    """Then a scale moves only the exponent, and what is left is what falls below E4M3's range. With
    scales of any size the largest number of every tile is exact, and blocks lose a little more."""
    powers = gradient_errors(model, batch, recipe=Fp8Recipe(gradient_scales="ue8m0"))
    for one in powers:
        assert one.block.whole == pytest.approx(one.tile.whole, rel=1e-3)
    assert max(one.block.whole / one.tile.whole for one in found) > 1.1


@dataclass(frozen=True, kw_only=True)
class StraightThrough(Fp8Training):
    """The forward numbers of FP8, and autograd's own way back."""

    def rounded(self, x, matrix):
        rows = x.detach().reshape(-1, x.shape[-1])
        codes = rounded_powers(rows).view_as(x)
        return F.linear(x + (codes - x).detach(), quantize_weight(matrix).dequantize())

    def from_latent(self, latent, weight):
        return self.rounded(latent, weight)


def rounded_powers(x: torch.Tensor) -> torch.Tensor:
    """Tiles of 1 x 128 with the next power of two as scale."""
    out = x.clone()
    for part in out.split(128, 1):
        scale = 2.0 ** (part.abs().amax(1, keepdim=True) / 448).clamp(min=1e-30).log2().ceil()
        part.copy_((part / scale).to(torch.float8_e4m3fn).float() * scale)
    return out


def test_errors_at_the_embedding_are_against_an_unrounded_way_back(model, batch):
    def gradient(precision):
        reader = Transformer(CONFIG, precision)
        reader.load_state_dict(model.state_dict())
        main, extra = losses(reader, batch)
        return torch.autograd.grad(main + 0.3 * extra[0], reader.embed.weight)[0]

    wanted = gradient(StraightThrough(name="fp8", dtype=torch.float32, weights=torch.float32))
    found = embedding_errors(model, batch)
    for form in SHAPES:
        off = gradient(replace(FLOAT32, recipe=Fp8Recipe(gradients=form))) - wanted
        assert found[form].whole == pytest.approx(float(off.norm() / wanted.norm()), rel=1e-3)
    assert found["tile"].whole != found["block"].whole


# Planted gradients -------------------------------------------------------------------------------


def planted(dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """Relative error of every row of dx."""
    random = torch.Generator().manual_seed(1)
    wq = quantize_weight(torch.randn(dy.shape[1], 96, generator=random))
    dx = dy @ wq.dequantize()
    return {
        form: off / dx.norm(dim=1) for form, off in zip(SHAPES, row_errors(dy, wq, dx), strict=True)
    }


def test_one_large_row_in_a_block_costs_the_others_their_digits():
    dy = torch.randn(256, 200, generator=torch.Generator().manual_seed(0))
    dy[5] *= 2.0**17
    errors, others = planted(dy), torch.arange(256).ne(5) & (torch.arange(256) < 128)
    assert errors["tile"].max() < 0.04
    assert errors["block"][others].min() > 0.2
    assert errors["block"][5] < 0.04 and errors["block"][128:].max() < 0.04


def test_rows_of_equal_size_lose_alike():
    """Rows with the same largest value have the scale of their block already."""
    row = torch.randn(128, generator=torch.Generator().manual_seed(0))
    dy = torch.stack([row.roll(shift) for shift in range(128)])
    errors = planted(dy)
    assert torch.equal(errors["tile"], errors["block"]) and errors["tile"].min() > 0.005


def test_how_many_times_a_row_is_smaller_than_its_block():
    dy = torch.zeros(130, 130)
    dy[0, 3], dy[1, 127], dy[2, 0] = -8.0, 2.0, 0.5  # the first block
    dy[128, 5], dy[129, 6] = 3.0, -1.0  # the block below
    dy[0, 129], dy[1, 128] = 1.0, 4.0  # and the one beside
    assert sorted(times_smaller(dy).tolist()) == [1, 1, 1, 3, 4, 4, 16]
