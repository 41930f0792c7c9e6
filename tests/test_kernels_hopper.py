"""The kernels written for Hopper, against their torch specifications and float64: on a GPU, or in
Triton's interpreter."""

import re
import sys

import pytest
import torch
from fp8_cases import adversarial_rows, product_error, same_bits

from dsv3 import ModelConfig, fp8, moe
from dsv3.errors import DSV3Error
from dsv3.fp8 import experts as fp8_experts
from dsv3.fp8 import product
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

pytest.importorskip("triton", reason="Triton is not installed (there is none for this platform)")

from dsv3.kernels import column_quant, experts, persistent_gemm
from dsv3.kernels.compiled import compile_for

pytestmark = [
    pytest.mark.slow,
    # of a gate far below zero, whose silu is -0; NumPy, which interprets, mentions it
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# FP8 tensor cores add with about 14 bits inside a block of 128; the interpreter is exact.
TOLERANCE = 1e-3 if DEVICE == "cuda" else 1e-5
FORMATS = ("float32", "ue8m0")


@pytest.fixture(autouse=True)
def two_at_once(monkeypatch) -> None:
    """Without a GPU: two programs at a time, so that few rows already fill the chip."""
    if DEVICE == "cpu":
        for module in (persistent_gemm, experts):
            monkeypatch.setattr(module, "multiprocessors", lambda device: 2)


def pieces(*quantised) -> list[torch.Tensor]:
    return [t.to(DEVICE) for q in quantised for t in (q.data, q.scale)]


def operands(m: int, n: int, k: int, scale_format: str):
    """Numbers whose sizes run over many powers of two, both ways."""
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-4, 3, k)
    w = torch.randn(n, k, generator=generator) * torch.logspace(2, -3, n)[:, None]
    return fp8.quantize_activation(x, scale_format), fp8.quantize_weight(w, scale_format)


