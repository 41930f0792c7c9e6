"""The three losses in one sum, and that MTP is asked for a token that it has not been fed."""

import math

import pytest
import torch
from torch import nn
from training_cases import TINY, window

from dsv3.model import Transformer
from dsv3.training.evaluation import evaluate
from dsv3.training.objective import cross_entropy, losses, mtp_logits, objective


class Successor(nn.Module):
    """A stand-in model for a text in which each token has one successor, which it knows.

    Whatever token it is fed last, it bets on that token's successor: for the next token, and in
    MTP depth k for t_{i+k+1} after being fed t_{i+k}. Tests that pass it off as a Transformer need
    ``as_in_use``.
    """

    def __init__(self, order: torch.Tensor, depths: int):
        super().__init__()
        self.following = torch.empty_like(order).scatter_(0, order, order.roll(-1))
        self.config = TINY.but(num_nextn_predict_layers=depths)

    def bet(self, tokens):
        return 30.0 * torch.nn.functional.one_hot(self.following[tokens], 320).float()

    def forward(self, tokens, return_hidden):
        return self.bet(tokens), torch.zeros(*tokens.shape, 1)

    def mtp_logits(self, hidden, tokens, depth):
        assert torch.equal(hidden, torch.full_like(hidden, float(depth)))  # chained, eq. 21
        return self.bet(tokens), hidden + 1


def shuffled_vocabulary() -> torch.Tensor:
    """An order of all tokens: each one's successor stands behind it."""
    return torch.randperm(320, generator=torch.Generator().manual_seed(1))


# Targets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_targets_are_the_tokens_the_paper_names(depths, as_in_use):
    """t_{i+1} for the model, t_{i+k+1} for depth k: any shift makes these losses large."""
    # eq. 24; fact 44
    order = shuffled_vocabulary()
    text = order.repeat(2)[: 17 + depths][None]
    main, extra = losses(Successor(order, depths), text)
    assert len(extra) == depths and main < 1e-6 and all(loss < 1e-6 for loss in extra)


def test_cross_entropy_is_the_mean_of_minus_log_p():
    # eq. 24
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(10).view(2, 5) % 7
    p = logits.double().exp() / logits.double().exp().sum(-1, keepdim=True)
    by_hand = -sum(math.log(p[b, s, targets[b, s]]) for b in range(2) for s in range(5)) / 10
    assert float(cross_entropy(logits, targets)) == pytest.approx(by_hand, rel=1e-6)


def test_objective_is_the_papers_sum():
    # eq. 25
    main, extra = torch.tensor(2.0), [torch.tensor(3.0), torch.tensor(5.0)]
    assert float(objective(main, extra, 0.3)) == pytest.approx(2 + 0.3 / 2 * 8)
    assert float(objective(main, [], 0.3)) == 2


# What is shared ----------------------------------------------------------------------------------


def test_mtp_has_no_embedding_or_head_of_its_own_and_trains_the_models():
    """The gradient of the sum is the sum of both losses' gradients, on the one tensor there is."""
    # fact 45
    model, text = Transformer(TINY).init_weights(0), window(1)
    assert not any("embed" in name or "head" in name for name, _ in model.mtp.named_parameters())
    shared = [model.embed.weight, model.head.weight]

    def gradients(pick):
        main, extra = losses(model, text)
        return torch.autograd.grad(pick(main, extra[0]), shared)

    alone, ahead, both = (
        gradients(pick)
        for pick in (lambda main, mtp: main, lambda main, mtp: mtp, lambda main, mtp: main + mtp)
    )
    for a, b, total in zip(alone, ahead, both):
        assert b.abs().max() > 0
        torch.testing.assert_close(a + b, total)


# Leaks ------------------------------------------------------------------------------------------


def test_mtp_sees_the_next_token_and_not_its_target():
    model, text, i = Transformer(TINY).init_weights(0), window(1), 7

    def logits(text):
        return mtp_logits(model, model(text[:, :16], return_hidden=True)[1], text)[0]

    with torch.no_grad():
        base = logits(text)
        fed, target = text.clone(), text.clone()
        fed[0, i + 1] = (fed[0, i + 1] + 1) % 320
        target[0, i + 2] = (target[0, i + 2] + 1) % 320
        assert not torch.allclose(logits(fed)[0, i], base[0, i])
        assert torch.equal(logits(target)[0, : i + 1], base[0, : i + 1])
        assert not torch.allclose(logits(target)[0, i + 1], base[0, i + 1])


