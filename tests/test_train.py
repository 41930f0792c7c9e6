"""The objective, the balance rule, the schedule, and a run that stops and goes on."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from dsv3 import data
from dsv3 import train as T
from dsv3.checkpoint import load_model
from dsv3.config import ModelConfig, QuantizationConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.train_state import latest_state, save_state

TINY = ModelConfig(
    vocab_size=320, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
    num_hidden_layers=2, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2,
    kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    first_k_dense_replace=1, n_group=4, topk_group=2, num_nextn_predict_layers=1,
    max_position_embeddings=64, quantization_config=QuantizationConfig())
RECIPE = T.Recipe(steps=6, batch_size=4, micro_batch=2, seq_len=16, learning_rate=5e-3, warmup=2,
                  log_every=1, eval_every=3, eval_windows=2, save_minutes=0.0)


@pytest.fixture
def model():
    return Transformer(TINY).init_weights(0)


@pytest.fixture(scope="module")
def plays(tmp_path_factory):
    """A few small plays, in the markup of the real ones."""
    folder = tmp_path_factory.mktemp("plays")
    words = "sweet prince good night and flights of angels sing thee to thy rest my lord".split()
    order = np.random.default_rng(0)
    for name in ("a", "b", *data.HELD_OUT):
        speeches = [f"**{'XYZ'[i % 3]}**  \n{' '.join(order.choice(words, 8))}.  \n"
                    for i in range(120)]
        (folder / f"{name}.md").write_text(f"# {name}\n\n## ACT I\n\n### SCENE I. Here.\n\n"
                                           + "\n".join(speeches), encoding="utf-8")
    return folder


def window(rows=4, length=18, seed=0):
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(seed))


# The objective ----------------------------------------------------------------------------------

class Successor(nn.Module):
    """A stand-in model for a text in which each token has one successor, which it knows.

    Whatever token it is fed last, it bets on that token's successor: for the next token, and in
    MTP depth k for t_{i+k+1} after being fed t_{i+k}.
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


@pytest.mark.parametrize("depths", [1, 2])
def test_targets_are_the_tokens_the_paper_names(depths):
    """t_{i+1} for the model, t_{i+k+1} for depth k: any shift makes these losses large."""
    order = torch.randperm(320, generator=torch.Generator().manual_seed(1))
    text = order.repeat(2)[:17 + depths][None]
    main, extra = T.losses(Successor(order, depths), text)
    assert len(extra) == depths and main < 1e-6 and all(loss < 1e-6 for loss in extra)


def test_mtp_sees_the_next_token_and_not_its_target(model):
    def logits(text):
        hidden = model(text[:, :16], return_hidden=True)[1]
        return T.mtp_logits(model, hidden, text)[0]
    text, i = window(1), 7
    with torch.no_grad():
        base = logits(text)
        fed, target = text.clone(), text.clone()
        fed[0, i + 1] = (fed[0, i + 1] + 1) % 320
        target[0, i + 2] = (target[0, i + 2] + 1) % 320
        assert not torch.allclose(logits(fed)[0, i], base[0, i])
        assert torch.equal(logits(target)[0, :i + 1], base[0, :i + 1])


def test_objective_is_the_papers_sum():
    main, extra = torch.tensor(2.0), [torch.tensor(3.0), torch.tensor(5.0)]
    assert T.objective(main, extra, 0.3) == pytest.approx(2 + 0.3 / 2 * 8)
    assert T.objective(main, [], 0.3) == 2


