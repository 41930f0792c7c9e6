"""What a model writes at the checkpoints of its run: the same beginnings each time.

A curve falls; a text shows what that means. The beginnings, their temperatures and the seed are
fixed, so that from one checkpoint to the next only the model changes. One sample each, and none is
chosen among several.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from dsv3.checkpoint.safetensors_io import write_text
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.files import read_json, unwritable
from dsv3.generation.loop import complete
from dsv3.generation.tokenizer import Tokenizer
from dsv3.model import Transformer
from dsv3.training.learner import first_learner
from dsv3.training.phases import phase_at, phases_of
from dsv3.training.recipe import Recipe
from dsv3.training.sharing import Sharing
from dsv3.training.state import check_sum, load_state, read_facts


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A beginning, and how it is gone on with: at most ``tokens`` more, up to ``stop``."""

    text: str
    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()


PROMPTS = (
    Prompt(
        text="SCENE I. Verona. A street.\n\n[Enter ROMEO]\n\nROMEO:\n",
        tokens=110,
        temperature=0.8,
        top_p=0.95,
    ),
    Prompt(text="def count_words(text):\n", tokens=90, temperature=0.8, top_p=0.95),
    Prompt(text="33 + 47 =", tokens=30, stop=("\n",)),  # a pair that was held out
    Prompt(text="let q = 58\nlet a = 31\n7 * 8 = 56\nget q =", tokens=6, stop=("\n",)),
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A text of one moment: step and tokens read by then, what was given, what was written."""

    step: int
    tokens: int
    prompt: str
    text: str


def model_of(checkpoint: Path) -> tuple[Transformer, int, int]:
    """The model of a training checkpoint, in float32 on the CPU, its step and tokens read.

    It has the config of the phase that the next step would have belonged to. The random state stays
    as it was. Raises DSV3Error for a checkpoint that a run would not go on from.
    """
    facts = read_facts(checkpoint)
    check_sum(checkpoint)
    recipe = replace(Recipe.from_dict(facts["recipe"]), precision="fp32", recompute=False)
    phases = phases_of(ModelConfig.from_dict(facts["config"]), recipe)
    config = phase_at(phases, facts["tokens"]).config
    with torch.random.fork_rng(devices=[]):
        learner = first_learner(config, recipe, Sharing.of(None, zero=False, experts=False))
        load_state(checkpoint, learner.model, learner.optimizer)
    learner.watch.close()
    return learner.model.eval(), facts["step"], facts["tokens"]


@torch.inference_mode()
def write_on(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Prompt] = PROMPTS, seed: int = 0
) -> Iterator[tuple[str, str]]:
    """(beginning, what the model writes after it) of each prompt, as the start of a document. A
    text ends before a ``stop``, and where the context ends; a beginning that fills the context is
    left out."""
    for prompt in prompts:
        ids = tokenizer.encode(prompt.text, add_bos=True)
        room = model.config.max_position_embeddings - len(ids)
        if room < 1:
            continue
        result = complete(
            model,
            [ids],
            tokenizer=tokenizer,
            max_new_tokens=min(prompt.tokens, room),
            temperature=prompt.temperature,
            top_p=prompt.top_p,
            seed=seed,
            stop=prompt.stop,
            eos_ids=[tokenizer.eos_id],
        )
        assert result.texts is not None  # there is a tokenizer
        yield prompt.text, result.texts[0]


def samples_of(checkpoint: Path, tokenizer: Tokenizer) -> list[Sample]:
    """One sample for each of ``PROMPTS`` by the model of a training checkpoint."""
    model, step, tokens = model_of(checkpoint)
    return [
        Sample(step=step, tokens=tokens, prompt=prompt, text=text)
        for prompt, text in write_on(model, tokenizer)
    ]


def save_samples(file: Path, samples: Sequence[Sample]) -> None:
    """Write them as JSON, whole or not at all, by step and in the order given."""
    rows = [asdict(sample) for sample in sorted(samples, key=lambda sample: sample.step)]
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(file, error) from None
    write_text(file, f"[\n{text}\n]\n")


def read_samples(file: str | Path) -> list[Sample]:
    """What ``save_samples`` wrote; DSV3Error for anything else."""
    rows, kinds = read_json(file), dict(step=int, tokens=int, prompt=str, text=str)
    assert list(kinds) == [field.name for field in fields(Sample)]
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or {n: type(v) for n, v in row.items()} != kinds:
            raise DSV3Error(
                "not samples of a training run",
                where=file,
                found=f"{row!r:.60}",
                expected="a list of objects with step, tokens, prompt and text",
                fix="Make them with benchmarks/samples.py",
            )
    return [Sample(**row) for row in rows]
