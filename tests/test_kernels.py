"""Each Triton kernel against its torch specification: on a GPU, or in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
from fp8_cases import adversarial_rows, hard_values, product_error, same_bits

from dsv3 import fp8
from dsv3.errors import DSV3Error

pytest.importorskip("triton", reason="Triton is not installed (there is none for this platform)")

from benchmarks import kernels_against_torch
from dsv3.kernels import act_quant, fp8_gemm, weight_dequant
from dsv3.kernels.compiled import compile_for

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# FP8 tensor cores add with about 14 bits inside a block of 128; the interpreter is exact.
TOLERANCE = 1e-3 if DEVICE == "cuda" else 1e-5
FORMATS = ("float32", "ue8m0")


def assert_same_quantisation(x: torch.Tensor, scale_format: str) -> None:
    """Kernel, specification and package: the same bytes and the same scales."""
    codes, scale = act_quant.act_quant(x.to(DEVICE), scale_format)
    spec_codes, spec_scale = act_quant.act_quant_spec(x, scale_format)
    portable = fp8.quantize_activation(x, scale_format, backend="torch")
    assert same_bits(codes.cpu(), spec_codes)
    assert same_bits(scale.cpu(), spec_scale)
    assert same_bits(portable.data, spec_codes)
    assert same_bits(portable.scale, spec_scale)


@pytest.mark.parametrize("scale_format", FORMATS)
def test_act_quant_on_every_tie_subnormal_and_special_value(scale_format):
    values = hard_values()
    values = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    inside = values.where(values.abs() <= 448, 0.0)
    # With 448 in each tile the scale is 1 and the codes are those of the values themselves.
    assert_same_quantisation(torch.nn.functional.pad(inside, (1, 0), value=448.0), scale_format)
    # With an infinity in each the scale is NaN, and large values and NaNs saturate or stay.
    assert_same_quantisation(torch.nn.functional.pad(values, (1, 0), value=torch.inf), scale_format)


def test_act_quant_codes_are_torchs_own_casts():
    inside = hard_values()
    inside = inside[inside.abs() <= 448]
    inside = torch.nn.functional.pad(inside, (0, -len(inside) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(inside, (1, 0), value=448.0)
    codes, scale = act_quant.act_quant(x.to(DEVICE))
    assert (scale == 1).all()
    assert same_bits(codes.cpu(), x.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_act_quant_on_adversarial_rows(dtype, scale_format):
    assert_same_quantisation(adversarial_rows(90, 300).to(dtype), scale_format)


def test_act_quant_scales_around_powers_of_two():
    exponents = torch.arange(-30, 120)
    powers = torch.ldexp(torch.full((150,), 448.0), exponents)
    steps = torch.stack(
        [
            torch.nextafter(powers, torch.tensor(0.0)),
            powers,
            torch.nextafter(powers, torch.tensor(torch.inf)),
        ]
    )
    x = torch.zeros(450, 128)
    x[:, 77] = -steps.flatten()
    # fact 39
    assert_same_quantisation(x, "ue8m0")
    _, scale = act_quant.act_quant(x.to(DEVICE), "ue8m0")
    up = torch.ldexp(torch.ones(150), exponents)
    assert same_bits(scale.cpu()[:, 0], torch.cat([up, up, 2 * up]))


@pytest.mark.parametrize("shape", [(300, 64), (1, 1), (2, 3, 200), (130,), (0, 256)])
def test_act_quant_on_any_shape(shape):
    assert_same_quantisation(torch.randn(shape), "float32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(576, 300), (320, 200), (128, 128), (1, 1), (0, 128)])
def test_weight_dequant(shape, dtype):
    q = fp8.quantize_weight(torch.randn(shape))
    found = weight_dequant.weight_dequant(q.data.to(DEVICE), q.scale.to(DEVICE), dtype).cpu()
    assert same_bits(found, weight_dequant.weight_dequant_spec(q.data, q.scale, dtype))
    assert same_bits(found, q.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_dequant_on_every_code(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128).view(torch.float8_e4m3fn)
    for scale in (1.0, 1e-12, 2.0**-140, 0.3, 2.0**119):
        scale = torch.full((1, 1), scale)
        found = weight_dequant.weight_dequant(codes.to(DEVICE), scale.to(DEVICE), dtype).cpu()
        spec = weight_dequant.weight_dequant_spec(codes, scale, dtype)
        assert torch.equal(found.isnan(), spec.isnan())
        assert same_bits(found.nan_to_num(1.0), spec.nan_to_num(1.0))


def test_no_byte_differs_on_any_kind_of_input():
    """What the benchmark prints: ties, subnormals, saturation, special values, every code."""
    compared = list(kernels_against_torch.comparisons())
    assert len(compared) > 50 and all(line.numbers and line.bytes for line in compared)
    assert {line.kernel.split()[0].strip(",") for line in compared} == {
        "act_quant",
        "weight_dequant",
        "fp8_gemm",
    }
    assert [line for line in compared if line.differ] == []


def test_the_inputs_of_the_comparison_are_what_their_names_say():
    kinds = dict(kernels_against_torch.activations())
    codes = {kind: act_quant.act_quant_spec(x)[0].float() for kind, x in kinds.items()}
    ties = kinds["ties"]
    moved = (ties - codes["ties"]).abs()[:, 1:]
    assert (moved > 0).sum() == 126 and (ties[:, 0] == codes["ties"][:, 0]).all()
    assert ((codes["subnormal"].abs() < 2**-6) & (codes["subnormal"] != 0)).sum() > 100
    beyond = kinds["beyond the range"]
    assert (codes["beyond the range"][beyond.abs() > 448].abs() == 448).all()
    wrong = codes["ties"].clone()
    wrong[0, 1] += 1
    found = kernels_against_torch.compare(
        "", "", 1, [wrong.to(torch.float8_e4m3fn)], [codes["ties"].to(torch.float8_e4m3fn)]
    )
    assert found.differ == 1 and found.bytes == wrong.numel()


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("m, n, k", [(1, 128, 128), (5, 130, 300), (200, 64, 256), (1, 576, 200)])
def test_fp8_gemm(m, n, k, scale_format):
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-4, 3, k)
    w = torch.randn(n, k, generator=generator) * torch.logspace(2, -3, n)[:, None]
    xq, wq = fp8.quantize_activation(x, scale_format), fp8.quantize_weight(w, scale_format)
    pieces = [t.to(DEVICE) for t in (xq.data, xq.scale, wq.data, wq.scale)]
    y = fp8_gemm.fp8_gemm(*pieces).cpu()
    spec = fp8_gemm.fp8_gemm_spec(xq.data, xq.scale, wq.data, wq.scale)
    values = xq.dequantize(), wq.dequantize()
    assert product_error(spec, *values) < 1e-5
    assert product_error(y, *values) < TOLERANCE


def test_linear_through_the_kernels():
    x, w = torch.randn(2, 3, 200), fp8.quantize_weight(torch.randn(130, 200))
    y = fp8.linear(x.to(DEVICE), w.to(DEVICE), backend="triton").cpu()
    assert y.shape == (2, 3, 130)
    assert torch.allclose(y, fp8.linear(x, w, backend="torch"), rtol=1e-3, atol=TOLERANCE * 20)
    x[1, 2, 7] = torch.nan
    y = fp8.linear(x.to(DEVICE), w.to(DEVICE), backend="triton").cpu()
    assert y[1, 2].isnan().all() and y.isnan().sum() == 130
    assert fp8.linear(x[:, :0].to(DEVICE), w.to(DEVICE), backend="triton").shape == (2, 0, 130)


def test_wrong_inputs_are_refused():
    codes = torch.zeros(128, 128, device=DEVICE).to(torch.float8_e4m3fn)
    one = torch.ones(1, 1, device=DEVICE)
    with pytest.raises(DSV3Error, match="act_quant: wrong dtype"):
        act_quant.act_quant(torch.ones(1, 128, dtype=torch.int32, device=DEVICE))
    with pytest.raises(DSV3Error, match="wrong output dtype"):
        weight_dequant.weight_dequant(codes, one, torch.float16)
    with pytest.raises(DSV3Error, match="fp8_gemm: shapes do not fit"):
        fp8_gemm.fp8_gemm(codes, one, codes, one)


def run_without_interpreter(code: str, cache) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=250, env=environment
    )


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler needs Linux")


@pytest.fixture
def afresh(tmp_path, monkeypatch) -> None:
    """Nothing compiled yet; and whether this process interprets kernels plays no part."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@on_linux
