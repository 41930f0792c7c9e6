"""The shapes written beside tensors are checked, in every module that says them.

``conftest.py`` installs the check. Were it to stop working, or a new module to be left out, every
other test would still pass: hence these.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import jaxtyping
import pytest
import torch
from conftest import SHAPED

from dsv3.cache import Step
from dsv3.config import ModelConfig
from dsv3.fp8 import QuantizedTensor
from dsv3.layers import RMSNorm
from dsv3.moe import Experts
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.rope import rotate

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


def rotations(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.complex64)


def experts(u: torch.Tensor):
    config = ModelConfig.mini()
    made = Experts(config, Precision.of("fp32", config), TensorGroup.single())
    return made(u, torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int64))


WRONG = {
    "sizes that do not go together": lambda: rotate(torch.ones(2, 5, 8), rotations(2, 5, 3)),
    "a dtype": lambda: rotate(torch.ones(2, 5, 8).long(), rotations(2, 5, 4)),
    "a method of a module": lambda: RMSNorm(8)(torch.ones(8).int()),
    "a dimension too many": lambda: experts(torch.ones(1, 2, ModelConfig.mini().hidden_size)),
    "a field of a dataclass": lambda: QuantizedTensor(torch.ones(128, 128), torch.ones(1, 1)),
    "two fields": lambda: Step(
        3,
        rotations(1, 3, 4),
        torch.ones(1, 1, 2, 3).bool(),
        torch.zeros(1, 1).long(),
        torch.zeros(1, 3).long(),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_tensors_are_caught(what):
    with pytest.raises(jaxtyping.TypeCheckError):
        WRONG[what]()


def test_right_ones_pass():
    assert rotate(torch.ones(2, 5, 3, 8), rotations(2, 5, 1, 4)).shape == (2, 5, 3, 8)
    QuantizedTensor(torch.ones(130, 128).to(E4M3), torch.ones(2, 1))


def test_results_are_checked(monkeypatch):
    monkeypatch.setattr(torch, "view_as_real", lambda pairs: torch.ones(2, 5, 4, 1))
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        rotate(torch.ones(2, 5, 8), rotations(2, 5, 4))


def modules_with_shapes() -> list[str]:
    """Modules of the package that import jaxtyping."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "dsv3").rglob("*.py"))
        if "from jaxtyping import" in path.read_text()
    ]


def test_every_module_that_says_shapes_is_checked():
    named = modules_with_shapes()
    assert {"dsv3.mla", "dsv3.fp8.product"} <= set(named)
    for name in named:
        assert any(name == other or name.startswith(other + ".") for other in SHAPED), name
        loader = importlib.import_module(name).__spec__.loader
        assert type(loader).__module__.startswith("jaxtyping"), name
