"""Training the arms, several runs at a time, each kept as soon as it has ended.

A run is one arm from one seed: a small JSON file in the work folder, named after everything that
decides what comes out. So an experiment that was stopped goes on where it was, and an arm that two
experiments share is trained once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from dsv3.attention import Attention
from dsv3.checkpoint.safetensors_io import write_text
from dsv3.errors import DSV3Error
from dsv3.files import read_json, unwritable
from dsv3.mla import MLA
from dsv3.model import Transformer
from dsv3.moe import Experts
from dsv3.parallel.tensor import TensorGroup
from dsv3.training.balance import RouterWatch, max_violation
from dsv3.training.corpus import Corpus
from dsv3.training.evaluation import evaluate_domains
from dsv3.training.experiments.arms import BASE, EXPERIMENTS, RECIPE, Arm
from dsv3.training.experiments.surgery import build
from dsv3.training.optimizer import make_optimizer
from dsv3.training.phases import phases_of, step_values
from dsv3.training.position import Position
from dsv3.training.step import train_step

_TARGETS = 1 + BASE.num_nextn_predict_layers
_POINTS = 30  # of a stored curve
_CHARACTERS = 2_500_000  # of each domain; cutting all of the code into tokens takes half a minute
_WINDOWS = 96  # held-out windows of each domain
_LAST = 0.2  # share of the steps over which MaxVio is averaged


def run_experiments(
    names: Sequence[str],
    work: Path,
    *,
    seeds: int = 3,
    tokens: int | None = None,
    jobs: int = 2,
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Train what is missing of some experiments, and return each as one JSON object.

    names: of ``EXPERIMENTS``; work: folder of finished runs; tokens: of each run (default: the
    experiment's own); jobs: runs at a time, one thread each. Raises DSV3Error for a loss that is
    not finite.
    """
    wanted = {
        (name, label, seed): _file(work, arm, seed, tokens or EXPERIMENTS[name].tokens)
        for seed in range(1, seeds + 1)
        for name in names
        for label, arm in EXPERIMENTS[name].arms.items()
    }
    missing = {file: run for run, file in wanted.items() if not file.exists()}
    say(f"{len(set(wanted.values()))} runs, {len(missing)} of them to be made")
    if missing:
        try:
            work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(work, error) from None
        with ProcessPoolExecutor(
            min(jobs, len(missing)), mp_context=get_context("spawn"), initializer=_one_thread
        ) as pool:
            running = {
                pool.submit(_run, *run, tokens or EXPERIMENTS[run[0]].tokens, file): run
                for file, run in missing.items()
            }
            for done in as_completed(running):
                name, label, seed = running[done]
                say(f"{name}: {label}, seed {seed}: loss {done.result():.3f} on held-out text")
    return {
        name: _told(
            name,
            tokens or EXPERIMENTS[name].tokens,
            [
                {"arm": label, "seed": seed, **read_json(file)}
                for (which, label, seed), file in wanted.items()
                if which == name
            ],
        )
        for name in names
    }


def _told(name: str, tokens: int, runs: list[dict]) -> dict:
    experiment = EXPERIMENTS[name]
    return {
        "experiment": name,
        "command": f"dsv3 experiment {name}",
        "question": experiment.question,
        "base": experiment.base,
        "report": experiment.report,
        "limit": experiment.limit,
        "tokens": tokens,
        "torch": torch.__version__,
        "runs": runs,
    }


def _file(work: Path, arm: Arm, seed: int, tokens: int) -> Path:
    choices = asdict(replace(arm, config={}))
    told = [arm.model.to_dict(), asdict(RECIPE), choices, seed, tokens, torch.__version__]
    text = json.dumps(told, sort_keys=True)
    return work / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def _corpus() -> Corpus:
    """The text of all runs of this process, in tokens of one tokenizer."""
    corpus = Corpus(None, None, lambda text: None)
    corpus.domains = [replace(domain, train=_some(domain.train)) for domain in corpus.domains]
    with TemporaryDirectory() as folder:
        corpus.learn_tokenizer(Path(folder), BASE, TensorGroup.single(), None)
    return corpus