def test_evaluate_on_a_model_that_knows_nothing():
    class Uniform(Successor):
        def bet(self, tokens):
            return torch.zeros(*tokens.shape, 320)
    windows, sizes = window(6, 18), torch.arange(320) % 5
    figures = T.evaluate(Uniform(torch.arange(320), 1), windows, sizes, batch_size=4)
    count, size = 6 * 16, int(sizes[windows[:, 1:17]].sum())
    assert figures["loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert figures["mtp_loss"] == pytest.approx(math.log(320), rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(math.log2(320) * count / size, rel=1e-6)


def test_draft_agreement_counts_the_models_own_next_choice():
    order = torch.randperm(320, generator=torch.Generator().manual_seed(1))

    class Wrong(Successor):
        def mtp_logits(self, hidden, tokens, depth):
            bets, hidden = super().mtp_logits(hidden, tokens, depth)
            bets[:, ::4] = 0.0          # every fourth draft says nothing: best token 0
            return bets, hidden
    windows = order[1:19][None]
    right = T.evaluate(Successor(order, 1), windows, torch.ones(320))
    wrong = T.evaluate(Wrong(order, 1), windows, torch.ones(320))
    assert right["draft_agreement"] == 1.0
    assert wrong["draft_agreement"] == pytest.approx(11 / 15)  # 15 drafts; 0, 4, 8, 12 are off


# Balance ----------------------------------------------------------------------------------------

def test_bias_rule_by_hand():
    bias = torch.tensor([0.5, 0.0, 0.0, -1.0])
    T.update_bias(bias, torch.tensor([9.0, 5.0, 5.0, 1.0]), 0.25)
    assert bias.tolist() == [0.25, 0.0, 0.0, -0.75]


def test_max_violation_of_balance_and_collapse():
    assert T.max_violation(torch.full((16,), 7.0)) == 0
    assert T.max_violation(torch.tensor([4.0, 4.0] + [0.0] * 14)) == 16 / 2 - 1


def test_bias_moves_by_gamma_only_and_gets_no_gradient(model):
    recipe = RECIPE
    optimizer, counter = T.make_optimizer(model, recipe), T.LoadCounter(model)
    routers = counter.routers
    assert set(routers) == {"layers.1.ffn.gate", "mtp.0.ffn.gate"}
    optimized = {id(v) for group in optimizer.param_groups for v in group["params"]}
    for name, router in routers.items():
        assert not router.bias.requires_grad and id(router.bias) not in optimized
    before = {name: router.bias.clone() for name, router in routers.items()}
    seen = {name: [] for name in routers}
    hooks = [router.register_forward_hook(lambda m, i, o, name=name: seen[name].append(o[1]))
             for name, router in routers.items()]
    T.train_step(model, optimizer, window(), 1e-3, recipe, counter)
    for hook in hooks:
        hook.remove()
    for name, router in routers.items():
        assert router.bias.grad is None
        chosen = torch.cat(seen[name]).flatten()
        assert len(chosen) == 4 * 16 * 2        # the whole batch, not one micro-batch
        load = torch.tensor([(chosen == e).sum() for e in range(8)])
        expected = 0.001 * (16 - load).sign()
        assert torch.allclose(router.bias - before[name], expected.float(), atol=1e-9)
        assert torch.equal(counter.load[name], load.float())


def test_decay_is_for_matrices(model):
    groups = T.make_optimizer(model, RECIPE).param_groups
    decayed = {id(v) for v in groups[0]["params"]}
    assert groups[0]["weight_decay"] == 0.1 and groups[1]["weight_decay"] == 0
    for name, value in model.named_parameters():
        assert (id(value) in decayed) == ("norm" not in name and not name.endswith("bias")), name


# Steps ------------------------------------------------------------------------------------------

def test_learning_rate_at_its_breakpoints():
    recipe = T.Recipe(steps=1000, warmup=100, learning_rate=1.0, decay_from=0.6, final_rate=0.1)
    assert T.learning_rate(0, recipe) == pytest.approx(0.01)
    assert T.learning_rate(99, recipe) == T.learning_rate(100, recipe) == 1.0
    assert T.learning_rate(599, recipe) == 1.0
    assert T.learning_rate(799, recipe) == pytest.approx(0.55)
    assert T.learning_rate(999, recipe) == pytest.approx(0.1)


def test_micro_batches_give_the_gradient_of_the_whole():
    results = []
    for micro in (1, 3, 4):
        model = Transformer(TINY).init_weights(0)
        recipe = replace(RECIPE, micro_batch=micro, clip=1e9)
        seen = {}
        optimizer = T.make_optimizer(model, recipe)
        optimizer.register_step_pre_hook(lambda *_: seen.update(
            {n: v.grad.clone() for n, v in model.named_parameters() if v.grad is not None}))
        values = T.train_step(model, optimizer, window(), 1e-3, recipe, T.LoadCounter(model))
        results.append((values, seen))
    for values, seen in results[1:]:
        assert values == pytest.approx(results[0][0], rel=1e-4)
        for name, grad in seen.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-3, atol=1e-5)


def test_loss_goes_down(model):
    optimizer, counter = T.make_optimizer(model, RECIPE), T.LoadCounter(model)
    text = window()
    values = [T.train_step(model, optimizer, text, 5e-3, RECIPE, counter) for _ in range(30)]
    assert values[-1]["loss"] < 0.6 * values[0]["loss"]
    assert values[-1]["mtp_loss"] < 0.7 * values[0]["mtp_loss"]


# Runs -------------------------------------------------------------------------------------------

class Killed(Exception):
    pass


def test_resumed_run_is_bit_equal(plays, tmp_path):
    whole = T.Run(TINY, tmp_path / "whole", RECIPE, None, plays)
    figures = whole.go(progress=False)

    broken = T.Run(TINY, tmp_path / "broken", RECIPE, None, plays)
    draw = broken.windows.draw

    def dying(batch):
        if broken.step == 4:
            raise Killed
        return draw(batch)
    broken.windows.draw = dying
    with pytest.raises(Killed):
        broken.go(progress=False)
    # Lines and a folder that a kill would leave: written after the checkpoint, or half-written.
    broken.step = 5
    broken._log(loss=0.0)
    (broken.checkpoints / "step-000005.partial").mkdir()
    torch.randn(3)

    again = T.Run(TINY, tmp_path / "broken", RECIPE, None, plays)
    assert again.step == 4
    assert again.go(progress=False) == figures
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters()):
        assert torch.equal(a, b), name
        for key, moment in whole.optimizer.state.get(a, {}).items():
            assert torch.equal(moment, again.optimizer.state[b][key]), (name, key)

    def lines(folder):
        texts = (folder / T.LOG_FILE).read_text(encoding="utf-8").splitlines()
        clock = ("seconds", "cpu_seconds", "tokens_per_second")
        return [{k: v for k, v in json.loads(t).items() if k not in clock} for t in texts]
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert [line["step"] for line in lines(tmp_path / "whole")] == [1, 2, 3, 3, 4, 5, 6, 6, 6]


