"""The bias that is stepped, and the sequence-wise loss (TR 2.1.2, eq. 16-20)."""

import pytest
import torch
from torch import nn
from training_cases import ROUTERS, TINY, window

from dsv3.model import Transformer
from dsv3.moe import Router, sequence_balance
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch, max_violation, update_bias
from dsv3.training.objective import losses
from dsv3.training.optimizer import make_optimizer
from dsv3.training.step import StepValues, train_step

EXPERTS, CHOSEN = 8, 2  # N_r and K_r of TINY


@pytest.fixture
def model():
    return Transformer(TINY).init_weights(0)


# The bias ---------------------------------------------------------------------------------------


def test_bias_rule_by_hand():
    bias = torch.tensor([0.5, 0.0, 0.0, -1.0])
    update_bias(bias, torch.tensor([9.0, 5.0, 5.0, 1.0]), 0.25)
    assert bias.tolist() == [0.25, 0.0, 0.0, -0.75]
    update_bias(bias, torch.tensor([9.0, 5.0, 5.0, 1.0]), 0.0)
    assert bias.tolist() == [0.25, 0.0, 0.0, -0.75]


def test_max_violation_of_balance_and_collapse():
    assert max_violation(torch.full((16,), 7.0)) == 0
    assert max_violation(torch.tensor([4.0, 4.0] + [0.0] * 14)) == 16 / 2 - 1


@pytest.mark.parametrize("micro_batch", [16, 32, 1000])
def test_bias_moves_by_gamma_only_and_gets_no_gradient(model, micro_batch):
    optimizer, watch = make_optimizer(model), RouterWatch(model)
    assert list(watch.routers) == ROUTERS
    optimized = {id(v) for group in optimizer.param_groups for v in group["params"]}
    for router in watch.routers.values():
        assert not router.bias.requires_grad and id(router.bias) not in optimized
        with torch.no_grad():
            router.bias += torch.arange(8) / 100
    before = {name: router.bias.clone() for name, router in watch.routers.items()}
    seen = {name: [] for name in watch.routers}
    hooks = [
        router.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o[1]))
        for name, router in watch.routers.items()
    ]
    train_step(
        model,
        optimizer,
        window(),
        StepValues(learning_rate=1e-3, bias_speed=0.01, micro_batch=micro_batch),
        watch,
    )
    for hook in hooks:
        hook.remove()
    for name, router in watch.routers.items():
        assert router.bias.grad is None
        chosen = torch.cat(seen[name]).flatten()
        assert len(chosen) == 4 * 16 * 2  # the whole batch, not one micro-batch
        load = torch.tensor([int((chosen == e).sum()) for e in range(8)])
        moved = router.bias - before[name]
        assert torch.allclose(moved, 0.01 * (16 - load).sign(), atol=1e-7)
        assert moved.abs().max() > 0
        assert torch.equal(watch.load[name], load.float())


def test_gamma_of_nothing_leaves_the_bias(model):
    optimizer, watch = make_optimizer(model), RouterWatch(model)
    train_step(model, optimizer, window(), StepValues(learning_rate=1e-3, bias_speed=0.0), watch)
    assert all(router.bias.eq(0).all() for router in watch.routers.values())


def test_the_rule_balances_a_skewed_router():
    """What it is for: from most choices on one pair of experts to nearly even loads."""
    router = Router(TINY.but(n_group=1, topk_group=1), Precision.training("fp32"))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        router.weight.normal_(0, 0.1, generator=random)
        router.weight[:2] += 0.1  # e_1 and e_2 suit tokens whose mean is 1
        router.bias.zero_()
        violations = []
        for _ in range(200):
            tokens = 1 + torch.randn(1024, 32, generator=random)
            load = torch.bincount(router(tokens)[1].flatten(), minlength=8).float()
            violations.append(max_violation(load))
            update_bias(router.bias, load, 0.004)
    assert violations[0] > 2 and sum(violations[-10:]) / 10 < 0.3


# The watch --------------------------------------------------------------------------------------


def test_watch_counts_from_reset_until_close(model):
    watch = RouterWatch(model)
    with torch.no_grad():
        model(window(2, 16))
        assert [load.sum() for load in watch.load.values()] == [2 * 16 * CHOSEN, 0]  # MTP idle
        watch.reset()
        model(window(1, 16))
        assert watch.load[ROUTERS[0]].sum() == 16 * CHOSEN
        watch.close()
        model(window(1, 16))
    assert watch.load[ROUTERS[0]].sum() == 16 * CHOSEN


