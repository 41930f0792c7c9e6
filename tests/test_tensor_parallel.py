"""Several ranks against one, on random weights in the released FP8 layout.

In float32 the logits agree within 1e-5 of the largest. In FP8 on a CPU they agree far closer
than one rounding of bfloat16, so that no token can differ: sums are whole before they are rounded.
"""

import numpy as np
import pytest
import torch
from ranks import run_ranks

from dsv3 import ModelConfig, Transformer, load_model
from dsv3.checkpoint.saving import save_model
from dsv3.config import QuantizationConfig, YarnScaling
from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup

pytestmark = pytest.mark.slow

# Sizes whose FP8 blocks can be cut over 4 ranks, with a last block of 64 rows in wkv_a.
CONFIG = ModelConfig.mini().but(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=512,
    moe_intermediate_size=512,
    num_hidden_layers=3,
    first_k_dense_replace=1,
    num_attention_heads=8,
    qk_rope_head_dim=64,
    n_routed_experts=8,
    num_experts_per_tok=3,
    rope_scaling=YarnScaling(
        factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0
    ),
    max_position_embeddings=64,
    initializer_range=0.08,
    quantization_config=QuantizationConfig(scale_fmt="ue8m0"),
)


BOUNDS = {"fp32": 1e-5, "fp8": 1e-6}  # of the largest logit


@pytest.fixture(scope="module", params=["compressed queries", "plain queries"])
def folder(request, tmp_path_factory):
    config = CONFIG if request.param == "compressed queries" else CONFIG.but(q_lora_rank=None)
    model = Transformer(config).init_weights(1)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if name.endswith("gate.bias"):
                weight.normal_(-3.0, 0.5, generator=torch.Generator().manual_seed(2))
    path = tmp_path_factory.mktemp("parallel")
    save_model(model, path)
    return path


def text(rows: int, length: int) -> torch.Tensor:
    return torch.randint(
        CONFIG.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5)
    )


@torch.inference_mode()
def answers(group: TensorGroup, folder) -> dict:
    """Everything one model can be asked, as arrays, by precision: full, ragged, cached, MTP."""
    found = {}
    for precision in BOUNDS:
        model = load_model(folder, precision=precision, group=group)
        tokens, before = text(2, 40), group.bytes_sent
        full, hidden = model(tokens, return_hidden=True)
        cache = model.new_cache(2, 60)
        ragged = model(tokens[:, :30], cache=cache, lengths=[30, 11], last_only=True)
        steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(30, 40)]
        sent = group.bytes_sent - before
        draft, _ = model.mtp_logits(hidden[:, :-1], tokens[:, 1:])
        found[precision] = {
            "full": full.numpy(),
            "ragged": ragged.numpy(),
            "sent": sent,
            "steps": torch.cat(steps, 1).numpy(),
            "draft": draft.numpy(),
        }
    return found


def gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(folder, ranks):
    # fact 52
    alone = answers(TensorGroup.single(), folder)
    together = run_ranks(answers, ranks, folder)
    for precision, bound in BOUNDS.items():
        for name in ("full", "ragged", "steps", "draft"):
            wanted = alone[precision][name]
            first = together[0][precision][name]
            assert gap(first, wanted) < bound, (precision, name)
            assert (first.argmax(-1) == wanted.argmax(-1)).all(), (precision, name)
            assert all((found[precision][name] == first).all() for found in together), (
                "ranks that see different logits choose different tokens"
            )
    check_bytes(together[0]["fp32"]["sent"], ranks)


def check_bytes(sent: int, ranks: int) -> None:
    """By the ring algorithms: per token one sum for the embedding and two a layer, each
    2 (N-1)/N * hidden_size * 4 bytes; and N-1 times my part of the logits that were asked for."""
    sums = 1 + 2 * CONFIG.num_hidden_layers
    positions, asked = 80 + 60 + 20, 80 + 2 + 20
    assert sent == (
        positions * sums * CONFIG.hidden_size * 4 * 2 * (ranks - 1) // ranks
        + asked * CONFIG.vocab_size // ranks * (ranks - 1) * 4
    )


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(num_attention_heads=6), "num_attention_heads"),
        (dict(vocab_size=254), "vocab_size"),
        (dict(n_routed_experts=6, n_group=1, topk_group=1), "n_routed_experts"),
        (dict(intermediate_size=514), "intermediate_size"),
    ],
)
def test_sizes_that_do_not_divide_are_named(changes, named):
    with pytest.raises(DSV3Error, match=named):
        Transformer(CONFIG.but(**changes), group=TensorGroup(rank=1, size=4, device="meta"))
