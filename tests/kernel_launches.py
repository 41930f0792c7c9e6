"""What the kernels' wrappers launch on a Hopper GPU, found out without one, and what becomes of it.

    python kernel_launches.py       one JSON object: of each launch what the compiler made of it

Every wrapper is called on CPU tensors of the sizes that models have, in a process in which Triton
does not interpret. What would go to a GPU is noted instead: the kernel, its constants, its options
and the types of its arguments. Nothing here lists tiles: a new row in a table is found by itself.
"""

import json
import re
from itertools import product

import torch
from triton.runtime.jit import JITFunction

from dsv3 import fp8
from dsv3.fp8.latent import LatentFormat
from dsv3.kernels import launch
from dsv3.kernels.compiled import _compile
from dsv3.kernels.signatures import BY_CONSTANT, KERNELS

CHOICES = {"released": (8, 4, 8), "shipped": (4, 2, 2)}


def typed(value) -> str:
    """As a signature says it."""
    if hasattr(value, "block_shape"):
        return f"tensordesc<fp8e4nv[{', '.join(map(str, value.block_shape))}]>"
    if isinstance(value, torch.Tensor):
        names = {
            torch.float32: "fp32",
            torch.bfloat16: "bf16",
            torch.float8_e4m3fn: "fp8e4nv",
            torch.uint8: "u8",
            torch.int16: "i16",
            torch.int64: "i64",
        }
        return "*" + names[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def launched(calls) -> dict[str, tuple]:
    """Each different launch of these calls: kernel, argument types, constants, options."""
    found: dict[str, tuple] = {}

    def run(kernel, *arguments, grid, warmup, **named):
        assert max(grid[1:], default=0) <= 65_535, (kernel.__name__, grid)
        given = dict(zip(kernel.arg_names, arguments)) | named
        constants = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        types = {p.name: typed(given[p.name]) for p in kernel.params if not p.is_constexpr}
        options = {name: value for name, value in named.items() if name not in kernel.arg_names}
        options = dict(num_warps=4, num_stages=3) | options
        name = kernel.__name__.removesuffix("_kernel")
        key = json.dumps([name, constants, options], sort_keys=True)
        found[key] = name, types, constants, options

    before, JITFunction.run = JITFunction.run, run
    try:
        for call in calls:
            call()
    finally:
        JITFunction.run = before
    return found


def calls():
    """One call of a wrapper after another."""
    from dsv3.kernels import (
        act_quant,
        column_quant,
        combine,
        experts,
        mla_decode,
        mla_prefill,
        norm_quant,
        persistent_gemm,
        router,
        weight_dequant,
    )

    def codes(*shape):
        return torch.empty(shape, dtype=torch.float8_e4m3fn)

    def scales(*shape):
        return torch.empty(fp8.scale_shape(shape, fp8.WEIGHT_BLOCK))

    def empty(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype)

    yield lambda: act_quant.act_quant(empty(3, 7168))
    yield lambda: column_quant.column_quant(empty(300, 7168))
    yield lambda: weight_dequant.weight_dequant(codes(256, 256), scales(256, 256), torch.bfloat16)
    for m, (n, k), dtype in product(
        (1, 20, 50, 100, 20_000), ((576, 7168), (24576, 1536)), (torch.bfloat16, torch.float32)
    ):
        given = codes(m, k), torch.empty(m, k // 128), codes(n, k), scales(n, k)
        yield lambda given=given, dtype=dtype: persistent_gemm.persistent_gemm(*given, dtype)
    rows = codes(576, 2048), torch.empty(576, 16), codes(512, 2048), torch.empty(512, 16)
    yield lambda: persistent_gemm.persistent_gemm(*rows, rows_of_w=1)
    for tokens, (count, d, inner) in product((1, 300, 700, 3000), ((16, 1024, 256),)):
        stacks = codes(count, 2, inner, d), codes(count, d, inner)
        blocks = scales(2 * count * 128, d).view(count, 2, -1, d // 128), scales(1, 1)
        ends = torch.zeros(count, dtype=torch.int64)
        given = codes(tokens, d), torch.empty(tokens, d // 128)
        given = *given, stacks[0], blocks[0], stacks[1], blocks[1], ends
        yield lambda given=given: experts.experts(*given, "ue8m0")
    for (latent, rope, heads), packed in product(((512, 64, 128), (128, 32, 16)), (False, True)):
        kind = LatentFormat(latent, rope)
        seen = empty(2, 600, latent + rope)
        seen = torch.empty(2, 600, kind.bytes, dtype=torch.uint8) if packed else seen
        q, reach = torch.empty(2, 1, heads, latent + rope), torch.zeros(2, 1, dtype=torch.int64)
        yield lambda given=(q, seen, reach, 1.0, latent): mla_decode.mla_decode(*given)
    for (nope, rope, heads), dtype in product(
        ((128, 64, 128), (64, 32, 16)), (torch.float32, torch.bfloat16)
    ):
        parts = (1024, 300, heads, nope), (1024, 300, heads, rope), (1024, 300, heads, 2 * nope)
        parts = [torch.empty(shape, dtype=dtype) for shape in (*parts, (1024, 300, rope))]
        reach = torch.zeros(1024, 300, dtype=torch.int64)
        yield lambda given=(*parts, reach, 1.0): mla_prefill.mla_prefill(*given)
    for (groups, opened, k), (count, d), tokens in product(
        CHOICES.values(), ((256, 7168), (16, 256)), (1, 4096)
    ):
        choice = router.Choice(groups, opened, k, "sigmoid", True, 2.5)
        given = empty(tokens, d), torch.empty(count, d), torch.empty(count), choice
        yield lambda given=given: router.router(*given)
    for d, keeps in product((256, 1536, 7168), (False, True)):
        yield lambda d=d, keeps=keeps: norm_quant.norm_quant(
            empty(2, d), torch.empty(d), 1e-6, "ue8m0", keeps=keeps
        )
    for k, d in ((8, 7168), (2, 256)):
        places = torch.zeros(5, k, dtype=torch.int64)
        given = torch.empty(5 * k, d), torch.empty(5, k), places, torch.zeros(1, dtype=torch.int64)
        yield lambda given=given: combine.combine(*given)


def misread(name: str, types: dict, constants: dict) -> list[str]:
    """Where the house's signature of a kernel differs from what a launch gives it."""
    if set(constants) != set(KERNELS[name][2]):
        return [f"constants {sorted(constants)}"]
    told = {arg: kind.format(**constants) for arg, kind in KERNELS[name][1].items()}
    for (kernel, constant, value), others in BY_CONSTANT.items():
        if kernel == name and constants[constant] == value:
            told |= others
    if "out_ptr" in types:  # sums leave in float32 or rounded, whatever the constants
        told["out_ptr"] = types["out_ptr"] if types["out_ptr"] in ("*fp32", "*i16") else "either"
    return [
        f"{arg}: {told.get(arg)}, launched with {kind}"
        for arg, kind in types.items()
        if told.get(arg) != kind
    ]


def every_tile_to_try() -> dict[str, tuple]:
    """What the tuner of the plain product may launch."""
    from dsv3.kernels.fp8_gemm import fp8_gemm_kernel

    _, types, usual = KERNELS["fp8_gemm"]
    return {
        str(config): (
            "fp8_gemm",
            types,
            usual | config.kwargs,
            dict(num_warps=config.num_warps, num_stages=config.num_stages),
        )
        for config in fp8_gemm_kernel.configs
    }


def main() -> None:
    launch.check_input = lambda *_: None  # before the kernels' modules take it
    launch.multiprocessors = lambda device: 132
    with torch.device("meta"):
        found = launched(calls())
    found |= every_tile_to_try()
    told = {}
    for key, (name, types, constants, options) in found.items():
        made = _compile(name, 90, constants, options)
        ptx = made.pop("ptx")
        told[key] = made | dict(
            kernel=name,
            misread=misread(name, types, constants),
            products=sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync", ptx))),
            atomics="atom" in ptx,
            inexact_division=bool(re.search(r"div\.(full|approx)", ptx)),
        )
    print(json.dumps(told))


if __name__ == "__main__":
    main()
