"""Training checkpoints that were damaged, mixed up or made by others, and folders in use.

Each is refused in one line that names the file, or makes no difference at all.
"""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
import training_cases
from safetensors.torch import load_file, save_file
from training_cases import RECIPE, TINY, little_text, stop_at

from dsv3 import data
from dsv3.checkpoint.folder import claim
from dsv3.errors import DSV3Error
from dsv3.training import LOG_FILE, Recipe, Run, train, usual_precision
from dsv3.training.state import digest, latest_state, remove_old

pytestmark = pytest.mark.slow

FILES = ("state.json", "state.safetensors", "SHA256SUMS")


texts, little = training_cases.texts, training_cases.little


@pytest.fixture(scope="module")
def stopped(texts, tmp_path_factory):
    """The folder of a run that was killed after two steps, and what it went on with then."""
    folder = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        little_text(patch.setattr)
        stop_at(Run(TINY, folder, RECIPE, **texts), 2)
        return folder, standing(Run(TINY, folder, RECIPE, **texts))


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(stopped[0], tmp_path / "out")


def standing(run: Run) -> dict:
    """Everything that the next step follows from."""
    found = {
        "position": run.position,
        "random": torch.get_rng_state().tolist(),
        "plan": run.plan,
        "text": run.stream.position,
        "tokenizer": run.corpus.tokenizer.to_str(),
        "log": run.log.bytes,
    }
    for name, weight in run.learner.model.named_parameters():
        for key, value in {"": weight, **run.learner.optimizer.state.get(weight, {})}.items():
            found[name, key] = (value.dtype, value.detach().flatten().tolist())
    return found


def refused(folder, texts, match: str, recipe: Recipe = RECIPE) -> str:
    """The one line that the run ends with; the folder stays as it is."""
    before = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DSV3Error, match=match) as error:
        Run(TINY, folder, recipe, **texts)
    assert before == {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


def change_tensors(path, change) -> None:
    """Another state.safetensors whose sums hold: what then is left is to look at it."""
    tensors = load_file(path / "state.safetensors")
    change(tensors)
    save_file(tensors, path / "state.safetensors")
    write_sums(path)


def write_sums(path) -> None:
    (path / "SHA256SUMS").write_text(
        "".join(f"{digest(path / name)}  {name}\n" for name in FILES[:2])
    )


# Tensors ----------------------------------------------------------------------------------------

MOMENT = "optimizer.exp_avg.head.weight"


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    "change, match",
    [
        (
            put(MOMENT, torch.zeros(320, 8)),
            r"exp_avg.head.weight: F32 \[320, 8\], expected F32 "
            r"\[320, 32\]",
        ),
        (put(MOMENT, torch.zeros(1)), r"exp_avg.head.weight: F32 \[1\]"),
        (put(MOMENT, torch.zeros(320, 32, dtype=torch.bfloat16)), "exp_avg.head.weight: BF16"),
        (put("optimizer.exp_avg_sq.norm.weight", torch.full((32,), float("nan"))), "NaN"),
        (put("optimizer.exp_avg_sq.norm.weight", torch.full((32,), -1.0)), "squares below 0"),
        (put("optimizer.step.norm.weight", torch.tensor(float("inf"))), "NaN or infinite"),
        (put("optimizer.step.norm.weight", torch.tensor(1.0)), "1 updates, expected 2"),
        (put("optimizer.step.norm.weight", torch.zeros(2)), r"step.norm.weight: F32 \[2\]"),
        (put("model.norm.weight", torch.zeros(33)), r"model.norm.weight: F32 \[33\]"),
        (put("model.norm.weight", torch.zeros(32).half()), "model.norm.weight: F16"),
        (put("model.norm.weight", torch.full((32,), float("inf"))), "model.norm.weight: NaN"),
        (put("model.other.weight", torch.zeros(3)), "another model"),
        (put("optimizer.other.norm.weight", torch.zeros(3)), "does not belong there"),
        (put("random.torch", torch.zeros(9, dtype=torch.uint8)), r"random.torch: U8 \[9\]"),
        (lambda tensors: tensors.pop("random.torch"), "no random.torch"),
        (lambda tensors: tensors.pop(MOMENT), "no " + MOMENT),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if "optimizer" in name],
            "no optimizer",
        ),
        (lambda tensors: tensors.pop("model.norm.weight"), "another model"),
    ],
)
def test_foreign_tensors_are_refused_by_name(folder, texts, change, match):
    """Even where the sums say that this is what was written."""
    change_tensors(latest_state(folder / "checkpoints"), change)
    refused(folder, texts, match)


def test_the_moments_of_another_recipe_are_not_taken(folder, texts):
    """Facts that say bfloat16, beside moments in float32."""
    path = latest_state(folder / "checkpoints")
    facts = json.loads((path / "state.json").read_text())
    facts["recipe"]["moments"] = "bf16"
    (path / "state.json").write_text(json.dumps(facts))
    write_sums(path)
    refused(folder, texts, "F32 .*expected BF16", replace(RECIPE, moments="bf16"))


# The way out ------------------------------------------------------------------------------------


def test_the_way_out_is_looked_for_and_leads_on(folder, texts):
    newest = latest_state(folder / "checkpoints")
    newest.joinpath("state.json").write_text("[1, 2]")
    assert "Remove step-000002: the run then goes on from step-000001" in refused(
        folder, texts, "a JSON list"
    )
    shutil.rmtree(newest)
    assert Run(TINY, folder, RECIPE, **texts).position.step == 1


def test_no_way_is_named_that_leads_to_the_next_damage(folder, texts):
    for path in (folder / "checkpoints").iterdir():
        (path / "state.safetensors").write_bytes(b"")
    assert "No whole checkpoint is left" in refused(folder, texts, "cannot be read")
    shutil.rmtree(folder / "checkpoints")
    assert Run(TINY, folder, RECIPE, **texts).position.step == 0