def test_kernels_compile_for_hopper_without_a_gpu(afresh):
    found = compile_for("act_quant", POWER_OF_TWO=True)
    assert ".target sm_90" in found.ptx and not found.products
    # Division rounds correctly, as the specification's does.
    assert "div.rn" in found.ptx and "div.full" not in found.ptx
    found = compile_for("weight_dequant")
    assert "weight_dequant_kernel" in found.ptx and found.threads == 128
    assert 0 < found.registers <= 255


@on_linux
def test_a_block_of_128_is_four_instructions_of_hopper(afresh):
    """Each 32 deep, E4M3 times E4M3 into f32: 128 products between two promotions (TR 3.3.2)."""
    found = compile_for("fp8_gemm", "sm_90")
    assert found.products == {"wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3": 4}
    assert 64 * 128 // found.threads < found.registers <= 255  # the tile's sums, and more
    assert found.shared <= 228 * 1024
    # Tiles too low for wgmma are multiplied as float16, which Triton does on its own.
    (low,) = compile_for("fp8_gemm", "sm_90", ROWS=16, COLS=32).products
    assert low.startswith("mma.sync") and low.endswith("f32.f16.f16.f32")


@on_linux
@pytest.mark.parametrize("gpu, product", [("sm_89", "mma.sync"), ("sm_100", "tcgen05.mma")])
def test_other_chips_have_other_instructions(afresh, gpu, product):
    (found,) = compile_for("fp8_gemm", gpu).products
    assert found.startswith(product)


