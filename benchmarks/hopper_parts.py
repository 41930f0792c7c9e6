"""What ``benchmarks/hopper.py`` checks and times, part by part.

Each part yields findings: a dict with the case, ``error`` (distance from the specification, of the
norm), further checks, and ``passed``; where times are asked for, ``us`` and what follows from it.
Three checks come again: *repeats*, twenty runs give the same bits (a pipelining race would not);
*as_alone*, a token's bits are those it has without the others; *close*, the error is below a bound.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch

from benchmarks.fp8_gemm import LAYERS, bytes_moved
from dsv3.fields import BLOCK

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Sizes:
    """small: for trying the file; timed: times are wanted; tiles: of every tile."""

    small: bool
    timed: bool
    tiles: bool

    def of(self, released, small):
        return small if self.small else released


def described() -> dict:
    """The machine and the versions."""
    if DEVICE == "cpu":
        return dict(chip="none, in Triton's interpreter", torch=torch.__version__)
    from benchmarks.fp8_gemm import described

    return described()


def microseconds(call: Callable[[], object]) -> float:
    """The median; the cache is emptied in between."""
    if DEVICE == "cpu":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6
    from triton.testing import do_bench

    return do_bench(call, return_mode="median") * 1e3


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, device=DEVICE, generator=generator)


def operands(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """Random codes and scales: x, sx, w, sw."""
    blocks = -(-k // BLOCK)
    codes = [(random(rows, k) * 100).clamp(-448, 448).to(E4M3) for rows in (m, n)]
    scales = [random(rows, blocks).abs() * 1e-2 + 1e-3 for rows in (m, -(-n // BLOCK))]
    return codes[0], scales[0], codes[1], scales[1]


def stack(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes, none of them NaN, and scales of their blocks."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device=DEVICE).bitwise_and_(0xFE)
    grid = *shape[:-2], -(-shape[-2] // BLOCK), -(-shape[-1] // BLOCK)
    return codes.view(E4M3), torch.rand(grid, device=DEVICE) * 1e-5 + 1e-6


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def same(*found: torch.Tensor) -> bool:
    return all(torch.equal(found[0], other) for other in found[1:])


def verdict(case: str, error: float, bound: float, **checks: bool) -> dict:
    checks = dict(close=error < bound, **checks)
    return dict(case=case, error=float(f"{error:.2g}"), **checks, passed=all(checks.values()))


def repeats(call: Callable[[], torch.Tensor], sizes: Sizes) -> bool:
    return same(*(call() for _ in range(sizes.of(20, 2))))


# The parts ---------------------------------------------------------------------------------------


def codes(sizes: Sizes) -> Iterator[dict]:
    """Quantisation, norm with quantisation and the sum over experts: bytes."""
    from dsv3.kernels import act_quant, combine, norm_quant

    rows, width = sizes.of((4096, 7168), (5, 300))
    x, weight = random(rows, width).bfloat16(), random(width).abs() + 0.1
    if sizes.timed:
        for tokens in sizes.of((1, 128, 4096), (3,)):
            part = x[:tokens]
            took = microseconds(
                lambda part=part: norm_quant.norm_quant(part, weight, 1e-6, "ue8m0")
            )
            moved = tokens * width * 3
            yield dict(case=f"norm_quant, {tokens} tokens", us=took, gb_per_s=moved / took / 1e3)
        return

    def differ(found, expected) -> int:
        raw = [(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
               for a, b in zip(found, expected, strict=True)]  # fmt: skip
        return sum(int((a != b).sum()) for a, b in raw)

    for kind in ("float32", "ue8m0"):
        count = differ(act_quant.act_quant(x, kind), act_quant.act_quant_spec(x, kind))
        yield dict(case=f"act_quant {kind}", bytes_differ=count, passed=count == 0)
        given = x, weight, 1e-6, kind
        found, expected = (
            norm_quant.norm_quant(*given, keeps=True),
            norm_quant.norm_quant_spec(*given),
        )
        count = differ(found, expected)
        yield dict(case=f"norm_quant {kind}", bytes_differ=count, passed=count == 0)
    n, k = sizes.of((512, 8), (5, 2))
    y, weights = random(n * k, width), random(n, k)
    order = torch.randperm(n * k, device=DEVICE)
    places, used = (
        combine.where_stands(order, n * k).view(n, k),
        torch.tensor([n * k - 3], device=DEVICE),
    )
    count = differ([combine.combine(y, weights, places, used)],
                   [combine.combine_spec(y, weights, places, used)])  # fmt: skip
    yield dict(case="combine", bytes_differ=count, passed=count == 0)


def products(sizes: Sizes) -> Iterator[dict]:
    """The block-scaled product: of the 671B model's layers, from one token to a long prompt."""
    from dsv3.kernels.persistent_gemm import Tile, persistent_gemm, persistent_gemm_spec, tile_for

    for layer, (n, k) in sizes.of(LAYERS, {"small": (192, 1104)}).items():
        for m in sizes.of((1, 16, 64, 256, 4096), (1, 20)):
            given, case = operands(m, n, k), f"{layer} {n} x {k}, {m} tokens"
            found = persistent_gemm(*given)
            if not sizes.timed:
                stages = [
                    persistent_gemm(*given, tile=tile_for(m)._replace(stages=count))
                    for count in (2, 3, 4, 5)
                ]
                alone = persistent_gemm(given[0][:1], given[1][:1], *given[2:])
                yield verdict(
                    case,
                    distance(found, persistent_gemm_spec(*given)),
                    1e-3,
                    repeats=repeats(lambda: persistent_gemm(*given), sizes),
                    any_stages=same(found, *stages),
                    as_alone=same(found[:1], alone),
                )
                continue
            tried = [tile_for(m)]
            if sizes.tiles:
                tried += [
                    Tile(rows, cols, warps, stages, swap=True)
                    for rows in (16, 32, 64)
                    for cols, warps, stages in ((64, 4, 6), (64, 4, 8), (128, 4, 5), (128, 8, 6))
                    if rows >= min(m, 64)
                ]
                tried += [
                    Tile(rows, 128, warps, stages, pair=pair)
                    for rows, warps, pair in ((64, 4, False), (64, 8, False), (128, 8, False),
                                              (128, 8, True))
                    for stages in (3, 4)
                ]  # fmt: skip
            for tile in tried:
                try:
                    took = microseconds(lambda tile=tile: persistent_gemm(*given, tile=tile))
                except Exception as refused:  # too much shared memory, for one
                    yield dict(case=case, tile=str(tile), refused=str(refused).splitlines()[0][:80])
                    continue
                yield dict(
                    case=case,
                    us=took,
                    tflops=2 * m * n * k / took / 1e6,
                    gb_per_s=bytes_moved(m, n, k) / took / 1e3,
                    **({"tile": str(tile)} if sizes.tiles else {}),
                )


