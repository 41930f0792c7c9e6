"""The kernels written for Hopper on a Hopper chip: all checked first, then timed; figures as JSON.

    python -m benchmarks.hopper --all [--minutes 9] [--json FILE]   unattended, from end to end
    python -m benchmarks.hopper --part products --timed [--tiles]   one part, in this process
    python -m benchmarks.hopper --all --small                       tries this file; needs no GPU

``--all`` runs each part in a process of its own, with a limit: one that fails, hangs or spoils the
GPU's memory for its process costs its own results, and the others go on. First every part's checks
(of what, ``benchmarks.hopper_parts`` says), then every part's times, then ``dsv3 bench``. FILE is
written anew after each, so a run that is cut off leaves what it had. Exit code 1 if a check
or a part failed. With ``--tiles``, products are timed with other tiles than the table's, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# Seconds that a part may take, and the last one, which is told by ``--minutes``.
MOST, BENCH_AT_LEAST = 120.0, 60.0


def one_part(name: str, timed: bool, small: bool, tiles: bool, file: Path | None) -> list[dict]:
    """The part's findings, printed and written as they come."""
    from benchmarks.hopper_parts import PARTS, Sizes

    found: list[dict] = []
    for point in PARTS[name](Sizes(small=small, timed=timed, tiles=tiles)):
        point = {key: shortened(value) for key, value in point.items()}
        found.append(point)
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in point.items()), flush=True)
        if file is not None:
            file.write_text(json.dumps(found))
    return found


def shortened(value):
    """Figures with four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def in_a_process(command: list[str], limit: float) -> dict:
    """Runs it; what it wrote as JSON, or how it failed."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found.json")
        try:
            done = subprocess.run(
                [sys.executable, *command, "--json", str(file)],
                cwd=ROOT,
                stderr=subprocess.PIPE,
                text=True,
                timeout=limit,
            )
            told = (done.stderr.strip().splitlines() or [""])[-1][:300]
            failure = f"exit code {done.returncode}: {told}" if done.returncode else None
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit:.0f} s"
        found = json.loads(file.read_text()) if file.exists() else None
    seconds = round(time.monotonic() - began, 1)
    return dict(found=found, seconds=seconds) | ({"failure": failure} if failure else {})


def passed(answer: dict) -> bool:
    points = answer["found"] if isinstance(answer["found"], list) else []
    return "failure" not in answer and all(point.get("passed", True) for point in points)


def everything(minutes: float, small: bool, tiles: bool, file: Path | None) -> int:
    from benchmarks.hopper_parts import PARTS, described

    end = time.monotonic() + 60 * minutes
    answer: dict = dict(described(), checks={}, times={})
    failed = []

    def note(kind: str, name: str, result: dict) -> None:
        answer[kind][name] = result
        if not passed(result):
            failed.append(f"{name} ({kind})")
            print(f"FAILED {name} ({kind}): {result.get('failure', 'a check')}", flush=True)
        if file is not None:
            beside = file.with_name(file.name + ".part")
            beside.write_text(json.dumps(answer, indent=1) + "\n")
            beside.replace(file)

    options = ["--small"] * small + ["--tiles"] * tiles
    for kind, more in (("checks", []), ("times", ["--timed"])):
        for name in PARTS:
            left = end - time.monotonic()
            if left < 5:
                note(kind, name, dict(found=None, seconds=0, failure="the minutes are over"))
                continue
            command = ["-m", "benchmarks.hopper", "--part", name, *options, *more]
            note(kind, name, in_a_process(command, min(MOST, left)))
    left = end - time.monotonic()
    if small or left < BENCH_AT_LEAST:
        print("dsv3 bench --suite gpu was left out: the minutes are over" * (not small))
    else:
        command = ["-m", "dsv3", "bench", "--suite", "gpu", "--minutes", f"{left / 60 * 0.8:.2f}"]
        note("times", "dsv3 bench", in_a_process(command, left))
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return bool(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--part")
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--tiles", action="store_true", help="time every tile that may be better")
    parser.add_argument("--small", action="store_true", help="small sizes, in the interpreter")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    if chosen.small and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is loaded
    elif not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("No Hopper chip here: nothing was measured.")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False  # the specifications add in FP32
    if chosen.all:
        return everything(chosen.minutes, chosen.small, chosen.tiles, chosen.json)
    if chosen.part is None:
        parser.error("--all, or one --part")
    found = one_part(chosen.part, chosen.timed, chosen.small, chosen.tiles, chosen.json)
    return not all(point.get("passed", True) for point in found)


if __name__ == "__main__":
    raise SystemExit(main())
