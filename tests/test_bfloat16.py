"""Products of bfloat16 numbers come out the same with a processor's units and without."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import TINY

from dsv3 import bfloat16
from dsv3.fp8 import training
from dsv3.grouped import plain_experts
from dsv3.model import Transformer
from dsv3.precision import Precision
from dsv3.recompute import PRODUCTS, recomputed

BF16 = torch.bfloat16
GROUPS, ENDS = 5, (3, 3, 40, 41, 70)  # one group without rows; rows 70 and on are nobody's


@pytest.fixture(params=[True, False], ids=["units", "widened"])
def units(request, monkeypatch) -> bool:
    monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", request.param)
    return request.param


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def check_rounded_once(found: Tensor, exact: Tensor, terms: float) -> None:
    """found is exact (float64), rounded to bfloat16. terms: what a float32 sum may be off by moves
    one value in some hundreds to a neighbour, and none further."""
    assert found.dtype == BF16 and found.shape == exact.shape
    best = exact.to(BF16)
    assert (found != best).sum() <= 0.01 * found.numel()
    step = torch.maximum(best.double().abs() * 2**-7, torch.tensor(2**-20 * terms).double())
    assert ((found.double() - best.double()).abs() <= step).all()


@pytest.mark.parametrize("lead", [(1,), (4,), (5,), (2, 3, 7), (0,), (2, 0)])
def test_linear_rounds_once(units, lead):
    x, w = normal(*lead, 96), normal(40, 96, seed=1)
    check_rounded_once(bfloat16.linear(x, w), x.double() @ w.double().T, 96)


def test_linear_rounds_a_float32_weight_first(units):
    x, w = normal(33, 96), torch.randn(40, 96, generator=torch.Generator().manual_seed(1))
    check_rounded_once(bfloat16.linear(x, w), x.double() @ w.to(BF16).double().T, 96)


def test_a_matrix_without_rows(units):
    assert bfloat16.linear(normal(2, 7, 96), normal(0, 96)).shape == (2, 7, 0)


def test_float32_stays_float32(units):
    x, w = normal(33, 96).float(), normal(40, 96, seed=1).float()
    assert torch.equal(bfloat16.linear(x, w), F.linear(x, w))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_gradients_of_linear(units, needs):
    x, w, grad = normal(6, 11, 96), normal(40, 96, seed=1), normal(6, 11, 40, seed=2)
    x.requires_grad_(needs[0]), w.requires_grad_(needs[1])
    bfloat16.linear(x, w).backward(grad)
    rows = grad.double().flatten(0, 1)
    exact = (
        (rows @ w.double()).view(6, 11, 96).detach(),
        (rows.T @ x.double().flatten(0, 1)).detach(),
    )
    for value, wanted, asked in zip((x, w), exact, needs, strict=True):
        if asked:
            check_rounded_once(value.grad, wanted, 96)
        else:
            assert value.grad is None


def one_by_one(x: Tensor, stack: Tensor) -> Tensor:
    starts = (0, *ENDS[:-1])
    return torch.cat([x[a:b] @ matrix.T for a, b, matrix in zip(starts, ENDS, stack, strict=True)])


def test_groups_have_their_own_matrices_and_gradients(units):
    x, stack = normal(72, 96), normal(GROUPS, 40, 96, seed=1)
    grad = normal(72, 40, seed=2)
    grad[70:] = 0
    wide, wide_stack = x.double().requires_grad_(), stack.double().requires_grad_()
    exact = one_by_one(wide, wide_stack)
    exact.backward(grad[:70].double())
    x.requires_grad_(), stack.requires_grad_()
    y = plain_experts(x, stack, torch.tensor(ENDS))
    y.backward(grad)
    check_rounded_once(y[:70].detach(), exact.detach(), 96)
    check_rounded_once(x.grad[:70], wide.grad[:70], 40)
    check_rounded_once(stack.grad, wide_stack.grad, 40)
    assert (stack.grad[1] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_its_gradients(units, masked):
    q, k, v = (normal(2, 4, 50, 24, seed=seed).requires_grad_() for seed in range(3))
    grad = normal(2, 4, 50, 24, seed=3)
    mask = torch.ones(50, 50, dtype=torch.bool).tril()[None, None] if masked else None
    o = bfloat16.attention(q, k, v, mask, not masked, 0.2)
    o.backward(grad)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*wide, is_causal=True, scale=0.2)
    exact.backward(grad.double())
    assert o.dtype == BF16
    if not units:  # torch's own form rounds the weights of attention too
        check_rounded_once(o.detach(), exact.detach(), 50)
    pairs = [(o.detach(), exact.detach())]
    pairs += [(x.grad, y.grad) for x, y in zip((q, k, v), wide, strict=True)]
    for found, wanted in pairs:
        assert (found.double() - wanted).norm() < (0.01 if units else 0.003) * wanted.norm()


def test_what_waits_for_the_backward_pass_is_not_widened(monkeypatch):
    monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", False)
    kept = []
    x, w = normal(33, 96).requires_grad_(), normal(40, 96, seed=1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        bfloat16.linear(x, w)
    assert sorted(tuple(t.shape) for t in kept) == [(33, 96), (96, 40)]
    assert all(t.dtype == BF16 for t in kept)


def test_recomputation_keeps_the_rounded_product(monkeypatch):
    """What is costly is not computed twice, and what is kept of it is bfloat16."""
    monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", False)
    x, w = normal(33, 96).requires_grad_(), normal(40, 96, seed=1).requires_grad_()
    kinds = []

    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            result = operation(*arguments, **(options or {}))
            if operation in PRODUCTS:
                kinds.append((operation, result.dtype))
            return result

    with Heard():
        y = recomputed(PRODUCTS, lambda x, w: F.silu(bfloat16.linear(x, w)), x, w)
        y.sum().backward()
    assert kinds == [(torch.ops.dsv3.widened_product.default, BF16)] * 3, "one and its two slopes"


@pytest.mark.parametrize("trains", [False, True])
def test_a_model_is_the_same_with_units_and_without(monkeypatch, trains):
    precision = Precision.training("bf16") if trains else Precision.of("bf16", TINY)
    model = Transformer(TINY, precision).init_weights(0)
    text = torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    widened, logits, slopes = [], [], []
    plain = bfloat16.widened_product
    monkeypatch.setattr(
        bfloat16, "widened_product", lambda *args: widened.append(1) or plain(*args)
    )
    for has_units in (True, False):
        monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", has_units)
        assert not widened
        with torch.set_grad_enabled(trains):
            logits.append(model(text))
        if trains:
            model.zero_grad()
            logits[-1].float().logsumexp(-1).sum().backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            slopes.append(torch.cat([grad.flatten() for grad in grads]))
    # Each layer has at least wq_a, wq_b, wkv_a, wo, w1, w2 and w3, one way or another.
    assert len(widened) >= 7 * TINY.num_hidden_layers
    for with_units, without in (logits, slopes)[: 1 + trains]:
        assert (with_units - without).norm() < 0.02 * with_units.norm()


def test_the_slope_of_a_weight_lies_as_the_weight(units):
    x, w = normal(33, 96), normal(40, 96, seed=1).requires_grad_()
    (slope,) = torch.autograd.grad(bfloat16.linear(x, w), w, normal(33, 40, seed=2))
    assert slope.stride() == w.stride()


def test_experts_are_widened_one_by_one(monkeypatch):
    """All at once would be a layer's experts in float32, chosen or not."""
    monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", False)
    monkeypatch.setattr("dsv3.grouped.grouped", lambda *inputs: pytest.fail("all at once"))
    plain_experts(normal(72, 96), normal(GROUPS, 40, 96, seed=1), torch.tensor(ENDS))


@pytest.mark.parametrize(
    "found, expected",
    [
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64"}, False),  # where a sandbox hides the processor
        ({"architecture": "aarch64", "bf16": True}, True),
        ({"architecture": "aarch64", "bf16": False}, False),
        ({}, True),
    ],
)
def test_units_are_what_the_processor_says(found, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert bfloat16._cpu_has_units() is expected


def test_fp8_operands_are_bfloat16_where_that_is_fast(units):
    cpu, operand = torch.device("cpu"), training._operand_dtype
    assert operand(cpu, BF16, "ue8m0", "ue8m0") == (BF16 if units else torch.float32)
    assert operand(cpu, BF16, "ue8m0", "float32") == torch.float32
    assert operand(torch.device("cuda"), BF16, "ue8m0", "ue8m0") == BF16


def test_how_slow_it_is_is_measured_once():
    assert 0.01 < bfloat16.slowdown() < 1000
    assert bfloat16.slowdown() == bfloat16.slowdown()
