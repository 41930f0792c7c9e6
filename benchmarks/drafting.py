"""What drafting is worth on the shipped model, by depth of the draft and by size of the batch.

    python benchmarks/drafting.py [--rounds 5] [--out assets/measurements/drafting.json]

By depth, on held-out text and in greedy generation: of the drafts whose forerunners were all right,
how many are right too. On held-out text, right means the real next token, or the model's own
greedy choice after the real text. By batch size: tokens per second of the CPU's time with one draft
a pass and without, in turn, one thread; then c, what a drafting step costs more than a plain
pass (the parts are timed alone), and (1 + p) / (1 + c) beside the ratio that was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from tokenizers import Tokenizer

from dsv3 import load_model
from dsv3.data import load_domains, pack
from dsv3.generation.loop import complete, stream
from dsv3.training import exam

MODEL = Path(__file__).parents[1] / "assets" / "dsv3-mini"
DEPTHS, BATCHES, NEW = 4, (1, 2, 4, 8, 16, 32), 17
WINDOWS, LENGTH, EVERY = 16, 96, 4  # held-out text by domain; drafts begin at each 4th token


@torch.inference_mode()
def depths_on_text(model, windows: torch.Tensor) -> dict[str, list[list[int]]]:
    """[verified, right] of each depth, against the real tokens and the model's own choices."""
    logits, hidden = model(windows, return_hidden=True)
    own = logits.argmax(-1)
    cache = model.new_draft_cache(len(windows), windows.shape[1])
    found = {name: [[0, 0] for _ in range(DEPTHS)] for name in ("real", "model")}
    for last in range(EVERY, LENGTH, EVERY):  # the newest token that is known
        held = cache.lengths[0]
        states, tokens = hidden[:, held:last], windows[:, held + 1 : last + 1]
        right = torch.ones(len(windows), dtype=torch.bool)
        for depth in range(DEPTHS):
            scores, states = model.mtp_logits(states, tokens, cache=cache, last_only=True)
            guess, states = scores.argmax(-1), states[:, -1:]
            place = last + 1 + depth
            for name, wanted in ("real", windows[:, place]), ("model", own[:, place - 1]):
                found[name][depth][0] += int(right.sum())
                found[name][depth][1] += int((right & (guess == wanted)).sum())
            right &= guess == windows[:, place]
            tokens = guess[:, None]
        cache.truncate([last] * len(windows))
    return found


def by_depth(model, tokenizer, domains) -> dict[str, dict]:
    """Of each domain: depths on held-out text, and in greedy generation from its beginnings."""
    out = {}
    for domain in domains:
        ids = pack(tokenizer, domain.held_out)
        windows = exam.held_out_windows(model, ids, LENGTH + DEPTHS, WINDOWS)
        prompts = exam.beginnings_of(tokenizer, domain.held_out, WINDOWS)
        run = complete(model, prompts, max_new_tokens=64, speculative=True, num_draft_tokens=DEPTHS)
        out[domain.name] = {
            **depths_on_text(model, windows),
            "generation": [list(depth) for depth in run.accepted_by_depth or []],
            "tokens_per_pass": run.tokens_per_pass,
        }
    return out


def in_turn(jobs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each job's answers, the jobs one after the other, again and again, after one for warmth."""
    for job in jobs.values():
        job()
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            found[name].append(job())
    return found


@torch.inference_mode()
def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def by_batch(model, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Tokens per second after the first token, plain and drafted, and what the parts cost."""
    b, used = len(prompts), {}

    def rate(speculative: bool) -> float:
        run = stream(model, prompts, max_new_tokens=NEW, speculative=speculative, eos_ids=())
        next(run)
        took = seconds(lambda: list(run))
        used[speculative] = run.result.tokens_per_pass
        return b * (NEW - 1) / took

    held = len(prompts[0]) + NEW
    cache, drafts = model.new_cache(b, held + 2), model.new_draft_cache(b, held + 2)
    text = torch.tensor(prompts)[:, :1].expand(b, held).contiguous()
    with torch.inference_mode():
        _, hidden = model(text, cache=cache, return_hidden=True)
        model.mtp_logits(hidden, text, cache=drafts)

    def part(width: int, module: bool) -> float:
        tokens, kept = text[:, :width], drafts if module else cache
        took = seconds(
            lambda: (
                model.mtp_logits(hidden[:, :width], tokens, cache=kept, last_only=True)
                if module
                else model(tokens, cache=kept)
            )
        )
        kept.truncate([held] * b)
        return took

    rates = in_turn({"plain": lambda: rate(False), "drafted": lambda: rate(True)}, rounds)
    parts = in_turn(
        {
            "plain": lambda: part(1, False),
            "verify": lambda: part(2, False),
            "draft": lambda: part(2, True),  # two states enter after an accepted draft
        },
        2 * rounds,
    )
    middle = {name: statistics.median(found) for name, found in parts.items()}
    c = (middle["verify"] + middle["draft"]) / middle["plain"] - 1
    ratios = [drafted / plain for drafted, plain in zip(rates["drafted"], rates["plain"])]
    return {
        "batch": b,
        **{
            f"{name}_{which}": figure(found)
            for name, found in rates.items()
            for which, figure in (("median", statistics.median), ("least", min), ("most", max))
        },
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "tokens_per_pass": used[True],
        **{f"{name}_ms": 1000 * took for name, took in middle.items()},
        "c": c,
        "expected": used[True] / (1 + c),
    }


def machine() -> dict[str, object]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "date": str(date.today()),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in wanted if f" {flag} " in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, domains = Tokenizer.from_file(str(MODEL / "tokenizer.json")), load_domains()
    found: dict = {"machine": machine(), "rounds": args.rounds, "by_batch": {}}
    for precision in ("fp32", "fp8"):
        model = load_model(MODEL, precision)
        if precision == "fp32":
            found["by_depth"] = by_depth(model, tokenizer, domains)
            for name, by in found["by_depth"].items():
                for what in ("real", "model", "generation"):
                    shares = [f"{right / max(seen, 1):6.1%}" for seen, right in by[what]]
                    print(f"{name:12} {what:10} {'  '.join(shares)}", flush=True)
                print(f"{name:12} {by['tokens_per_pass']:.2f} tokens a pass with {DEPTHS} drafts")
        pool = [
            prompt
            for group in zip(
                *(exam.beginnings_of(tokenizer, domain.held_out, 11) for domain in domains)
            )
            for prompt in group
        ]
        rows = found["by_batch"][precision] = []
        print(
            f"\n{precision}: batch, tokens/s plain, drafted, ratio, tokens a pass, c, (1+p)/(1+c)"
        )
        for b in BATCHES:
            rows.append(row := by_batch(model, pool[:b], args.rounds))
            print(
                f"{b:3} {row['plain_median']:8.1f} {row['drafted_median']:8.1f}  "
                f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})  "
                f"{row['tokens_per_pass']:.2f}  {row['c']:.2f}  {row['expected']:.2f}",
                flush=True,
            )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rounded = json.loads(
            json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}")
        )
        args.out.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