def _some(documents: list[str]) -> list[str]:
    """So many of the documents, in any order, that a run need not read one twice."""
    order = np.random.default_rng(0).permutation(len(documents))
    ends = np.cumsum([len(documents[number]) for number in order])
    return [documents[number] for number in order[: int((ends < _CHARACTERS).sum()) + 1]]


def _run(name: str, label: str, seed: int, tokens: int, file: Path) -> float:
    """Train one arm from one seed and keep what came out; the mean loss over the domains."""
    outcome = train_arm(EXPERIMENTS[name].arms[label], seed, tokens, _corpus())
    write_text(file, json.dumps(outcome))
    return outcome["loss"]


def train_arm(arm: Arm, seed: int, tokens: int, corpus: Corpus) -> dict:
    """One run from first values to figures on held-out text.

    Returns loss (nats a token, the mean over domains), mtp_loss and what ``evaluate_domains`` says
    by domain; max_violation, of each router, the mean over the last fifth of the steps; curve, of
    (tokens, training loss); size, of the model.
    """
    recipe = replace(RECIPE, tokens=tokens, seed=seed, sequence_weight=arm.balance)
    phase = phases_of(arm.model, recipe)[0]
    model = build(arm, seed)
    optimizer, watch = make_optimizer(model, betas=recipe.betas), RouterWatch(model)
    stream = corpus.stream(
        recipe.shares, length=recipe.seq_len, targets=_TARGETS, seed=seed, fim_rate=recipe.fim_rate
    )
    position, losses, violations = Position(), [], []
    while position.tokens < tokens:
        values, windows = step_values(phase, recipe, position)
        values = replace(values, bias_speed=arm.bias * values.bias_speed)
        batch = stream.draw(windows)[:, : recipe.seq_len + 1 + arm.model.num_nextn_predict_layers]
        result = train_step(model, optimizer, batch, values, watch)
        if not math.isfinite(result["loss"]):
            raise DSV3Error("a loss is not finite", where=f"step {position.step}", found=arm)
        position = position.after_step(windows * recipe.seq_len, 0.0, 0.0)
        losses.append((position.tokens, result["loss"]))
        violations.append({name: max_violation(load) for name, load in watch.load.items()})
    held_out = {
        name: some[:, : recipe.seq_len + 1 + arm.model.num_nextn_predict_layers]
        for name, some in corpus.windows(recipe.seq_len, _TARGETS, _WINDOWS).items()
    }
    figures, loads = evaluate_domains(model, held_out, corpus.token_bytes, watch)
    watch.close()
    late = violations[-max(int(len(violations) * _LAST), 1) :]
    return {
        "loss": _mean(one["loss"] for one in figures.values()),
        "by_domain": figures,
        "load_by_domain": loads,
        "max_violation": {name: _mean(step[name] for step in late) for name in late[0]},
        "curve": _curve(losses),
        "size": size(model),
    }


def size(model: Transformer) -> dict[str, int]:
    """Parameters, those that work for a token, and values cached for one token in all layers; of
    the main model, without the MTP module."""
    config, parameters, resting, cached = model.config, 0, 0, 0
    for part in (model.embed, *model.layers, model.norm, model.head):
        parameters += sum(weight.numel() for weight in part.parameters())
        for module in part.modules():
            if isinstance(module, Experts):
                stacks = sum(weight.numel() for weight in module.parameters())
                resting += stacks * (module.total - config.num_experts_per_tok) // module.total
            if isinstance(module, MLA):
                cached += config.latent_dim
            if isinstance(module, Attention):
                cached += module.kv_heads * (module.head_dim + module.v_head_dim)
    return {"parameters": parameters, "activated": parameters - resting, "cached": cached}


def _curve(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The loss in so many stretches of equal length: tokens at the end, mean within."""
    length = max(len(losses) // _POINTS, 1)
    parts = [losses[start : start + length] for start in range(0, len(losses), length)]
    return [(part[-1][0], round(_mean(loss for _, loss in part), 4)) for part in parts]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
