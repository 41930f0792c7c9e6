"""Recomputation keeps less and changes nothing."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from training_cases import TINY

from dsv3.layers import RMSNorm
from dsv3.mla import LatentUpProjection
from dsv3.model import Transformer
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.objective import losses, objective

# Windows long enough for the expanded form of attention.
CONFIG = TINY.but(kv_lora_rank=48)


def forward(precision: str, recompute: bool):
    """Loss, model, loads, and whether each norm's and up-projection's output is still held."""
    model = Transformer(CONFIG, Precision.training(precision, recompute=recompute))
    model.init_weights(0)
    held = []

    def remember(module, inputs, outputs):
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        held.extend(StorageWeakRef(output.untyped_storage()) for output in outputs)

    for layer in model.layers:
        for module in layer.modules():
            if isinstance(module, (RMSNorm, LatentUpProjection)):
                module.register_forward_hook(remember)
    watch = RouterWatch(model)
    text = torch.randint(CONFIG.vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))
    loss = objective(*losses(model, text), 0.3) + 1e-2 * watch.sequence_loss()
    return loss, model, watch, [not reference.expired() for reference in held]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_same_gradients_and_loads(precision):
    results = []
    for recompute in (False, True):
        loss, model, watch, _ = forward(precision, recompute)
        loss.backward()
        results.append((loss, dict(model.named_parameters()), watch.load))
    (loss, plain, load), (loss_again, again, load_again) = results
    assert torch.equal(loss, loss_again)
    for name, weight in plain.items():
        if weight.requires_grad:
            assert torch.equal(weight.grad, again[name].grad), name
    assert all(torch.equal(load[name], load_again[name]) for name in load)


def test_outputs_of_norms_and_up_projections_are_not_kept():
    loss, _, _, held = forward("fp32", recompute=False)
    # In each layer attn_norm, q_norm, keys, ffn_norm; kv_norm's and the values are copied at once.
    assert sum(held) >= 2 * 4 and loss.requires_grad
    loss, _, _, held = forward("fp32", recompute=True)
    assert not any(held) and loss.requires_grad
