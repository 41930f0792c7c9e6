"""Checks of chapter 6's exercises, and the toy run that one of them kills."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3.book import broken_runs as stored
from dsv3.book import step_slips
from dsv3.book.exercise import Verdict, judge, judge_numbers, judge_statements
from dsv3.training.simulation import simulate


def batch_sizes(answer: dict[str, int | None]) -> Verdict:
    """Tokens in two of V3's steps, and how many whole steps its last part has."""
    right = {
        "tokens in V3's first step": 12_582_912,
        "tokens in a step after the ramp": 62_914_560,
        "whole steps in the last 167 billion tokens": 2_654,
    }

    def why(key: str, value: int) -> str:
        if value in (3_072, 15_360):
            return "that is windows; each has 4,096 tokens"
        if key.startswith("whole"):
            if value == 2_655:
                return "whole steps are asked for: round down"
            if value in (13_272, 13_273):
                return "by then the batch has grown to 15,360 windows"
            return "167 billion tokens, by what a step reads"
        if value in right.values():
            return "that is the other one"
        return "windows in the batch, times 4,096"

    return judge_numbers("batch_sizes", answer, right, why, "63 million tokens in a step")


# --- AdamW ------------------------------------------------------------------------------------


def _adamw(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.95,
    decay: float = 0.1,
    eps: float = 1e-8,
    *,
    corrected: bool = True,
    late: bool = False,
    under: bool = False,
    decays: str = "weight",
    root: bool = True,
    keeps: bool = False,
    square: bool = True,
    way: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    if decays == "gradient":
        g = g + decay * w
    new_m, new_v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (g**2 if square else g.abs())
    used_m, used_v = (m, v) if late else (new_m, new_v)
    if corrected:
        used_m, used_v = used_m / (1 - b1**t), used_v / (1 - b2**t)
    if not root:
        below = used_v + eps
    else:
        below = (used_v + eps).sqrt() if under else used_v.sqrt() + eps
    step = used_m / below
    if decays == "weight":
        step = step + decay * w
    new_w = w - way * lr * step
    if decays == "after":
        new_w = new_w - lr * decay * new_w
    if decays == "whole":
        new_w = new_w - decay * w
    return (new_w, used_m, used_v) if keeps else (new_w, new_m, new_v)


def adamw(answer: Callable) -> Verdict:
    """w, g, m, v, t -> w, m, v after step t."""
    random = torch.Generator().manual_seed(6)
    cases = [(torch.ones(3), torch.tensor([4.0, -2.0, 0.0]), torch.zeros(3), torch.zeros(3), 1)]
    for t in (2, 7):
        w, g, m = (torch.randn(5, generator=random) for _ in range(3))
        cases.append((w, g, m, torch.rand(5, generator=random) / 10 + 1e-3, t))
    cases.append((torch.ones(2), torch.tensor([1e-8, 1e-7]), torch.zeros(2), torch.zeros(2), 1))

    def wrong(**how) -> Callable:
        return lambda *given: _adamw(*given, **how)

    return judge(
        "adamw",
        answer,
        _adamw,
        cases,
        {
            "the means begin at 0: divide them by 1 - b1**t and 1 - b2**t": wrong(corrected=False),
            "you step with the moments of before; update them first": wrong(late=True),
            "eps belongs beside the root, not under it": wrong(under=True),
            "the decay goes into the gradient here, and so through Adam's division. In AdamW it is "
            "added to the step": wrong(decays="gradient"),
            "the decay is missing": wrong(decays="no"),
            "the decay is multiplied by the learning rate as well": wrong(decays="whole"),
            "the decay is of the weight before the step, not after it": wrong(decays="after"),
            "the step goes downhill: subtract it": wrong(way=-1),
            "the first step has t = 1: the powers are b1**t and b2**t": lambda w, g, m, v, t: (
                _adamw(w, g, m, v, t + 1)
            ),
            "divide by the root of v": wrong(root=False),
            "return the moments as they are; the corrected ones are for this step alone": wrong(
                keeps=True
            ),
            "v is the mean of squares": wrong(square=False),
        },
        praise="the first case is the one by hand: 0.89, 1.09, 0.99",
    )


# --- gamma ------------------------------------------------------------------------------------

_ALL, _LAST = "all 200 steps below 0.28", "last 50 below 0.18"
_FITTING = {_ALL: 0.01, _LAST: 0.003}


def tune_gamma(answer: Mapping[str, float | None]) -> Verdict:
    """Two step sizes of the bias for the router of ``simulate``: one quick, one calm."""
    name = "tune_gamma"
    if not isinstance(answer, Mapping) or set(answer) != {_ALL, _LAST}:
        return Verdict(name, "wrong", f'keep the two keys, "{_ALL}" and "{_LAST}"')
    missing = [key for key in (_ALL, _LAST) if answer[key] is None]
    if len(missing) == 2:
        return Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
    said = []
    for key in (_ALL, _LAST):
        if key not in missing and (fault := _gamma_fault(key, answer[key])):
            said.append(f'"{key}": {fault}')
    if said:
        return Verdict(name, "wrong", "; ".join(said))
    if missing:
        return Verdict(name, "open", f'right so far; "{missing[0]}" has no answer yet')
    return Verdict(name, "right", "quick and calm are two different step sizes")


def _gamma_fault(key: str, gamma: object) -> str:
    """What is wrong with a step size, "" if nothing is."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 10:
        return f"a number from 0 to 10 is asked for, and this is {gamma!r}"
    found = simulate(
        experts=16, k=2, tokens=1024, steps=200, skew=0.7, gamma=float(gamma)
    ).max_violation
    value, bound = (found.mean(), 0.28) if key == _ALL else (found[-50:].mean(), 0.18)
    if value < bound:
        return ""
    if gamma == 0:
        return f"without a step nothing changes; the mean is {value:.2f}"
    return f"the mean is {value:.2f}; " + (
        "the bias swings: take smaller steps"
        if gamma > _FITTING[key]
        else "it arrives late: take larger steps"
    )


# --- true or false ----------------------------------------------------------------------------


def training_claims(answer: dict[str, bool | None]) -> Verdict:
    """Eight statements about a step, and about what a run needs."""
    told = {
        "Adam's first step is twice as long for a gradient twice as large": (
            False,
            "corrected, m is g and v its square; their quotient is the sign",
        ),
        "in V3's training a window can hold the end of one document and the "
        "start of another, and the second sees the first": (
            True,
            "documents are packed, and no mask keeps them apart",
        ),
        "clipping changes the direction of the gradient": (
            False,
            "all of it is multiplied by one number",
        ),
        "the balance loss of V3 has a weight of 0": (False, "0.0001: small, and not nothing"),
        "the routing bias gets a small gradient through the gate weights": (
            False,
            "it only decides who is chosen, and choosing has no gradient; the weights are made of "
            "scores without it",
        ),
        "with master weights in BF16, small steps add up to large ones in time": (
            False,
            "each is rounded away before the next one comes",
        ),
        "a run that goes on without Adam's moments stops with an error": (
            False,
            "fresh moments are what a new run has; it steps on, otherwise",
        ),
        "a falling loss on text that is read again and again means a better model": (
            False,
            "it may be learning the text by heart; measure on text that it never reads",
        ),
    }
    return judge_statements(
        "training_claims",
        answer,
        {key: truth for key, (truth, _) in told.items()},
        {key: why for key, (_, why) in told.items()},
    )


# --- six logs ---------------------------------------------------------------------------------


def log(letter: str) -> list[dict[str, float]]:
    """The log of one of the six runs, A to F."""
    return stored.read()[letter]


def broken_runs(answer: dict[str, str | None]) -> Verdict:
    """Which of six logs has which fault."""
    name, right = "broken_runs", stored.NAMES
    if not isinstance(answer, Mapping) or set(answer) != set(right):
        return Verdict(name, "wrong", f"keep the letters {', '.join(right)}")
    if all(value is None for value in answer.values()):
        return Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
    why = {
        "sign": "max_violation of such a run grows; look where it does",
        "leak": "in such a run mtp_loss falls far below loss, which no honest module can",
        "batch": "in such a run one gradient is some sixty times as long as the others",
        "moments": "such a run is the fine one up to step 41, and differs from it afterwards",
        "kept": "in such a run old gradients are in every new one: grad_norm is above the fine "
        "run's from the second step on",
        "fine": "in a fine run the two losses stay near each other, norms near 1, and "
        "max_violation falls",
    }
    said = []
    for letter, value in answer.items():
        if value is None or value == right[letter]:
            continue
        if value not in why:
            said.append(f"{letter}: one of {', '.join(sorted(why))} is asked for")
        else:
            said.append(f'{letter} is not "{value}": {why[value]}')
    if said:
        return Verdict(name, "wrong", "; ".join(said))
    missing = [letter for letter, value in answer.items() if value is None]
    if missing:
        return Verdict(name, "open", f"right so far; {missing[0]} has no answer yet")
    return Verdict(name, "right", "each fault has its own mark in the log")


# --- resume by hand ---------------------------------------------------------------------------

_KEPT = ("weights", "moments", "bias", "step", "position", "random")
_TEXT = torch.sin(torch.arange(400.0)).view(100, 4)


@dataclass
class ToyRun:
    """A run that needs six things to go on: steps change the tensors in place."""

    weights: Tensor = field(default_factory=lambda: torch.zeros(4))
    moments: Tensor = field(default_factory=lambda: torch.zeros(4))
    bias: Tensor = field(default_factory=lambda: torch.zeros(2))
    step: int = 0
    position: int = 0
    random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(1))

    def train(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            row = _TEXT[self.position % len(_TEXT)]
            noise = torch.rand(4, generator=self.random) / 10
            gradient = self.weights - row + noise + self.bias.repeat(2)
            self.moments.mul_(0.9).add_(gradient, alpha=0.1)
            self.weights.sub_(self.moments / (1 - 0.9 ** (self.step + 1)), alpha=0.3)
            self.bias.add_(0.01 * torch.tensor([1.0, -1.0]) * row.sum().sign())
            self.step += 1
            self.position += 1 + self.step % 2

    def take(self, kept: Mapping) -> None:
        """Go on from what was kept; what is missing stays as in a new run."""
        for name in _KEPT:
            if name not in kept:
                continue
            if name == "random":
                self.random.set_state(kept[name])
            else:
                setattr(self, name, kept[name])


def snapshot(answer: Callable) -> Verdict:
    """run -> a dict from which another run goes on as if nothing had happened."""
    name = "snapshot"
    if not callable(answer):
        return (
            Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
            if answer in (None, ...)
            else Verdict(name, "wrong", "give the function itself; leave out the ()")
        )
    run = ToyRun()
    run.train(5)
    try:
        kept = answer(run)
    except Exception as error:
        return Verdict(name, "wrong", f"your function stops with {type(error).__name__}: {error}")
    if kept is None or kept is ...:
        return Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
    if not isinstance(kept, Mapping):
        return Verdict(name, "wrong", "return a dict")
    if odd := sorted(map(str, set(kept) - set(_KEPT))):
        return Verdict(name, "wrong", f"nobody asks for {', '.join(odd)}; the names are as in run")
    if isinstance(kept.get("random"), torch.Generator):
        return Verdict(name, "wrong", "random: a generator goes on; keep run.random.get_state()")
    before = {key: kept[key].clone() for key in kept if isinstance(kept[key], Tensor)}
    run.train(7)
    moved = [key for key, value in before.items() if not torch.equal(kept[key], value)]
    if moved:
        return Verdict(
            name,
            "wrong",
            f"{', '.join(moved)}: your dict has changed while the run went on. Steps change the "
            "tensor in place, and you kept the tensor itself: clone it",
        )
    other = ToyRun()
    try:
        other.take(kept)
        other.train(7)
    except Exception as error:
        return Verdict(
            name,
            "wrong",
            f"a new run can't go on from your dict ({type(error).__name__}: {error}); keep tensors "
            "as tensors and numbers as numbers",
        )
    if all(_same(getattr(run, key), getattr(other, key)) for key in _KEPT):
        return Verdict(name, "right", "killed after step 5, and bit-equal after step 12")
    what = {
        "weights": "it begins with a new model",
        "moments": "its first steps have forgotten the gradients before",
        "bias": "its loads have to be balanced again",
        "step": "its means are corrected as if they had just begun",
        "position": "it reads the same text again",
        "random": "its random numbers begin again",
    }
    missing = [key for key in _KEPT if key not in kept]
    if missing:
        said = "; ".join(f"without {key} {what[key]}" for key in missing)
        return Verdict(name, "wrong", f"the run goes on, and ends elsewhere: {said}")
    first = next(key for key in _KEPT if not _same(getattr(run, key), getattr(other, key)))
    return Verdict(name, "wrong", f"all six are there, but {first} differs in the end")


def _same(a, b) -> bool:
    if isinstance(a, torch.Generator):
        return torch.equal(a.get_state(), b.get_state())
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


# --- close the book ---------------------------------------------------------------------------


def one_step(answer: Callable) -> Verdict:
    """learner, batch (n, T + 2), values -> loss of the next token; the learner is changed."""
    name = "one_step"
    if not callable(answer):
        return (
            Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
            if answer in (None, ...)
            else Verdict(name, "wrong", "give the function itself; leave out the ()")
        )
    try:
        said, found = step_slips.after(answer)
    except Exception as error:
        return Verdict(name, "wrong", f"your function stops with {type(error).__name__}: {error}")
    right_said, right = step_slips.mistaken("")
    if said[0] is None and torch.equal(found, step_slips.after(lambda *given: None)[1]):
        return Verdict(name, "open", "nothing written yet; fill in the gap and run the cell again")
    if not step_slips.close(found, right):
        fitting = [
            text
            for text in step_slips.SLIPS
            if step_slips.close(found, step_slips.mistaken(text)[1])
        ]
        said_of = "; or: ".join(fitting) or (
            f"after four steps weights are off by up to {float((found - right).abs().max()):.2g}"
        )
        return Verdict(name, "wrong", said_of)
    values = [None if value is None else float(torch.as_tensor(value).detach()) for value in said]
    if None in values:
        return Verdict(name, "wrong", "the learner is right; return the loss as well")
    if not torch.allclose(torch.tensor(values), torch.tensor(right_said), atol=1e-3):
        return Verdict(name, "wrong", "the learner is right, but you return another loss than that "
                       "of the next token")  # fmt: skip
    return Verdict(name, "right", "four steps, and the weights are those of the package's")