def test_what_cannot_be_compiled_is_said_in_one_line(afresh, monkeypatch):
    with pytest.raises(DSV3Error, match="unknown kernel.*act_quant, .*weight_dequant, fp8_gemm"):
        compile_for("softmax")
    with pytest.raises(DSV3Error, match="gpu: not a kind of GPU"):
        compile_for("act_quant", "H100")
    with pytest.raises(DSV3Error, match="act_quant: no such constant.*COLS.*ROWS"):
        compile_for("act_quant", COLS=3)
    with pytest.raises(DSV3Error, match="act_quant for sm_90: the compiler took too long"):
        compile_for("act_quant", timeout_s=0.01)
    if sys.platform == "linux":  # Ampere has no E4M3
        with pytest.raises(DSV3Error, match="fp8_gemm for sm_80: Triton cannot.*fp8e4nv"):
            compile_for("fp8_gemm", "sm_80")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DSV3Error, match="Triton is not installed"):
        compile_for("act_quant")


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_a_cpu_tensor_outside_the_interpreter_is_refused(tmp_path):
    code = (
        "import torch; from dsv3 import fp8\n"
        "w = fp8.quantize_weight(torch.ones(128, 128))\n"
        "try: fp8.linear(torch.ones(1, 128), w, backend='triton')\n"
        "except fp8.product.DSV3Error as error: print(error)\n"
    )
    done = run_without_interpreter(code, tmp_path)
    assert done.stdout.startswith("act_quant: Triton kernels need a GPU"), done.stderr
