"""What each part of a trained model is worth, and whether the model uses its context.

A part that training left where it began is invisible in the loss: nothing gets worse when it is
taken away. So it is taken away. ``cost_without`` sets one part's last matrix to zero and reads the
same held-out windows again; the difference, window by window, is what the part was worth there.

The context is asked for in three ways. A passage that stands twice is cheap the second time for a
model that copies (``two_copies``); the heads that do it look from a token to the one that followed
its earlier copy (``induction_scores``); and a fact must be found again over a distance
(``facts_found``; ``dsv3.training.needle`` asks the same among sums).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Tensor, nn

from dsv3.block import Block
from dsv3.cache import Step
from dsv3.data.recall import english_facts
from dsv3.data.vocabulary import BOS, pack
from dsv3.errors import DSV3Error
from dsv3.mla import MLA
from dsv3.model import Transformer


@dataclass(frozen=True)
class Spread:
    """A mean over windows or passages, and how far one of them is from it (standard deviation)."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Float[Tensor, " n"]) -> Spread:
        """The spread of n values."""
        values = values.double()
        return cls(
            float(values.mean()), float(values.std()) if len(values) > 1 else 0.0, len(values)
        )

    def __str__(self) -> str:
        return f"{self.mean:+.3f} +- {self.deviation:.3f} (n = {self.count})"


# Parts ------------------------------------------------------------------------------------------


def _blocks(layers: nn.ModuleList) -> list[Block]:
    return [layer for layer in layers if isinstance(layer, Block)]


def _attention(model: Transformer) -> list[MLA]:
    return [layer.attn for layer in _blocks(model.layers)]


def _up_projections(model: Transformer) -> list[Tensor]:
    """wkv_b of every layer, (heads, d_h + d_v, d_c)."""
    return [attn.wkv_b.weight.unflatten(0, (attn.heads, -1)) for attn in _attention(model)]


def _key_rows(model: Transformer) -> list[Tensor]:
    return [both[:, : model.config.qk_nope_head_dim] for both in _up_projections(model)]


def _value_rows(model: Transformer) -> list[Tensor]:
    return [both[:, model.config.qk_nope_head_dim :] for both in _up_projections(model)]


def _rotated_rows(model: Transformer) -> list[Tensor]:
    return [attn.wkv_a.weight[model.config.kv_lora_rank :] for attn in _attention(model)]


def _experts(model: Transformer, which: Callable) -> list[Tensor]:
    layers = [layer for number, layer in enumerate(model.layers) if model.config.is_moe(number)]
    return [which(layer.ffn) for layer in layers]


# Name -> the tensors (views of what the model computes with) that are set to zero.
PARTS: dict[str, Callable[[Transformer], list[Tensor]]] = {
    "W^UK": _key_rows,
    "W^UV": _value_rows,
    "W^KR": _rotated_rows,
    "shared expert": lambda model: _experts(model, lambda moe: moe.shared_experts.w2.weight),
    "routed experts": lambda model: _experts(model, lambda moe: moe.experts.w2),
    "MTP attention": lambda model: [module.attn.wo.weight for module in _blocks(model.mtp)],
}


@contextlib.contextmanager
def without(model: Transformer, part: str) -> Iterator[None]:
    """The model with one of ``PARTS`` set to zero in every layer, and whole again afterwards."""
    if part not in PARTS:
        raise DSV3Error("no such part", where="anatomy", found=part, expected=", ".join(PARTS))
    views = [
        view.view(torch.uint8) if view.dtype == torch.float8_e4m3fn else view
        for view in PARTS[part](model)
    ]
    with torch.no_grad():
        kept = [view.clone() for view in views]
        for view in views:
            view.zero_()
        try:
            yield
        finally:
            for view, values in zip(views, kept):
                view.copy_(values)


@torch.no_grad()
def token_losses(
    model: Transformer, windows: Int[Tensor, "n w"], ahead: bool = False, batch_size: int = 8
) -> Float[Tensor, "n t"]:
    """Nats of every token; ahead: what the first MTP module says of the token after the next."""
    losses = []
    for window in windows.split(batch_size):
        window = window.to(model.device)
        if ahead:
            _, hidden = model(window[:, :-2], return_hidden=True)
            logits, _ = model.mtp_logits(hidden, window[:, 1:-1])
            targets = window[:, 2:]
        else:
            logits, targets = model(window[:, :-1]), window[:, 1:]
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
            .view_as(targets)
            .float()
            .cpu()
        )
    return torch.cat(losses)


def cost_without(
    model: Transformer, windows: dict[str, Int[Tensor, "n w"]], parts: Sequence[str] = tuple(PARTS)
) -> dict[str, dict[str, Spread]]:
    """Nats a token that each part is worth: part -> name of the windows -> spread over windows.

    The MTP module's part is measured in the module's own loss, the others in the main one.
    """
    result: dict[str, dict[str, Spread]] = {}
    whole = {
        (name, ahead): token_losses(model, some, ahead).mean(1)
        for name, some in windows.items()
        for ahead in {part.startswith("MTP") for part in parts}
    }
    for part in parts:
        ahead = part.startswith("MTP")
        with without(model, part):
            result[part] = {
                name: Spread.of(token_losses(model, some, ahead).mean(1) - whole[name, ahead])
                for name, some in windows.items()
            }
    return result


