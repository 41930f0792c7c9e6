"""A whole run: two phases, its log, stopping and going on, and what it leaves behind."""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_cases
from ranks import run_ranks
from training_cases import (
    POSITIONS,
    RECIPE,
    ROUTERS,
    TINY,
    little_text,
    stop_at,
    window,
    write_texts,
)

from dsv3.checkpoint.loading import load_model
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.training import LOG_FILE, Recipe, Run, minutes, train
from dsv3.training import run as run_module
from dsv3.training.optimizer import make_optimizer
from dsv3.training.phases import total_tokens
from dsv3.training.resuming import BEFORE, CHECKPOINTS
from dsv3.training.state import latest_state, load_state, save_state, whole_state

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.exam import with_context

pytestmark = pytest.mark.slow

CLOCKS = ("seconds", "cpu_seconds", "tokens_per_second")
texts, little = training_cases.texts, training_cases.little
UNSEEN = ModelConfig.from_dict(TINY.to_dict())  # equal to TINY, another object


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A run from beginning to end, and what it returned."""
    with pytest.MonkeyPatch.context() as patch:
        little_text(patch.setattr)
        run = Run(TINY, tmp_path_factory.mktemp("whole") / "out", RECIPE, **texts)
        run.figures = run.go()
    return run


def log_of(folder) -> list[dict]:
    """The lines of a log without what a clock says."""
    lines = map(json.loads, (folder / LOG_FILE).read_text(encoding="utf-8").splitlines())
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines]


def steps_of(folder) -> list[dict]:
    return [line for line in log_of(folder) if "loss" in line]


def assert_same_end(run: Run, other: Run) -> None:
    """Weights, moments, random state, log and exported files are equal, bit for bit."""
    for (name, a), (_, b) in zip(
        run.learner.model.named_parameters(), other.learner.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        ours, theirs = (
            run.learner.optimizer.state.get(a, {}),
            other.learner.optimizer.state.get(b, {}),
        )
        assert set(ours) == set(theirs)
        for key, moment in ours.items():
            assert moment.dtype == theirs[key].dtype
            assert torch.equal(moment, theirs[key]), (name, key)
    assert log_of(run.out_dir) == log_of(other.out_dir)
    names = sorted(file.name for file in run.out_dir.iterdir())
    assert names == sorted(file.name for file in other.out_dir.iterdir())
    for name in set(names) - {LOG_FILE, "checkpoints"}:
        assert (run.out_dir / name).read_bytes() == (other.out_dir / name).read_bytes(), name
    last = [latest_state(r.checkpoints) / "state.safetensors" for r in (run, other)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_first_weights_are_those_of_seed_and_recipe(texts, tmp_path):
    for by_width in (False, True):
        recipe = replace(RECIPE, seed=7, embedding_std=0.25, init_by_width=by_width)
        run = Run(TINY, tmp_path / str(by_width), recipe, **texts)
        plain = Transformer(TINY).init_weights(7, 0.25, by_width=by_width)
        for name, value in run.learner.model.named_parameters():
            assert torch.equal(value, plain.get_parameter(name)), name
        assert float(plain.embed.weight.detach().std()) == pytest.approx(0.25, rel=0.05)


# Phases -----------------------------------------------------------------------------------------


def test_schedules_phases_and_loads_are_in_the_log(whole):
    lines = steps_of(whole.out_dir)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["tokens"] for line in lines] == POSITIONS
    assert [line["windows"] for line in lines] == [2, 4, 4, 4, 4, 4, 1, 1, 1]

    # Before the steps 0, 32, ... tokens were read; 300 tokens stand for 14.8T.
    def cosine(tokens):
        done = (tokens * 14.8 / 300 - 10) / 4.3
        return 5e-4 + 4.5e-3 * (1 + math.cos(math.pi * done)) / 2

    assert [line["lr"] for line in lines] == pytest.approx(
        [
            2.5e-3,
            5e-3,
            5e-3,
            5e-3,
            cosine(224),
            cosine(288),
            1e-3,
            1e-3 * (1 - 0.9 * 64 / 200),
            1e-3 * (1 - 0.9 * 128 / 200),
        ]
    )
    assert [line["mtp_weight"] for line in lines] == [0.3] * 4 + [0.1] * 5
    assert [line["bias_speed"] for line in lines] == [0.001] * 6 + [0.0] * 3
    before = 0
    for line in lines:
        assert list(line["load"]) == list(line["max_violation"]) == ROUTERS
        for name in ROUTERS:
            load = line["load"][name]
            assert len(load) == 8 and sum(load) == 2 * (line["tokens"] - before)
            assert line["max_violation"][name] == pytest.approx(
                max(load) / (sum(load) / 8) - 1, abs=6e-4
            )
        assert all(
            0 < line[name] < 10 for name in ("loss", "mtp_loss", "sequence_loss", "grad_norm")
        )
        before = line["tokens"]
    clocks = [json.loads(line) for line in (whole.out_dir / LOG_FILE).read_text().splitlines()]
    assert all(line["seconds"] >= 0 and line["cpu_seconds"] >= 0 for line in clocks)
    assert all(line["tokens_per_second"] > 0 for line in clocks if "loss" in line)


def test_validation_is_in_the_log(whole):
    lines = [line for line in log_of(whole.out_dir) if "held_out" in line]
    assert [(line["step"], line["seq_len"]) for line in lines] == [(4, 16), (8, 64), (9, 64)]
    assert lines[-1]["held_out"] == whole.figures
    for line in lines:
        for name in ("plays", "code", "arithmetic"):
            figures = line["held_out"][name]
            assert set(figures) == {"loss", "bits_per_byte", "mtp_loss", "draft_agreement"}
            loads = [sum(line["load_by_domain"][name][router]) for router in ROUTERS]
            assert loads[0] == loads[1] > 0 and loads[0] % (2 * line["seq_len"]) == 0
    # Two windows of each domain while it runs, all of them at the end.
    assert sum(lines[0]["load_by_domain"]["code"][ROUTERS[0]]) in (2 * 16 * 2, 3 * 16 * 2)
    windows = (len(whole.corpus.held_out["code"]) - 2) // 64
    assert windows > 4
    assert sum(lines[2]["load_by_domain"]["code"][ROUTERS[0]]) == windows * 64 * 2


def snapshot(run: Run) -> dict[str, torch.Tensor]:
    """Copies of weights and moments."""
    result = {}
    for name, weight in run.learner.model.named_parameters():
        result[name] = weight.detach().clone()
        for key, moment in run.learner.optimizer.state.get(weight, {}).items():
            result[f"{name} {key}"] = moment.clone()
    return result


def test_yarn_appears_at_the_boundary_and_all_else_goes_on(texts, tmp_path, monkeypatch):
    seen = []

    def watched(run, phase, learner, enter=Run._enter):
        before = learner and (learner.model.config, snapshot(run))
        enter(run, phase, learner)
        assert all(
            router in [*run.learner.model.modules()]
            for router in run.learner.watch.routers.values()
        )
        seen.append(
            (
                run.position.tokens,
                run.position.phase_start,
                run.stream.length,
                before,
                run.learner.model.config,
                snapshot(run),
            )
        )

    monkeypatch.setattr(Run, "_enter", watched)
    train(TINY, tmp_path, RECIPE, progress=False, **texts)
    short = TINY.but(rope_scaling=None, max_position_embeddings=32)
    first, second = seen
    assert first[:5] == (0, 0, 16, None, short)
    tokens, start, length, (config, before), extended, after = second
    assert (tokens, start, length, config, extended) == (352, 352, 64, short, TINY)
    assert set(before) == set(after) and "head.weight exp_avg" in before
    assert before["head.weight step"] == 6
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = load_model(tmp_path / CHECKPOINTS / BEFORE, precision="fp32")
    assert torch.equal(kept.embed.weight, before["embed.weight"].bfloat16().float())


def test_exported_model_is_extended(whole):
    stored = json.loads((whole.out_dir / "config.json").read_text())
    assert stored["rope_scaling"]["type"] == "yarn" and stored["rope_scaling"]["factor"] == 4
    assert ModelConfig.from_pretrained(whole.out_dir) == TINY


def test_the_model_before_its_extension_is_kept(whole):
    """It can be used as it is, within the context it was trained on; the exam asks beyond it."""
    kept = whole.checkpoints / BEFORE
    short = load_model(kept, precision="fp32")
    assert short.config == whole.phases[0].config and short.config.rope_scaling is None
    longer = with_context(kept, 1024, "fp32")
    tokens = torch.arange(20)[None]
    with torch.no_grad():  # norms that ask for a gradient are summed in another order
        assert torch.equal(longer(tokens), short(tokens))
    with pytest.raises(DSV3Error, match="longer than the context"):
        short(torch.zeros(1, 600, dtype=torch.int64))
    assert longer(torch.zeros(1, 600, dtype=torch.int64)).isfinite().all()


def test_validation_at_the_boundary_has_the_model_of_its_windows(texts, tmp_path):
    train(TINY, tmp_path, replace(RECIPE, eval_every=6), progress=False, **texts)
    lines = [line for line in log_of(tmp_path) if "held_out" in line]
    assert [(line["step"], line["seq_len"]) for line in lines] == [(6, 64), (9, 64)]


@pytest.mark.parametrize("config, tokens", [(TINY, 0), (TINY.but(rope_scaling=None), 200)])
def test_without_a_second_phase(texts, tmp_path, config, tokens):
    """No tokens for it, or a model without YaRN: one phase, in the model as it is given."""
    run = Run(config, tmp_path, replace(RECIPE, extension_tokens=tokens), **texts)
    run.go()
    assert [line["tokens"] for line in steps_of(tmp_path)] == POSITIONS[:6]
    assert run.learner.model.config == config == ModelConfig.from_pretrained(tmp_path)


@pytest.fixture
def batches(monkeypatch):
    """What every step was given to read."""
    seen, step = [], run_module.train_step
    monkeypatch.setattr(
        run_module,
        "train_step",
        lambda model, optimizer, batch, *rest: (
            seen.append(batch),
            step(model, optimizer, batch, *rest),
        )[1],
    )
    return seen


def test_each_phase_reads_a_text_from_its_beginning(texts, tmp_path, batches):
    same = replace(RECIPE, extension_shares=RECIPE.shares)
    run = Run(TINY, tmp_path, same, **texts)
    first = run.stream
    run.go()
    assert [tuple(batch.shape) for batch in batches] == [(2, 18), *[(4, 18)] * 5, *[(1, 66)] * 3]
    assert first.position == 352 and run.stream.position == 192
    assert len({tuple(row.tolist()) for batch in batches for row in batch}) == 25
    # Even with the same documents, the second does not begin as the first did.
    text = str(first._ids[: first._filled].tolist())
    assert all(str(row.tolist())[1:-1] in text for batch in batches[:6] for row in batch)
    assert all(str(batch[0].tolist())[1:-1] not in text for batch in batches[6:])


def test_each_phase_has_its_own_mixture(texts, tmp_path, batches):
    recipe = replace(RECIPE, shares={"plays": 1.0}, extension_shares={"functions": 1.0})
    run = Run(TINY, tmp_path, recipe, **texts)
    run.go()
    plays, functions = (
        " ".join(run.corpus.tokenizer.decode(row.tolist()) for batch in part for row in batch)
        for part in (batches[:6], batches[6:])
    )
    assert "sweet" in plays and "return" not in plays
    assert "return x" in functions and "sweet" not in functions
    assert set(run.corpus.held_out) == {"plays", "code", "arithmetic"}


# Stopping and going on --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved, killed", [(3, 3), (2, 5), (6, 6), (5, 7), (8, 8), (6, 8), (0, 3), (0, 7)]
)
def test_resumed_run_is_bit_equal(whole, texts, tmp_path, saved, killed):
    """Stopped in phase one, at the boundary, and in phase two, with steps to be made again."""
    broken = Run(TINY, tmp_path, RECIPE, **texts)
    stop_at(broken, killed, saved)
    # What a kill would leave: a line and a folder after the checkpoint, whole and half-written.
    broken.position = replace(broken.position, step=killed + 1)
    broken._log(loss=0.0)
    with open(tmp_path / LOG_FILE, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "tok')
    partial = broken.checkpoints / f"step-{killed + 1:06d}.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"half")
    torch.randn(3)

    again = Run(TINY, tmp_path, RECIPE, **texts)
    assert again.position.step == saved
    assert (again.learner.model.config.rope_scaling is None) == (saved < 6)
    assert again.go() == whole.figures
    assert_same_end(again, whole)


def test_resumed_run_with_bfloat16_moments_in_fp8_is_bit_equal(texts, tmp_path):
    recipe = replace(RECIPE, precision="fp8", moments="bf16", eval_every=1000)
    runs = [Run(TINY, tmp_path / name, recipe, **texts) for name in ("whole", "broken")]
    runs[0].go()
    for stop in (2, 7):
        stop_at(runs[1], stop)
        runs[1] = Run(TINY, tmp_path / "broken", recipe, **texts)
        assert runs[1].position.step == stop
    moments = next(iter(runs[1].learner.optimizer.state.values()))
    assert moments["exp_avg"].dtype == torch.bfloat16 != moments["step"].dtype
    runs[1].go()
    assert_same_end(*runs)


def test_a_finished_run_is_left_as_it_is(whole, texts, tmp_path, capsys):
    once = Run(TINY, tmp_path, RECIPE, **texts)
    once.go()
    # As if it had been killed during the export, and before among its checkpoints.
    (tmp_path / "model.safetensors").rename(tmp_path / "model.safetensors.partial")
    (once.checkpoints / "step-000007").mkdir()
    (once.checkpoints / "step-000010.partial").mkdir()
    again = Run(TINY, tmp_path, RECIPE, **texts)
    assert sorted(path.name for path in once.checkpoints.iterdir()) == [
        "before-extension",
        "step-000008",
        "step-000009",
    ]
    assert again.position.step == 9 and again.go() == whole.figures
    assert_same_end(again, whole)
    Run(TINY, tmp_path, RECIPE, progress=True, **texts).go()
    assert "this run has ended, after 544 tokens" in capsys.readouterr().err


def test_a_tokenizer_cut_short_before_the_first_checkpoint_is_made_again(whole, texts, tmp_path):
    stop_at(Run(TINY, tmp_path, RECIPE, **texts), 1, saved=0)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    (tmp_path / "tokenizer_config.json").unlink()
    again = Run(TINY, tmp_path, RECIPE, **texts)
    again.go()
    assert_same_end(again, whole)


def test_a_log_that_was_removed_begins_anew(whole, texts, tmp_path):
    stop_at(Run(TINY, tmp_path, RECIPE, **texts), 5)
    (tmp_path / LOG_FILE).unlink()
    train(TINY, tmp_path, RECIPE, progress=False, **texts)
    assert log_of(tmp_path) == [line for line in log_of(whole.out_dir) if line["step"] > 5]


def test_a_folder_without_checkpoints_is_begun_anew(texts, tmp_path):
    (tmp_path / LOG_FILE).write_text("of another run\n")
    stop_at(Run(TINY, tmp_path, RECIPE, **texts), 1)
    assert [line["step"] for line in log_of(tmp_path)] == [1]


@pytest.mark.parametrize(
    "config, changes, message",
    [
        (TINY.but(rope_theta=500.0), {}, "another model"),
        (TINY, {"seed": 2}, "another recipe"),
        (TINY, {"moments": "bf16"}, "another recipe"),
        (TINY, {"tokens": 400}, "another recipe"),
        (TINY.but(vocab_size=330), {}, "another model"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(texts, tmp_path, config, changes, message):
    stop_at(Run(TINY, tmp_path, RECIPE, **texts), 1)
    with pytest.raises(DSV3Error, match=message):
        Run(config, tmp_path, replace(RECIPE, **changes), **texts)


def test_another_text_in_the_same_folder_is_refused(texts, tmp_path):
    stop_at(Run(TINY, tmp_path / "out", RECIPE, **texts), 1)
    (tmp_path / "others").mkdir()
    others = write_texts(tmp_path / "others")
    Run(TINY, tmp_path / "out", RECIPE, **others)  # equal, in another place
    (others["code"] / "first.py").write_text("def first(x):\n    return x\n")
    with pytest.raises(DSV3Error, match="another text"):
        Run(TINY, tmp_path / "out", RECIPE, **others)


def test_options_survive_the_way_through_json(texts, tmp_path):
    stop_at(Run(TINY, tmp_path, RECIPE, **texts), 1)
    assert (
        Run(UNSEEN, tmp_path, replace(RECIPE, shares=dict(RECIPE.shares)), **texts).position.step
        == 1
    )


# Time -------------------------------------------------------------------------------------------


@pytest.fixture
def few_timed_steps(monkeypatch):
    monkeypatch.setattr(minutes, "_TIMED_STEPS", 3)


LONG = replace(RECIPE, tokens=100_000, save_minutes=60.0, eval_every=1000)


def test_minutes_shorten_the_run_and_are_remembered(texts, tmp_path):
    """Next to no time: the first step is the last of its phase, and the second has one."""
    run = Run(TINY, tmp_path, LONG, max_minutes=1e-9, **texts)
    run.go()
    assert [line["step"] for line in steps_of(tmp_path)] == [1, 2]
    assert (run.plan.recipe.tokens, run.plan.recipe.extension_tokens) == (32, 1)
    assert run.learner.model.config == TINY and run.plan.last_windows == 1
    again = Run(TINY, tmp_path, LONG, max_minutes=1.0, **texts)
    assert again.plan.recipe == run.plan.recipe and again.position.tokens > total_tokens(
        again.phases
    )
    assert again.plan.last_windows == 1
    with pytest.raises(
        DSV3Error, match="another recipe.*tokens was 32, is now 100000.*give --max-minutes again"
    ):
        Run(TINY, tmp_path, LONG, **texts)


@pytest.mark.parametrize(
    "steps, seconds, minutes_, known",
    [(1, 3.1, 1.0, True), (1, 2.9, 1.0, False), (20, 0.1, 1.0, True), (19, 0.1, 1.0, False)],
)
def test_speed_is_known_after_some_steps_or_some_of_the_time(steps, seconds, minutes_, known):
    assert minutes.knows_its_speed(steps, seconds, minutes_) is known


def test_minutes_are_of_everything():
    """Setting up, validation and export leave their time to the steps."""

    def planned(spent, held_out, minutes_=10.0):
        recipe, most = minutes.fit_minutes(
            Recipe(tokens=900_000, extension_tokens=100_000),
            minutes_,
            tokens=3000,
            total=1_000_000,
            speed=100.0,
            spent=spent,
            cutting=40,
            held_out=held_out,
        )
        steps = (sum(recipe.values()) - 3000) / 100
        return spent + 40 + steps + 3 + (held_out / 250 if most is None else 90), most

    for spent, held_out in ((30, 0), (300, 0), (30, 20_000)):
        seconds, most = planned(spent, held_out)
        assert most is None and 0.9 * 600 < seconds <= 600
    seconds, most = planned(30, 100_000)  # 400 s of validation do not fit
    assert most == 90 * 250 // (3 * 1024) and 0.9 * 600 < seconds <= 600
    assert planned(30, 0, 1e9)[0] > 9_000  # time enough: everything


def test_minutes_hold_for_a_run_killed_before_they_were_known(texts, tmp_path, few_timed_steps):
    recipe = replace(LONG, save_minutes=0.0)
    stop_at(Run(TINY, tmp_path, recipe, max_minutes=10, **texts), 2)
    run = Run(TINY, tmp_path, recipe, max_minutes=1e-9, **texts)
    assert run.position.step == 2 and run.plan.recipe.tokens == 100_000
    assert run.began <= time.monotonic() - run.position.seconds  # its minutes count on
    run.go()
    assert run.position.step == 4


def test_a_shortened_run_resumes_bit_equal(texts, tmp_path, few_timed_steps, monkeypatch):
    """Killed right after its length was fixed, which was stored at once."""
    monkeypatch.setattr(
        run_module, "fit_minutes", lambda *_, **__: ({"tokens": 400, "extension_tokens": 130}, 2)
    )
    recipe, runs = replace(LONG, eval_every=3), []
    for name in ("whole", "broken"):
        run = Run(TINY, tmp_path / name, recipe, max_minutes=100, **texts)
        if name == "broken":
            stop_at(run, 3)
            run = Run(TINY, tmp_path / name, recipe, max_minutes=100, **texts)
            assert run.position.step == 3
        run.go()
        runs.append(run)
    assert runs[0].plan.recipe.tokens == 400
    assert_same_end(*runs)


def test_time_enough_leaves_the_length(texts, tmp_path, few_timed_steps):
    run = Run(TINY, tmp_path, RECIPE, max_minutes=1e9, **texts)
    stop_at(run, 4)
    assert run.plan.recipe == RECIPE and run.plan.last_windows is None


def test_minutes_come_too_late_for_a_run_in_its_last_phase(whole, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(minutes, "_TIMED_STEPS", 7)
    train(TINY, tmp_path, RECIPE, max_minutes=10, progress=False, **texts)
    assert log_of(tmp_path) == log_of(whole.out_dir)


# What goes wrong --------------------------------------------------------------------------------


def test_non_finite_loss_stops_and_names_the_last_good_checkpoint(texts, tmp_path):
    run = Run(TINY, tmp_path, RECIPE, **texts)
    draw = run.stream.draw

    def poison(count):
        if run.position.step == 3:
            with torch.no_grad():
                run.learner.model.layers[1].ffn.experts.w2.fill_(float("nan"))
        return draw(count)

    run.stream.draw = poison
    with pytest.raises(DSV3Error) as stopped:
        run.go()
    assert "step 4" in str(stopped.value) and "step-000003" in str(stopped.value)
    assert "loss = nan" in str(stopped.value)
    assert latest_state(run.checkpoints).name == "step-000003"
    assert log_of(tmp_path)[-1]["step"] == 3
    assert not (tmp_path / "model.safetensors").exists()


def test_checkpoints_hold_no_pickle_and_old_ones_go(whole):
    assert sorted(path.name for path in whole.checkpoints.iterdir()) == [
        "before-extension",
        "step-000008",
        "step-000009",
    ]
    assert sorted(path.name for path in latest_state(whole.checkpoints).iterdir()) == [
        "SHA256SUMS",
        "state.json",
        "state.safetensors",
    ]


def test_full_disk_leaves_the_last_checkpoint(texts, tmp_path, monkeypatch):
    run = Run(TINY, tmp_path, RECIPE, **texts)
    good = run.save()
    run.position = replace(run.position, step=1)

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dsv3.training.state.save_file", full)
    with pytest.raises(DSV3Error, match="No space left"):
        run.save()
    assert list(run.checkpoints.iterdir()) == [good]


@pytest.mark.parametrize(
    "file, content",
    [
        ("state.safetensors", b"\x10\0\0\0\0\0\0\0nonsense"),
        ("state.safetensors", None),
        ("state.json", b'{"step": 1'),
        ("state.json", None),
    ],
)
def test_broken_checkpoint_is_one_clear_line(texts, tmp_path, file, content):
    run = Run(TINY, tmp_path, RECIPE, **texts)
    stop_at(run, 2)
    path = latest_state(run.checkpoints)
    (path / file).unlink() if content is None else (path / file).write_bytes(content)
    with pytest.raises(DSV3Error, match="cannot be read") as refused:
        Run(TINY, tmp_path, RECIPE, **texts)
    assert "step-000002" in str(refused.value) and "\n" not in str(refused.value).strip()
    # The way out that the message names.
    for part in path.iterdir():
        part.unlink()
    path.rmdir()
    assert Run(TINY, tmp_path, RECIPE, **texts).position.step == 1


def test_a_log_that_cannot_be_written_is_named(texts, tmp_path):
    run = Run(TINY, tmp_path, RECIPE, **texts)
    (tmp_path / LOG_FILE).mkdir()
    with pytest.raises(DSV3Error, match=LOG_FILE + ": cannot be written"):
        run.go()


def test_state_of_another_model_is_refused(tmp_path):
    def parts(config):
        model = Transformer(config).init_weights(0)
        return model, make_optimizer(model)

    path = save_state(tmp_path, 0, {}, whole_state(*parts(TINY), 0))
    for other in (TINY.but(num_hidden_layers=3), TINY.but(num_nextn_predict_layers=0)):
        with pytest.raises(DSV3Error, match="another model"):
            load_state(path, *parts(other))
    load_state(path, *parts(TINY))


def test_a_folder_that_cannot_be_written_is_named(texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DSV3Error, match="not a folder|cannot be written"):
        Run(TINY, tmp_path / "file" / "out", RECIPE, **texts)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq_len": 33}, "seq_len"),
        ({"extension_seq_len": 129}, "extension_seq_len"),
        ({"extension_seq_len": 33, "extension_tokens": 0, "seq_len": 129}, "seq_len"),
    ],
)
def test_windows_longer_than_the_context_are_refused(texts, tmp_path, changes, message):
    with pytest.raises(DSV3Error, match=message):
        Run(TINY, tmp_path, replace(RECIPE, **changes), **texts)


def test_held_out_text_shorter_than_a_window_is_refused(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3.data.arithmetic.HELD_OUT_CHARACTERS", 1)
    config = TINY.but(max_position_embeddings=4096)
    recipe = replace(RECIPE, extension_seq_len=530)  # the held-out code has 540 tokens
    with pytest.raises(DSV3Error, match="arithmetic: too little held-out text.*532"):
        Run(config, tmp_path, recipe, **texts)
    Run(config, tmp_path, replace(recipe, extension_tokens=0), **texts)


@pytest.mark.parametrize("name", ["batch_first", "batch_last", "extension_batch"])
def test_fewer_windows_than_ranks_are_refused(texts, tmp_path, name):
    recipe = replace(RECIPE, batch_first=3, batch_last=3, extension_batch=3)
    with pytest.raises(DSV3Error, match=name):
        Run(TINY, tmp_path, replace(recipe, **{name: 2}), group=TensorGroup(0, 3), **texts)


# What it leaves ---------------------------------------------------------------------------------


def test_exported_model_loads_in_fp8_and_is_near_the_trained_one(whole):
    text = window()[:, :16]
    with torch.no_grad():
        trained, loaded = (
            whole.learner.model(text),
            load_model(whole.out_dir, precision="fp8")(text),
        )
        # FP8 weights and activations: about 3% a matrix.
        assert 0 < (trained - loaded).norm() < 0.1 * trained.norm()
        plain = load_model(whole.out_dir, precision="fp32")(text)
        assert 0 < (trained - plain).norm() < (trained - loaded).norm()


def test_train_returns_the_figures(whole, texts, tmp_path):
    assert train(TINY, tmp_path, RECIPE, progress=False, **texts) == whole.figures
    assert set(whole.figures) == {"plays", "code", "arithmetic"}


def test_progress_goes_to_the_terminal_and_not_into_the_log(whole, texts, tmp_path, capsys):
    stop_at(Run(TINY, tmp_path, RECIPE, **texts), 2)
    Run(TINY, tmp_path, RECIPE, progress=True, **texts).go()
    out, bar = capsys.readouterr()
    assert out == "" and "544" in bar and "loss=" in bar
    for words in (
        "reading the plays",
        "counting",
        "from step 2 on",
        "validation on held-out text",
        f"the model is in {tmp_path}; try: dsv3 generate {tmp_path} ",
    ):
        assert words in bar
    assert log_of(tmp_path) == log_of(whole.out_dir)


# Ranks ------------------------------------------------------------------------------------------

SHARED = replace(RECIPE, batch_first=3, batch_last=4, extension_batch=2)


def run_one_rank(group, out_dir, texts):
    """Train; returns the figures, the weights, and what this rank wrote below ``out_dir``."""
    little_text()
    written = []

    def audit(event, arguments):
        name = str(arguments[0]) if arguments else ""
        writes = event in ("os.rename", "os.rmdir", "os.remove", "os.truncate") or (
            event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        )
        if writes and name.startswith(str(out_dir)):
            written.append(f"{event} {name}")

    sys.addaudithook(audit)
    run = Run(TINY, out_dir, SHARED, group=group, progress=True, **texts)
    figures = run.go()
    return (
        figures,
        {n: v.detach().numpy() for n, v in run.learner.model.named_parameters()},
        written,
    )


def test_two_ranks_share_a_run_that_only_the_first_writes(texts, tmp_path, capfd):
    (figures, weights, written), (nothing, others, by_others) = run_ranks(
        run_one_rank, 2, tmp_path / "two", texts
    )
    assert nothing == {} and by_others == [] and len(written) > 20
    assert all((weights[name] == others[name]).all() for name in weights)
    one = Run(TINY, tmp_path / "one", SHARED, **texts)
    found = one.go()
    for name, by_domain in found.items():
        assert figures[name] == pytest.approx(by_domain, rel=1e-3)
    for mine, theirs in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        for name in ("step", "tokens", "windows", "lr", "loss", "mtp_loss", "sequence_loss"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert load_model(tmp_path / "two").config == TINY
    again = Run(TINY, tmp_path / "two", SHARED, **texts)  # by one process, why not
    assert again.position.step == one.position.step
