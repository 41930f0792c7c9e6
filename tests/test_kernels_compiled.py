"""Everything that the kernels' wrappers launch, compiled for Hopper by Triton's own compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (there is none for this platform)")

from dsv3.kernels.signatures import KERNELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler needs Linux"),
]

HOPPER = 227 * 1024  # bytes of shared memory that a program can have
# Kernels that are told how many bytes of a thread find no register: 32-bit numbers, a few of which
# are put away across the loop. All others have room.
MOST_SPILLED = {"persistent_gemm": 136, "mla_prefill": 136, "mla_decode": 32, "router_choose": 8}
# Which instruction multiplies: Hopper's own where a tile has the rows for it.
PRODUCTS = {
    "persistent_gemm": "wgmma.mma_async",
    "expert_hidden": "wgmma.mma_async",
    "expert_out": "wgmma.mma_async",
    "mla_prefill": "wgmma.mma_async",
    "mla_decode": "mma.sync",
    "router": "mma.sync",
}
# Whose quotients have to be correctly rounded.
EXACT = {"act_quant", "column_quant", "norm_quant", "expert_hidden"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kernel_launches.py")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_kernel_of_the_house_is_among_them(compiled):
    """A kernel that no call reaches is in no test; one without a signature cannot be seen into."""
    defined = {
        line.partition("def ")[2].partition("_kernel(")[0]
        for path in Path(__file__).parents[1].glob("dsv3/kernels/*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert {made["kernel"] for made in compiled.values()} == set(KERNELS) == defined


def test_a_launch_gives_what_the_signature_says(compiled):
    assert {key: made["misread"] for key, made in compiled.items() if made["misread"]} == {}


def test_every_launch_fits_a_multiprocessor(compiled):
    for key, made in compiled.items():
        assert made["shared"] <= HOPPER, key
        assert made["registers"] * made["threads"] <= 65_536, key
        assert made["spilled"] <= MOST_SPILLED.get(made["kernel"], 0), key


def test_what_makes_products_and_quotients(compiled):
    """The tensor core multiplies; nobody adds by atomic operations, in an order that chance gives;
    what is rounded to codes was divided as IEEE 754 says."""
    for key, made in compiled.items():
        wanted = PRODUCTS.get(made["kernel"])
        if made["kernel"] != "fp8_gemm":  # which tries small tiles too
            assert made["products"] == ([wanted] if wanted else []), key
        assert not made["atomics"], key
        assert not (made["inexact_division"] and made["kernel"] in EXACT), key