def experts(sizes: Sizes) -> Iterator[dict]:
    """A layer's experts, on the rows of random choices: decoding and a long prompt."""
    from dsv3.kernels.experts import experts, experts_spec

    d, inner, all_of, picks = sizes.of((7168, 2048, 256, 8), (48, 32, 8, 2))
    for tokens in sizes.of((1, 16, 128, 4096), (3, 20)):
        count = all_of // 8 if tokens > 1024 else all_of  # what one of eight chips holds
        draw = torch.Generator(DEVICE).manual_seed(tokens)
        chosen = torch.rand(tokens, count, device=DEVICE, generator=draw).topk(picks).indices
        ends = torch.bincount(chosen.flatten(), minlength=count).cumsum(0)
        rows = tokens * picks
        x, sx, _, _ = operands(rows, 1, d)
        given = x, sx, *stack(count, 2, inner, d), *stack(count, d, inner), ends
        case = f"{tokens} tokens, {count} experts"
        if not sizes.timed:
            error = distance(experts(*given), experts_spec(*given))
            yield verdict(case, error, 1e-2, repeats=repeats(lambda: experts(*given), sizes))
            continue
        took = microseconds(lambda: experts(*given))
        used = int((ends.diff(prepend=ends[:1] * 0) > 0).sum())
        yield dict(
            case=case,
            us=took,
            tflops=6 * rows * inner * d / took / 1e6,
            gb_per_s_of_weights=3 * used * inner * d / took / 1e3,
        )


