"""The examination of a trained model: what can it do on what it has never seen?

A loss says that one model is better than another, not what either can do. So each domain has a
question that can be answered with right or wrong: does the model add two numbers it has never
added, does the Python it writes parse, does the draft of the MTP module hold?

Rules that keep the figures honest:

- Everything is asked about held-out plays, modules and pairs of numbers. Sums are also asked of
  trained pairs: the difference is what was learned by heart.
- An answer counts when it is wholly right. Text that did not end does not count as Python.
- What could flatter a figure is counted too: code copied from training text, generated text that
  repeats itself (easy to draft).
- Prompts and seeds are fixed beforehand, and all samples count.

Prompts begin with the begin token, as every document in training did.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from dsv3 import data
from dsv3.errors import DSV3Error
from dsv3.generation.loop import complete
from dsv3.model import Transformer
from dsv3.training.balance import max_violation
from dsv3.training.evaluation import evaluate
from dsv3.training.routing import Specialisation, by_label, specialisation

# Most tokens a sum needs: "[9+9=18, 9+9+1=19] 118" and its line break, with some room.
_SUM_TOKENS = 40


def held_out_windows(
    model: Transformer, ids: np.ndarray, length: int, most: int | None = None
) -> Int[Tensor, "n w"]:
    """Windows of which the model reads ``length`` tokens, evenly spaced, at most ``most``."""
    overlap = 1 + model.config.num_nextn_predict_layers
    windows = data.in_order(ids, length + overlap, overlap)
    return windows[spread_out(range(len(windows)), most)]


def spread_out(items: Sequence, most: int | None) -> list:
    """At most ``most`` of the items, evenly spaced over them, in order."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[number * len(items) // most] for number in range(most)]


