"""Our MTP module against transformers' own, on a checkpoint that both read from disk.

transformers reads the folder by itself, names included, and drafts with ``generate(use_mtp=True)``.
Its class lists layer 61 as the only place of MTP weights, the released model's; the tests point it
at layer ``num_hidden_layers`` of a small one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from test_diff import CONFIG as BASE
from test_diff import save_random

from dsv3.checkpoint.loading import load_model
from dsv3.config import YarnScaling
from dsv3.generation.loop import complete

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")
CONFIG = BASE.but(
    num_nextn_predict_layers=1,
    rope_scaling=YarnScaling(
        factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=1.0
    ),
)
TOKENS = torch.randint(CONFIG.vocab_size, (2, 50), generator=torch.Generator().manual_seed(3))
BOUND = 2e-5


def follow_the_last_word(model) -> None:
    """Let words depend mostly on the word before, so that some drafts are right."""
    size = CONFIG.hidden_size
    model.embed.weight.mul_(25.0)
    model.mtp[0].eh_proj.weight[:, :size].add_(20 * torch.eye(size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    save_random(folder, CONFIG, follow_the_last_word)
    return folder


@pytest.fixture
def main(folder, monkeypatch):
    """transformers' model, able to find the MTP layer."""
    kind = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(
        kind,
        "_keys_to_ignore_on_load_unexpected",
        [rf"model\.layers\.{CONFIG.num_hidden_layers}.*"],
    )
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def module(main):
    from transformers.modeling_layers import MtpModel

    return MtpModel.from_pretrained(main).eval()


def new_cache(module):
    from transformers.cache_utils import MtpCache

    return MtpCache(config=module.config)


@torch.inference_mode()
def their_logits(main, module, hidden, tokens, cache, first: int) -> torch.Tensor:
    """tokens (b, s) are those at positions ``first`` and on; hidden, the states before each."""
    positions = torch.arange(first, first + tokens.shape[1])[None]
    states = module.forward_layer(0, hidden, positions, cache, input_ids=tokens)
    return main.lm_head(states)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.inference_mode()
def test_logits_of_a_whole_text(folder, main, module):
    # eq. 21-23
    ours = load_model(folder, "fp32")
    _, hidden = ours(TOKENS, return_hidden=True)
    states = main.model(TOKENS).last_hidden_state
    assert gap(hidden, states) < BOUND
    logits, _ = ours.mtp_logits(hidden[:, :-1], TOKENS[:, 1:])
    wanted = their_logits(main, module, states[:, :-1], TOKENS[:, 1:], new_cache(module), 1)
    assert gap(logits, wanted) < BOUND
    assert gap(ours(TOKENS)[:, :-1], wanted) > 0.1, "the module must not repeat the model"


@torch.inference_mode()
@pytest.mark.parametrize("cuts", [[0, 30, 31, 33, 34, 49], [0, 1, 2, 49], [0, 49]])
def test_logits_in_pieces_over_a_cache(folder, main, module, cuts):
    """As in drafting: many positions at once, then one or two at a time."""
    ours = load_model(folder, "fp32")
    _, hidden = ours(TOKENS, return_hidden=True)
    states = main.model(TOKENS).last_hidden_state
    cache, their_cache = ours.new_draft_cache(2, 50), new_cache(module)
    whole = their_logits(main, module, states[:, :-1], TOKENS[:, 1:], new_cache(module), 1)
    for a, b in itertools.pairwise(cuts):
        logits, _ = ours.mtp_logits(hidden[:, a:b], TOKENS[:, a + 1 : b + 1], cache=cache)
        wanted = their_logits(
            main, module, states[:, a:b], TOKENS[:, a + 1 : b + 1], their_cache, a + 1
        )
        assert gap(logits, wanted) < BOUND
        assert gap(logits, whole[:, a:b]) < BOUND
    assert cache.lengths == [49, 49]


@torch.inference_mode()
def test_ragged_rows_over_a_cache(folder, main, module):
    ours = load_model(folder, "fp32")
    _, hidden = ours(TOKENS, return_hidden=True)
    states = main.model(TOKENS).last_hidden_state
    whole = their_logits(main, module, states[:, :-1], TOKENS[:, 1:], new_cache(module), 1)
    cache = ours.new_draft_cache(2, 50)
    ours.mtp_logits(hidden[:, :20], TOKENS[:, 1:21], cache=cache, lengths=[20, 7])
    pieces = [(20, 2), (7, 1)]  # where each row goes on, and by how much
    inputs = [
        torch.stack([x[row, at : at + 2] for row, (at, _) in enumerate(pieces)])
        for x in (hidden, TOKENS[:, 1:])
    ]
    logits, _ = ours.mtp_logits(*inputs, cache=cache, lengths=[2, 1])
    for row, (at, count) in enumerate(pieces):
        assert gap(logits[row, :count], whole[row, at : at + count]) < BOUND


@torch.inference_mode()
def test_speculative_text_equals_their_speculative_text(folder, main):
    prompt = TOKENS[:1, :9]
    wanted = main.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=100,
        do_sample=False,
        use_mtp=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    run = complete(
        load_model(folder, "fp32"), prompt.tolist(), max_new_tokens=100, speculative=True
    )
    assert run.ids[0] == wanted[0, 9:].tolist()
    assert 0.1 < run.acceptance < 0.9 and len(set(run.ids[0])) > 8
