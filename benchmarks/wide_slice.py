"""Convert and cast 3 GB at the true width of the 671B model, and measure the memory they take.

The checkpoint is one complete MoE layer of DeepSeek-V3 (attention, router, shared expert) with 64
of its 256 routed experts, random numbers inside. Each job runs in a process of its own, in which
a thread reads the anonymous memory (RssAnon) every 2 ms; what counts is the peak above the level
before the job. The limit is three times the largest tensor, whatever the checkpoint's size.
Results are checked: the rows of each rank against the source, and FP8 -> BF16 -> FP8 code by code.

    python benchmarks/wide_slice.py [--experts 64] [--folder DIR]

Needs five times the checkpoint's size on the disk (15 GB) and a few minutes on two cores. Linux
only, for RssAnon.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.index import INDEX_FILE, index_text
from dsv3.checkpoint.layout import TensorSpec, layout
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import DTYPES, StreamWriter
from dsv3.config import CONFIG_FILE, ModelConfig

RANKS = 2


def slice_config(experts: int) -> ModelConfig:
    """One MoE layer of the 671B model with fewer experts and a small vocabulary."""
    return ModelConfig.deepseek_v3().but(
        num_hidden_layers=1,
        first_k_dense_replace=0,
        n_routed_experts=experts,
        vocab_size=8192,
        num_nextn_predict_layers=0,
    )


def write_slice(folder: Path, config: ModelConfig, shards: int) -> int:
    """Write the checkpoint; returns its bytes. Scales lie in the shard before their weights."""
    specs = layout(config)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    files: dict[str, list[TensorSpec]] = {name: [] for name in names}
    weights = [spec for spec in specs if not spec.scale_of]
    for i, spec in enumerate(weights):
        files[names[i % shards]].append(spec)
        if spec.scale:
            files[names[(i - 1) % shards]].append(spec.scale)
    planned = {
        name: [(s.hf_name, s.dtype, s.shape) for s in content] for name, content in files.items()
    }
    random = torch.Generator().manual_seed(0)
    for name, content in files.items():
        with StreamWriter(folder / name, planned[name]) as out:
            for spec in content:
                out.write(spec.hf_name, _random(spec, random))
    (folder / INDEX_FILE).write_text(index_text(planned))
    (folder / CONFIG_FILE).write_text(config.to_json())
    return sum(spec.nbytes for spec in specs)


def _random(spec: TensorSpec, random: torch.Generator) -> torch.Tensor:
    if spec.dtype != "F8_E4M3":
        values = torch.rand(spec.shape, generator=random) + 0.5
        return values.to(DTYPES[spec.dtype])
    codes = torch.randint(0, 256, spec.shape, generator=random, dtype=torch.uint8)
    codes.masked_fill_(codes & 0x7F == 0x7F, 0)  # no NaN
    codes[::128, ::128] = 0x7E  # 448, the largest, in every block, as a quantiser leaves it
    return codes.view(torch.float8_e4m3fn)


def measured(job: str, source: Path, target: Path) -> dict:
    """Run one job in this process; its peak of anonymous memory, limit and seconds."""
    base = peak = _anonymous()
    running = True

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, _anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        if job == "convert":
            plan = convert(source, target, RANKS)
        else:
            plan = cast(source, target, job)
    finally:
        running = False
        watcher.join()
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "bytes_written": plan["bytes"],
        "largest_tensor": plan["largest_tensor"],
        "peak_bytes": peak - base,
        "limit_bytes": 3 * plan["largest_tensor"],
        "within": peak - base <= 3 * plan["largest_tensor"],
    }


def _anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def check(folder: Path, config: ModelConfig) -> dict:
    """Compare what the jobs wrote with the source, tensor by tensor."""
    same_slices = same_codes = True
    with (
        CheckpointReader(folder / "fp8") as source,
        CheckpointReader(folder / "back") as back,
        CheckpointReader(folder / "converted", [f"model1-mp{RANKS}.safetensors"]) as rank_1,
    ):
        for spec in layout(config):
            value = source.read(spec.hf_name)
            if not spec.scale_of:
                same_codes &= _same(value, back.read(spec.hf_name))
            part = spec.slice_for(1, RANKS, config.n_routed_experts)
            if part is not None:
                for dim, kept in enumerate(part):
                    value = value.narrow(dim, kept.start, len(kept))
                same_slices &= _same(value, rank_1.read(spec.name))
    return {"slices_equal": same_slices, "codes_equal_there_and_back": same_codes}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def apart(job: str, source: Path, target: Path) -> dict:
    """``measured`` in a fresh process."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.wide_slice",
            "--job",
            job,
            source.absolute(),
            target.absolute(),
        ],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
        timeout=3600,
    )
    if done.returncode:
        raise SystemExit(f"{job} failed")
    return json.loads(done.stdout)


def run(folder: Path, config: ModelConfig, shards: int = 3, start=apart) -> dict:
    """Everything; returns the printed result. start: how a job is run."""
    (folder / "fp8").mkdir()
    return {
        "experts": config.n_routed_experts,
        "bytes": write_slice(folder / "fp8", config, shards),
        "convert": start("convert", folder / "fp8", folder / "converted"),
        "bf16": start("bf16", folder / "fp8", folder / "bf16"),
        "fp8": start("fp8", folder / "bf16", folder / "back"),
        **check(folder, config),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--folder", type=Path, help="parent of the files (default: temporary)")
    parser.add_argument(
        "--job", nargs=3, metavar=("JOB", "SOURCE", "TARGET"), help=argparse.SUPPRESS
    )
    args = parser.parse_args()
    if args.job:
        job, source, target = args.job
        print(json.dumps(measured(job, Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(json.dumps(run(Path(folder), slice_config(args.experts)), indent=2))


if __name__ == "__main__":
    main()