def held_out_figures(
    model: Transformer,
    tokenizer: Tokenizer,
    ids: dict[str, np.ndarray],
    length: int,
    most: int | None = None,
) -> dict[str, dict[str, float]]:
    """``evaluate`` by domain on windows of ``length`` tokens; "windows" says how many there were.

    ids: held-out tokens of each domain, packed.
    """
    sizes = torch.from_numpy(data.token_bytes(tokenizer)).to(model.group.device)
    figures = {}
    for name, tokens in ids.items():
        windows = held_out_windows(model, tokens, length, most).to(model.group.device)
        figures[name] = evaluate(model, windows, sizes, batch_size=max(1, 2048 // length))
        figures[name]["windows"] = len(windows)
    return figures


def sums_right(
    model: Transformer, tokenizer: Tokenizer, pairs: Sequence[tuple[int, int]], batch_size: int = 50
) -> dict:
    """Greedy answers to ``a + b =``, each at the beginning of a document, one line long.

    right: share of answers whose result, behind the working, is exactly a + b; working_right:
    share whose whole line is what the training text would say; wrong: some lines that were not
    right. An answer that does not end its line is wrong.
    """
    bos = tokenizer.token_to_id(data.BOS)
    line_ends = [number for token, number in tokenizer.get_vocab().items() if "Ċ" in token]
    # pyrefly: ignore[bad-argument-type] - our tokenizers have it
    line_ends.append(tokenizer.token_to_id(data.EOS))
    right, exact, wrong = 0, 0, []
    for start in range(0, len(pairs), batch_size):
        some = pairs[start : start + batch_size]
        prompts = [[bos, *encode(tokenizer, f"{a} + {b} =")] for a, b in some]
        result = complete(model, prompts, max_new_tokens=_SUM_TOKENS, eos_ids=line_ends)
        for (a, b), ids, reason in zip(some, result.ids, result.stopped_by, strict=True):
            said = tokenizer.decode(ids)
            good = reason == "eos" and data.final_answer(said) == str(a + b)
            right += good
            exact += good and said.strip() == f"{data.working(a, b)}{a + b}"
            if not good:
                wrong.append(f"{a} + {b} ={said}")
    return {
        "right": right / len(pairs),
        "working_right": exact / len(pairs),
        "asked": len(pairs),
        "wrong": wrong[:10],
    }


def some_sums(held_out: bool, count: int, seed: int = 0) -> list[tuple[int, int]]:
    """``count`` different pairs of two-digit numbers, held out or trained on."""
    pairs = data.sums(held_out)
    order = np.random.default_rng([seed, int(held_out)]).permutation(len(pairs))
    return [pairs[number] for number in order[:count]]


def first_lines(documents: Sequence[str], count: int) -> list[str]:
    """The first lines of ``count`` of the functions among the code documents, with line break.

    Evenly spaced; only first lines that hold a whole signature, so that the rest is a body.
    """
    heads = [document.removeprefix(data.BOS).split("\n")[0] for document in documents]
    return [
        head + "\n"
        for head in spread_out(
            [head for head in heads if head.startswith("def ") and head.endswith(":")], count
        )
    ]


def code_samples(
    model: Transformer,
    tokenizer: Tokenizer,
    beginnings: Sequence[str],
    temperature: float,
    top_p: float = 0.95,
    seed: int = 0,
    max_new_tokens: int = 512,
    trained: Sequence[str] = (),
    batch_size: int = 25,
) -> dict:
    """One sample for each beginning of a Python document, and whether it is Python.

    parsed: share that ended with the end token and that ``ast`` parses, from beginning to end;
    ended: share that ended; lines: their median number of lines (a body of one ``pass`` parses
    too); copied: share of those parsed whose new text stands word for word in one of ``trained``;
    texts: all samples; broken: the first syntax errors.
    """
    bos, eos = tokenizer.token_to_id(data.BOS), tokenizer.token_to_id(data.EOS)
    texts, ended, parsed, copied, broken = [], 0, [], 0, []
    for start in range(0, len(beginnings), batch_size):
        some = beginnings[start : start + batch_size]
        result = complete(
            model,
            [[bos, *encode(tokenizer, text)] for text in some],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + start,
            eos_ids=[eos],
        )
        for beginning, ids, reason in zip(some, result.ids, result.stopped_by, strict=True):
            new = tokenizer.decode(ids, skip_special_tokens=False)
            texts.append(beginning + new)
            if reason != "eos":
                continue
            ended += 1
            error = syntax_error(beginning + new)
            if error:
                broken.append(error)
            else:
                parsed.append(texts[-1].strip().count("\n") + 1)
                copied += any(new in document for document in trained)
    count = len(beginnings)
    return {
        "parsed": len(parsed) / count,
        "ended": ended / count,
        "samples": count,
        "lines": float(np.median(parsed)) if parsed else 0.0,
        "copied": copied / len(parsed) if parsed else 0.0,
        "temperature": temperature,
        "top_p": top_p,
        "broken": broken[:10],
        "texts": texts,
    }


def syntax_error(text: str) -> str | None:
    """What is wrong with a Python text, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in strings
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"{type(error).__name__}: {getattr(error, 'msg', error)}"
    return None if tree.body else "nothing but comments"


def beginnings_of(
    tokenizer: Tokenizer, documents: Sequence[str], count: int, length: int = 32
) -> list[list[int]]:
    """The first ``length`` tokens of ``count`` documents that are longer, evenly spaced."""
    long = [
        ids[:length] for document in documents if len(ids := encode(tokenizer, document)) > length
    ]
    return spread_out(long, count)


def draft_acceptance(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int = 256,
    batch_size: int = 25,
) -> dict[str, float]:
    """Greedy speculative decoding of the prompts: what became of the drafts.

    acceptance: accepted over drafted tokens of all prompts; passes: of rows through the model;
    tokens: new ones; repeated: share of the new text's runs of eight tokens that stood in the
    same row before. A text in a loop is easy to draft, so acceptance should be read beside it.
    A row stops at its end token, as in use.
    """
    eos = tokenizer.token_to_id(data.EOS)
    accepted = passes = tokens = runs = new_runs = 0
    for start in range(0, len(prompts), batch_size):
        result = complete(
            model,
            prompts[start : start + batch_size],
            speculative=True,
            max_new_tokens=max_new_tokens,
            eos_ids=[eos],
        )
        # A row's last pass drafts nothing where one token is left; passes weigh nearly right.
        accepted += (result.acceptance or 0.0) * result.passes
        passes += result.passes
        for ids in result.ids:
            tokens += len(ids)
            eights = [tuple(ids[place : place + 8]) for place in range(len(ids) - 7)]
            runs, new_runs = runs + len(eights), new_runs + len(set(eights))
    return {
        "acceptance": accepted / max(passes, 1),
        "passes": passes,
        "tokens": tokens,
        "prompts": len(prompts),
        "repeated": 1 - new_runs / max(runs, 1),
    }


def routing_by_domain(
    counts: dict[str, Int[Tensor, "n experts"]],
    labels: Int[Tensor, " n"],
    shares: Sequence[float],
    permutations: int = 200,
) -> dict[str, dict]:
    """Balance and specialisation of each router, from ``routing.expert_counts``.

    labels: number of each window's domain. max_violation: MaxVio of the domains in their
    ``shares``, those of the training text, for which the bias was steered; by_domain: of each
    alone. The others are the fields of ``Specialisation``.
    """
    if len(shares) != int(labels.max()) + 1:
        raise DSV3Error(
            "wrong shares",
            where="routing",
            found=f"{len(shares)} shares",
            expected=f"one for each of {int(labels.max()) + 1} domains",
        )
    result = {}
    for name, table in counts.items():
        loads = by_label(table, labels)
        loads = loads / loads.sum(1, keepdim=True)
        found: Specialisation = specialisation(table, labels, permutations)
        mixed = torch.tensor(shares, dtype=torch.float64) @ loads
        result[name] = {
            "max_violation": max_violation(mixed),
            "by_domain": [max_violation(load) for load in loads],
            "beyond_chance": found.beyond_chance,
            **vars(found),
        }
    return result


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text that says itself where it begins."""
    return tokenizer.encode(text, add_special_tokens=False).ids
