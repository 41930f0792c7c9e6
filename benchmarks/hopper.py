"""The kernels written for Hopper on a Hopper chip: checked first, then timed, tile by tile.

    python benchmarks/hopper.py [--tokens 1 16 64 256 4096] [--layers wq_b wo w1 w2] [--quick]

For each product: the distance from its specification; whether twenty runs give the same bits with
2 to 5 loads under way; whether the first token's numbers are those it has alone, bit for bit (the
order of a sum does not depend on the number of tokens); then the time with each tile, a star at
the one that the table in ``dsv3.kernels.persistent_gemm`` takes. Then a layer's experts, for a step
of decoding and for a long prompt, and the gradient of a weight. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.fp8_gemm import LAYERS, MOST_ERROR, bytes_moved, operands
from dsv3.fields import BLOCK

EXPERTS, INNER, HIDDEN, CHOSEN = 256, 2048, 7168, 8  # of the 671B model


def tiles() -> list:
    """What the table could say: candidates for few tokens and for many."""
    from dsv3.kernels.persistent_gemm import Tile

    few = [
        Tile(rows, cols, warps, stages, swap=True)
        for rows in (16, 32, 64)
        for cols, warps, stages in ((64, 4, 6), (64, 4, 8), (128, 4, 5), (128, 8, 6))
    ]
    many = [
        Tile(rows, 128, warps, stages, pair=pair)
        for rows, warps, pair in ((64, 4, False), (64, 8, False), (128, 8, False), (128, 8, True))
        for stages in (3, 4)
    ]
    return few + many


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def same(*found: torch.Tensor) -> bool:
    return all(torch.equal(found[0], other) for other in found[1:])


def products(layers: list[str], tokens: list[int], quick: bool) -> int:
    from triton.testing import do_bench

    from dsv3.kernels.persistent_gemm import persistent_gemm, persistent_gemm_spec, tile_for

    failed = 0
    for layer in layers:
        n, k = LAYERS[layer]
        for m in tokens:
            given = operands(m, n, k)
            found = persistent_gemm(*given)
            error = distance(found, persistent_gemm_spec(*given))
            again = [persistent_gemm(*given) for _ in range(20)]
            again += [
                persistent_gemm(*given, tile=tile_for(m)._replace(stages=stages))
                for stages in (2, 3, 4, 5)
            ]
            alone = persistent_gemm(given[0][:1], given[1][:1], *given[2:])
            checks = dict(close=error < MOST_ERROR, repeats=same(found, *again))
            checks["as alone"] = same(found[:1], alone)
            failed += not all(checks.values())
            told = " ".join(f"{name} {'yes' if ok else 'NO'}" for name, ok in checks.items())
            print(f"{layer:5} {m:5} tokens: error {error:.1e}, {told}")
            chosen = tile_for(m)
            for tile in [chosen] if quick else [chosen, *tiles()]:
                if tile.swap and tile.rows < min(m, 64):
                    continue
                try:
                    took = do_bench(lambda: persistent_gemm(*given, tile=tile)) / 1e3
                except Exception as refused:  # too much shared memory, for one
                    print(f"    {tile}: {str(refused).splitlines()[0][:60]}")
                    continue
                print(
                    f"  {'*' if tile == chosen else ' '} {took * 1e6:8.1f} us "
                    f"{2 * m * n * k / took / 1e12:7.1f} TFLOPS "
                    f"{bytes_moved(m, n, k) / took / 1e9:7.1f} GB/s  {tile}",
                    flush=True,
                )
    return failed


def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, none of them NaN, and scales of their blocks."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda").bitwise_and_(0xFE)
    grid = *shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK)
    return codes.view(torch.float8_e4m3fn), torch.rand(grid, device="cuda") * 1e-5 + 1e-6


def routed(tokens: int) -> int:
    """A layer's experts for so many tokens, on the rows of random choices."""
    from triton.testing import do_bench

    from dsv3.kernels.experts import experts, experts_spec

    count = EXPERTS // 8 if tokens > 1024 else EXPERTS  # what one of eight chips holds
    draw = torch.Generator("cuda").manual_seed(tokens)
    chosen = torch.rand(tokens, count, device="cuda", generator=draw).topk(CHOSEN).indices
    ends = torch.bincount(chosen.flatten(), minlength=count).cumsum(0)
    rows = tokens * CHOSEN
    x, sx, _, _ = operands(rows, 1, HIDDEN)
    given = x, sx, *stack(count, 2, INNER, HIDDEN), *stack(count, HIDDEN, INNER), ends
    found = experts(*given)
    error = distance(found, experts_spec(*given))
    close, repeats = error < 1e-2, same(found, *(experts(*given) for _ in range(20)))
    took = do_bench(lambda: experts(*given)) / 1e3
    used = int((ends.diff(prepend=ends[:1] * 0) > 0).sum())
    print(
        f"experts, {tokens} tokens of {count} experts ({used} used): error {error:.1e}, close "
        f"{'yes' if close else 'NO'}, repeats {'yes' if repeats else 'NO'}; {took * 1e6:.1f} us, "
        f"{6 * rows * INNER * HIDDEN / took / 1e12:.1f} TFLOPS, "
        f"{3 * used * INNER * HIDDEN / took / 1e9:.1f} GB/s of weights",
        flush=True,
    )
    return not (close and repeats)


def gradient(tokens: int, outs: int, ins: int) -> int:
    from triton.testing import do_bench

    from dsv3 import fp8

    draw = torch.Generator("cuda").manual_seed(tokens)
    dy, x = (
        torch.randn(tokens, width, device="cuda", generator=draw).bfloat16()
        for width in (outs, ins)
    )
    a, b = (fp8.quantize_columns(t, "ue8m0") for t in (dy, x))
    error = distance(fp8.outer(a, b), a.dequantize().T @ b.dequantize())
    took = do_bench(lambda: fp8.outer(a, b)) / 1e3
    whole = do_bench(
        lambda: fp8.outer(fp8.quantize_columns(dy, "ue8m0"), fp8.quantize_columns(x, "ue8m0"))
    )
    bf16 = do_bench(lambda: dy.T @ x)
    print(
        f"dW {outs} x {ins}, {tokens} tokens: error {error:.1e}; {took * 1e3:.3f} ms "
        f"({2 * tokens * outs * ins / took / 1e12:.1f} TFLOPS), with both quantisations "
        f"{whole:.3f} ms; bf16 {bf16:.3f} ms"
    )
    return error > MOST_ERROR


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 4096])
    parser.add_argument("--quick", action="store_true", help="only the tile of the table")
    chosen = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("No Hopper chip here: nothing was measured.")
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False  # the specifications add in FP32
    failed = products(chosen.layers, chosen.tokens, chosen.quick)
    failed += sum(routed(tokens) for tokens in (1, 16, 128, 4096))
    return bool(failed + gradient(4096, 7168, 2048))


if __name__ == "__main__":
    raise SystemExit(main())
