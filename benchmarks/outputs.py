"""What one tree computes, as digests: ``same_as`` runs this once for each tree.

    python benchmarks/outputs.py TREE PART,PART INPUTS WORK [--quick]

A part is a function of this module that gives the names of checks and what each computes. Each
answer becomes a line of JSON in WORK/answers.jsonl; of a check that fails it is a text that begins
with "error".
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from two_trees import PRECISIONS, check_tree, make_inputs, some_tokens, training_step

ANSWERS = "answers.jsonl"
NO_BALANCE = {"sequence_weight": 0.0}
CLOCKS = ("seconds", "cpu_seconds", "tokens_per_second")
PROMPTS = ["To be, or not to be", "37 + 45 =", "def add(a, b):\n", "SCENE II. Verona.\n\n[Enter"]
RECIPE = dict(
    tokens=300,
    seq_len=16,
    batch_first=2,
    batch_last=4,
    micro_batch=32,
    learning_rate=5e-3,
    warmup=2,
    extension_tokens=200,
    extension_seq_len=64,
    extension_batch=1,
    extension_rate=1e-3,
    precision="fp32",
    log_every=1,
    eval_every=4,
    eval_windows=2,
    save_minutes=0.0,
)


def digest(value) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, of a file, or of anything JSON can hold."""
    import torch

    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        value = f"{value.dtype} {tuple(value.shape)} ".encode() + raw
    elif isinstance(value, Path):
        value = value.read_bytes()
    elif not isinstance(value, bytes):
        value = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(value).hexdigest()


def of_folder(folder: Path) -> dict[str, str]:
    """Digest of each file of a folder but of logs, which tell the time, and of checkpoints."""
    return {
        path.name: digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix not in (".jsonl", ".lock")
    }


def command(*arguments) -> str:
    """Standard output of ``dsv3 ARGUMENTS`` run in this process."""
    from dsv3.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as told:
        code = main([str(a) for a in arguments])
    if code:
        raise RuntimeError(f"dsv3 {arguments[0]} exited with {code}: {told.getvalue()[-300:]}")
    return out.getvalue()


def models(inputs: Path, quick: bool) -> dict[str, Path]:
    shown = {name: inputs / name for name in ("tiny", "tiny-ue8m0", "shipped")}
    return dict(list(shown.items())[:1]) if quick else shown


def files(inputs: Path, work: Path, quick: bool) -> Iterator[tuple[str, Callable]]:
    for name, source in models(inputs, quick).items():
        bf16 = work / f"{name}-bf16"

        def cast(source: Path, target: Path, *options):
            command("cast", source, target, *options)
            return of_folder(target)

        def convert(source: Path, ranks: int, target: Path):
            command("convert", source, target, "--tp", ranks)
            return of_folder(target)

        yield f"cast {name} to bf16", lambda: cast(source, bf16, "--to", "bf16")
        for scales in ("float32", "ue8m0"):
            target = work / f"{name}-{scales}"
            yield (
                f"cast {name} bf16 to fp8, scales {scales}",
                lambda: cast(bf16, target, "--to", "fp8", "--scale-fmt", scales),
            )
        for ranks in (1, 2) if name == "shipped" else (1, 2, 4):  # its blocks cannot be cut in 4
            target = work / f"{name}-tp{ranks}"
            yield f"convert {name} --tp {ranks}", lambda: convert(source, ranks, target)
        yield f"convert {name} bf16 --tp 2", lambda: convert(bf16, 2, work / f"{name}-bf16-tp2")
        yield (
            f"inspect {name} --tp 2 --json",
            lambda: (
                json.loads(command("inspect", source, "--tp", 2, "--json"))
                | {"model": None, "folder": None}
            ),
        )


def forms_of(model) -> dict[str, str]:
    """Digests of logits by every way to ask for them."""
    import torch

    tokens, out = some_tokens(model.config, 2, 24), {}
    with torch.inference_mode():
        whole, hidden = model(tokens, return_hidden=True)
        out["whole"], out["hidden"] = digest(whole), digest(hidden)
        for form, widths in (("chunks", (7, 1, 16)), ("token by token", (1,) * 24)):
            cache = model.new_cache(2, 32)
            parts = [model(part, cache=cache) for part in tokens.split(widths, dim=1)]
            out[form] = digest(torch.cat(parts, dim=1))
        cache = model.new_cache(2, 32)
        parts = [
            model(tokens[:, :9], cache=cache, lengths=[9, 4], last_only=True),
            model(tokens[:, 9:14], cache=cache, lengths=[0, 5], last_only=True)[1:],
            model(tokens[:, 14:15], cache=cache, lengths=[1, 1], last_only=True),
        ]
        out["ragged"] = digest(torch.cat(parts))
        out["last_only"] = digest(model(tokens, last_only=True))
        cache, ahead = model.new_draft_cache(2, 32), tokens.roll(-1, dims=1)
        for form, kept in (("mtp", None), ("mtp with cache", cache)):
            drafts, states = model.mtp_logits(hidden, ahead, cache=kept)
            out[form], out[form + ", states"] = digest(drafts), digest(states)
    return out


