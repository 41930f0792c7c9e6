"""What drafting is worth on the shipped model, by depth of the draft and by size of the batch.

    python benchmarks/drafting.py [--seconds 30] [--out assets/measurements/drafting.json]

By depth, on held-out text and in greedy generation: of the drafts whose forerunners were all right,
how many are right too. On held-out text, right means the real next token, or the model's own
greedy choice after the real text. By batch size: tokens per second of the CPU's time with one draft
a pass and without, in turn, one thread; then c, what a drafting step costs more than a plain
pass (the parts are timed alone), and (1 + p) / (1 + c) beside the ratio that was measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from dsv3 import load_model
from dsv3.bench.drafting import by_batch
from dsv3.bench.machine import described
from dsv3.data import load_domains, pack
from dsv3.generation.loop import complete
from dsv3.training import exam

MODEL = Path(__file__).parents[1] / "assets" / "dsv3-mini"
DEPTHS, BATCHES = 4, (1, 2, 4, 8, 16, 32)
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


def figures(found: dict) -> dict[str, float]:
    """What chapter 5 reads of ``by_batch``."""
    rates, told = found.pop("rates"), dict(found)
    told |= {f"{name}_ms": took for name, took in told.pop("ms").items()}
    ratios = [drafted / plain for drafted, plain in zip(rates["drafted"], rates["plain"])]
    for name, values in *rates.items(), ("ratio", ratios):
        told |= {f"{name}_least": min(values), f"{name}_most": max(values)}
        told[name if name == "ratio" else f"{name}_median"] = statistics.median(values)
    return told | {"rounds": len(ratios)}


class OwnTime:
    """A clock of the time that the CPU spends on this process: what else runs takes none of it."""

    def seconds(self, call) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30, help="for each size of batch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer, domains = Tokenizer.from_file(str(MODEL / "tokenizer.json")), load_domains()
    found: dict = {"machine": described(), "by_batch": {}}
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
            found_here = by_batch(model, pool[:b], OwnTime(), args.seconds)
            rows.append(row := figures(found_here))
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
