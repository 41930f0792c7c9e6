"""FP8 numbers, quantised tensors and products against their definitions in float64."""

import math
import subprocess
import sys

import pytest
import torch
from fp8_cases import (
    adversarial_rows,
    e4m3_value,
    hard_values,
    nearest_code,
    product_error,
    same_bits,
)

from dsv3 import fp8
from dsv3.errors import DSV3Error
from dsv3.fp8 import formats
from dsv3.fp8.quantize import QuantizedTensor

ALL_CODES = torch.arange(256, dtype=torch.uint8)
FORMATS = ("float32", "ue8m0")


def dequantized(q: QuantizedTensor) -> torch.Tensor:
    """code * scale in float64 from the definition, one block scale spread over its block."""
    values = torch.tensor([e4m3_value(code) for code in range(256)], dtype=torch.float64)
    rows, cols = q.shape[-2:]
    scale = q.scale.double().repeat_interleave(q.block[0], -2).repeat_interleave(q.block[1], -1)
    return values[q.data.view(torch.uint8).long()] * scale[..., :rows, :cols]


# Numbers


def test_every_code_decodes_to_its_value():
    expected = torch.tensor([e4m3_value(code) for code in range(256)])
    assert same_bits(fp8.decode_e4m3(ALL_CODES), expected)
    assert same_bits(ALL_CODES.view(torch.float8_e4m3fn).float(), expected)


def test_the_fast_decoder_is_exact_on_finite_codes():
    finite = ALL_CODES[~formats.is_nan_code(ALL_CODES)]
    assert same_bits(formats.decode_finite(finite) * 256, fp8.decode_e4m3(finite))
    assert formats.has_nan_code(ALL_CODES[255:]) and formats.has_nan_code(ALL_CODES[:128])
    assert not formats.has_nan_code(finite)


def test_rounding_of_ties_subnormals_saturation_and_special_values():
    values = hard_values()
    expected = torch.tensor([nearest_code(value) for value in values.tolist()], dtype=torch.uint8)
    # tolist() may lose the sign of a NaN; the encoder must keep it.
    expected = torch.where(values.isnan(), 0x7F + 0x80 * torch.signbit(values), expected)
    expected = expected.to(torch.uint8)
    assert torch.equal(fp8.encode_e4m3(values), expected)
    assert torch.equal(formats.to_e4m3(values.clone()).view(torch.uint8), expected)


def test_rounding_equals_torch_on_random_bit_patterns():
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=generator)
    near = torch.randn(200_000, generator=generator) * 2.0 ** torch.linspace(-14, 8, 200_000)
    values = torch.cat([bits.to(torch.int32).view(torch.float32), near])
    clamped = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(fp8.encode_e4m3(values), clamped)


def test_codes_survive_a_round_trip():
    assert torch.equal(fp8.encode_e4m3(fp8.decode_e4m3(ALL_CODES))[:127], ALL_CODES[:127])
    assert torch.equal(fp8.encode_e4m3(fp8.decode_e4m3(ALL_CODES))[128:255], ALL_CODES[128:255])


# Scales


@pytest.mark.parametrize("scale", [1024 * (1 + 2.0**-23), 1024.0, 1024 * (1 - 2.0**-24), 3.0])
def test_power_of_two_scale_is_the_smallest_one_not_below(scale):
    found = formats.next_power_of_two(torch.tensor([scale])).item()
    mantissa, exponent = math.frexp(torch.tensor(scale).item())
    assert found == math.ldexp(1.0, exponent if mantissa > 0.5 else exponent - 1)


def test_power_of_two_scale_where_log2_in_fp32_is_too_small():
    amax = torch.tensor([448 * 1024 * (1 + 2.0**-23)])
    assert torch.log2(amax / 448).ceil().item() == 10  # the trap
    assert formats.block_scale(amax, "ue8m0").item() == 2048.0