def logits(inputs: Path, work: Path, quick: bool) -> Iterator[tuple[str, Callable]]:
    from dsv3 import load_model

    for name, source in models(inputs, quick).items():
        for precision in PRECISIONS:
            yield f"logits {name} {precision}", lambda: forms_of(load_model(source, precision))
    for form in ("tp1", "bf16"):
        for precision in PRECISIONS:
            yield (
                f"logits of tiny-{form} {precision}",
                lambda: forms_of(load_model(work / f"tiny-{form}", precision)),
            )


def tokens_of(model, prompts: list) -> dict[str, list]:
    from dsv3 import generate

    asked = {
        "greedy": dict(temperature=0.0),
        "sampled": dict(temperature=0.9, top_p=0.9, top_k=20, seed=3),
        "two samples": dict(temperature=1.0, seed=5, n=2),
        "in chunks": dict(prefill_chunk=3),
    }
    return {
        f"{what}{', speculative' * speculative}": generate(
            model, prompts, max_new_tokens=16, speculative=speculative, eos_ids=(), **options
        )
        for what, options in asked.items()
        for speculative in (False, True)
    }


def tokens(inputs: Path, work: Path, quick: bool) -> Iterator[tuple[str, Callable]]:
    from dsv3 import load_model, load_tokenizer

    shipped, some = inputs / "shipped", PROMPTS[:2] if quick else PROMPTS
    (work / "prompts.txt").write_text("\n".join(p.splitlines()[0] for p in some) + "\n")
    for precision in PRECISIONS:

        def by_function():
            tokenizer = load_tokenizer(shipped)
            return tokens_of(load_model(shipped, precision), [tokenizer.encode(p) for p in some])

        def by_command(*options):
            prompts = ("--input-file", work / "prompts.txt", "--precision", precision)
            plain = ("--max-new-tokens", 12, "--json", "--logprobs")
            answer = json.loads(command("generate", shipped, *prompts, *plain, *options))
            return {key: answer[key] for key in ("precision", "tp", "results", "acceptance")}

        yield f"tokens {precision}", by_function
        if not quick:
            sampled = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 4, "--n", 2)
            yield f"dsv3 generate {precision}", by_command
            yield f"dsv3 generate {precision}, sampled", lambda: by_command(*sampled)
            yield f"dsv3 generate {precision}, speculative", lambda: by_command("--speculative")


def ranks(inputs: Path, work: Path, quick: bool) -> Iterator[tuple[str, Callable]]:
    from dsv3 import load_model
    from dsv3.parallel.tensor import TensorGroup

    group = TensorGroup.from_environment("cpu")
    for precision in PRECISIONS:
        for name, source in (("tiny", inputs / "tiny"), ("tiny-tp2", work / "tiny-tp2")):

            def both():
                model = load_model(source, precision, group=group)
                prompts = some_tokens(model.config, 2, 5).tolist()
                return forms_of(model) | tokens_of(model, prompts)

            yield f"two ranks: {name} {precision}", both
        if not quick:
            yield (
                f"two ranks: shipped {precision}",
                lambda: forms_of(load_model(inputs / "shipped", precision, group=group)),
            )
    yield "two ranks: bytes sent", lambda: group.bytes_sent


def by_name(tensors: dict) -> dict[str, str]:
    """Digests by the names of converted files, whether experts are stacked or not."""
    out = {}
    for name, value in tensors.items():
        place, stacked, leaf = name.rpartition(".experts.w")
        if not stacked or value.dim() < 3:
            out[name] = digest(value)
            continue
        for expert, matrix in enumerate(value):
            parts = zip(("1", "3"), matrix) if leaf == "13" else [(leaf, matrix)]
            for number, part in parts:
                out[f"{place}.experts.{expert}.w{number}.weight"] = digest(part)
    return out


