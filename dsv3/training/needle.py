"""Does a model use a long context? The needle test (TR 4.3), and the loss by position.

A *needle* is one line, ``let q = 58``, somewhere in many lines of arithmetic; the last line asks
for it, ``get q =``. Values have two digits, so guessing is right once in ninety. Other lets are
strewn around: a model that repeats the last value it saw, or any, fails.

The test asks for retrieval, which a small model may not have learned even where it reads well. The
loss by position needs no such skill. A context that helps makes later tokens easier; positions that
the model has never seen make them much harder. Before the extension with YaRN the loss jumps behind
the trained length; after it, the loss must go on falling.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from dsv3.data.arithmetic import NAMES, SHORT_LINES, task
from dsv3.data.vocabulary import BOS, pack
from dsv3.errors import DSV3Error
from dsv3.model import Transformer

LENGTHS = (64, 128, 192, 256, 384, 512, 768, 1000)
DEPTHS = (0.1, 0.5, 0.9)
EDGES = (0, 256, 512, 1024)
DISTRACTORS = 3


def haystack(
    tokenizer: Tokenizer,
    length: int,
    depth: float,
    rng: np.random.Generator,
    distractors: int = DISTRACTORS,
) -> tuple[list[int], list[int]]:
    """One prompt and the right answer, as token ids; together at most ``length``, and nearly.

    depth: share of the lines that stand before the needle, 0 to 1. The answer is " 58" with its
    line break, so that a third digit is wrong. Raises DSV3Error where the lines do not fit.
    """
    names = rng.permutation(list(NAMES)).tolist()[: 1 + distractors]
    values = (10 + rng.permutation(90)[: 1 + distractors]).tolist()
    needle, *others = [f"let {name} = {value}\n" for name, value in zip(names, values, strict=True)]
    ask, answer = f"get {names[0]} =", pack(tokenizer, [f" {values[0]}\n"]).tolist()
    room = length - len(answer) - len(pack(tokenizer, [BOS, needle, *others, ask]))
    if room < 0 or not 0 <= depth <= 1:
        raise DSV3Error(
            "does not fit",
            where="needle test",
            found=f"length {length}, depth {depth}, {distractors} other lets",
            expected=f"a length of at least {length - room}, a depth of 0 to 1",
        )
    while True:
        line = " ".join(task(rng, held_out=True, kinds=SHORT_LINES)) + "\n"
        room -= len(pack(tokenizer, [line]))
        if room < 0:
            break
        others.append(line)
    lines = [others[number] for number in rng.permutation(len(others))]
    lines.insert(round(depth * len(lines)), needle)
    return pack(tokenizer, [BOS + "".join(lines) + ask]).tolist(), answer


@torch.inference_mode()
def needle_test(
    model: Transformer,
    tokenizer: Tokenizer,
    lengths: tuple[int, ...] = LENGTHS,
    depths: tuple[float, ...] = DEPTHS,
    count: int = 25,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[int, dict[float, float]]:
    """Share of ``count`` needles found greedily: length in tokens -> depth -> 0 to 1.

    The prompts depend on length, depth and seed alone, so two models are asked the same. One pass
    over prompt and right answer decides: greedy decoding says the answer just when each of its
    tokens is the best one after the right beginning.
    """
    device = model.group.device
    grid: dict[int, dict[float, float]] = {}
    for length in lengths:
        if length > model.config.max_position_embeddings:
            raise DSV3Error(
                "longer than the context",
                where="needle test",
                found=length,
                expected=f"at most {model.config.max_position_embeddings}",
            )
        grid[length] = {}
        for depth in depths:
            rng = np.random.default_rng([seed, length, round(1000 * depth)])
            rows = [haystack(tokenizer, length, depth, rng) for _ in range(count)]
            found = 0
            for start in range(0, count, batch_size):
                some = rows[start : start + batch_size]
                tokens = torch.zeros(len(some), length, dtype=torch.int64)
                for row, (prompt, answer) in enumerate(some):
                    tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                best = model(tokens.to(device)).argmax(-1).tolist()
                found += sum(
                    best[row][len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
                    for row, (prompt, answer) in enumerate(some)
                )
            grid[length][depth] = found / count
    return grid


@torch.inference_mode()
def loss_by_position(
    model: Transformer,
    windows: Int[Tensor, "n w"],
    edges: tuple[int, ...] = EDGES,
    batch_size: int = 2,
) -> dict[tuple[int, int], float]:
    """Nats a token, by the place of the last token read: (from, to) -> mean loss.

    windows: (n, s + 1), or more, of which the model reads s = the last of ``edges``. All places
    are over the same windows, so a difference between them is not one between texts.
    """
    length = edges[-1]
    if windows.shape[1] <= length:
        raise DSV3Error(
            "windows too short",
            where="loss by position",
            found=windows.shape[1],
            expected=f"{length + 1} or more",
        )
    nats = torch.zeros(length, dtype=torch.float64)
    for window in windows.split(batch_size):
        logits = model(window[:, :length].to(model.group.device))
        loss = F.cross_entropy(
            logits.flatten(0, 1),
            window[:, 1 : 1 + length].flatten().to(logits.device),
            reduction="none",
        )
        nats += loss.view(-1, length).double().sum(0).cpu()
    nats /= len(windows)
    return {(start, end): float(nats[start:end].mean()) for start, end in pairwise(edges)}
