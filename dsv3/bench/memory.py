"""Row 12: how much memory it takes to convert, cast and load; how a job's peak is measured.

Each job runs in a process of its own, in which a thread reads the anonymous memory (RssAnon) every
2 ms; what counts is the peak above the level before the job. The checkpoint is one complete MoE
layer of DeepSeek-V3 at its true width (attention, router, shared expert) with a few of its routed
experts, random numbers inside, and what the jobs write is compared with it: the rows of a rank, and
FP8 -> BF16 -> FP8 code by code. Linux only, for RssAnon.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from dsv3.bench.experts import filled
from dsv3.bench.models import CONFIG, moe_layer
from dsv3.bench.peers import Missing, transformers
from dsv3.bench.row import Goal, Line, Row, Workbench, quantity
from dsv3.checkpoint.cast import cast
from dsv3.checkpoint.convert import convert
from dsv3.checkpoint.index import INDEX_FILE, index_text
from dsv3.checkpoint.layout import TensorSpec, layout
from dsv3.checkpoint.loading import load_model
from dsv3.checkpoint.reader import CheckpointReader
from dsv3.checkpoint.safetensors_io import DTYPES, StreamWriter
from dsv3.config import CONFIG_FILE, ModelConfig
from dsv3.model import Transformer

RANKS, SHARDS, EXPERTS = 2, 3, 8
MOST = Goal(3.0, most=True)  # largest tensors
_STATUS = Path("/proc/self/status")


# A checkpoint of true width -----------------------------------------------------------------------


def slice_config(experts: int = EXPERTS) -> ModelConfig:
    """One MoE layer of the 671B model with fewer experts, 8 or more, and few tokens."""
    return ModelConfig.deepseek_v3().but(
        num_hidden_layers=1,
        first_k_dense_replace=0,
        n_routed_experts=experts,
        n_group=1,
        topk_group=1,
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


def same_after(folder: Path, config: ModelConfig) -> bool:
    """Whether what the jobs wrote is what was there, tensor by tensor."""
    with (
        CheckpointReader(folder / "fp8") as source,
        CheckpointReader(folder / "back") as back,
        CheckpointReader(folder / "converted", [f"model1-mp{RANKS}.safetensors"]) as rank_1,
    ):
        for spec in layout(config):
            value = source.read(spec.hf_name)
            if not spec.scale_of and not same_bytes(value, back.read(spec.hf_name)):
                return False
            part = spec.slice_for(1, RANKS, config.n_routed_experts)
            if part is not None:
                for dim, kept in enumerate(part):
                    value = value.narrow(dim, kept.start, len(kept))
                if not same_bytes(value, rank_1.read(spec.name)):
                    return False
    return True


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# A job and its peak -------------------------------------------------------------------------------


def peak_of(work: Callable[[], object]) -> int:
    """Bytes of anonymous memory at the peak of some work, above those before it."""
    _give_back()
    base = peak = _anonymous()
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, _anonymous())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        running = False
        watcher.join()
    return max(peak, _anonymous()) - base


def _give_back() -> None:
    """Hand freed memory back to the system, where the C library can: work that found its memory
    there would seem to take none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _anonymous() -> int:
    with _STATUS.open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def job(kind: str, *told: str) -> dict[str, int]:
    """One job in this process, and its bytes: {"peak", ...}.

    "convert", "bf16" or "fp8" (a cast) with source and target; "load" with folder, precision and
    device; "use" with folder and precision: the same, then a prompt and some tokens more, and what
    is "kept" in the end. "read" or "write" with a number and a precision, or "transformers": a pass
    of the bench's model over so many tokens, or over one behind so many. "experts" with their
    number and that of tokens, a layer's weights and its pass; "tokens" with the same, the pass
    alone.
    """
    if kind in ("convert", "bf16", "fp8"):
        source, target = map(Path, told)
        plan: dict = {}
        work = (
            partial(convert, source, target, RANKS)
            if kind == "convert"
            else partial(cast, source, target, kind)
        )
        peak = peak_of(lambda: plan.update(work()))
        return {"peak": peak, "largest": plan["largest_tensor"], "bytes": plan["bytes"]}
    if kind == "load":
        folder, precision, device = told
        held: list[torch.nn.Module] = []
        peak = peak_of(lambda: held.append(load_model(folder, precision, device)))
        tensors = (*held[0].parameters(), *held[0].buffers())
        return {"peak": peak, "held": sum(t.nbytes for t in tensors if t.device.type == "cpu")}
    with torch.inference_mode():
        if kind == "use":
            return _of_use(*told)
        if kind in ("experts", "tokens"):
            return {"peak": _of_experts(kind, *map(int, told))}
        count, form = told
        text = torch.zeros(1, int(count), dtype=torch.int64)
        of_a_pass = _of_their_pass if form == "transformers" else partial(_of_our_pass, form)
        return {"peak": of_a_pass(kind, text)}