def after_steps(
    inputs: Path,
    precision: str,
    count: int,
    recompute: bool = False,
    moments: str = "fp32",
    sequence_weight: float = 1e-2,
) -> dict[str, str]:
    """Losses of each step, and what model and optimizer hold after the last."""
    import torch

    from dsv3 import ModelConfig, Transformer
    from dsv3.precision import Precision

    config = ModelConfig.from_dict(json.loads((inputs / "train.json").read_text()))
    model = Transformer(config, Precision.training(precision, recompute=recompute)).init_weights(3)
    values = dict(sequence_weight=sequence_weight, micro_batch=64)
    step, optimizer = training_step(model, moments, **values)
    random = torch.Generator().manual_seed(11)
    told = [step(torch.randint(config.vocab_size, (4, 34), generator=random)) for _ in range(count)]
    out = {
        f"{name} of step {n}": v.hex() for n, line in enumerate(told) for name, v in line.items()
    }
    out |= by_name(dict(model.state_dict()))
    for moment in ("exp_avg", "exp_avg_sq"):
        kept = {
            name: optimizer.state[weight][moment]
            for name, weight in model.named_parameters()
            if weight in optimizer.state
        }
        out |= {f"{moment} of {name}": value for name, value in by_name(kept).items()}
    return out


def steps(inputs: Path, work: Path, quick: bool) -> Iterator[tuple[str, Callable]]:
    for precision in PRECISIONS:
        for what, options in {
            "": {},
            ", recompute": dict(recompute=True),
            ", no balance loss": NO_BALANCE,
            ", no balance loss, recompute": dict(NO_BALANCE, recompute=True),
            ", moments in bf16": dict(moments="bf16"),
        }.items():
            for count in (1,) if quick else (1, 3):
                yield (
                    f"{count} training step{'s' * (count > 1)}, {precision}{what}",
                    lambda: after_steps(inputs, precision, count, **options),
                )


def train_in(inputs: Path, folder: Path, **changes) -> dict:
    """Log and exported files of a short run that is begun or resumed in ``folder``."""
    from dsv3 import ModelConfig
    from dsv3.data import arithmetic, stream
    from dsv3.training import Recipe, train

    for module, name, small in (
        (arithmetic, "TRAIN_CHARACTERS", 6000),
        (arithmetic, "HELD_OUT_CHARACTERS", 1500),
        (stream, "_SHUFFLED", 1024),
    ):
        assert hasattr(module, name), name
        setattr(module, name, small)
    config = ModelConfig.from_dict(json.loads((inputs / "train.json").read_text()))
    texts = {name: inputs / "texts" / name for name in ("plays", "code")}
    figures = train(config, folder, Recipe(**RECIPE | changes), progress=False, **texts)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    log = [{key: value for key, value in line.items() if key not in CLOCKS} for line in log]
    return {"log": log, "figures": figures} | of_folder(folder)


def run(inputs: Path, work: Path, quick: bool) -> Iterator[tuple[str, Callable]]:
    yield "a training run", lambda: train_in(inputs, work / "run")
    yield "a training run, no balance loss", lambda: train_in(inputs, work / "plain", **NO_BALANCE)
    if not quick:
        yield (
            "a run of the old tree, resumed, no balance loss",
            lambda: train_in(inputs, work / "begun", **NO_BALANCE),
        )

        def by_command():
            texts = [f"--{name}={inputs / 'words' / name}" for name in ("plays", "code")]
            size = ("--tokens", 800, "--extension-tokens", 0, "--precision", "fp32")
            command("train", "--preset", "mini", "--out", work / "mini", *size, *texts)
            return of_folder(work / "mini")

        yield "dsv3 train, 800 tokens", by_command


def begin(inputs: Path, work: Path) -> None:
    """Train until the sixth checkpoint is about to get its name; never returns."""

    def die(event, arguments):
        if event == "os.rename" and str(arguments[1]).endswith("step-000006"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    train_in(inputs, work / "begun", **NO_BALANCE)


def compute(parts: list[str], inputs: Path, work: Path, quick: bool) -> None:
    """Answer all checks of some parts."""
    import torch

    torch.set_num_threads(1)
    known = {part.__name__: part for part in (files, logits, tokens, ranks, steps, run)}
    for check, value in chain.from_iterable(known[part](inputs, work, quick) for part in parts):
        try:
            found = value()
        except Exception as error:
            found = f"error: {type(error).__name__}: {error}"[:300]
        if os.environ.get("RANK", "0") == "0":
            with (work / ANSWERS).open("a", encoding="utf-8") as out:
                out.write(json.dumps([check, found]) + "\n")


def main(tree: str, parts: str, inputs: str, work: str, *options: str) -> None:
    check_tree(tree)
    if parts == "inputs":
        make_inputs(Path(tree), Path(inputs))
    elif parts == "begin":
        begin(Path(inputs), Path(work))
    else:
        compute(parts.split(","), Path(inputs), Path(work), "--quick" in options)


if __name__ == "__main__":
    main(*sys.argv[1:])
