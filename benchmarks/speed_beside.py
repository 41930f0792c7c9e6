"""How fast this tree is beside another one, measured in turn in one run.

    python benchmarks/speed_beside.py OLD_TREE [--new TREE] [--rounds 9]

Decoding (16 tokens behind 64) and prefill (512 tokens) of the shipped model, and a training step of
the small model (3 windows of 256, fp32), on one thread, in time of the CPU: what else runs on the
machine takes none of that, and what it does to the caches disturbs both alike, old, new, old, new.
A second process of the old tree takes part too; what sets it apart from the first is the noise.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from two_trees import (
    HERE,
    LIMIT,
    PRECISIONS,
    check_tree,
    commit,
    prepare,
    some_tokens,
    start,
    training_step,
)

SPEEDS = (
    *(f"decode {p}" for p in PRECISIONS),
    *(f"prefill {p}" for p in PRECISIONS),
    "training step fp32",
)


def timers(inputs: Path) -> dict[str, Callable[[], object]]:
    """What each name of SPEEDS times."""
    import torch

    from dsv3 import ModelConfig, Transformer, load_model
    from dsv3.precision import Precision

    out = {}
    for precision in PRECISIONS:
        model = load_model(inputs / "shipped", precision)
        text = some_tokens(model.config, 1, 512)

        @torch.inference_mode()
        def decode(model=model, text=text):
            cache = model.new_cache(1, 160)
            model(text[:, :64], cache=cache)
            began = time.process_time()
            for place in range(64, 80):
                model(text[:, place : place + 1], cache=cache, last_only=True)
            return time.process_time() - began

        @torch.inference_mode()
        def prefill(model=model, text=text):
            began = time.process_time()
            model(text, cache=model.new_cache(1, 512), last_only=True)
            return time.process_time() - began

        out[f"decode {precision}"], out[f"prefill {precision}"] = decode, prefill
    config = ModelConfig.mini()
    trained = Transformer(config, Precision.training("fp32")).init_weights(0, 0.3)
    step, _ = training_step(trained)
    batch = some_tokens(config, 3, 258)

    def training():
        began = time.process_time()
        step(batch)
        return time.process_time() - began

    return out | {"training step fp32": training}


def serve(inputs: Path) -> None:
    """Answer each name that comes in by the seconds it took."""
    import torch

    torch.set_num_threads(1)
    known = timers(inputs)
    for name in SPEEDS:
        known[name]()  # shapes are prepared
    print("ready", flush=True)
    for line in sys.stdin:
        print(known[line.strip()](), flush=True)


def measure(trees: dict[str, Path], inputs: Path, rounds: int) -> None:
    """Print medians of all, and the ratio within a round: its median and its middle half."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, tree in {**trees, "old again": trees["old"]}.items():
            process = start(
                tree,
                Path(__file__).name,
                "--serve",
                inputs,
                folder=inputs,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            stack.callback(process.wait, LIMIT)
            stack.callback(process.kill)
            workers[name] = process
        for name, process in workers.items():
            assert process.stdout.readline().strip() == "ready", f"{name} could not start"
        print(
            f"{'milliseconds':22}{'old':>9}{'new':>9}   new / old (middle half)   old again / old"
        )
        for what in SPEEDS:
            taken = {name: [] for name in workers}
            for number in range(rounds):
                for name in list(workers)[:: 1 if number % 2 else -1]:
                    print(what, file=workers[name].stdin, flush=True)
                    taken[name].append(float(workers[name].stdout.readline()))

            def ratio(name):
                of = [mine / old for mine, old in zip(taken[name], taken["old"])]
                low, middle, high = statistics.quantiles(of, n=4)
                return f"{middle:5.2f} ({low:.2f} to {high:.2f})"

            old, new = (1000 * statistics.median(taken[name]) for name in ("old", "new"))
            print(
                f"{what:22}{old:9.1f}{new:9.1f}   {ratio('new'):24}  {ratio('old again')}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_TREE")
    parser.add_argument("--new", type=Path, default=HERE, metavar="TREE", help="default: this one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        check_tree(args.old)
        serve(args.serve)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    print("  ".join(f"{name}: {commit(tree)}" for name, tree in trees.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(trees, Path(folder) / "inputs")
        measure(trees, Path(folder) / "inputs", args.rounds)


if __name__ == "__main__":
    main()