# One dense layer learns this text in 40 steps.
SMALL = TINY.but(
    vocab_size=8,
    rope_scaling=None,
    initializer_range=0.1,
    num_hidden_layers=1,
    first_k_dense_replace=2,
)
# What is left to guess in it: the right value comes with 0.7 + 0.3 / 8, each other with 0.3 / 8.
RIGHT, OTHER = 0.7 + 0.3 / 8, 0.3 / 8
NOISE = -RIGHT * math.log(RIGHT) - 7 * OTHER * math.log(OTHER)


def noisy_text(rows: int, seed: int) -> torch.Tensor:
    """(rows, 18) tokens, t_{i+2} = 2 t_i + t_{i+1} + noise mod 8: to know t_{i+1} is needed."""
    random = torch.Generator().manual_seed(seed)
    columns = list(torch.randint(8, (2, rows), generator=random))
    while len(columns) < 18:
        noise = torch.randint(8, (rows,), generator=random)
        noise *= torch.rand(rows, generator=random) < 0.3
        columns.append((2 * columns[-2] + columns[-1] + noise) % 8)
    return torch.stack(columns, 1)


def trained(losses) -> Transformer:
    """A model after 40 steps on that text."""
    model = Transformer(SMALL).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        main, extra = losses(model, noisy_text(16, step))
        objective(main, extra, 1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def mtp_loss(model: Transformer, text: torch.Tensor, fed: torch.Tensor) -> float:
    """The MTP loss of ``text`` when the module is fed from another text."""
    with torch.no_grad():
        hidden = model(text[:, :16], return_hidden=True)[1]
        return float(cross_entropy(mtp_logits(model, hidden, fed)[0], text[:, 2:]))


def test_shuffling_the_fed_embedding_raises_the_mtp_loss(as_in_use):
    model, text = trained(losses), noisy_text(64, 1000)
    other_rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    honest = mtp_loss(model, text, text)
    assert NOISE - 0.05 < honest < NOISE + 0.25  # as good as it can be: it names no noise
    assert mtp_loss(model, text, text[other_rows]) > honest + 0.5


def test_an_mtp_that_is_fed_its_target_would_show(as_in_use):
    """The mistake those tests are for: with its target before it, even noise is no riddle."""

    def leaking(model, text):
        hidden = model(text[:, :16], return_hidden=True)[1]
        ahead = model.mtp_logits(hidden, text[:, 2:])[0]
        return losses(model, text)[0], [cross_entropy(ahead, text[:, 2:])]

    model = trained(leaking)
    with torch.no_grad():
        assert leaking(model, noisy_text(64, 1000))[1][0] < 0.1 * NOISE


# Held-out figures -------------------------------------------------------------------------------


def test_evaluate_on_a_model_that_knows_nothing(as_in_use):
    class Uniform(Successor):
        def bet(self, tokens):
            return torch.zeros(*tokens.shape, 320)

    windows, sizes = window(6, 18), torch.arange(320) % 5
    figures = evaluate(Uniform(torch.arange(320), 1), windows, sizes, batch_size=4)
    count, size = 6 * 16, int(sizes[windows[:, 1:17]].sum())
    assert figures["loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert figures["mtp_loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(320) * count / size, rel=1e-6)


def test_draft_agreement_counts_the_models_own_next_choice(as_in_use):
    order = shuffled_vocabulary()

    class Wrong(Successor):
        def mtp_logits(self, hidden, tokens, depth):
            bets, hidden = super().mtp_logits(hidden, tokens, depth)
            bets[:, ::4] = 0.0  # every fourth draft says nothing: best token 0
            return bets, hidden

    windows, sizes = order[1:19][None], torch.ones(320, dtype=torch.int64)
    right = evaluate(Successor(order, 1), windows, sizes)
    wrong = evaluate(Wrong(order, 1), windows, sizes)
    assert right["draft_agreement"] == 1.0 and max(right["loss"], right["mtp_loss"]) < 1e-6
    assert wrong["draft_agreement"] == pytest.approx(11 / 15)  # 15 drafts; 0, 4, 8, 12 are off
    assert wrong["mtp_loss"] == pytest.approx(math.log(320) * 4 / 16) and wrong["loss"] < 1e-6


def test_a_model_without_mtp_has_no_draft_figures():
    config = TINY.but(num_nextn_predict_layers=0)
    figures = evaluate(Transformer(config).init_weights(0), window(), torch.ones(320).long())
    assert set(figures) == {"loss", "bits_per_byte"}
