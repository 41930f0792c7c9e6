"""What ``same_as`` and ``speed_beside`` share: processes that see one of two trees, and inputs.

Each tree runs in processes of its own, on the interpreter that runs this, and all are given the
same files. Only the public face and the command line are asked, so modules may move from one
commit to the next; what a training step needs beside them is looked up in ``training_step``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from string import ascii_lowercase

HERE = Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds of one process
PRECISIONS = ("fp32", "bf16", "fp8")


def start(tree: Path, script: str, *arguments, folder: Path, ranks: int = 1, **pipes):
    """A process that runs a script beside this one on ``tree`` and sees no other."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [str(Path(__file__).with_name(script)), str(tree), *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, *(launcher if ranks > 1 else ()), *command],
        cwd=folder,
        env=environment,
        text=True,
        **pipes,
    )


def check_tree(tree: str) -> None:
    """In such a process: that it is the tree it was started for."""
    import dsv3

    found = Path(dsv3.__file__).parents[1]
    assert found == Path(tree), f"{found} is imported, and {tree} was meant"


def commit(tree: Path) -> str:
    """What git calls the state of a tree."""
    asked = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.strip() or str(tree)


def prepare(trees: dict[str, Path], inputs: Path) -> None:
    """Write the models and texts that both trees are given."""
    inputs.mkdir()
    shutil.copytree(trees["old"] / "assets/dsv3-mini", inputs / "shipped")
    with start(trees["new"], "outputs.py", "inputs", inputs, inputs, folder=inputs) as process:
        if process.wait(timeout=LIMIT):
            raise SystemExit("the inputs could not be made")


def make_inputs(tree: Path, inputs: Path) -> None:
    """The tiny ones, by the helpers of the tree's tests."""
    sys.path.insert(0, str(tree / "tests"))
    from checkpoints import tiny_config, write_checkpoint
    from training_cases import TINY, write_texts

    from dsv3.config import QuantizationConfig

    config = tiny_config(
        n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, vocab_size=96
    )
    write_checkpoint(inputs / "tiny", config)
    powers = config.but(quantization_config=QuantizationConfig(scale_fmt="ue8m0"))
    write_checkpoint(inputs / "tiny-ue8m0", powers, seed=1)
    (inputs / "train.json").write_text(json.dumps(TINY.to_dict()))
    for name in ("texts", "words"):
        (inputs / name).mkdir()
        write_texts(inputs / name)
    random = Random(0)
    for file in sorted((inputs / "words").glob("*/*")):  # different ones, for 4,096 tokens
        mark = "# " if file.suffix == ".py" else ""
        with file.open("a", encoding="utf-8") as out:
            for _ in range(300):
                words = ("".join(random.choices(ascii_lowercase, k=7)) for _ in range(10))
                out.write(mark + " ".join(words) + "\n")


def some_tokens(config, rows: int, length: int):
    """(rows, length) random ids, the same every time."""
    import torch

    random = torch.Generator().manual_seed(7)
    return torch.randint(config.vocab_size, (rows, length), generator=random)


def training_step(model, moments: str = "fp32", **values) -> tuple[Callable, object]:
    """A function that makes one update from a batch, and its optimizer. values: of StepValues."""
    step = importlib.import_module("dsv3.training.step")
    make_optimizer = importlib.import_module("dsv3.training.optimizer").make_optimizer
    optimizer = make_optimizer(model, moments=moments)
    values = step.StepValues(learning_rate=1e-3, **values)
    more = {}
    if "watch" in inspect.signature(step.train_step).parameters:
        more["watch"] = importlib.import_module("dsv3.training.balance").RouterWatch(model)
    return lambda batch: step.train_step(model, optimizer, batch, values, **more), optimizer
