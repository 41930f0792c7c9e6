"""Whether this tree computes what another one does, bit for bit.

    python benchmarks/same_as.py OLD_TREE [--new TREE] [--quick] [--only PART] [--json FILE]

OLD_TREE is a checkout of another commit (``git worktree add ../old COMMIT``). Every output of both
becomes a SHA-256 (``outputs``), and a line says of each check whether the two are equal. The exit
code is 1 when anything differs.

* files: cast to bf16, to fp8 and to fp8 with ue8m0 scales; convert for 1, 2 and 4 ranks; inspect;
  of the shipped model and of tiny ones with ragged blocks, expert groups and an MTP module.
* logits: whole, in three chunks, token by token, ragged, last_only, hidden states, MTP; fp32, bf16
  and fp8; from released and from converted files.
* tokens: greedy, sampled and speculative, with log-probabilities, through ``generate`` and the
  command line.
* ranks: logits and tokens on two ranks.
* steps: one training step and three, in fp32, bf16 and fp8, with and without recompute, with and
  without the balance loss (whose gradient reaches the router by a path of its own), and with
  moments in bf16: losses, norm of the gradient, all weights, biases and moments.
* run: a short ``train`` of two phases, its log and exported files; one that the old tree has begun
  and that was killed, resumed by each; and ``dsv3 train`` of the small model.

Both trees are given the old one's shipped model and tiny ones made by the new one's tests. All of
it takes about three minutes on two cores, --quick less than one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from outputs import ANSWERS
from two_trees import HERE, LIMIT, commit, prepare, start

PARTS = ("files", "logits", "tokens", "ranks", "steps", "run")


def answers(processes: dict[str, subprocess.Popen], work: dict[str, Path]) -> dict[str, dict]:
    """check -> {tree: its answer}, of processes that run side by side."""
    found: dict[str, dict] = {}
    try:
        for name, process in processes.items():
            if process.wait(timeout=LIMIT):
                found[f"exit of the process on the {name} tree"] = {name: "error"}
            for line in (work[name] / ANSWERS).read_text(encoding="utf-8").splitlines():
                check, value = json.loads(line)
                found.setdefault(check, {})[name] = value
            (work[name] / ANSWERS).write_text("")
    finally:
        for process in processes.values():
            process.kill()
    return found


def difference(values: dict) -> str | None:
    """Nothing when both trees gave the same; else which parts differ."""
    old, new = values.get("old", "error: no answer"), values.get("new", "error: no answer")
    for name, value in (("old", old), ("new", new)):
        if isinstance(value, str) and value.startswith("error"):
            return f"{name}: {value}"
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        shown = ", ".join(names[:4]) + ", ..." * (len(names) > 4)
        return f"{len(names)} of {len({**old, **new})} differ: {shown}"
    return f"{str(old)[:60]} became {str(new)[:60]}"


def compare(
    trees: dict[str, Path], parts: list[str], folder: Path, quick: bool
) -> Iterator[tuple[str, dict]]:
    """(check, answer of each tree) for all checks of some parts."""
    inputs = folder / "inputs"
    prepare(trees, inputs)
    work = {name: folder / name for name in trees}
    for place in work.values():
        place.mkdir()
        (place / ANSWERS).touch()
    if "run" in parts and not quick:
        begun = start(trees["old"], "outputs.py", "begin", inputs, folder, folder=folder)
        if begun.wait(timeout=LIMIT) != -signal.SIGKILL:
            raise SystemExit("the run that should have been killed has ended by itself")
        for place in work.values():
            shutil.copytree(folder / "begun", place / "begun")
    flags = ["--quick"] * quick
    for ranks, some in ((1, [part for part in parts if part != "ranks"]), (2, ["ranks"])):
        if not set(some) & set(parts):
            continue
        both = {
            name: start(
                tree,
                "outputs.py",
                ",".join(some),
                inputs,
                work[name],
                *flags,
                folder=work[name],
                ranks=ranks,
            )
            for name, tree in trees.items()
        }
        yield from answers(both, work).items()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, metavar="OLD_TREE")
    parser.add_argument("--new", type=Path, default=HERE, metavar="TREE", help="default: this one")
    parser.add_argument(
        "--quick", action="store_true", help="less of it, on one rank, in under a minute"
    )
    parser.add_argument("--only", choices=PARTS, action="append", metavar="PART")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all digests")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no process is left behind
    trees = {"old": args.old.resolve(), "new": args.new.resolve()}
    print("  ".join(f"{name}: {commit(tree)}" for name, tree in trees.items()), flush=True)
    began, parts = (
        time.monotonic(),
        args.only or [part for part in PARTS if not (args.quick and part == "ranks")],
    )
    if "files" not in parts and {"logits", "ranks"} & set(parts):
        parts = ["files", *parts]  # which makes what those load
    kept, wrong = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for check, values in compare(trees, parts, Path(folder), args.quick):
            fault = difference(values)
            print(f"DIFFERENT  {check}   {fault}" if fault else f"equal      {check}", flush=True)
            kept[check], wrong = values, wrong + bool(fault)
    if args.json:
        args.json.write_text(json.dumps(kept, indent=1))
    print(f"{len(kept) - wrong} of {len(kept)} equal, in {time.monotonic() - began:.0f} s")
    return int(bool(wrong) or not kept)


if __name__ == "__main__":
    sys.exit(main())