def gradients(sizes: Sizes) -> Iterator[dict]:
    """The gradient of a weight, its operands quantised by columns."""
    from dsv3 import fp8

    tokens, outs, ins = sizes.of((4096, 7168, 2048), (200, 130, 48))
    dy, x = (random(tokens, width).bfloat16() for width in (outs, ins))

    def whole() -> torch.Tensor:
        a, b = (fp8.quantize_columns(t, "ue8m0", backend="triton") for t in (dy, x))
        return fp8.outer(a, b, backend="triton")

    case = f"dW {outs} x {ins}, {tokens} tokens"
    if not sizes.timed:
        a, b = (fp8.quantize_columns(t, "ue8m0", backend="torch") for t in (dy, x))
        yield verdict(
            case,
            distance(whole(), a.dequantize().T @ b.dequantize()),
            1e-3,
            repeats=repeats(whole, sizes),
        )
        return
    took, bf16 = microseconds(whole), microseconds(lambda: dy.T @ x)
    yield dict(case=case, us=took, tflops=2 * tokens * outs * ins / took / 1e6, bf16_us=bf16)


def attention(sizes: Sizes) -> Iterator[dict]:
    """Absorbed, over a cache in bfloat16 and one in FP8; and expanded."""
    from dsv3.fp8.latent import LatentFormat
    from dsv3.kernels.mla_decode import mla_decode, mla_decode_spec
    from dsv3.kernels.mla_prefill import mla_prefill, mla_prefill_spec

    latent, rope = sizes.of((512, 64), (64, 16))
    cases = [(1, 128, 4096), (32, 128, 4096), (1, 16, 32768), (64, 16, 4096)]
    for b, heads, t in sizes.of(cases, [(2, 4, 300)]):
        q, store = random(b, 1, heads, latent + rope), random(b, t, latent + rope)
        reach = torch.full((b, 1), t - 1, device=DEVICE)
        for packed in (False, True):
            kind = LatentFormat(latent, rope)
            seen = kind.pack(store) if packed else store.bfloat16()
            given = q, seen, reach, 0.07, latent
            case = f"decode, {b} texts, {heads} heads, {t} keys{', FP8' if packed else ''}"
            if sizes.timed:
                took = microseconds(lambda: mla_decode(*given))
                yield dict(case=case, us=took, gb_per_s=seen.nbytes / took / 1e3)
                continue
            wide = kind.unpack(seen, torch.float32) if packed else seen.float()
            kind_of = torch.float64 if b * t < 40_000 else torch.float32
            expected = mla_decode_spec(q.to(kind_of), wide.to(kind_of), *given[2:])
            found = mla_decode(*given)
            alone = mla_decode(q[:1], seen[:1, : t - 1], reach[:1], *given[3:])
            yield verdict(
                case,
                distance(found, expected),
                1e-4,
                repeats=repeats(lambda: mla_decode(*given), sizes),
                as_alone=same(found[:1], alone),
            )
    d_h, d_r, d_v = sizes.of((128, 64, 128), (48, 16, 32))
    for heads, s in sizes.of([(16, 2048), (128, 1024)], [(2, 70)]):
        for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
            shapes = (1, s, heads, d_h), (1, s, heads, d_r), (1, s, heads, d_h + d_v), (1, s, d_r)
            parts = [random(*shape).to(dtype) for shape in shapes]
            reach = torch.arange(1, s + 1, device=DEVICE)[None]
            case = f"prefill, {heads} heads, {s} tokens, {str(dtype)[6:]}"
            if sizes.timed:
                took = microseconds(lambda: mla_prefill(*parts, reach, 0.07))
                flops = s * s * heads * (d_h + d_r + d_v)
                yield dict(case=case, us=took, tflops=flops / took / 1e6)
                continue
            expected = mla_prefill_spec(*(part.float() for part in parts), reach, 0.07)
            found = mla_prefill(*parts, reach, 0.07)
            again = repeats(lambda: mla_prefill(*parts, reach, 0.07), sizes)
            yield verdict(case, distance(found, expected), bound, repeats=again)


