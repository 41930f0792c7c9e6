"""Answers to chapter 6's exercises with mistakes that readers make, and what must be said."""

from __future__ import annotations

from dsv3.book import step_slips

SIZES = {
    "tokens in V3's first step": 12_582_912,
    "tokens in a step after the ramp": 62_914_560,
    "whole steps in the last 167 billion tokens": 2_654,
}
CLAIMS = {
    "Adam's first step is twice as long for a gradient twice as large": False,
    "in V3's training a window can hold the end of one document and the "
    "start of another, and the second sees the first": True,
    "clipping changes the direction of the gradient": False,
    "the balance loss of V3 has a weight of 0": False,
    "the routing bias gets a small gradient through the gate weights": False,
    "with master weights in BF16, small steps add up to large ones in time": False,
    "a run that goes on without Adam's moments stops with an error": False,
    "a falling loss on text that is read again and again means a better model": False,
}
FIRST, LAST = "all 200 steps below 0.28", "last 50 below 0.18"
LOGS = dict(A="leak", B="moments", C="fine", D="sign", E="kept", F="batch")


def adamw(
    *,
    correct=True,
    beside=True,
    decays="weight",
    old=False,
    root=True,
    keep=False,
    square=True,
    way=1,
    early=0,
):
    def answer(w, g, m, v, t, lr=0.1, b1=0.9, b2=0.95, decay=0.1, eps=1e-8):
        if decays == "gradient":
            g = g + decay * w
        before = m, v
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * (g * g if square else g.abs())
        above, below = before if old else (m, v)
        if correct:
            above, below = above / (1 - b1 ** (t + early)), below / (1 - b2 ** (t + early))
        if not root:
            size = below + eps
        else:
            size = below.sqrt() + eps if beside else (below + eps).sqrt()
        new = w - way * lr * above / size
        if decays == "weight":
            new = new - way * lr * decay * w
        if decays == "after":
            new = new - lr * decay * new
        if decays == "whole":
            new = new - decay * w
        return (new, above, below) if keep else (new, m, v)

    return answer


def kept(*, without=(), clone=True):
    def answer(run):
        tensors = {name: getattr(run, name) for name in ("weights", "moments", "bias")}
        if clone:
            tensors = {name: value.clone() for name, value in tensors.items()}
        all_of_it = {
            **tensors,
            "step": run.step,
            "position": run.position,
            "random": run.random.get_state(),
        }
        return {name: value for name, value in all_of_it.items() if name not in without}

    return answer


def the_generator(run):
    return {**kept()(run), "random": run.random}


def step(**how):
    return lambda *given: float(step_slips.step(*given, **how)["loss"])


def the_sum(*given):
    told = step_slips.step(*given)
    return float(told["loss"] + told["mtp_loss"])


def returns_nothing(*given):
    step_slips.step(*given)


PLANTED = {
    "batch_sizes": [
        (SIZES | {"tokens in V3's first step": 3_072}, "each has 4,096 tokens"),
        (SIZES | {"whole steps in the last 167 billion tokens": 2_655}, "round down"),
        (SIZES | {"whole steps in the last 167 billion tokens": 13_272}, "has grown"),
        (SIZES | {"tokens in a step after the ramp": 12_582_912}, "the other one"),
        (SIZES | {"tokens in a step after the ramp": 61_000_000}, "times 4,096"),
    ],
    "adamw": [
        (adamw(correct=False), "1 - b1**t"),
        (adamw(beside=False), "not under it"),
        (adamw(decays="gradient"), "through Adam's division"),
        (adamw(decays="no"), "decay is missing"),
        (adamw(decays="whole"), "by the learning rate as well"),
        (adamw(old=True), "moments of before"),
        (adamw(decays="after"), "not after it"),
        (adamw(way=-1), "subtract it"),
        (adamw(early=1), "has t = 1"),
        (adamw(root=False), "the root of v"),
        (adamw(keep=True), "for this step alone"),
        (adamw(square=False), "mean of squares"),
    ],
    "tune_gamma": [
        ({FIRST: 0.1, LAST: 0.003}, "smaller steps"),
        ({FIRST: 0.0003, LAST: 0.003}, "larger steps"),
        ({FIRST: 0.01, LAST: 0.02}, "smaller steps"),
        ({FIRST: 0.005, LAST: 0.003}, "larger steps"),
        ({FIRST: 0.003, LAST: 0.003}, "larger steps"),
        ({FIRST: 0.01, LAST: 0.05}, "smaller steps"),
        ({FIRST: 0.01, LAST: 0.001}, "larger steps"),
        ({FIRST: 0, LAST: None}, "nothing changes"),
        ({FIRST: "0.01", LAST: None}, "a number from 0 to 10"),
    ],
    "training_claims": [
        (CLAIMS | {key: not truth}, phrase)
        for (key, truth), phrase in zip(
            CLAIMS.items(),
            (
                "the sign",
                "no mask",
                "one number",
                "0.0001",
                "no gradient",
                "rounded away",
                "fresh moments",
                "by heart",
            ),
        )
    ],
    "broken_runs": [
        (LOGS | {"A": "fine", "C": "leak"}, "no honest module"),
        (LOGS | {"B": "fine", "C": "moments"}, "up to step 41"),
        (LOGS | {"D": "kept", "E": "sign"}, "max_violation of such a run grows"),
        (LOGS | {"F": "kept"}, "grad_norm is above"),
        (LOGS | {"F": "crash"}, "is asked for"),
    ],
    "snapshot": [
        (kept(clone=False), "clone it"),
        (kept(without=["moments"]), "without moments"),
        (kept(without=["bias", "random"]), "random numbers begin again"),
        (kept(without=["position"]), "the same text again"),
        (kept(without=["step"]), "as if they had just begun"),
        (the_generator, "get_state()"),
        (lambda run: [run.weights], "return a dict"),
        (lambda run: kept()(run) | {"weights": run.weights.tolist()}, "tensors as tensors"),
    ],
    "one_step": [
        (step(way=-1), "wrong way"),
        (step(way=0), "does not move"),
        (step(sign=False), "by the sign"),
        (step(zero=False), "pile up"),
        (step(clip=False), "not clipped"),
        (step(weight=1.0), "no weight"),
        (step(weight=0.0), "MTP loss is missing"),
        (step(balance=False), "balance loss is missing"),
        (step(leak=True), "that it is asked for"),
        (step(asked_once=True), "just fed"),
        (step(reset=False), "not reset"),
        (step(rate=False), "never set"),
        (the_sum, "another loss"),
        (returns_nothing, "return the loss as well"),
    ],
}