def _of_use(folder: str, precision: str) -> dict[str, int]:
    held: list[object] = []
    text = torch.zeros(1, 256, dtype=torch.int64)

    def work() -> None:
        model = load_model(folder, precision, "cpu")
        cache = model.new_cache(1, text.shape[1] + 4)
        model(text, cache=cache, last_only=True)
        for _ in range(4):
            model(text[:, :1], cache=cache, last_only=True)
        held.extend((model, cache))

    before = _anonymous()
    peak = peak_of(work)
    _give_back()
    return {"peak": peak, "kept": _anonymous() - before}


def _of_experts(kind: str, experts: int, tokens: int) -> int:
    u = torch.randn(1, tokens, CONFIG.hidden_size)
    layer = moe_layer(CONFIG, experts, "fp32")
    layer(u[:, :1])  # what is made once is there, loops among it
    if kind == "tokens":
        return peak_of(partial(layer, u))
    del layer
    return peak_of(lambda: moe_layer(CONFIG, experts, "fp32")(u))


def _of_our_pass(precision: str, kind: str, text: torch.Tensor) -> int:
    count = text.shape[1]
    model = filled(Transformer(CONFIG, precision))

    def work() -> None:
        cache = model.new_cache(1, count)
        if kind == "read":
            model(text, cache=cache, last_only=True)
        else:
            cache.data.normal_()
            cache.advance([count - 1])
            model(text[:, :1], cache=cache, last_only=True)

    model(text[:, :1])
    return peak_of(work)


def _of_their_pass(kind: str, text: torch.Tensor) -> int:
    library, count = transformers(), text.shape[1]
    fields = CONFIG.to_dict() | {"num_mtp_layers": 0}
    model = library.DeepseekV3ForCausalLM(library.DeepseekV3Config(**fields)).eval()

    def work() -> None:
        cache = library.DynamicCache(config=model.config)
        if kind == "write":
            for layer in range(CONFIG.num_hidden_layers):
                widths = CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim
                cache.update(*(torch.randn(1, 1, count - 1, width) for width in widths), layer)
        new = text[:, :1] if kind == "write" else text
        model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)

    model(text[:, :1])
    return peak_of(work)


def apart(kind: str, *told: object, timeout: float = 900) -> dict[str, int]:
    """``job`` in a fresh process."""
    if not _STATUS.exists():
        raise Missing("memory is read from /proc/self/status, which Linux has")
    done = subprocess.run(
        [sys.executable, "-m", "dsv3.bench.memory", kind, *map(str, told)],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"{kind} failed"])[-1])
    return json.loads(done.stdout)


# The rows -----------------------------------------------------------------------------------------


def checkpoints(
    config: ModelConfig, row: Row, bench: Workbench, allowed: float, start: Callable = apart
) -> Iterator[Line]:
    """Convert, cast there and back, load. start: how a job is run."""
    needed = 6 * sum(spec.nbytes for spec in layout(config))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < needed:
            raise Missing(f"{needed / 1e9:.0f} GB of disk are needed for the checkpoint")
        (folder / "fp8").mkdir()
        write_slice(folder / "fp8", config, SHARDS)
        found = {
            "convert": start("convert", folder / "fp8", folder / "converted"),
            "cast to bf16": start("bf16", folder / "fp8", folder / "bf16"),
            "cast to fp8": start("fp8", folder / "bf16", folder / "back"),
        }
        loaded = start("load", folder / "fp8", "fp8", bench.device)
        if not same_after(folder, config):
            yield Line(row.number, row.name, row.case, "", "failed", note="other bytes than before")
            return
    largest = found["convert"]["largest"]
    for what, told in found.items():
        yield quantity(
            row, f"{what}: the largest tensor", told["peak"] / 1e6, told["largest"] / 1e6, "MB",
            MOST, "bytes compared",
        )  # fmt: skip
    beyond = loaded["peak"] - loaded["held"]
    yield quantity(
        row, "load in fp8, beyond the weights: the largest tensor", beyond / 1e6, largest / 1e6,
        "MB", MOST if bench.device.type == "cuda" else None, "bytes compared",
    )  # fmt: skip


def rows(suite: str) -> list[Row]:
    width = f"one layer of true width, {EXPERTS} experts"
    work = partial(checkpoints, slice_config())
    return [Row(12, "memory at the peak", width, work, least=60)]


if __name__ == "__main__":
    print(json.dumps(job(*sys.argv[1:])))