def test_watch_keeps_no_scores_of_held_out_text_or_from_before_reset(model):
    watch = RouterWatch(model)
    losses(model, window())
    watch.reset()
    with torch.no_grad():
        losses(model, window())
    losses(model, window())
    # Scores of three forward passes would not go together with two routers.
    assert watch.sequence_loss().requires_grad


def test_watch_adds_up_all_routers(model):
    watch = RouterWatch(model)
    scores = {name: [] for name in watch.routers}
    for name, router in watch.routers.items():
        router.register_forward_hook(
            lambda m, inputs, o, name=name: scores[name].append(m.scores(inputs[0]))
        )
    losses(model, window())
    by_hand = sum(
        by_definition(scores[name][0].detach().view(4, 16, 8), CHOSEN) for name in ROUTERS
    )
    assert float(watch.sequence_loss().detach()) == pytest.approx(by_hand, rel=1e-5)


def test_a_dense_model_has_no_sequence_loss():
    model = Transformer(TINY.but(first_k_dense_replace=3)).init_weights(0)
    watch = RouterWatch(model)
    losses(model, window())
    assert not watch.routers and watch.sequence_loss() == 0


# The sequence-wise loss -------------------------------------------------------------------------


def by_definition(scores: torch.Tensor, k: int) -> float:
    """Eq. 17-20 without alpha, token after token in Python floats; the mean over sequences."""
    total = 0.0
    for sequence in scores.double().tolist():
        experts, tokens = len(sequence[0]), len(sequence)
        for i in range(experts):
            f = p = 0.0
            for s in sequence:
                f += s[i] in sorted(s)[-k:]  # among the K_r largest
                p += s[i] / sum(s)  # eq. 19
            total += f * experts / (k * tokens) * p / tokens  # eq. 18, 20
    return total / len(scores)


def random_scores(b: int, t: int, experts: int = EXPERTS, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, t, experts, generator=torch.Generator().manual_seed(seed)) + 1e-3


def balanced(experts: int, k: int) -> torch.Tensor:
    """As many tokens as experts; token t prefers experts t, t + 1, ..., t + k - 1 alike."""
    scores = torch.full((experts, experts), 0.2)
    for t in range(experts):
        scores[t, (t + torch.arange(k)) % experts] = 0.9
    return scores[None]


def config(experts: int, k: int):
    return TINY.but(n_routed_experts=experts, num_experts_per_tok=k, n_group=1, topk_group=1)


@pytest.mark.parametrize("experts, k", [(8, 2), (8, 1), (16, 4), (6, 3)])
def test_loss_is_eq_17_to_20(experts, k):
    # eq. 17-20
    scores = random_scores(3, 10, experts)
    assert float(sequence_balance(scores, k)) == pytest.approx(by_definition(scores, k), rel=1e-5)


@pytest.mark.parametrize("experts, k", [(8, 2), (16, 4), (256, 8)])
def test_loss_is_one_when_balanced(experts, k):
    assert float(sequence_balance(balanced(experts, k), k)) == pytest.approx(1)


@pytest.mark.parametrize("experts, k", [(8, 2), (16, 4), (256, 8)])
def test_loss_nears_its_bound_on_collapse(experts, k):
    """All tokens on the same K_r experts: N_r / K_r times what these get of all affinity."""
    for others in (0.1, 1e-3, 1e-9):
        scores = torch.full((2, 12, experts), others)
        scores[..., :k] = torch.linspace(0.5, 0.9, k)
        share = 0.7 * k / (0.7 * k + others * (experts - k))
        loss = float(sequence_balance(scores, k))
        assert loss == pytest.approx(experts / k * share, rel=1e-5)
    assert loss == pytest.approx(experts / k, rel=1e-4)


