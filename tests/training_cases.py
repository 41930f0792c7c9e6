"""What the tests of training share: a tiny model, a short recipe, and little text to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3 import data
from dsv3.config import ModelConfig, QuantizationConfig, YarnScaling
from dsv3.data import arithmetic, stream
from dsv3.training import Recipe, Run
from dsv3.training import run as run_module

# Every mechanism is there, YaRN included; only the sizes are small.
TINY = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=1,
    max_position_embeddings=128,
    quantization_config=QuantizationConfig(),
    rope_scaling=YarnScaling(
        factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0
    ),
)
ROUTERS = ["layers.1.ffn.gate", "mtp.0.ffn.gate"]

# The first step has 2 windows, all others 4: tokens read after each of the six steps of phase one
# are 32, 96, ..., 352. The second phase has one window of 64 a step, up to 416, 480 and 544.
RECIPE = Recipe(
    tokens=300,
    seq_len=16,
    batch_first=2,
    batch_last=4,
    micro_batch=32,
    learning_rate=5e-3,
    warmup=2,
    init_by_width=False,
    extension_tokens=200,
    extension_seq_len=64,
    extension_batch=1,
    extension_rate=1e-3,
    precision="fp32",
    log_every=1,
    eval_every=4,
    eval_windows=2,
    save_minutes=0.0,
)
POSITIONS = [32, 96, 160, 224, 288, 352, 416, 480, 544]


def window(rows: int = 4, length: int = 18, seed: int = 0) -> torch.Tensor:
    """Random tokens of TINY's vocabulary."""
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(seed))


def write_texts(folder: Path) -> dict[str, Path]:
    """Folders of a few small plays and modules, as the options ``plays`` and ``code`` take them."""
    texts = {"plays": folder / "plays", "code": folder / "code"}
    words = "sweet prince good night and flights of angels sing thee to thy rest my lord".split()
    order = np.random.default_rng(0)
    for place in texts.values():
        place.mkdir()
    for name in ("a", "b", *data.HELD_OUT):
        speeches = [
            f"**{'XYZ'[i % 3]}**  \n{' '.join(order.choice(words, 8))}.  \n" for i in range(30)
        ]
        (texts["plays"] / f"{name}.md").write_text(
            f"# {name}\n\n## ACT I\n\n### SCENE I. Here.\n\n" + "\n".join(speeches),
            encoding="utf-8",
        )
    for name in ("first", "second", "heapq"):
        (texts["code"] / f"{name}.py").write_text(
            "\n\n".join(
                f"def {name}_{i}(x):\n    return x * {i} + {order.integers(100)}\n"
                for i in range(20)
            ),
            encoding="utf-8",
        )
    return texts


def little_text(setattr=setattr) -> None:
    """Make arithmetic and shuffle as small; setattr: a monkeypatch's, to have it undone."""
    setattr(arithmetic, "TRAIN_CHARACTERS", 6000)
    setattr(arithmetic, "HELD_OUT_CHARACTERS", 1500)
    setattr(stream, "_SHUFFLED", 1024)


# Fixtures: a module of tests that trains names them (``texts = training_cases.texts``).


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Where the little text lies, as the options of a run."""
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def little(monkeypatch, as_in_use) -> None:
    """Runs as they are in use, on little text."""
    little_text(monkeypatch.setattr)


class Killed(Exception):
    """The end of a run that ``stop_at`` has stopped."""


def stop_at(run: Run, step: int, saved: int = 1000) -> None:
    """Go on until so many steps are made; the last checkpoint is of step ``saved`` at most."""
    save, values = run.save, run_module.step_values

    def dying(phase, recipe, position):
        if position.step == step:
            raise Killed
        return values(phase, recipe, position)

    run.save = lambda: save() if run.position.step <= saved else None
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module, "step_values", dying)
        run.go()
