"""Row 13: what one draft a pass is worth, beside what arithmetic says it should be worth.

A drafting step writes 1 + p tokens, p being the share of drafts that are accepted, and costs 1 + c
plain passes: verifying reads two tokens instead of one, and the draft is made by the MTP module.
So drafting should be (1 + p) / (1 + c) times as fast, with c from the parts timed alone; the goal
is that nine tenths of it arrive. The model is the shipped one, the texts are beginnings of Python's
standard library that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from dsv3.bench.rounds import Clock, Spread, in_turn
from dsv3.bench.row import Goal, Line, Row, Workbench, state_of
from dsv3.checkpoint.loading import load_model
from dsv3.data.code import code_documents, read_modules, split_modules
from dsv3.generation.loop import complete, stream
from dsv3.model import Transformer
from dsv3.shipped import model_folder
from dsv3.training.exam import beginnings_of

NEW = 17
MODEL = "dsv3-mini"


def by_batch(
    model: Transformer, prompts: list[list[int]], clock: Clock, allowed: float
) -> dict[str, Any]:
    """Tokens a second after the first token, plain and drafted, and what the parts cost.

    rates: of each round, by "plain" and "drafted"; tokens_per_pass: 1 + p; ms: of a plain pass, of
    verifying, of drafting; c from them; expected: (1 + p) / (1 + c).
    """
    b, runs, used = len(prompts), {}, {}

    def start(name: str) -> None:
        speculative = name == "drafted"
        run = stream(model, prompts, max_new_tokens=NEW, speculative=speculative, eos_ids=())
        next(run)  # the first token is the prompt's
        runs[name] = run

    def finish(name: str) -> None:
        for _ in runs[name]:
            pass
        used[name] = runs[name].result.tokens_per_pass

    names = "plain", "drafted"
    whole = in_turn(
        {name: partial(finish, name) for name in names}, clock, allowed / 2, before=start
    )
    parts = in_turn(_parts(model, prompts), clock, allowed / 2)
    ms = {name: 1e3 * Spread.of(times).middle for name, times in parts.items()}
    c = (ms["verify"] + ms["draft"]) / ms["plain"] - 1
    return {
        "batch": b,
        "rates": {name: [b * (NEW - 1) / took for took in whole[name]] for name in names},
        "tokens_per_pass": used["drafted"],
        "ms": ms,
        "c": c,
        "expected": used["drafted"] / (1 + c),
    }


def _parts(model: Transformer, prompts: list[list[int]]) -> dict[str, Callable[[], None]]:
    """A plain pass, one that verifies a draft, and a draft, behind as many tokens as a run has."""
    b, held = len(prompts), len(prompts[0]) + NEW
    cache, drafts = model.new_cache(b, held + 2), model.new_draft_cache(b, held + 2)
    text = torch.tensor(prompts)[:, :1].expand(b, held).contiguous().to(model.device)
    with torch.inference_mode():
        _, hidden = model(text, cache=cache, return_hidden=True)
        model.mtp_logits(hidden, text, cache=drafts)

    @torch.inference_mode()
    def read(width: int) -> None:
        model(text[:, :width], cache=cache)
        cache.truncate([held] * b)

    @torch.inference_mode()
    def draft(width: int) -> None:
        model.mtp_logits(hidden[:, :width], text[:, :width], cache=drafts, last_only=True)
        drafts.truncate([held] * b)

    # Two states enter the module after a draft that was accepted.
    return {"plain": partial(read, 1), "verify": partial(read, 2), "draft": partial(draft, 2)}


def prompts_of(count: int) -> list[list[int]]:
    """Beginnings of held-out modules, 32 tokens each."""
    _, held_out = split_modules(read_modules())
    words = Tokenizer.from_file(str(Path(model_folder(MODEL), "tokenizer.json")))
    return beginnings_of(words, code_documents(held_out), count)


def drafted(
    precision: str, texts: int, row: Row, bench: Workbench, allowed: float
) -> Iterator[Line]:
    """How much of what is expected arrives."""
    model = load_model(MODEL, precision, bench.device)
    prompts = prompts_of(texts)
    plain, drafts = (
        complete(model, prompts, max_new_tokens=NEW, speculative=speculative).ids
        for speculative in (False, True)
    )
    if plain != drafts:
        yield Line(
            row.number, row.name, row.case, "", "failed", note="the text with drafts is another one"
        )
        return
    found = by_batch(model, prompts, bench.clock, allowed)
    times = [d / p for d, p in zip(found["rates"]["drafted"], found["rates"]["plain"])]
    faster, expected = Spread.of(times), found["expected"]
    share, goal = faster.each(lambda value: value / expected), Goal(0.9)
    yield Line(
        row.number, row.name, row.case, "(1 + p) / (1 + c)", state_of(goal, share.middle), goal,
        share, faster, Spread(expected, expected, expected), "times plain", len(times), "same text",
        f"p {found['tokens_per_pass'] - 1:.2f}, c {found['c']:.2f}",
    )  # fmt: skip


def rows(suite: str) -> list[Row]:
    return [
        Row(13, "drafting", f"dsv3-mini, {precision}, 1 text", partial(drafted, precision, 1))
        for precision in ("fp32", "fp8")
    ]
