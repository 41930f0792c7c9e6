"""AdamW whose moments rest in float32 or in bfloat16 (TR 3.3.3)."""

import pytest
import torch
from torch import nn
from training_cases import TINY

from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.training.optimizer import MOMENTS, AdamW, make_optimizer

OPTIONS = dict(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-8)
SHAPES = [(7, 5), (33,), (2, 3, 4)]


def weights() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=random)) for shape in SHAPES]


def gradients(step: int) -> list[torch.Tensor]:
    """Of very different sizes, as in a model: from 1e-6 to 10."""
    random = torch.Generator().manual_seed(100 + step)
    return [
        torch.randn(shape, generator=random) * 10.0 ** torch.randint(-6, 2, shape, generator=random)
        for shape in SHAPES
    ]


def run(optimizer: torch.optim.Optimizer, steps: int) -> list[torch.Tensor]:
    """Weights after some steps whose rate changes."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = OPTIONS["lr"] * (1 + step % 3)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def by_hand(steps: int, moments: torch.dtype, math: torch.dtype) -> list[torch.Tensor]:
    """Decoupled weight decay (Loshchilov and Hutter, algorithm 2); moments are kept in ``moments``
    between steps, everything else is computed in ``math``.
    """
    beta1, beta2 = OPTIONS["betas"]
    result = []
    for number, weight in enumerate(weights()):
        w = weight.detach().to(math)
        m, v = torch.zeros_like(w, dtype=moments), torch.zeros_like(w, dtype=moments)
        for step in range(steps):
            lr, g = OPTIONS["lr"] * (1 + step % 3), gradients(step)[number].to(math)
            w = w * (1 - lr * OPTIONS["weight_decay"])
            wide_m = beta1 * m.to(math) + (1 - beta1) * g
            wide_v = beta2 * v.to(math) + (1 - beta2) * g * g
            m_hat = wide_m / (1 - beta1 ** (step + 1))
            v_hat = wide_v / (1 - beta2 ** (step + 1))
            w = w - lr * m_hat / (v_hat.sqrt() + OPTIONS["eps"])
            m, v = wide_m.to(moments), wide_v.to(moments)
        result.append((w, m, v))
    return result


def test_float32_moments_are_torchs_adamw_bit_for_bit():
    ours = run(AdamW([{"params": weights()}], moments="fp32", **OPTIONS), 20)
    theirs = run(torch.optim.AdamW(weights(), fused=True, **OPTIONS), 20)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("moments, kept", [("fp32", torch.float64), ("bf16", torch.bfloat16)])
def test_update_is_the_formula(moments, kept):
    optimizer = AdamW([{"params": weights()}], moments=moments, **OPTIONS)
    for ours, (w, _m, _v) in zip(run(optimizer, 3), by_hand(3, kept, torch.float64)):
        torch.testing.assert_close(ours.double(), w, rtol=2e-5, atol=1e-7)


def test_bfloat16_moments_are_rounded_once_a_step_and_nothing_else_is():
    """Against a loop in float32. A moment may lie on the other side of a rounding: one step apart
    of bfloat16, 2^-7 of itself, in few places.
    """
    optimizer = AdamW([{"params": weights()}], moments="bf16", **OPTIONS)
    parameters = optimizer.param_groups[0]["params"]
    run(optimizer, 12)
    apart = count = 0
    for weight, (w, *moments) in zip(parameters, by_hand(12, torch.bfloat16, torch.float32)):
        torch.testing.assert_close(weight.detach(), w, rtol=1e-4, atol=1e-5)
        for name, moment in zip(MOMENTS, moments):
            ours = optimizer.state[weight][name]
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours, moment, rtol=2**-7, atol=0)
            apart += int((ours != moment).sum())
            count += moment.numel()
        assert weight.dtype == torch.float32 and optimizer.state[weight]["step"] == 12
    assert apart <= 0.02 * count


def test_bfloat16_moments_stay_near_float32():
    """50 steps: weights move by about 0.2 each; the formats differ by 1 percent of that at most."""
    # fact 41
    start = weights()
    narrow, wide = (
        run(AdamW([{"params": weights()}], moments=moments, **OPTIONS), 50)
        for moments in ("bf16", "fp32")
    )
    for a, b, first in zip(narrow, wide, start):
        assert 0 < (a - b).norm() < 0.01 * (b - first.detach()).norm()


def test_a_weight_without_a_gradient_is_left_alone():
    for moments in ("fp32", "bf16"):
        first, second = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
        optimizer = AdamW([{"params": [first, second]}], moments=moments, **OPTIONS)
        first.grad = torch.ones(3, 3)
        optimizer.step()
        assert first.ne(1).all() and second.eq(1).all() and not optimizer.state[second]


def test_decay_is_for_matrices():
    model = Transformer(TINY).init_weights(0)
    groups = make_optimizer(model, weight_decay=0.1).param_groups
    decayed = {id(v) for v in groups[0]["params"]}
    assert groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0
    for name, value in model.named_parameters():
        assert (id(value) in decayed) == ("norm" not in name and not name.endswith("bias")), name
    everything = [v for group in groups for v in group["params"]]
    assert len(everything) == len(list(model.parameters()))
    biases = [v for name, v in model.named_buffers() if name.endswith("gate.bias")]
    assert len(biases) == 2 and not {id(v) for v in biases} & {id(v) for v in everything}


def test_unknown_moments_are_refused():
    with pytest.raises(DSV3Error, match="fp32 or bf16"):
        make_optimizer(Transformer(TINY), moments="fp16")