def test_stored_scales_decode_like_torchs_own_type():
    expected = torch.tensor([math.ldexp(1.0, byte - 127) for byte in range(255)] + [math.nan])
    assert same_bits(fp8.decode_scale(ALL_CODES), expected)
    assert same_bits(fp8.decode_scale(ALL_CODES.view(torch.float8_e8m0fnu)), expected)
    assert same_bits(ALL_CODES.view(torch.float8_e8m0fnu).float(), expected)
    assert fp8.decode_scale(expected) is expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu, torch.float32])
def test_scales_survive_storage(dtype):
    scale = fp8.decode_scale(ALL_CODES).view(16, 16)
    stored = fp8.encode_scale(scale, dtype)
    assert stored.dtype == dtype
    assert same_bits(fp8.decode_scale(stored), scale)


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, math.inf])
def test_what_is_no_power_of_two_is_not_stored_as_one(scale):
    with pytest.raises(DSV3Error, match="not a power of two"):
        fp8.encode_scale(torch.tensor([2.0, scale]), torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_scales_are_read_as_the_numbers_they_are(dtype):
    scale = torch.tensor([[0.01, 3.0]]).to(dtype)
    assert same_bits(fp8.decode_scale(scale), scale.float())


def test_scales_of_other_dtypes_are_refused():
    with pytest.raises(DSV3Error, match="wrong dtype of scales"):
        fp8.decode_scale(torch.ones(1, dtype=torch.int16))
    with pytest.raises(DSV3Error, match="wrong dtype of scales"):
        fp8.encode_scale(torch.ones(1), torch.float16)


# Quantised tensors


@pytest.mark.parametrize("scale_format", FORMATS)
def test_activation_tiles_against_the_definition(scale_format):
    x = adversarial_rows(90, 300)
    q = fp8.quantize_activation(x, scale_format)
    assert q.scale.shape == (90, 3)
    for row in range(90):
        for tile in range(3):
            part = x[row, tile * 128 : tile * 128 + 128]
            amax, scale = part.abs().max().item(), q.scale[row, tile].item()
            if not math.isfinite(amax):
                assert math.isnan(scale)
                continue
            exact = max((torch.tensor(amax) / 448).item(), torch.tensor(1e-12).item())
            if scale_format == "ue8m0":
                assert math.frexp(scale)[0] == 0.5 and scale / 2 < exact <= scale
            else:
                assert scale == exact
            codes = q.data[row, tile * 128 : tile * 128 + 128].view(torch.uint8)
            assert torch.equal(codes, fp8.encode_e4m3(part / scale))


def test_any_leading_shape_and_dtype():
    x = torch.randn(2, 3, 200).bfloat16()
    q = fp8.quantize_activation(x)
    flat = fp8.quantize_activation(x.float().view(6, 200))
    assert q.shape == (2, 3, 200) and q.scale.shape == (2, 3, 2)
    assert same_bits(q.data.view(6, 200), flat.data) and same_bits(q.scale.view(6, 2), flat.scale)
    assert same_bits(fp8.quantize_activation(x[0, 0]).data, q.data[0, 0])
    assert fp8.quantize_activation(x[:, :0]).scale.shape == (2, 0, 2)
    turned = torch.randn(200, 6).T
    assert same_bits(
        fp8.quantize_activation(turned).data, fp8.quantize_activation(turned.contiguous()).data
    )


@pytest.mark.parametrize("shape", [(576, 700), (128, 256), (1, 1), (130, 127)])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_weight_blocks_against_the_definition(shape, scale_format):
    w = torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]
    q = fp8.quantize_weight(w, scale_format)
    assert q.scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(q.scale.shape[0]):
        for j in range(q.scale.shape[1]):
            where = slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128)
            exact = (w[where].abs().max() / 448).item()
            scale = q.scale[i, j].item()
            if scale_format == "ue8m0":
                assert math.frexp(scale)[0] == 0.5 and scale / 2 < exact <= scale
            else:
                assert scale == exact
            assert torch.equal(q.data[where].view(torch.uint8), fp8.encode_e4m3(w[where] / scale))


