"""Examine a trained model: held-out loss, sums, code, drafts, routing, parts, and its context.

    python benchmarks/exam.py assets/dsv3-mini [--precision fp8] [--quick] [--parts sums,code]
                              [--before FOLDER] [--json FILE]

Prints a table with the goal beside each figure, and the seconds each part took. All parts take
about 30 minutes on one core in FP8, with --quick about four. --before is for the needle test and
the context: the model of the first phase, before its context was extended, which a run keeps in
OUT/checkpoints/before-extension. It is asked the same at positions it has never seen. Needs the
training extra.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from dsv3 import data
from dsv3.checkpoint.loading import load_model
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.moe import Router
from dsv3.training import anatomy, exam, needle
from dsv3.training.balance import max_violation
from dsv3.training.recipe import Recipe
from dsv3.training.routing import expert_counts

PARTS = ("loss", "sums", "code", "drafts", "routing", "anatomy", "context", "needle")
# Tokens of a passage that stands twice; tokens between a fact and the question about it.
PASSAGES = (16, 60, 120, 200, 400)
FACT_DISTANCES = (64, 128, 240, 384, 512, 768, 1000)


@dataclass(frozen=True)
class Amount:
    """How much is asked; the defaults are the full examination.

    windows_long, windows_short: most windows a domain, of the whole context and of 256 tokens.
    """

    windows_long: int | None = None
    windows_short: int = 100
    sums: int = 200
    samples: int = 50
    prompts: int = 50
    routing_windows: int = 64
    needles: int = 25
    lengths: tuple[int, ...] = needle.LENGTHS
    position_windows: int = 40
    anatomy_windows: int = 48
    passages: int = 24
    facts: int = 100


QUICK = Amount(
    windows_long=6,
    windows_short=12,
    sums=40,
    samples=10,
    prompts=6,
    routing_windows=16,
    needles=6,
    lengths=(128, 256, 512, 1000),
    position_windows=8,
    anatomy_windows=8,
    passages=4,
    facts=12,
)


@dataclass(frozen=True)
class Line:
    """One figure of the table; goal: the least (or with ``most``, the largest) it should be."""

    what: str
    value: float
    unit: str = ""
    goal: float | None = None
    most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.most else self.value >= self.goal

    def __str__(self) -> str:
        shown = _shown(self.value, self.unit)
        goal = (
            ""
            if self.goal is None
            else (
                f"{'at most' if self.most else 'at least'} {_shown(self.goal, self.unit):>8}  "
                f"{'reached' if self.met else 'MISSED'}"
            )
        )
        return f"{self.what:<56} {shown:>13}   {goal}".rstrip()


def _shown(value: float, unit: str) -> str:
    return f"{value:.1%}" if unit == "%" else f"{value:.3f} {unit}".rstrip()


class Exam:
    """One model, its tokenizer and the held-out text; each part is a method that yields lines.

    details: everything the parts found, for --json.
    """

    def __init__(self, folder: Path, precision: str, amount: Amount, before: Path | None = None):
        self.model = load_model(folder, precision=precision)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        context = self.model.config.max_position_embeddings
        self.before = with_context(before, context, precision) if before else None
        self.amount, self.details = amount, {}
        self.domains = data.load_domains()
        self.ids = {
            domain.name: data.pack(self.tokenizer, domain.held_out) for domain in self.domains
        }

    def loss(self) -> Iterator[Line]:
        """Loss, bits per byte, MTP loss and agreement of drafts on held-out text."""
        context = self.model.config.max_position_embeddings
        amounts = {context: self.amount.windows_long, 256: self.amount.windows_short}
        for length, most in amounts.items():
            figures = exam.held_out_figures(self.model, self.tokenizer, self.ids, length, most)
            self.details.setdefault("held_out", {})[length] = figures
            for name, found in figures.items():
                where = f"{name}, {length} tokens:"
                goal = 1.95 if name == "plays" and length == context else None
                yield Line(f"{where} bits per byte", found["bits_per_byte"], "", goal, most=True)
                yield Line(f"{where} loss", found["loss"], "nats")
                if "mtp_loss" in found:
                    yield Line(f"{where} MTP loss", found["mtp_loss"], "nats")
                    yield Line(f"{where} drafts agree", found["draft_agreement"], "%")

    def sums(self) -> Iterator[Line]:
        """Sums of two two-digit numbers, greedily."""
        for held_out, name, goal in ((True, "held-out", 0.95), (False, "trained", None)):
            pairs = exam.some_sums(held_out, self.amount.sums)
            found = exam.sums_right(self.model, self.tokenizer, pairs)
            self.details.setdefault("sums", {})[name] = found
            yield Line(f"sums, {name} pairs: right", found["right"], "%", goal)
            yield Line(f"sums, {name} pairs: working right too", found["working_right"], "%")

    def code(self) -> Iterator[Line]:
        """Generated Python: does it end, does it parse?"""
        held_out, trained = self.domains[1].held_out, self.domains[1].train
        heads = exam.first_lines(held_out, self.amount.samples)
        runs = {
            "held-out signature, T 0.8": (heads, 0.8, 0.5),
            "held-out signature, T 0.2": (heads, 0.2, None),
            '"def ", T 0.8': (["def "] * self.amount.samples, 0.8, None),
        }
        for name, (beginnings, temperature, goal) in runs.items():
            found = exam.code_samples(
                self.model, self.tokenizer, beginnings, temperature, trained=trained
            )
            self.details.setdefault("code", {})[name] = found
            yield Line(f"code, {name}: ends and parses", found["parsed"], "%", goal)
            yield Line(f"code, {name}: ends", found["ended"], "%")
            yield Line(f"code, {name}: lines (median of parsed)", found["lines"])
            yield Line(f"code, {name}: body copied (of parsed)", found["copied"], "%")

    def drafts(self) -> Iterator[Line]:
        """Acceptance of MTP drafts, greedy, by domain and together."""
        results = {}
        for domain in self.domains:
            prompts = exam.beginnings_of(self.tokenizer, domain.held_out, self.amount.prompts)
            found = exam.draft_acceptance(self.model, self.tokenizer, prompts)
            results[domain.name] = found
            yield Line(f"drafts accepted, {domain.name}", found["acceptance"], "%", 0.7)
            yield Line(f"  text in it that repeats itself, {domain.name}", found["repeated"], "%")
        passes = sum(found["passes"] for found in results.values())
        together = sum(found["acceptance"] * found["passes"] for found in results.values()) / passes
        self.details["drafts"] = {**results, "together": together}
        yield Line("drafts accepted, together", together, "%", 0.75)

    def routing(self) -> Iterator[Line]:
        """Load of the experts, and what the domain says about them against shuffled labels."""
        parts = [
            exam.held_out_windows(self.model, ids, 256, self.amount.routing_windows)
            for ids in self.ids.values()
        ]
        labels = torch.arange(len(parts)).repeat_interleave(
            torch.tensor([len(part) for part in parts])
        )
        shares = Recipe().shares
        found = exam.routing_by_domain(
            expert_counts(self.model, torch.cat(parts)), labels, [shares[name] for name in self.ids]
        )
        self.details["routing"] = {
            "domains": list(self.ids),
            "windows": len(labels),
            "routers": found,
        }
        for name, router in found.items():
            yield Line(f"{name}: MaxVio in the training mixture", router["max_violation"])
            for domain, violation in zip(self.ids, router["by_domain"], strict=True):
                yield Line(f"  MaxVio in {domain} alone", violation)
            yield Line("  domain and expert share", router["bits"], "bits")
            yield Line("  with shuffled labels, mean", router["shuffled_mean"], "bits")
            yield Line("  with shuffled labels, 99th percentile", router["shuffled_99"], "bits")

    def anatomy(self) -> Iterator[Line]:
        """What each part is worth in nats a token, and what the bias does to the load."""
        windows = {
            name: exam.held_out_windows(self.model, ids, 256, self.amount.anatomy_windows)
            for name, ids in self.ids.items()
        }
        found = anatomy.cost_without(self.model, windows)
        self.details["anatomy"] = {
            part: {name: vars(spread) for name, spread in row.items()}
            for part, row in found.items()
        }
        for part, row in found.items():
            for name, spread in row.items():
                yield Line(
                    f"without {part}, {name}: +- {spread.deviation:.2f}", spread.mean, "nats"
                )
            yield Line(
                f"without {part}: domains with 0.1 nats or more",
                sum(spread.mean >= 0.1 for spread in row.values()),
                "",
                2,
            )
        together = torch.cat(list(windows.values()))
        loads = [self._violations(together)]
        biases = [router.bias for router in self.model.modules() if isinstance(router, Router)]
        with torch.no_grad():
            kept = [bias.clone() for bias in biases]
            for bias in biases:
                bias.zero_()
            loads.append(self._violations(together))
            for bias, values in zip(biases, kept):
                bias.copy_(values)
        self.details["bias"] = {"with": loads[0], "without": loads[1]}
        for name in loads[0]:
            yield Line(f"{name}: MaxVio in all of this", loads[0][name])
            yield Line(f"{name}: the same without its bias", loads[1][name])

    def _violations(self, windows: torch.Tensor) -> dict[str, float]:
        return {
            name: max_violation(counts.sum(0).double())
            for name, counts in expert_counts(self.model, windows).items()
        }

    def context(self) -> Iterator[Line]:
        """Passages that stand twice, the heads that copy, and facts by distance."""
        filler = [
            line
            for text in self.domains[0].held_out
            for line in text.splitlines()
            if 20 < len(line) < 60
        ]
        for name, model in (("before", self.before), ("after", self.model)):
            if model is None:
                continue
            details = self.details.setdefault("context", {}).setdefault(name, {})
            for length in PASSAGES:
                for domain, ids in self.ids.items():
                    found = anatomy.two_copies(
                        model,
                        anatomy.passages_twice(self.tokenizer, ids, length, self.amount.passages),
                    )
                    details.setdefault("copies", {}).setdefault(str(length), {})[domain] = {
                        what: vars(spread) for what, spread in found.items()
                    }
                    goal = 0.5 if name == "after" and length in (60, 200) else None
                    yield Line(
                        f"{name}: second copy of {length} of {domain}, of the first",
                        found["second"].mean / found["first"].mean,
                        "",
                        goal,
                        most=True,
                    )
            heads = anatomy.induction_scores(
                model,
                anatomy.passages_twice(self.tokenizer, self.ids["plays"], 60, self.amount.passages),
            )
            details["induction"] = heads.tolist()
            for layer, row in enumerate(heads):
                best = int(row.argmax())
                yield Line(
                    f"{name}: induction, layer {layer}, best head (number {best})",
                    float(row[best]),
                    "%",
                )
            facts = anatomy.facts_found(
                model, self.tokenizer, filler, FACT_DISTANCES, self.amount.facts
            )
            details["facts"] = {str(distance): share for distance, share in facts.items()}
            for distance, share in facts.items():
                goal = None if name == "before" else 0.95 if distance < 256 else 0.9
                yield Line(f"{name}: facts found over {distance} tokens", share, "%", goal)

    def needle(self) -> Iterator[Line]:
        """Needles found by length and depth, and the loss by position, before and after."""
        for name, model in (("before", self.before), ("after", self.model)):
            if model is None:
                continue
            context = model.config.max_position_embeddings
            lengths = tuple(n for n in self.amount.lengths if n <= context)
            grid = needle.needle_test(model, self.tokenizer, lengths, count=self.amount.needles)
            edges = tuple(edge for edge in needle.EDGES if edge <= context)
            windows = exam.held_out_windows(
                model, self.ids["plays"], edges[-1], self.amount.position_windows
            )
            losses = needle.loss_by_position(model, windows, edges)
            self.details.setdefault("needle", {})[name] = {
                "context": context,
                "each": self.amount.needles,
                "found": {
                    str(n): {str(d): share for d, share in row.items()} for n, row in grid.items()
                },
                "loss_by_position": {f"{a}-{b}": nats for (a, b), nats in losses.items()},
            }
            for length, row in grid.items():
                for depth, share in row.items():
                    yield Line(f"needle {name}: {length} tokens, depth {depth:.0%}", share, "%")
            for (start, end), nats in losses.items():
                yield Line(f"plays {name}: loss at positions {start} to {end - 1}", nats, "nats")


def with_context(folder: Path, context: int, precision: str) -> Transformer:
    """A model that may be asked at ``context`` positions, wherever its training ended."""
    model = load_model(folder, precision=precision)
    longer = Transformer(model.config.but(max_position_embeddings=context), precision)
    longer.load_state_dict(model.state_dict())
    return longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder in the released layout")
    parser.add_argument("--precision", default="fp8", choices=("fp8", "bf16", "fp32"))
    parser.add_argument("--quick", action="store_true", help="a few minutes, rougher figures")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ",".join(PARTS))
    parser.add_argument("--before", type=Path, help="the model before its context was extended")
    parser.add_argument("--json", type=Path, help="write everything found to this file")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts: {args.parts} is not among {','.join(PARTS)}")
    try:
        run(
            args.model,
            args.precision,
            QUICK if args.quick else Amount(),
            parts,
            args.before,
            args.json,
        )
    except DSV3Error as error:
        sys.exit(f"error: {error}")


def run(
    folder: Path,
    precision: str,
    amount: Amount,
    parts: list[str],
    before: Path | None = None,
    file: Path | None = None,
) -> dict:
    """Print the table, part by part; returns what --json writes, and writes it after each part."""
    began = time.perf_counter()
    paper = Exam(folder, precision, amount, before)
    print(
        f"{folder}, {precision}, {torch.get_num_threads()} threads; ready after "
        f"{time.perf_counter() - began:.0f} s",
        flush=True,
    )
    result = {
        "model": str(folder),
        "precision": precision,
        "seconds": {},
        "lines": [],
        "details": paper.details,
    }
    for part in parts:
        print(f"\n{part}", flush=True)
        began, cpu = time.perf_counter(), time.process_time()
        for line in getattr(paper, part)():
            print(line, flush=True)
            result["lines"].append({**vars(line), "met": line.met})
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        result["seconds"][part] = {"wall": round(seconds, 1), "cpu": round(cpu, 1)}
        print(f"({seconds:.0f} s, of which computing {cpu:.0f} s)", flush=True)
        if file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
