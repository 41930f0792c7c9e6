"""What a model writes at its checkpoints: read from a tiny run, and kept while it trains."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_cases
from training_cases import RECIPE, TINY, little_text, window

from dsv3.errors import DSV3Error
from dsv3.generation.tokenizer import load_tokenizer
from dsv3.training import Run, read_log
from dsv3.training.log import Stretch
from dsv3.training.resuming import BEFORE, CHECKPOINTS
from dsv3.training.samples import PROMPTS, Prompt, model_of, read_samples, samples_of, write_on
from dsv3.training.state import all_states
from dsv3.viz.widgets import TrainingRun

sys.path.append(str(Path(__file__).parents[1]))

from benchmarks import samples as script

pytestmark = pytest.mark.slow

texts, little = training_cases.texts, training_cases.little
PROMPT = Prompt(text="1 + 1 =", tokens=12)


@pytest.fixture(scope="module")
def kept(texts, tmp_path_factory):
    """A whole run whose every checkpoint was linked, and the models that made them."""
    folder, models = tmp_path_factory.mktemp("kept"), {}
    with pytest.MonkeyPatch.context() as patch:
        little_text(patch.setattr)
        run = Run(TINY, folder / "run", RECIPE, **texts)
        save = run.save

        def saving():
            save()
            models[run.position.step] = {
                name: value.clone() for name, value in run.learner.model.state_dict().items()
            }
            script.link(folder / "run", folder / "kept")

        run.save = saving
        run.go()
    return folder, models


def test_every_checkpoint_was_kept(kept):
    folder, models = kept
    names = [f"step-{step:06d}" for step in range(1, 10)]
    assert [path.name for path in all_states(folder / "kept")] == names
    assert list(models) == list(range(1, 10))
    assert [path.name for path in all_states(folder / "run" / CHECKPOINTS)] == names[-2:]
    assert not list((folder / "kept").glob("*.partial"))
    assert script.link(folder / "run", folder / "kept") == []


@pytest.mark.parametrize("step, context", [(1, 32), (6, 128), (9, 128)])
def test_the_model_of_a_checkpoint_is_that_of_the_run(kept, step, context):
    folder, models = kept
    before = torch.manual_seed(5).get_state()
    model, at, tokens = model_of(folder / "kept" / f"step-{step:06d}")
    assert torch.equal(before, torch.get_rng_state())
    assert (at, tokens) == (step, training_cases.POSITIONS[step - 1])
    assert model.config.max_position_embeddings == context and not model.training
    assert (model.config.rope_scaling is None) == (step < 6)
    for name, value in model.state_dict().items():
        assert torch.equal(value, models[step][name]), name
    with torch.inference_mode():
        assert torch.isfinite(model(window(1)[:, :9])).all()


def test_a_text_is_greedy_or_drawn_and_ends_where_it_should(kept):
    folder, _ = kept
    model, *_ = model_of(folder / "kept" / "step-000009")
    tokenizer = load_tokenizer(folder / "run")

    def written(seed=0, **changes):
        ((prompt, text),) = write_on(model, tokenizer, [replace(PROMPT, **changes)], seed)
        assert prompt == PROMPT.text
        return text

    ids = tokenizer.encode(PROMPT.text, add_bos=True)
    for _ in range(12):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_id:
            break
    start = len(tokenizer.encode(PROMPT.text, add_bos=True))
    assert written() == written(seed=1) == tokenizer.decode(ids[start:])
    drawn = [written(seed=seed, temperature=1.5) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    whole = written(temperature=1.5)
    assert written(temperature=1.5, stop=(whole[4],)) == whole[: whole.index(whole[4])]
    assert len(tokenizer.encode(written(tokens=10_000))) < 140  # to the end of the context


def test_the_script_writes_what_the_widget_reads(kept, tmp_path, capsys):
    folder, _ = kept
    some, out = tmp_path / "kept", tmp_path / "out.json"
    for step in (2, 7):
        shutil.copytree(folder / "kept" / f"step-{step:06d}", some / f"step-{step:06d}")
    script.sample(folder / "run", out, some)
    found = read_samples(out)
    tokenizer = load_tokenizer(folder / "run")
    lengths = {prompt.text: len(tokenizer.encode(prompt.text, add_bos=True)) for prompt in PROMPTS}
    assert max(lengths.values()) > 32 > min(lengths.values())  # some do not fit before step 6
    assert [(each.step, each.tokens, each.prompt) for each in found] == [
        *((2, 96, prompt) for prompt, length in lengths.items() if length < 32),
        *((7, 416, prompt) for prompt in lengths),
    ]
    assert found[-4:] == samples_of(some / "step-000007", tokenizer)
    assert "step-000002" in capsys.readouterr().out
    script.sample(folder / "run", out)  # the newest two join them
    assert sorted({each.step for each in read_samples(out)}) == [2, 7, 8, 9]
    before = out.read_bytes()
    script.sample(folder / "run", out)
    assert out.read_bytes() == before
    widget = TrainingRun(folder / "run", out, step=8)
    assert "Written at step 8:" in widget.alt and "grow from 16 to 64 tokens" in widget.alt
    assert all(list(row) == ["step", "tokens", "prompt", "text"] for row in json.loads(before))


def test_the_log_of_a_tiny_run_is_read(kept):
    """Two windows in its first step, then four of 16 tokens, then one of 64."""
    log = read_log(kept[0] / "run")
    assert [line["tokens"] for line in log.steps] == training_cases.POSITIONS
    assert log.stretches == (Stretch(0, 1, 16), Stretch(6, 7, 64))
    assert log.routers == tuple(training_cases.ROUTERS) and log.moments == tuple(range(1, 10))
    assert [line["step"] for line in log.held_out] == [4, 8, 9]


def test_a_damaged_checkpoint_is_refused(kept, tmp_path):
    folder, _ = kept
    bad = tmp_path / "kept" / "step-000003"
    shutil.copytree(folder / "kept" / bad.name, bad)
    data = bytearray((bad / "state.safetensors").read_bytes())
    data[-50] ^= 1
    (bad / "state.safetensors").write_bytes(data)
    with pytest.raises(DSV3Error, match="cannot be read"):
        samples_of(bad, load_tokenizer(folder / "run"))
    with pytest.raises(DSV3Error, match="no checkpoints of a training run"):
        script.sample(folder / "run", tmp_path / "out.json", tmp_path)


def test_checkpoints_are_kept_until_the_model_is_there(kept, tmp_path, capsys):
    folder, _ = kept
    assert (folder / "run" / CHECKPOINTS / BEFORE).exists()  # no checkpoint, so not linked
    script.keep(folder / "run", tmp_path / "again", 0.0)
    assert capsys.readouterr().out == "kept step-000008\nkept step-000009\n"
