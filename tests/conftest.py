"""Set-up for all tests."""

import os
import signal
from pathlib import Path

import jaxtyping
import pytest
import torch

# Modules whose annotations say the shapes of tensors. Every test run checks them at every call:
# the hook rewrites these modules when they are imported, so it must come before any of dsv3.
SHAPED = [
    "dsv3.rope",
    "dsv3.grouped",
    "dsv3.precision",
    "dsv3.layers",
    "dsv3.parallel.collectives",
    "dsv3.parallel.data",
    "dsv3.parallel.experts",
    "dsv3.attention",
    "dsv3.cache",
    "dsv3.mla",
    "dsv3.moe",
    "dsv3.bfloat16",
    "dsv3.plain",
    "dsv3.block",
    "dsv3.mtp",
    "dsv3.model",
    "dsv3.generation.sampling",
    "dsv3.generation.speculative",
    "dsv3.fp8.accumulation",
    "dsv3.fp8.experts",
    "dsv3.fp8.formats",
    "dsv3.fp8.latent",
    "dsv3.fp8.product",
    "dsv3.fp8.quantize",
    "dsv3.fp8.training",
    "dsv3.data",
    "dsv3.compiling",
    "dsv3.training",
    "dsv3.bench",
    "dsv3.book.held_out",
    "dsv3.book.nursery",
    "dsv3.viz.drafted",
    "dsv3.viz.specimen",
    "dsv3.viz.widgets",
]
jaxtyping.install_import_hook(SHAPED, "annotations.check")

# A shell starts what runs in the background with Ctrl-C ignored, nohup ignores that a terminal has
# gone, and processes pass both on to those they start. Tests that send them would wait in vain.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)

# The models here are too small for two threads to help, and on busy cores threads that wait for
# each other take many times as long.
torch.set_num_threads(1)

# Triton reads this when a kernel is decorated. Without a GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def without_numba(monkeypatch):
    """FP8 on a CPU by torch's operations, as where Numba is not installed."""
    monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: False)


@pytest.fixture
def as_in_use(monkeypatch) -> None:
    """No checks of annotations: what the package itself says to a wrong tensor is the subject."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def browser():
    """Chromium. Without one the test is skipped, except where DSV3_NEED_BROWSER is set (as
    .ci/run does): there a missing browser is a failure."""
    from lab import open_browser

    from dsv3.commands import doctor

    if doctor.browser() is None:
        reason = f"no browser found, looked for {', '.join(doctor.BROWSERS)}"
        (pytest.fail if os.environ.get("DSV3_NEED_BROWSER") else pytest.skip)(reason)
    with open_browser() as chromium:
        yield chromium


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A random model with its own tokenizer, in the released layout, in FP8, under 2 MB.

    Every mechanism of the large model is in it, sizes cut over 1 and 2 ranks, and its embedding
    has 84 rows that are no tokens.
    """
    from dsv3.checkpoint.saving import save_model
    from dsv3.config import ModelConfig
    from dsv3.data import save_tokenizer, train_tokenizer
    from dsv3.model import Transformer

    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    config = ModelConfig.mini().but(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        qk_rope_head_dim=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )
    text = "In byte-level text every word, çédille and emoji 😀 is bytes; frequent ones merge. "
    save_tokenizer(
        train_tokenizer([text + str(number) for number in range(100)], 300),
        folder,
        config.max_position_embeddings,
    )
    save_model(Transformer(config).init_weights(0), folder)
    return folder