def test_run_leaves_a_model_that_loads(plays, tmp_path):
    figures = T.train(TINY, tmp_path, RECIPE, plays=plays, progress=False)
    assert set(figures) == {"loss", "bits_per_byte", "mtp_loss", "draft_agreement"}
    trained = T.Run(TINY, tmp_path, RECIPE, None, plays).model
    loaded = load_model(tmp_path, precision="fp32")
    text = window()[:, :16]
    with torch.no_grad():
        ours, theirs = trained(text), loaded(text)
    assert (ours - theirs).norm() < 0.1 * ours.norm()   # FP8 weights: about 3% a matrix
    assert (ours - theirs).norm() > 0


def test_minutes_fix_the_number_of_steps(plays, tmp_path):
    recipe = replace(RECIPE, steps=10_000, save_minutes=60.0, eval_every=10_000)
    run = T.Run(TINY, tmp_path, recipe, 1e-9, plays)
    run.go(progress=False)
    assert run.step == run.recipe.steps == 21           # one after the steps that were timed
    assert T.Run(TINY, tmp_path, recipe, 1e-9, plays).recipe.steps == 21


def test_non_finite_loss_stops_and_names_the_last_good_checkpoint(plays, tmp_path):
    run = T.Run(TINY, tmp_path, RECIPE, None, plays)
    draw = run.windows.draw

    def poison(batch):
        if run.step == 3:
            with torch.no_grad():
                run.model.layers[1].ffn.experts.w2.fill_(float("nan"))
        return draw(batch)
    run.windows.draw = poison
    before = {}
    run.optimizer.register_step_post_hook(lambda *_: before.update(
        head=run.model.head.weight.clone(), bias=run.counter.routers["layers.1.ffn.gate"].bias))
    with pytest.raises(DSV3Error) as stopped:
        run.go(progress=False)
    assert "step 3" in str(stopped.value) and "step-000003" in str(stopped.value)
    assert torch.equal(run.model.head.weight, before["head"])
    assert latest_state(run.checkpoints).name == "step-000003"
    assert not (tmp_path / "model.safetensors").exists()


def test_checkpoints_hold_no_pickle_and_old_ones_go(model, tmp_path):
    optimizer = T.make_optimizer(model, RECIPE)
    windows = data.Windows(np.arange(100), 18, 0)
    for step in (1, 2, 3):
        save_state(tmp_path, step, {}, model, optimizer, windows)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    assert sorted(p.name for p in latest_state(tmp_path).iterdir()) == [
        "state.json", "state.safetensors"]


@pytest.mark.parametrize("change, message", [
    (lambda run: (TINY, T.Recipe(steps=6, seed=2)), "another recipe"),
    (lambda run: (TINY.but(rope_theta=500.0), RECIPE), "another model")])
def test_another_run_in_the_same_folder_is_refused(plays, tmp_path, change, message):
    run = T.Run(TINY, tmp_path, RECIPE, None, plays)
    run.save()
    config, recipe = change(run)
    with pytest.raises(DSV3Error, match=message):
        T.Run(config, tmp_path, recipe, None, plays)


def test_full_disk_leaves_the_last_checkpoint(plays, tmp_path, monkeypatch):
    run = T.Run(TINY, tmp_path, RECIPE, None, plays)
    good = run.save()
    run.step = 1

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("dsv3.train_state.save_file", full)
    with pytest.raises(DSV3Error, match="No space left"):
        run.save()
    assert list(run.checkpoints.iterdir()) == [good]


def test_broken_checkpoint_is_one_clear_line(plays, tmp_path):
    path = T.Run(TINY, tmp_path, RECIPE, None, plays).save()
    (path / "state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0nonsense")
    with pytest.raises(DSV3Error, match="cannot be read"):
        T.Run(TINY, tmp_path, RECIPE, None, plays)


# The shipped model ------------------------------------------------------------------------------

def test_shipped_model_is_the_preset_and_has_learned():
    folder = Path(__file__).parents[1] / "assets" / "dsv3-mini"
    assert ModelConfig.from_pretrained(folder) == ModelConfig.mini()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 24_000_000
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    held_out = data.split(data.read_plays())[1]
    ids = data.pack(tokenizer, data.documents(held_out, chats=False))
    windows = data.in_order(ids, 514, 2)[::40]
    sizes = torch.from_numpy(data.token_bytes(tokenizer))
    figures = T.evaluate(load_model(folder, precision="fp8"), windows, sizes)
    assert figures["bits_per_byte"] < 2.2 and figures["draft_agreement"] > 0.5
