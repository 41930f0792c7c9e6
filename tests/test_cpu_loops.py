"""Compiled loops on a CPU against the plain forms beside them, to the bit where that is said."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fp8_cases import adversarial_rows, hard_values, same_bits

from dsv3 import fp8, generate, load_model
from dsv3.cache import Step
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.backend import pick_backend
from dsv3.fp8.product import ROWS_IN_LOOPS
from dsv3.grouped import fp8_experts
from dsv3.layers import RMSNorm, exactly_normalised
from dsv3.mla import MLA
from dsv3.model import Transformer
from dsv3.parallel.tensor import TensorGroup
from dsv3.plain import wide_linear
from dsv3.precision import Precision

pytest.importorskip("numba", reason="Numba is not installed")

from dsv3.kernels import cpu, cpu_fp8

FORMATS = ("float32", "ue8m0")
F64 = torch.float64


def codes(*shape: int, seed: int = 0, weight: bool = False) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * torch.rand(shape[-1], generator=random).exp2()
    return fp8.quantize_weight(x) if weight else fp8.quantize_activation(x, backend="torch")


def exact(x: QuantizedTensor, w: QuantizedTensor) -> torch.Tensor:
    """The product of what the codes stand for, in float64: neither value is rounded."""

    def values(q):
        rows, cols = q.shape
        scale = q.scale.double().repeat_interleave(q.block[0], 0)[:rows]
        return q.data.double() * scale.repeat_interleave(q.block[1], 1)[:, :cols]

    return values(x) @ values(w).T


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_quantised_to_the_same_bits(scale_format, dtype):
    values = hard_values()
    tiles = torch.nn.functional.pad(values, (0, -len(values) % 127)).view(-1, 127)
    inside = tiles.where(tiles.abs() <= 448, 0.0)
    for x in (
        torch.nn.functional.pad(inside, (1, 0), value=448.0),  # scale 1: the values themselves
        torch.nn.functional.pad(tiles, (1, 0), value=torch.inf),  # scale NaN
        adversarial_rows(20, 300),
        torch.randn(3, 5, 200),
        torch.randn(300)[::2],
        torch.zeros(2, 130),
    ):
        x = x.to(dtype)
        found, plain = (
            fp8.quantize_activation(x, scale_format, backend) for backend in ("numba", "torch")
        )
        assert same_bits(found.data, plain.data) and same_bits(found.scale, plain.scale)


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 1), (129, 127)])
def test_codes_are_dequantised_to_the_same_bits(shape, monkeypatch):
    every = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127]
    every = torch.cat([every, torch.tensor([0x7F, 0xFF], dtype=torch.uint8)])
    data = every.repeat(shape[0] * shape[1] // 256 + 1)[: shape[0] * shape[1]].view(shape)
    scale = torch.rand(fp8.scale_shape(shape, fp8.WEIGHT_BLOCK)) * 1e-3
    q = QuantizedTensor(data.view(torch.float8_e4m3fn), scale)
    fast = q.dequantize(), q.dequantize(torch.bfloat16)
    monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: False)
    plain = q.dequantize(), q.dequantize(torch.bfloat16)
    for found, wanted in zip(
        fast, plain
    ):  # as float32, for there same_bits asks no NaN for its bits
        assert found.dtype == wanted.dtype and same_bits(found.float(), wanted.float())


# Products ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 5, ROWS_IN_LOOPS, ROWS_IN_LOOPS + 1])
@pytest.mark.parametrize("out, inner", [(1, 1), (7, 129), (130, 576), (256, 128)])
def test_products_are_exact_but_for_the_last_bits(rows, out, inner):
    x, w = codes(rows, inner), codes(out, inner, seed=1, weight=True)
    wanted = exact(x, w)
    for backend in ("numba", "torch"):
        found = fp8.matmul(x, w, F64, backend)
        assert (found - wanted).abs().max() <= 1e-15 * wanted.abs().max() * inner


def test_a_sum_over_a_tile_has_no_rounding_at_all():
    """Codes of all sizes and signs, with scales of 1: whole numbers of 2^-18, added as integers."""
    random = torch.Generator().manual_seed(0)
    finite = torch.arange(256, dtype=torch.uint8)[torch.arange(256) % 128 != 127]
    x, w = (
        finite[torch.randint(254, (n, 128), generator=random)].view(torch.float8_e4m3fn)
        for n in (3, 64)
    )
    ones = torch.ones(3, 1), torch.ones(1, 1)
    whole = [(v.double() * 2**9).long() for v in (x, w)]
    wanted = (whole[0] @ whole[1].T).double() / 2**18
    for rows in (slice(0, 1), slice(0, 3)):
        assert torch.equal(cpu_fp8.product(x[rows], ones[0][rows], w, ones[1]), wanted[rows])


def test_a_row_has_the_same_bits_among_others():
    x, w = codes(9, 700), codes(300, 700, seed=1, weight=True)
    together = fp8.matmul(x, w, F64)
    for row in range(9):
        assert torch.equal(fp8.matmul(x[row : row + 1], w, F64)[0], together[row])


def test_threads_take_nothing_from_a_product(monkeypatch):
    monkeypatch.setattr(cpu, "_FOR_A_THREAD", 1)
    x, w = codes(3, 200), codes(515, 200, seed=1, weight=True)
    alone = fp8.matmul(x, w, F64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(fp8.matmul(x, w, F64), alone)


def test_nan_in_a_row_stays_in_that_row():
    x = torch.randn(3, 200)
    x[1, 150] = torch.nan
    y = fp8.matmul(fp8.quantize_activation(x), codes(5, 200, seed=1, weight=True), F64)
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()
    one = fp8.matmul(fp8.quantize_activation(x[1:2]), codes(5, 200, seed=1, weight=True), F64)
    assert one.isnan().all()


def test_small_codes_count_where_subnormal_numbers_do_not():
    w = QuantizedTensor(torch.full((4, 256), 2.0**-9).to(torch.float8_e4m3fn), torch.ones(1, 2))
    x = fp8.quantize_activation(torch.full((1, 256), 448.0))
    torch.set_flush_denormal(True)
    try:
        found = fp8.matmul(x, w, F64)
    finally:
        torch.set_flush_denormal(False)
    assert (found == 448 * 2.0**-9 * 256).all() and torch.equal(fp8.matmul(x, w, F64), found)


@pytest.mark.parametrize("parts", [1, 2])
def test_experts_in_one_call(parts, without_numba, monkeypatch):
    """None, one, few and many rows, and rows of nobody at the end."""
    shares = [0, 1, 3, ROWS_IN_LOOPS + 4, 0, 2]
    ends = torch.tensor(shares).cumsum(0)
    x = codes(int(ends[-1]) + 2, 200)
    w = codes(len(shares) * parts * 130, 200, seed=1)
    w = QuantizedTensor(
        w.data.view(len(shares), parts, 130, 200), torch.rand(len(shares), parts, 2, 2) + 0.5
    )
    if parts == 1:
        w = QuantizedTensor(w.data[:, 0], w.scale[:, 0])
    inputs = x.data, x.scale, w.data, w.scale, ends, F64
    plain = fp8_experts(*inputs)
    monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: True)
    found = fp8_experts(*inputs)
    assert found.shape == plain.shape and (found[ends[-1] :] == 0).all()
    assert (found - plain).abs().max() <= 1e-14 * plain.abs().max()


@pytest.mark.parametrize("rows", [1, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_products_of_plain_numbers(rows, dtype):
    x, w = torch.randn(rows, 2, 50).to(torch.bfloat16), torch.randn(33, 50).to(dtype)
    wanted = x.double() @ w.double().T
    found = wide_linear(x, w, F64)
    assert found.dtype == F64 and (found - wanted).abs().max() < 1e-12


# Attention ---------------------------------------------------------------------------------------

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=3,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=32,
    kv_lora_rank=40,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    max_position_embeddings=256,
)


@pytest.mark.parametrize("name, tolerance", [("fp32", 5e-6), ("bf16", 5e-6), ("fp8", 1e-14)])
@pytest.mark.parametrize("starts, counts", [([6], [1]), ([0, 9, 4], [2, 1, 2]), ([31, 30], [4, 4])])
@pytest.mark.parametrize("packed", [False, True])
def test_absorbed_attention_in_loops(name, tolerance, starts, counts, packed):
    precision, random = Precision.of(name, CONFIG), torch.Generator().manual_seed(0)
    layer = MLA(CONFIG, precision, TensorGroup()).requires_grad_(False)
    layer.wkv_b.weight.normal_(std=0.2, generator=random)
    b, s = len(starts), max(counts)
    cache = Transformer(CONFIG, precision).new_cache(b, 40, "fp8" if packed else None)
    step = Step.make(CONFIG, starts, counts, s, torch.device("cpu"))

    def numbers(*shape):
        return torch.randn(shape, generator=random).to(precision.dtype)

    before = Step.make(CONFIG, [0] * b, [36] * b, 36, torch.device("cpu"))
    cache.one(0).append(numbers(b, 36, 48), before)
    seen = cache.one(0).append(numbers(b, s, 48), step)
    inputs = numbers(b, s, 3, 16), numbers(b, s, 3, 8), seen, step
    with torch.no_grad():
        assert layer.core(inputs[0]) == layer.absorbed_in_loops
        found, plain = layer.absorbed_in_loops(*inputs), layer.absorbed(*inputs)
    assert found.shape == plain.shape and found.dtype == precision.core(seen.device)
    for row, count in enumerate(counts):
        assert (found[row, :count] - plain[row, :count]).abs().max() < tolerance


@pytest.mark.parametrize("name, tolerance", [("fp32", 5e-5), ("fp8", 1e-12)])
def test_scores_that_no_power_can_hold(name, tolerance):
    """e to the power of a score would be infinite, or 0 for all keys; and a latent that is not a
    number spoils the queries that see it, and no other."""
    precision, random = Precision.of(name, CONFIG), torch.Generator().manual_seed(0)
    layer = MLA(CONFIG, precision, TensorGroup()).requires_grad_(False)
    layer.wkv_b.weight.normal_(std=0.2, generator=random)
    step = Step.make(CONFIG, [9, 9, 9], [1, 1, 1], 1, torch.device("cpu"))
    q = torch.randn(3, 1, 3, 24, generator=random)
    seen = torch.randn(3, 10, 48, generator=random)
    q[0] *= 3000  # scores of some thousands
    seen[1, :, 40:], q[1, ..., :16], q[1, ..., 16:] = 50.0, 0.0, -50.0  # all of -20,000 x scale
    seen[2, 4, 7] = torch.nan
    inputs = *q.to(precision.dtype).split([16, 8], -1), seen.to(precision.dtype), step
    found, plain = layer.absorbed_in_loops(*inputs), layer.absorbed(*inputs)
    torch.testing.assert_close(found, plain, rtol=0.0, atol=tolerance, equal_nan=True)
    assert found[:2].isfinite().all() and found[2].isnan().all()


def test_loops_leave_alone_what_they_cannot_do():
    layer = MLA(CONFIG, Precision.of("fp32", CONFIG), TensorGroup())
    q = torch.zeros(1, 1, 3, 16)
    assert layer.core(q) == layer.absorbed  # a gradient is asked for
    with torch.no_grad():
        assert layer.core(q) == layer.absorbed_in_loops
        assert layer.core(q.expand(1, 5, 3, 16)) == layer.absorbed
    layer.requires_grad_(False)
    latents = torch.zeros(1, 1, 48)
    assert layer.core(q, latents) == layer.absorbed_in_loops
    assert layer.core(q, latents.requires_grad_()) == layer.absorbed
    trains = MLA(CONFIG, Precision.training("fp32"), TensorGroup())
    with torch.no_grad():
        assert trains.core(q) == trains.absorbed


# Whole models ------------------------------------------------------------------------------------


def test_the_text_is_the_same_without_numba(monkeypatch):
    model = Transformer(CONFIG, "fp32").init_weights(0)
    stored = model.state_dict()
    model = Transformer(CONFIG, "fp8")
    model.load_state_dict(stored)
    prompts = [[1, 2, 3], list(range(20)), [7] * 40]
    fast = generate(model, prompts, max_new_tokens=30)
    monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: False)
    assert generate(model, prompts, max_new_tokens=30) == fast


def test_what_is_not_installed_is_named(monkeypatch):
    assert pick_backend(torch.device("cpu")) == "numba"
    monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: False)
    assert pick_backend(torch.device("cpu")) == "torch"
    with pytest.raises(DSV3Error, match="Numba is not installed.*pip install numba"):
        pick_backend(torch.device("cpu"), "numba")
    with pytest.raises(DSV3Error, match="torch, numba or triton"):
        pick_backend(torch.device("cpu"), "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1, 192), (2, 3, 513), (4, 1), (0, 8), (1, 2000, 7)])
def test_norms_are_the_plain_ones(shape, dtype, monkeypatch):
    """A NaN, an infinity, and squares that overflow or vanish do what they do in torch. Exact ones
    to the bit, in several threads too; the others but for the order of float32 sums."""
    monkeypatch.setattr(cpu, "_FOR_A_THREAD", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    random = torch.Generator().manual_seed(0)
    for size in (1.0, 1e-22, 2e18, 1e19):
        x = (torch.randn(shape, generator=random) * size).to(dtype)
        if x.numel() > 200:
            x[0, 0, 0], x[-1, -1, 5] = torch.nan, torch.inf
        for exact in (True, False):
            norm = RMSNorm(shape[-1], exact=exact).requires_grad_(False)
            norm.weight.copy_(torch.rand(shape[-1], generator=random) + 0.5)
            found = norm(x)
            if exact:
                plain, within = exactly_normalised(x, norm.weight, norm.eps), 0.0
            else:
                plain = F.rms_norm(x.float(), shape[-1:], norm.weight, norm.eps).to(dtype)
                within = {torch.bfloat16: 2**-7, torch.float32: 2**-19}[dtype]
            assert found.dtype == dtype
            torch.testing.assert_close(
                found, plain, rtol=within, atol=0.0 if exact else 1e-30, equal_nan=True
            )


def test_a_norm_without_epsilon_of_zeros_is_nan_as_in_torch():
    norm = RMSNorm(8, eps=0.0).requires_grad_(False)
    assert norm.weight.fill_(1.0).shape == (8,) and norm(torch.zeros(2, 8)).isnan().all()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_in_use_go_through_the_loop(dtype, exact, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "dsv3.kernels.cpu_norm.rms_norm", lambda *inputs: calls.append(inputs) or inputs[0]
    )
    norm, x = RMSNorm(8, exact=exact), torch.ones(2, 8, dtype=dtype)
    norm.weight.data.fill_(1.0)
    norm(x)
    assert not calls, "its weight asks for a gradient"
    norm.requires_grad_(False)(x)
    assert len(calls) == 1 and calls[0][-1] == exact


def test_the_shipped_model_writes_the_same_without_numba(monkeypatch):
    """Logits of whole prompts, bit by bit: one number on the other side would move many."""
    model = load_model(Path(__file__).parents[1] / "assets" / "dsv3-mini", "fp8")
    tokens = torch.randint(2000, (6, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fast = model(tokens)
        monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: False)
        assert (fast - model(tokens)).abs().max() < 1e-5


@pytest.mark.parametrize("fails", [0, 256], ids=["the caller's part", "another's"])
def test_a_thread_that_fails_is_heard_when_all_have_ended(monkeypatch, fails):
    monkeypatch.setattr(cpu, "_FOR_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    ended = []

    def run(first, last):
        if first == fails:
            raise ValueError("nothing")
        time.sleep(0.2)
        ended.append((first, last))

    with pytest.raises(ValueError, match="nothing"):
        cpu.in_threads(run, 300, 128, 1000)
    assert ended == [(256, 300) if fails == 0 else (0, 256)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_process_has_threads_of_its_own(monkeypatch):
    """A child has none of its parent's threads, and would wait for them for ever."""
    monkeypatch.setattr(cpu, "_FOR_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    cpu.in_threads(lambda first, last: None, 300, 128, 1000)
    child = os.fork()
    if child == 0:
        try:
            done = []
            cpu.in_threads(lambda first, last: done.append(last), 300, 128, 1000)
            os._exit(sorted(done) != [256, 300])
        finally:
            os._exit(2)
    until = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < until:
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_other_dtypes_of_weights_and_keys_are_read_as_what_they_are(monkeypatch):
    layer = MLA(CONFIG, Precision.of("fp32", CONFIG), TensorGroup()).requires_grad_(False)
    layer.wkv_b.weight.normal_(std=0.2)
    layer.wkv_b.bfloat16()
    step = Step.make(CONFIG, [0, 0], [1, 1], 1, torch.device("cpu"))
    inputs = (
        torch.randn(2, 1, 3, 16),
        torch.randn(2, 1, 3, 8),
        torch.randn(1, 1, 48).expand(2, -1, -1),
    )
    torch.testing.assert_close(
        layer.absorbed_in_loops(*inputs, step), layer.absorbed(*inputs, step)
    )
    norm = RMSNorm(64, exact=True).requires_grad_(False)
    norm.weight.fill_(0.75)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(norm.bfloat16()(x), norm.float()(x))
    assert wide_linear(torch.empty(0, 50), torch.randn(7, 50), F64).shape == (0, 7)
    ends = torch.tensor([2, 3], dtype=torch.int32)
    x, w = (
        codes(3, 64),
        QuantizedTensor(codes(256, 64, seed=1).data.view(2, 128, 64), torch.ones(2, 1, 1)),
    )
    found = [fp8_experts(x.data, x.scale, w.data, w.scale, e, F64) for e in (ends, ends.long())]
    assert torch.equal(*found)


def test_loops_are_for_a_cpu(monkeypatch):
    with pytest.raises(DSV3Error, match="run on a CPU"):
        fp8.quantize_activation(torch.empty(1, 128, device="meta"), backend="numba")
    code = (
        "import torch; from dsv3.fp8.backend import pick_backend; "
        "print(pick_backend(torch.device('cpu')))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.stdout == "torch\n", told.stderr