def whole_numbers(*shape: int) -> torch.Tensor:
    """Codes whose products have exact sums, in any order."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-8, 9, shape, generator=generator).float().to(torch.float8_e4m3fn)


# The product -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    "m, n, k",
    [(1, 60, 48), (3, 60, 1104), (20, 150, 1040), (50, 140, 144), (130, 40, 1040), (200, 250, 160)],
)
def test_a_product_of_every_tile(m, n, k, scale_format):
    xq, wq = operands(m, n, k, scale_format)
    y = persistent_gemm.persistent_gemm(*pieces(xq, wq)).cpu()
    values = xq.dequantize(), wq.dequantize()
    assert product_error(persistent_gemm.persistent_gemm_spec(*pieces(xq, wq)), *values) < 1e-5
    assert product_error(y, *values) < TOLERANCE
    low = persistent_gemm.persistent_gemm(*pieces(xq, wq), torch.bfloat16).cpu()
    assert same_bits(low, y.to(torch.bfloat16))


def test_a_tokens_numbers_do_not_depend_on_how_many_there_are():
    """Exact sums of blocks, scales that make each addition of two blocks round: only one order of
    additions gives these bits. One tile splits K among programs, two rows of tiles do not."""
    n, k = 60, 1104
    x, w = whole_numbers(130, k), whole_numbers(n, k)
    sx, sw = torch.rand(130, 9) + 0.1, torch.rand(1, 9) + 0.1
    assert persistent_gemm.blocks_in_part(n, k) == 5
    whole = persistent_gemm.persistent_gemm_spec(x, sx, w, sw)
    in_one_go = sum(
        (x[:, at].float() @ w[:, at].float().T) * (sx[:, i, None] * sw[:, i])
        for i, at in enumerate(slice(128 * i, 128 * i + 128) for i in range(9))
    )
    assert (whole != in_one_go).any()
    for m in (1, 20, 50, 130):
        found = persistent_gemm.persistent_gemm(*(t.to(DEVICE) for t in (x[:m], sx[:m], w, sw)))
        assert same_bits(found.cpu(), whole[:m])


def test_how_a_sum_is_cut_depends_on_the_matrix_alone():
    """At one token a Hopper chip's 132 multiprocessors have work. Rows and columns of V3."""
    for n, k in ((1536, 7168), (576, 7168), (24576, 1536), (7168, 16384), (7168, 2048), (128, 64)):
        blocks, in_part = -(-k // 128), persistent_gemm.blocks_in_part(n, k)
        parts = -(-blocks // in_part)
        assert (parts - 1) * in_part < blocks <= parts * in_part
        assert parts == 1 or (in_part >= 4 and -(-n // 64) * parts <= 192)
        assert n < 576 or -(-n // 64) * parts > 100


def test_nan_stays_in_its_row():
    xq, wq = operands(5, 70, 160, "float32")
    xq.scale[3, 1] = torch.nan
    y = persistent_gemm.persistent_gemm(*pieces(xq, wq)).cpu()
    assert y[3].isnan().all() and y.isnan().sum() == 70


def test_scales_may_lie_in_any_order():
    xq, wq = operands(5, 70, 160, "float32")
    x, sx, w, sw = pieces(xq, wq)
    turned = sx.T.contiguous().T, sw.T.contiguous().T
    assert turned[0].stride() != sx.stride()
    y = persistent_gemm.persistent_gemm(x, turned[0], w, turned[1])
    assert same_bits(y, persistent_gemm.persistent_gemm(x, sx, w, sw))


def test_the_package_takes_the_kernel_that_fits(monkeypatch):
    """Rows at multiples of 16 bytes go through descriptors, others through plain addresses."""
    used = []
    kernel = persistent_gemm.persistent_gemm
    monkeypatch.setattr(
        persistent_gemm, "persistent_gemm", lambda *a, **kw: used.append(a[-1]) or kernel(*a, **kw)
    )
    for k, calls in ((160, [torch.bfloat16]), (200, [])):
        xq, wq = operands(6, 70, k, "ue8m0")
        xq = fp8.QuantizedTensor(xq.data.view(2, 3, k), xq.scale.view(2, 3, -1), xq.block, "ue8m0")
        y = fp8.matmul(xq.to(DEVICE), wq.to(DEVICE), backend="triton", dtype=torch.bfloat16)
        plain = fp8.matmul(xq, wq, backend="torch", dtype=torch.bfloat16)
        assert used == calls and y.dtype == torch.bfloat16 and y.shape == (2, 3, 70)
        torch.testing.assert_close(y.cpu(), plain, rtol=2**-7, atol=1e-2)
        used.clear()
    assert fp8.matmul(xq[:0].to(DEVICE), wq.to(DEVICE), backend="triton").shape == (0, 3, 70)
    with pytest.raises(DSV3Error, match="persistent_gemm: shapes do not fit"):
        kernel(*pieces(xq[0], wq)[:3], torch.ones(3, 3, device=DEVICE))


# Weight gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_tiles_are_those_of_the_package(dtype, scale_format):
    x = adversarial_rows(90, 300).T.contiguous().to(dtype)  # 300 tokens, sizes by channel
    found = fp8.quantize_columns(x.to(DEVICE), scale_format, backend="triton")
    plain = fp8.quantize_columns(x, scale_format, backend="torch")
    spec = column_quant.column_quant_spec(x, scale_format)
    for codes, scale in ((found.data, found.scale), (spec[0].T, spec[1].T)):
        assert same_bits(codes.cpu(), plain.data) and same_bits(scale.cpu(), plain.scale)
    assert found.data.T.stride() == (304, 1)  # tokens side by side, rows of whole 16 bytes
    assert column_quant.column_quant(x[:0].to(DEVICE))[0].shape == (90, 0)


@pytest.mark.parametrize("tokens, outs, ins", [(1, 40, 70), (200, 130, 130), (1100, 130, 40)])
def test_a_weight_gradient(tokens, outs, ins):
    """Each row of either operand has a scale of its own for every 128 tokens."""
    generator = torch.Generator().manual_seed(tokens)
    dy = torch.randn(tokens, outs, generator=generator) * torch.logspace(-3, 3, outs)
    x = torch.randn(tokens, ins, generator=generator) * torch.logspace(2, -4, ins)
    dy *= torch.logspace(0, -5, tokens)[:, None]
    a, b = (fp8.quantize_columns(t.to(DEVICE), "ue8m0", backend="triton") for t in (dy, x))
    found = product.outer(a, b, backend="triton").cpu()
    values = a.dequantize().cpu().T, b.dequantize().cpu().T
    assert product_error(found, *values) < TOLERANCE
    assert product_error(product.outer(a, b, backend="torch").cpu(), *values) < 1e-5
    spec = persistent_gemm.persistent_gemm_spec(
        *(t.cpu() for t in (a.data.T, a.scale.T, b.data.T, b.scale.T)), rows_of_w=1
    )
    assert product_error(spec, *values) < 1e-5


def test_sums_over_rows_want_column_tiles():
    rows = fp8.quantize_activation(torch.ones(3, 128))
    with pytest.raises(DSV3Error, match="sum over rows.*quantize_columns"):
        product.outer(rows, rows)


# Experts -----------------------------------------------------------------------------------------


def stacks(count: int, inner: int, d: int, scale_format: str):
    """Experts of random numbers: w13 and w2, and their codes and scales as a list."""
    generator = torch.Generator().manual_seed(count + inner + d)
    w13 = torch.randn(count, 2, inner, d, generator=generator) / d**0.5
    w2 = torch.randn(count, d, inner, generator=generator) / inner**0.5
    w13, w2 = (fp8.quantize_weight(w, scale_format) for w in (w13, w2))
    return w13, w2


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    "rows, inner, d, ends",
    [
        (7, 48, 144, [3, 3, 6]),  # an empty expert, a row of junk; a few rows each
        (1, 16, 48, [0, 1]),
        (40, 144, 48, [1, 38]),  # a second block of hidden channels that is not full
        (70, 32, 48, [0, 67]),
        (150, 32, 48, [149]),
        (5, 32, 48, [0, 0]),  # none of the rows is mine
    ],
)
def test_experts_of_every_tile(rows, inner, d, ends, scale_format):
    w13, w2 = stacks(len(ends), inner, d, scale_format)
    x = fp8.quantize_activation(torch.randn(rows, d) * torch.logspace(-2, 2, rows)[:, None])
    x = fp8.QuantizedTensor(x.data, x.scale, x.block, scale_format)
    mine, last = torch.tensor(ends), ends[-1]
    given = [*pieces(x, w13), mine.to(DEVICE), scale_format]
    codes, scales = (t.cpu()[:last] for t in experts.hidden(*given))
    spec, spec_scales = (
        t[:last] for t in experts.hidden_spec(*(pieces(x, w13)), mine, scale_format)
    )
    # Two orders of a sum round to two neighbours in bfloat16 now and then.
    same = (codes.view(torch.uint8) == spec.view(torch.uint8)).float().mean()
    assert last == 0 or same > 0.99
    torch.testing.assert_close(scales, spec_scales, rtol=1e-2, atol=0)

    found = experts.experts(*pieces(x, w13, w2), mine.to(DEVICE), scale_format).cpu()
    assert found.shape == (rows, d)
    hidden = fp8.QuantizedTensor(codes, scales, x.block, scale_format).dequantize()
    starts = [0, *ends]
    for expert, end in enumerate(ends):
        if starts[expert] < end:
            own = slice(starts[expert], end)
            assert product_error(found[own], hidden[own], w2[expert].dequantize()) < TOLERANCE
    whole = experts.experts_spec(*(pieces(x, w13, w2)), mine, scale_format)
    torch.testing.assert_close(
        found[:last], whole[:last], rtol=0.05, atol=0.02 * float(whole.abs().max())
    )


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("rows", [5, 40, 70])
def test_what_goes_into_w2_is_quantised_to_the_same_bytes(rows, scale_format):
    """Gates of 64, whose silu is 64 exactly, and sums that are exact: every byte is given."""
    inner, d = 144, 48
    x, w13 = whole_numbers(rows, d), whole_numbers(2, 2, inner, d)
    x[:, 0], w13[:, 0], w13[:, 0, :, 0] = 1, 0, 64
    sx = torch.ldexp(torch.ones(rows, 1), torch.arange(rows)[:, None] % 7 - 2)
    sx[-1] = torch.nan
    x[0, 1:], w13[:, 1, 1::2] = 0, 0  # a tile with little in it
    s13 = torch.ones(2, 2, 2, 1)
    given = [t.to(DEVICE) for t in (x, sx, w13, s13, torch.tensor([rows // 3, rows]))]
    codes, scales = (t.cpu() for t in experts.hidden(*given, scale_format))
    gate, up = (
        torch.stack(
            [(x[r].float() * sx[r]) @ w13[int(r >= rows // 3), i].float().T for r in range(rows)]
        )
        for i in (0, 1)
    )
    assert (gate[:-1] == 64 * sx[:-1]).all()
    big = sx.flatten() >= 1  # silu(g) is g there
    values = torch.nn.functional.silu(gate.bfloat16()) * up.bfloat16()
    wanted = fp8.quantize_activation(values, scale_format, backend="torch")
    assert scales[-1].isnan().all() and wanted.scale[-1].isnan().all()
    big[-1] = False
    assert big.sum() > 1 and same_bits(codes[big], wanted.data[big])
    assert same_bits(scales[big], wanted.scale[big])


def test_a_layers_experts_take_the_fused_form_where_it_serves(monkeypatch):
    config = ModelConfig.mini().but(
        hidden_size=48, moe_intermediate_size=32, n_routed_experts=4, n_group=1, topk_group=1
    )
    layer = moe.Experts(config, Precision.of("fp8", config), TensorGroup.single())
    for codes, scale in ((layer.w13, layer.w13_scale), (layer.w2, layer.w2_scale)):
        blocks = fp8.quantize_weight(torch.randn(codes.shape) / codes.shape[-1] ** 0.5)
        codes.data.copy_(blocks.data)
        scale.copy_(blocks.scale)
    u, weights = torch.randn(6, 48).bfloat16(), torch.rand(6, 2)
    chosen = torch.tensor([[0, 3], [3, 0], [0, 2], [2, 3], [3, 2], [0, 2]])  # nobody wants 1
    plain = layer(u, weights, chosen)

    def one_by_one(*_):
        raise AssertionError("the plain form was taken")

    layer, u, weights, chosen = (
        layer.to(DEVICE),
        u.to(DEVICE),
        weights.to(DEVICE),
        chosen.to(DEVICE),
    )
    monkeypatch.setattr(fp8_experts, "pick_backend", lambda device, backend: "triton")
    monkeypatch.setattr("dsv3.grouped.one_by_one", one_by_one)
    found = layer(u, weights, chosen).cpu()
    assert (found - plain).norm() < 0.01 * plain.norm()
    # A gradient is refused, as in the plain form.
    with pytest.raises(DSV3Error, match="no gradient goes back"):
        operand = fp8.quantize_activation(u)
        operand.scale.requires_grad_()
        layer.swiglu(operand, torch.tensor([1, 2, 3, 6], device=DEVICE)).sum().backward()


def test_the_fused_form_is_refused_what_it_cannot_take():
    w13, w2 = stacks(2, 32, 48, "float32")
    x, ends = fp8.quantize_activation(torch.randn(3, 48)), torch.tensor([1, 3])
    assert fp8.fused_experts(x.dequantize(), w13.dequantize(), w2.dequantize(), ends) is None
    assert fp8.fused_experts(x, w13, w2, ends, "torch") is None
    assert fp8.fused_experts(x[:0], w13, w2, ends, "triton") is None
    odd13, odd2 = stacks(2, 40, 48, "float32")  # hidden rows of 40 bytes
    assert fp8.fused_experts(x, odd13, odd2, ends, "triton") is None
    given = [t.to(DEVICE) for t in (x, w13, w2, ends)]
    assert fp8.fused_experts(*given, "triton") is not None
    if DEVICE == "cpu":
        assert fp8.fused_experts(x, w13, w2, ends) is None


# What they become --------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler needs Linux")
@pytest.mark.parametrize(
    "kernel, options, constants, product",
    [
        ("persistent_gemm", (8, 4), dict(PAIR=True), "m64n128k32"),
        ("persistent_gemm", (4, 8), dict(ROWS=16, COLS=64, SWAP=True, SPLIT=True), "m64n16k32"),
        ("persistent_gemm", (8, 4), dict(W_TILES=True, FOLD=True), "m64n128k32"),
        ("expert_hidden", (4, 5), dict(ROWS=16, SWAP=True), "m64n16k32"),
        ("expert_out", (8, 4), {}, "m64n128k32"),
        ("column_quant", (4, 4), {}, None),
    ],
)
def test_products_are_made_by_the_tensor_core_from_tiles_the_memory_unit_fetched(
    tmp_path, monkeypatch, kernel, options, constants, product
):
    """E4M3 codes as they are, even for 16 tokens, where the plain kernel makes float16 of them."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = compile_for(kernel, num_warps=options[0], num_stages=options[1], **constants)
    if product is not None:
        name = f"wgmma.mma_async.sync.aligned.{product}.f32.e4m3.e4m3"
        assert set(found.products) == {name} and "cp.async.bulk.tensor.2d.shared" in found.ptx
    if kernel in ("expert_hidden", "column_quant"):  # divisions round correctly
        assert "div.rn" in found.ptx and not re.search(r"div\.(full|approx)", found.ptx)
    assert found.threads == 32 * options[0] and found.shared <= 227 * 1024
