"""What a kernel becomes on a GPU, on a machine that has none.

Triton's compiler needs no GPU: it turns a kernel into PTX, NVIDIA's portable assembly, for any chip
that is named to it, and the assembler ``ptxas``, which comes in Triton's wheel, makes machine code
of that. So anyone can look up what the report's figure 7 says of Hopper: how ``tl.dot`` of two
blocks of E4M3 becomes instructions ``wgmma``, each of which multiplies 32 numbers deep, so that
four of them are the 128 products between two promotions.

    found = compile_for("fp8_gemm", "sm_90")
    found.products       {"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3": 4}
    found.registers      of each thread
    found.ptx            the program, to be read

The name of an instruction says the type of its result, f32, and that is the type of the register
it is written to. It does not say with how many bits the sum was made (``dsv3.fp8.accumulation``).
And a Hopper chip multiplies E4M3 only in tiles of 64 rows or more: for ROWS=16 Triton turns the
codes into float16 and multiplies those.

Triton decides when a kernel is decorated whether it is compiled or interpreted, for the life of
the process. So the compiler runs in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from dsv3.errors import DSV3Error
from dsv3.kernels.signatures import BY_CONSTANT, KERNELS, MULTIPLES

_PRODUCT = re.compile(
    r"^\s*(?:@\S+ )?((?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*)", re.MULTILINE
)


@dataclass(frozen=True)
class Compiled:
    """A kernel for one kind of GPU.

    ptx: the program. registers: 32-bit registers of each thread, of which a multiprocessor of
    Hopper has 65,536. spilled: bytes of each thread that found no room in them. shared: bytes of
    shared memory of each program, of which it has 228 KiB. threads: of each program.
    """

    kernel: str
    gpu: str
    ptx: str
    registers: int
    spilled: int
    shared: int
    threads: int

    @property
    def products(self) -> dict[str, int]:
        """The tensor-core instructions that multiply, and how often each stands in the PTX."""
        return dict(Counter(_PRODUCT.findall(self.ptx)))


def compile_for(
    kernel: str,
    gpu: str = "sm_90",
    *,
    num_warps: int = 4,
    num_stages: int = 4,
    timeout_s: float = 120.0,
    **constants: int,
) -> Compiled:
    """Compile a kernel of the house, by its name ("fp8_gemm").

    gpu: "sm_89" is Ada, "sm_90" Hopper, "sm_100" Blackwell. constants: of the kernel, where other
    than usual (ROWS=16, POWER_OF_TWO=True). Takes a few seconds; Triton keeps what it compiled.
    Raises DSV3Error where Triton or its assembler is missing or refuses, and after timeout_s.
    """
    if kernel not in KERNELS:
        raise DSV3Error("unknown kernel", found=kernel, expected=", ".join(KERNELS))
    if not re.fullmatch(r"sm_\d{2,3}", gpu):
        raise DSV3Error("not a kind of GPU", where="gpu", found=gpu, expected="sm_90 or the like")
    usual = KERNELS[kernel][2]
    if unknown := sorted(set(constants) - set(usual)):
        raise DSV3Error(
            "no such constant", where=kernel, found=unknown[0], expected=", ".join(usual)
        )
    if importlib.util.find_spec("triton") is None:
        raise DSV3Error(
            "Triton is not installed",
            where="compile_for",
            fix="It has wheels for Linux: pip install triton",
        )
    options = dict(num_warps=num_warps, num_stages=num_stages)
    order = json.dumps([kernel, int(gpu[3:]), usual | constants, options])
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, order],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise DSV3Error(
            "the compiler took too long", where=f"{kernel} for {gpu}", found=f"over {timeout_s:g} s"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        missing = "Cannot find" in reason  # ptxas or cuobjdump
        raise DSV3Error(
            "Triton cannot compile it",
            where=f"{kernel} for {gpu}",
            found=reason,
            fix="It comes in Triton's wheel; install that again."
            if missing
            else "sm_89, sm_90, sm_100 and sm_120 are known to work.",
        )
    return Compiled(kernel, gpu, **json.loads(done.stdout))


def _compile(kernel: str, arch: int, constants: dict, options: dict) -> dict:
    """In the process of its own."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, types, _ = KERNELS[kernel]
    function = getattr(importlib.import_module(f"dsv3.kernels.{module}"), f"{kernel}_kernel")
    if isinstance(function, triton.runtime.Autotuner):
        function = function.fn
    types = {name: kind.format(**constants) for name, kind in types.items()}
    for (name, constant, value), others in BY_CONSTANT.items():
        if name == kernel and constants[constant] == value:
            types |= others
    aligned = [["tt.divisibility", 16]]
    source = ASTSource(
        function,
        types | dict.fromkeys(constants, "constexpr"),
        constants,
        {
            (at,): aligned
            for at, (name, kind) in enumerate(types.items())
            if kind.startswith("*") or name in MULTIPLES
        },
    )
    found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return dict(
        ptx=found.asm["ptx"],
        **_resources(knobs.nvidia.cuobjdump.path, found.asm["cubin"]),
        shared=found.metadata.shared,
        threads=32 * found.metadata.num_warps,
    )


def _resources(cuobjdump: str, cubin: bytes) -> dict[str, int]:
    """Of each thread, as the assembler noted it beside the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        told = subprocess.run(
            [cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", told.stdout)[0]
    return dict(registers=int(registers), spilled=int(stack))


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Triton may print; the answer is the only output
        answer = _compile(*json.loads(sys.argv[1]))
    print(json.dumps(answer))
