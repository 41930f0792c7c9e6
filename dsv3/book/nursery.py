"""A model so small that it learns while you watch, and the text that it learns from.

It is a DeepSeek-V3 of 0.9 million parameters: two layers, the second with 8 experts, and an MTP
module. It reads one scene of Hamlet, over and over, and sums that are made by rule. So it needs
nothing that does not come with the package, and a run of 80 steps takes about 10 seconds. What it
shows is how a run goes, not what a model can learn: one scene is learned by heart.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import tokenizers
import torch
from jaxtyping import Int
from torch import Tensor

from dsv3 import data
from dsv3.book import held_out
from dsv3.config import ModelConfig
from dsv3.data.vocabulary import BOS, EOS
from dsv3.generation.tokenizer import load_tokenizer
from dsv3.training.evaluation import evaluate_domains
from dsv3.training.learner import Learner, first_learner
from dsv3.training.phases import phases_of
from dsv3.training.recipe import Recipe
from dsv3.training.schedules import Switch
from dsv3.training.sharing import Sharing

ROOT = Path(__file__).resolve().parents[2]
SCENE, TOKENIZER = ROOT / "assets/text/hamlet_3_1.txt", ROOT / "assets/dsv3-mini/tokenizer.json"
STEPS, WINDOWS, LENGTH = 80, 16, 64
ONE_TOKEN = 2000  # of a batch that is nothing else: a file of zeros, so to speak
_SUMS = 600  # documents of sums

CONFIG = ModelConfig.mini().but(
    vocab_size=2048,
    hidden_size=96,
    intermediate_size=192,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=64,
    kv_lora_rank=48,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    rope_scaling=None,
    max_position_embeddings=256,
)
RECIPE = Recipe(
    tokens=STEPS * WINDOWS * LENGTH,
    seq_len=LENGTH,
    batch_first=WINDOWS,
    batch_last=WINDOWS,
    learning_rate=6e-3,
    warmup=8,
    extension_tokens=0,
    shares={"plays": 0.5, "arithmetic": 0.5},
    precision="fp32",
)


def phase_of(recipe: Recipe = RECIPE):
    """The run's only phase. The bias steps ten times as fast as in the report: the run is short."""
    (phase,) = phases_of(CONFIG, recipe)
    quick = Switch(before=0.01, after=0.0, until=phase.schedules.bias_speed.until)
    return replace(phase, schedules=replace(phase.schedules, bias_speed=quick))


@cache
def domains() -> tuple[data.Domain, ...]:
    """The scene, and sums; a tenth of the pairs of numbers is held out."""
    scene = BOS + SCENE.read_text(encoding="utf-8") + EOS
    sums = [data.arithmetic_documents(1, held_out=out)[:_SUMS] for out in (False, True)]
    return data.Domain("plays", [scene], []), data.Domain("arithmetic", *sums)


def new_stream(position: int = 0) -> data.Stream:
    """The text of a run from a place on: windows of 64 tokens with 2 more as targets."""
    tokenizer = tokenizers.Tokenizer.from_file(str(TOKENIZER))
    return data.Stream(
        tokenizer,
        list(domains()),
        RECIPE.shares,
        length=LENGTH,
        targets=1 + CONFIG.num_nextn_predict_layers,
        seed=RECIPE.seed,
        position=position,
    )


def new_learner(recipe: Recipe = RECIPE) -> Learner:
    """Model, optimizer, and what watches the routers, before the first step."""
    return first_learner(CONFIG, recipe, Sharing.of(None, zero=False, experts=False))


@cache
def _unread() -> tuple[dict[str, Int[Tensor, "n w"]], Int[Tensor, " vocab"]]:
    """Held-out windows of plays and sums, and the bytes of each token."""
    width = LENGTH + 1 + CONFIG.num_nextn_predict_layers
    windows, domain = held_out.read(load_tokenizer(TOKENIZER.parent), width)
    widths = data.token_bytes(tokenizers.Tokenizer.from_file(str(TOKENIZER)))
    texts = {"plays": windows[domain == 0], "sums": windows[domain == 2]}
    return texts, torch.from_numpy(widths)


def look(learner: Learner) -> dict[str, dict[str, float]]:
    """Figures on text that is never read in training: scenes of other plays, and new sums."""
    figures, _ = evaluate_domains(learner.model, *_unread(), learner.watch)
    return figures


def copied(learner: Learner) -> Learner:
    """Another learner with the same weights, moments and biases, which goes its own way."""
    copy = new_learner()
    copy.model.load_state_dict(learner.model.state_dict())
    copy.optimizer.load_state_dict(deepcopy(learner.optimizer.state_dict()))
    return copy