def test_report_setting_random_against_collapsed():
    """256 experts, 8 chosen, alpha = 1e-4: 1.00e-4 for random logits, 2.4e-3 for a collapse.

    f of random scores differs from 1 by sampling only, and P by less; of collapsed ones whose
    favourites have affinity s and others r, the loss is alpha * 32 * 8 s / (8 s + 248 r).
    """
    # fact 29
    random = torch.randn(4, 4096, 256, generator=torch.Generator().manual_seed(0)).sigmoid()
    assert 1e-4 * float(sequence_balance(random, 8)) == pytest.approx(1e-4, rel=0.02)
    favourites, others = 0.99, 0.0105
    collapsed = torch.full((1, 512, 256), others)
    collapsed[..., 100:108] = favourites
    expected = 1e-4 * 32 * 8 * favourites / (8 * favourites + 248 * others)
    assert expected == pytest.approx(2.4e-3, rel=0.01)
    assert 1e-4 * float(sequence_balance(collapsed, 8)) == pytest.approx(expected)


def test_loss_is_per_sequence_and_not_per_batch():
    """Sorted by domain, each sequence crowds its own experts while the batch is balanced."""
    # fact 30
    domains = torch.full((4, 20, 8), 0.01)
    for domain in range(4):
        domains[domain, :, 2 * domain : 2 * domain + 2] = 0.9
    per_batch = sequence_balance(domains.reshape(1, 80, 8), TINY.num_experts_per_tok)
    mixed = sequence_balance(domains.transpose(0, 1).reshape(4, 20, 8), TINY.num_experts_per_tok)
    assert float(per_batch) == pytest.approx(1) == float(mixed)
    assert float(sequence_balance(domains, TINY.num_experts_per_tok)) > 3.8


def test_the_watch_cuts_micro_batches_into_sequences(model):
    """Rows of one word each: every sequence sits on its own experts, the batch on all."""
    text = torch.arange(4)[:, None].expand(4, 18).contiguous() * 7
    watch = RouterWatch(model)
    with torch.no_grad():
        for router in watch.routers.values():
            router.weight.mul_(100)  # some affinities near 0, some near 1
    losses(model, text)
    apart = float(watch.sequence_loss().detach())
    losses(model, text.reshape(1, -1))
    together = float(watch.sequence_loss().detach())
    assert apart > 1.3 * together


def test_bias_changes_the_choice_and_not_the_loss(model):
    watch, values = RouterWatch(model), []
    for push in (0.0, 5.0):
        with torch.no_grad():
            watch.routers[ROUTERS[1]].bias[3] = push  # the last layer: nothing comes after it
        watch.reset()
        losses(model, window())
        values.append((float(watch.sequence_loss().detach()), watch.load[ROUTERS[1]][3]))
    assert values[0][0] == values[1][0]
    assert values[0][1] < 4 * 16 == values[1][1]  # all tokens went there


def test_gradient_comes_through_p_and_reaches_the_router():
    scores = random_scores(2, 10).double().requires_grad_()
    sequence_balance(scores, TINY.num_experts_per_tok).backward()
    # By hand: d loss / d s_i,t = (f_i - sum_j f_j s'_j,t) / (sum_j s_j,t T b), f held constant.
    s = scores.detach()
    kth = s.sort(dim=-1, descending=True).values[..., CHOSEN - 1 : CHOSEN]
    f = (s >= kth).double().mean(1, keepdim=True) * EXPERTS / CHOSEN
    total = s.sum(-1, keepdim=True)
    expected = (f - (f * s / total).sum(-1, keepdim=True)) / total / 10 / 2
    torch.testing.assert_close(scores.grad, expected)


def test_gradient_reaches_the_router_weights_and_no_bias(model):
    watch = RouterWatch(model)
    losses(model, window())
    watch.sequence_loss().backward()
    for name in ROUTERS:
        assert watch.routers[name].weight.grad.abs().max() > 0
        assert watch.routers[name].bias.grad is None
    assert model.head.weight.grad is None  # balance is no business of the head


def test_small_steps_down_the_loss_spread_the_tokens():
    """A router that crowds two experts for one sequence learns from the loss alone to spread."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 64, 16, generator=random) + 0.5
    weight = nn.Parameter(torch.randn(8, 16, generator=random) * 0.1)
    with torch.no_grad():
        weight[:2] += 0.1
    optimizer, values = torch.optim.SGD([weight], lr=0.5), []
    for _ in range(60):
        loss = sequence_balance((tokens @ weight.T).sigmoid(), TINY.num_experts_per_tok)
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[0] > 1.15 and values[-1] < 1 + (values[0] - 1) / 2