def test_another_recipe_is_told_by_its_options(folder, texts):
    refused(
        folder,
        texts,
        "found seed was 1, is now 2; moments was fp32, is now bf16|"
        "found moments was fp32, is now bf16; seed was 1, is now 2",
        replace(RECIPE, seed=2, moments="bf16"),
    )


# Fuzz -------------------------------------------------------------------------------------------


def fuzzed(content: bytes, name: str, choose: random.Random) -> bytes:
    """One damage: a bit, a cut, a piece twice, or another JSON value."""
    kind = choose.randrange(5)
    if kind == 0 or not content:
        at = choose.randrange(len(content) or 1)
        return content[:at] + bytes([content[at] ^ 1 << choose.randrange(8)]) + content[at + 1 :]
    if kind == 1:
        return content[: choose.randrange(len(content))]
    if kind == 2:
        at = choose.randrange(len(content))
        return content[:at] + choose.randbytes(choose.randrange(1, 9)) + content[at:]
    if kind == 3 or name != "state.json":
        at = choose.randrange(min(len(content), 300))
        return content[:at] + choose.randbytes(4) + content[at + 4 :]
    facts = json.loads(content)
    place = choose.choice([facts, facts["recipe"], facts["config"]])
    place[choose.choice(sorted(place))] = choose.choice(
        [None, True, -1, 10**400, 1e308, float("nan"), "", "x" * 99, [], [[]], {}, {"a": 1}]
    )
    return json.dumps(facts).encode()


@pytest.mark.parametrize("again", [False, True], ids=["as it was damaged", "with new sums"])
def test_fuzzed_checkpoints_are_refused_or_make_no_difference(stopped, texts, tmp_path, again):
    """With new sums a change of the values themselves cannot be seen; what is tried then is that
    it is refused or taken, and never crashes."""
    choose = random.Random(3)
    outcomes = {"refused": 0, "taken": 0}
    for number in range(24):
        folder = shutil.copytree(stopped[0], tmp_path / str(number))
        path = latest_state(folder / "checkpoints")
        file = path / choose.choice(FILES[:2] if again else FILES)
        damaged = fuzzed(file.read_bytes(), file.name, choose)
        file.write_bytes(damaged)
        if again:
            write_sums(path)
        try:
            run = Run(TINY, folder, RECIPE, **texts)
        except DSV3Error as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            outcomes["refused"] += 1
        else:
            outcomes["taken"] += 1
            if not again:
                assert standing(run) == stopped[1], file
        shutil.rmtree(folder)
    assert outcomes["refused"] > 5


# What lies beside them --------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["cut", "missing", "another"])
def test_a_damaged_tokenizer_is_made_again(stopped, folder, texts, damage):
    file = folder / "tokenizer.json"
    whole = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(whole[:500] if damage == "cut" else whole.replace(b"sweet", b"sweat"))
    (folder / "tokenizer_config.json").unlink()
    assert standing(Run(TINY, folder, RECIPE, **texts)) == stopped[1]
    assert file.read_bytes() == whole
    assert (folder / "tokenizer_config.json").read_bytes() == (
        stopped[0] / "tokenizer_config.json"
    ).read_bytes()


def test_a_tokenizer_that_comes_out_otherwise_is_refused(folder, texts, monkeypatch):
    (folder / "tokenizer.json").unlink()
    learn = data.train_tokenizer
    monkeypatch.setattr(
        data, "train_tokenizer", lambda texts, size: learn(["another text " * 50, *texts], size)
    )
    with pytest.raises(DSV3Error, match="another tokenizer"):
        Run(TINY, folder, RECIPE, **texts)


def test_an_odd_log_is_cut_to_whole_lines(folder, texts):
    log = folder / LOG_FILE
    whole = log.read_bytes()
    log.write_bytes(whole[:-20])
    Run(TINY, folder, RECIPE, **texts)
    assert log.read_bytes() == whole[: whole[:-20].rfind(b"\n") + 1]
    log.unlink()
    log.mkdir()
    with pytest.raises(DSV3Error, match="log.jsonl"):
        Run(TINY, folder, RECIPE, **texts)


def test_checkpoints_go_by_number(tmp_path):
    for name in (
        "step-999998",
        "step-999999",
        "step-1000000",
        "step-1000001.partial",
        "step-abc",
        "step-0000007",
        "notes",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step-2000000").write_text("a file")
    assert latest_state(tmp_path).name == "step-1000000"
    remove_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "notes",
        "step-0000007",
        "step-1000000",
        "step-2000000",
        "step-999999",
        "step-abc",
    ]


# The folder -------------------------------------------------------------------------------------


def test_two_runs_in_one_folder(folder, texts):
    with claim(folder, "train"), pytest.raises(DSV3Error, match="another job writes.*train"):
        train(TINY, folder, RECIPE, progress=False, **texts)


def test_a_model_that_was_not_trained_here_is_not_written_over(tmp_path, texts):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DSV3Error, match="holds a model.*new --out folder"):
        train(TINY, tmp_path, RECIPE, progress=False, **texts)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# Precision --------------------------------------------------------------------------------------


def test_precision_follows_the_machine_and_then_the_run(stopped, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    for slower, expected in ((30.0, "fp32"), (0.4, "bf16")):
        monkeypatch.setattr("dsv3.bfloat16.slowdown", lambda slower=slower: slower)
        assert usual_precision(tmp_path, cpu)[0] == expected
        assert usual_precision(stopped[0], cpu) == (
            "fp32",
            "precision fp32: this run began with it",
        )
    assert usual_precision(tmp_path, torch.device("cuda"))[0] == "bf16"