def test_the_released_latent_projection_has_five_rows_of_scales():
    q = fp8.quantize_weight(torch.ones(576, 7168))
    assert q.scale.shape == (5, 56)
    assert q.nbytes == 576 * 7168 + 4 * 5 * 56
    assert torch.equal(q.dequantize(), torch.full((576, 7168), 448 * (torch.ones(()) / 448).item()))


@pytest.mark.parametrize("shape", [(576, 700), (1024, 1024), (3, 200, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_weights_are_rounded_once(shape, dtype):
    q = fp8.quantize_weight(torch.randn(shape) * 0.02)
    assert same_bits(q.dequantize(dtype), dequantized(q).float().to(dtype))


def test_a_stack_is_its_matrices():
    w = torch.randn(3, 200, 130)
    stack = fp8.quantize_weight(w)
    assert stack.scale.shape == (3, 2, 2) and len(list(stack)) == 3
    alone = fp8.quantize_weight(w[2])
    assert same_bits(stack[2].data, alone.data) and same_bits(stack[2].scale, alone.scale)
    assert stack[2].data.data_ptr() == stack.data[2].data_ptr()


def test_dequantising_is_exact_for_extreme_scales():
    codes = ALL_CODES[:127].repeat(4).view(torch.float8_e4m3fn).view(4, 127)
    scale = torch.tensor([[2.0**-140], [1e-12], [2.0**8], [1.5 * 2.0**120]])
    q = QuantizedTensor(codes, scale, (1, 128))
    assert same_bits(q.dequantize(), dequantized(q).float())


def test_nan_codes_dequantise_to_nan():
    codes = ALL_CODES.view(torch.float8_e4m3fn).view(1, 256)
    found = QuantizedTensor(codes, torch.ones(1, 2)).dequantize().isnan().nonzero()[:, 1]
    assert found.tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_what_is_not_finite_never_turns_into_numbers(bad, scale_format):
    x = torch.ones(3, 256)
    x[1, 200] = bad
    values = fp8.quantize_activation(x, scale_format).dequantize()
    assert values[1, 128:].isnan().all()
    assert values.isnan().sum() == 128
    y = fp8.linear(x, fp8.quantize_weight(torch.ones(4, 256)))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    assert fp8.quantize_weight(x).dequantize()[:, 128:].isnan().all()


def test_zero_and_tiny_blocks():
    x = torch.zeros(2, 128)
    x[1] = torch.linspace(-1e-9, 1e-9, 128)
    q = fp8.quantize_activation(x)
    assert q.scale[0].item() == torch.tensor(1e-12).item()
    assert (q.dequantize()[0] == 0).all()
    # A floor of 1e-4 instead would leave nothing of the second row.
    assert ((q.dequantize()[1] - x[1]).norm() / x[1].norm()).item() < 0.04


def test_what_a_file_may_not_hold_is_refused():
    good = fp8.quantize_weight(torch.randn(128, 128))
    assert good.check("w") is good
    codes = good.data.clone()
    codes.view(torch.uint8)[3, 4] = 0xFF
    with pytest.raises(DSV3Error, match="^w: NaN among the quantised weights"):
        QuantizedTensor(codes, good.scale).check("w")
    for scale in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(DSV3Error, match="^w: a scale is not a positive finite number"):
            QuantizedTensor(good.data, torch.full((1, 1), scale)).check("w")


@pytest.mark.parametrize(
    "data, scale, words",
    [
        (torch.zeros(256, 128), torch.ones(2, 1), "wrong dtypes"),
        (torch.zeros(256, 128).to(torch.float8_e4m3fn), torch.ones(2, 1).half(), "wrong dtypes"),
        (torch.zeros(192, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), r"expected \(2, 1\)"),
        (torch.zeros(128).to(torch.float8_e4m3fn), torch.ones(1), "too few dimensions"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(data, scale, words, as_in_use):
    with pytest.raises(DSV3Error, match=words):
        QuantizedTensor(data, scale)


def test_unknown_scale_format_is_refused():
    with pytest.raises(DSV3Error, match="unknown scale format.*found e5m2"):
        fp8.quantize_weight(torch.ones(1, 1), "e5m2")


# How good it is: numbers of the book (relative errors of Gaussian data)


def test_relative_error_of_gaussian_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 1024, generator=generator)
    w = torch.randn(1024, 1024, generator=generator)

    def error(found, exact):
        return ((found - exact).norm() / exact.norm()).item()

    # fact 32
    assert error(fp8.quantize_activation(x).dequantize(), x) == pytest.approx(0.0257, abs=1e-3)
    assert error(fp8.quantize_weight(x).dequantize(), x) == pytest.approx(0.0265, abs=1e-3)
    # fact 33
    assert error(fp8.linear(x, fp8.quantize_weight(w)), x @ w.T) == pytest.approx(0.037, abs=3e-3)


# Products


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize(
    "m, n, k",
    [(1, 128, 128), (1, 576, 700), (7, 130, 300), (40, 1500, 512), (1, 1500, 512), (5, 1, 1)],
)
def test_products_against_float64(m, n, k, scale_format):
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator) * torch.logspace(-6, 4, k)
    w = torch.randn(n, k, generator=generator) * torch.logspace(2, -5, n)[:, None]
    xq, wq = fp8.quantize_activation(x, scale_format), fp8.quantize_weight(w, scale_format)
    y = fp8.matmul(xq, wq)
    assert y.dtype == torch.float32 and y.shape == (m, n)
    assert product_error(y, dequantized(xq), dequantized(wq)) < 1e-5
    assert torch.equal(fp8.linear(x, wq), y)


def test_linear_quantises_activations_in_the_format_of_the_weights():
    x, w = torch.randn(4, 256), torch.randn(128, 256)
    power_of_two = fp8.linear(x, fp8.quantize_weight(w, "ue8m0"))
    xq = fp8.quantize_activation(x, "ue8m0")
    assert torch.equal(power_of_two, fp8.matmul(xq, fp8.quantize_weight(w, "ue8m0")))
    assert not torch.equal(power_of_two, fp8.linear(x, fp8.quantize_weight(w)))


def test_leading_axes_and_no_rows():
    wq = fp8.quantize_weight(torch.randn(192, 256))
    x = torch.randn(2, 5, 256)
    assert torch.allclose(fp8.linear(x, wq).view(10, 192), fp8.linear(x.view(10, 256), wq))
    assert fp8.linear(x[0, 0], wq).shape == (192,)
    assert fp8.linear(x[:, :0], wq).shape == (2, 0, 192)


def test_operands_that_do_not_fit_are_refused():
    wq = fp8.quantize_weight(torch.ones(128, 256))
    with pytest.raises(DSV3Error, match="inner sizes"):
        fp8.linear(torch.ones(1, 128), wq)
    with pytest.raises(DSV3Error, match="wrong form"):
        fp8.matmul(wq, wq)
    with pytest.raises(DSV3Error, match="wrong form"):
        fp8.linear(torch.ones(1, 256), fp8.quantize_weight(torch.ones(2, 128, 256)))
    with pytest.raises(DSV3Error, match="unknown FP8 backend.*found cuda"):
        fp8.linear(torch.ones(1, 256), wq, backend="cuda")


def test_fp8_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; import dsv3; from dsv3 import fp8\n"
        "w = fp8.quantize_weight(torch.ones(128, 128))\n"
        "print(fp8.linear(torch.ones(1, 128), w).sum().item() / 128)\n"
        "try: fp8.linear(torch.ones(1, 128), w, backend='triton')\n"
        "except Exception as error: print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    value, error = done.stdout.split()
    assert float(value) == pytest.approx(128, rel=1e-5)
    assert error == "DSV3Error"


def test_importing_fp8_leaves_triton_alone():
    code = "import sys, dsv3, dsv3.fp8; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