# Context ----------------------------------------------------------------------------------------


def passages_twice(
    tokenizer: Tokenizer, ids: np.ndarray, length: int, count: int
) -> Int[Tensor, "n w"]:
    """``count`` passages of ``length`` tokens, evenly spaced in a text, each twice in a row behind
    the begin token."""
    if len(ids) < length:
        raise DSV3Error(
            "text too short",
            where="two copies",
            found=f"{len(ids)} tokens",
            expected=f"{length} or more",
        )
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    bos = pack(tokenizer, [BOS])
    return torch.stack(
        [
            torch.from_numpy(np.concatenate([bos, ids[s : s + length], ids[s : s + length]]))
            for s in starts
        ]
    ).long()


def two_copies(model: Transformer, twice: Int[Tensor, "n w"]) -> dict[str, Spread]:
    """Nats a token of the first and second copy of each passage, and second over first.

    The first token of a copy is left out: nothing says that the passage begins again.
    """
    losses = token_losses(model, twice)
    length = losses.shape[1] // 2
    first, second = losses[:, 1:length].mean(1), losses[:, length + 1 :].mean(1)
    return {
        "first": Spread.of(first),
        "second": Spread.of(second),
        "ratio": Spread.of(second / first),
    }


@torch.no_grad()
def induction_scores(model: Transformer, twice: Int[Tensor, "n w"]) -> Float[Tensor, "l heads"]:
    """Share of attention that a token of the second copy pays to the token behind its first copy.

    Mean over tokens and passages, for every layer and head; 1 / (tokens seen) by chance.
    """
    count = twice.shape[1]
    length = (count - 1) // 2
    query = torch.arange(length + 1, 2 * length)  # the tokens of the second copy but its last
    layers = _blocks(model.layers)
    scores = torch.zeros(len(layers), layers[0].attn.heads)
    step = Step.make(model.config, [0], [count], count, model.device)
    hidden = torch.ones(count, count, device=model.device).triu(1).bool()
    for tokens in twice:
        x = model.embed(tokens[None].to(model.device))
        for number, layer in enumerate(layers):
            h, attn = layer.attn_norm(x), layer.attn
            q = torch.cat(attn.queries(h, step), -1).transpose(1, 2)
            k, _ = attn.wkv_b(attn.latents(h, step).to(model.precision.core(model.device)))
            weights = (
                (q.to(k.dtype) @ k.transpose(-1, -2) * attn.scale)
                .masked_fill(hidden, float("-inf"))
                .softmax(-1)[0]
            )
            scores[number] += weights[:, query, query - length + 1].float().mean(-1).cpu()
            x = layer(x, step)
    return scores / len(twice)


def facts_prompt(
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    filler: Sequence[str],
    distance: int,
    facts: int = 4,
) -> tuple[list[int], list[int]]:
    """Facts about people, lines of other text, and a question: (prompt, answer) as token ids.

    distance: tokens between the fact that is asked for and its answer, or a line's length less.
    filler: lines to choose from.
    """
    told = english_facts(rng, facts)
    fact, asked = told[0]
    question, _, answer = asked.rpartition("? ")
    lines = [said for said, _ in told[1:]]
    room = distance - sum(len(pack(tokenizer, [text])) for text in (*lines, question + "?"))
    while True:
        line = filler[int(rng.integers(len(filler)))] + "\n"
        room -= len(pack(tokenizer, [line]))
        if room < 0:
            break
        lines.append(line)
    lines = [lines[number] for number in rng.permutation(len(lines))]
    # The answer's first token stands alone behind the question mark, as in training.
    prompt = pack(tokenizer, [BOS + fact + "".join(lines) + question + "?"])
    whole = pack(tokenizer, [BOS + fact + "".join(lines) + question + "? " + answer])
    return prompt.tolist(), whole[len(prompt) :].tolist()


@torch.no_grad()
def facts_found(
    model: Transformer,
    tokenizer: Tokenizer,
    filler: Sequence[str],
    distances: Sequence[int],
    count: int = 50,
    seed: int = 0,
) -> dict[int, float]:
    """Share of ``count`` facts that are named rightly, greedily and to the end, by distance.

    One pass over prompt and answer decides, as in ``dsv3.training.needle``.
    """
    found = {}
    for distance in distances:
        rng, right = np.random.default_rng([seed, distance]), 0
        for _ in range(count):
            prompt, answer = facts_prompt(tokenizer, rng, filler, distance)
            tokens = torch.tensor([prompt + answer])[:, : model.config.max_position_embeddings]
            best = model(tokens.to(model.device)).argmax(-1)[0].tolist()
            right += best[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
        found[distance] = right / count
    return found
