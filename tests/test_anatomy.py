"""What parts are worth: the right weights are zeroed, and all is as before afterwards."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_cases import TINY, window

from dsv3 import data
from dsv3.book.probe import attention_maps
from dsv3.checkpoint import load_model, save_model
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.training import anatomy

SIZES = TINY.but(rope_scaling=None)
KEYS, RANK = TINY.qk_nope_head_dim, TINY.kv_lora_rank


def zero(part: str, name: str, weight: torch.Tensor) -> None:
    """Set by the released name what a part is, without the module under test."""
    heads = weight.view(TINY.num_attention_heads, -1, RANK) if "wkv_b" in name else None
    main = name.startswith("layers")
    if part == "W^UK" and main and heads is not None:
        heads[:, :KEYS] = 0
    if part == "W^UV" and main and heads is not None:
        heads[:, KEYS:] = 0
    if part == "W^KR" and main and "wkv_a" in name:
        weight[RANK:] = 0
    if part == "shared expert" and main and "shared_experts.w2" in name:
        weight[:] = 0
    if part == "routed experts" and main and ".experts.w2" in name:
        weight[:] = 0
    if part == "MTP attention" and name.startswith("mtp") and "attn.wo" in name:
        weight[:] = 0


@pytest.mark.parametrize("part", anatomy.PARTS)
def test_a_part_is_zeroed_and_comes_back(part):
    model, tokens = Transformer(SIZES).init_weights(0, 0.3, by_width=True), window(3)
    other = Transformer(SIZES).init_weights(0, 0.3, by_width=True)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            zero(part, name, weight)
    ahead = part.startswith("MTP")
    whole, less = (anatomy.token_losses(each, tokens, ahead) for each in (model, other))
    assert not torch.allclose(whole, less)
    with anatomy.without(model, part):
        assert torch.equal(anatomy.token_losses(model, tokens, ahead), less)
    assert torch.equal(anatomy.token_losses(model, tokens, ahead), whole)
    found = anatomy.cost_without(model, {"text": tokens}, [part])[part]["text"]
    cost = (less - whole).mean(1)
    assert found.mean == pytest.approx(float(cost.mean()), abs=1e-6) and found.count == 3
    assert found.deviation == pytest.approx(float(cost.std()), abs=1e-6)


@pytest.mark.parametrize("part", anatomy.PARTS)
def test_parts_of_a_model_in_fp8(part, tmp_path):
    save_model(Transformer(SIZES).init_weights(0, 0.3, by_width=True), tmp_path)
    model, tokens = load_model(tmp_path, precision="fp8"), window(2)
    ahead = part.startswith("MTP")
    whole = anatomy.token_losses(model, tokens, ahead)
    with anatomy.without(model, part):
        assert not torch.allclose(anatomy.token_losses(model, tokens, ahead), whole)
    assert torch.equal(anatomy.token_losses(model, tokens, ahead), whole)


def test_what_is_no_part_is_refused():
    with pytest.raises(DSV3Error, match="no such part"), anatomy.without(Transformer(SIZES), "W^X"):
        pass


def test_losses_are_of_the_next_token_and_of_the_one_after_it():
    model, tokens = Transformer(SIZES).init_weights(0), window(5)
    losses = anatomy.token_losses(model, tokens, batch_size=2)
    log_p = model(tokens)[:, :-1].log_softmax(-1)
    assert torch.allclose(losses, -log_p.gather(-1, tokens[:, 1:, None])[..., 0], atol=1e-5)
    hidden = model(tokens, return_hidden=True)[1][:, :-2]
    log_p = model.mtp_logits(hidden, tokens[:, 1:-1])[0].log_softmax(-1)
    assert torch.allclose(
        anatomy.token_losses(model, tokens, ahead=True),
        -log_p.gather(-1, tokens[:, 2:, None])[..., 0],
        atol=1e-5,
    )


class Copier(Transformer):
    """Knows nothing of a first copy and that it comes again, and then what stood a copy before."""

    device = torch.device("cpu")

    def __init__(self, length: int):
        torch.nn.Module.__init__(self)
        self.length = length

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 320)
        logits[:, self.length + 1 :] = 9.0 * F.one_hot(tokens[:, 2 : 1 - self.length], 320)
        return logits


def test_the_second_copy_is_cheap_for_who_copies():
    passage = window(6, 20)
    twice = torch.cat([torch.zeros(6, 1, dtype=torch.int64), passage, passage], 1)
    found = anatomy.two_copies(Copier(20), twice)
    assert found["first"].mean == pytest.approx(np.log(320), abs=1e-5)
    assert found["second"].mean == pytest.approx(np.log(1 + 319 * np.exp(-9)), abs=1e-5)
    assert found["ratio"].mean < 0.01 and found["first"].count == 6


def test_passages_stand_twice_behind_the_begin_token(tokenizer):
    ids = np.arange(1000) % 250
    twice = anatomy.passages_twice(tokenizer, ids, 40, 7)
    assert twice.shape == (7, 81) and (twice[:, 0] == tokenizer.token_to_id(data.BOS)).all()
    assert torch.equal(twice[:, 1:41], twice[:, 41:]) and len(set(twice[:, 1].tolist())) == 7
    with pytest.raises(DSV3Error, match="too short"):
        anatomy.passages_twice(tokenizer, ids[:30], 40, 1)


@torch.inference_mode()
def test_induction_is_attention_to_the_token_behind_the_earlier_copy():
    model, passage = Transformer(SIZES).init_weights(0, 0.3, by_width=True), window(3, 10)
    twice = torch.cat([torch.ones(3, 1, dtype=torch.int64), passage, passage], 1)
    expected = torch.zeros(2, 2)
    for row in twice:
        maps = attention_maps(model, row[None])
        for place in range(11, 20):  # its earlier copy is at place - 10
            assert row[place] == row[place - 10]
            expected += maps[:, :, place, place - 10 + 1] / 9 / 3
    assert torch.allclose(anatomy.induction_scores(model, twice), expected, atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(["The cat sat. What is the name of it? In Rome.\n"] * 3, 285)


def test_a_fact_is_asked_for_at_its_distance(tokenizer):
    rng = np.random.default_rng(0)
    filler = ["All the world's a stage,", "And all the men and women merely players;"]
    for distance in (200, 400):
        for _ in range(10):
            prompt, answer = anatomy.facts_prompt(tokenizer, rng, filler, distance)
            text, said = tokenizer.decode(prompt), tokenizer.decode(answer)
            fact = text.splitlines()[0]
            assert text.endswith("?") and said.startswith(" ") and said.endswith(".\n")
            assert said.strip().removeprefix("In ").rstrip(".") in fact
            assert distance - 60 < len(prompt) <= distance + len(data.BOS) + 60
            assert text.count(fact) == 1