def routing(sizes: Sizes) -> Iterator[dict]:
    """The router: the same experts but for near ties, and the same bits alone and among many."""
    from dsv3.kernels.router import Choice, router, router_spec

    count, width, groups, opened, k = sizes.of((256, 7168, 8, 4, 8), (16, 320, 4, 2, 2))
    weight, bias = random(count, width) * width**-0.5, 0.1 * random(count)
    choice = Choice(groups, opened, k, "sigmoid", True, 2.5)
    for tokens in sizes.of((1, 64, 4096), (1, 40)):
        u = random(tokens, width).bfloat16()
        if sizes.timed:
            took = microseconds(lambda: router(u, weight, bias, choice))
            yield dict(case=f"{tokens} tokens", us=took)
            continue
        (weights, chosen), (wanted, numbers) = (
            form(u, weight, bias, choice) for form in (router, router_spec)
        )
        agree = (chosen == numbers).all(-1)
        alone = router(u[:1], weight, bias, choice)
        yield verdict(
            f"{tokens} tokens",
            distance(weights[agree], wanted[agree]),
            1e-5,
            same_experts=float(agree.float().mean()) > 0.998,
            as_alone=same(weights[:1], alone[0]) and same(chosen[:1], alone[1]),
        )


def model(sizes: Sizes) -> Iterator[dict]:
    """A whole model in FP8 with all kernels: beside plain torch, alone and in a batch, compiled and
    captured; tokens a second."""
    from dsv3 import ModelConfig, Transformer
    from dsv3.generation.loop import complete

    config = ModelConfig.mini().but(num_nextn_predict_layers=0)
    if sizes.small:
        config = config.but(num_hidden_layers=2, first_k_dense_replace=1, vocab_size=64)
    network = Transformer(config, "fp8", device=DEVICE)
    filled = Transformer(config, device=DEVICE).init_weights(0, by_width=True)
    network.load_state_dict(filled.state_dict())
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(config.vocab_size, (5, sizes.of(60, 4)), generator=draw).tolist()
    options = dict(max_new_tokens=sizes.of(64, 2), eos_ids=())
    if not sizes.timed:
        with torch.inference_mode():
            tokens = torch.tensor(prompts)
            found = network(tokens).float()
            with patch("dsv3.precision.Precision.in_kernels", return_value=False):
                yield verdict("logits beside plain torch", distance(found, network(tokens)), 0.2)
        together = complete(network, prompts, **options)
        equal = together.ids[0] == complete(network, prompts[:1], **options).ids[0]
        yield dict(case="a text alone and in a batch (no promise on a GPU)", equal=equal)
        if DEVICE == "cpu":
            return
        network.compile()
        captured = complete(network, prompts, **options)
        equal = sum(a == b for a, b in zip(captured.ids, together.ids))
        captures = network._compiled is not None and network._compiled.captured is not None
        yield dict(
            case="texts by captured passes that are those without",
            equal=f"{equal} of {len(prompts)}",
            captures=captures,
            passed=equal > 0 and captures,
        )
        return

    def speed() -> float:
        complete(network, prompts[:1], **options)
        return statistics.median(
            complete(network, prompts[:1], **options).tokens_per_second for _ in range(3)
        )

    eager = speed()
    yield dict(case="one text, tokens a second", eager=eager)
    if DEVICE == "cuda":
        network.compile()
        captured = speed()
        yield dict(case="one text, tokens a second", captured=captured, ratio=captured / eager)


PARTS: dict[str, Callable[[Sizes], Iterator[dict]]] = {
    part.__name__: part for part in (codes, products, experts, attention, routing, gradients, model)
}
