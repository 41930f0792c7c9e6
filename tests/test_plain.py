"""Products of plain numbers in loops or by the library, and who chooses; sums over experts."""

import pytest
import torch
import torch.nn.functional as F
from training_cases import TINY

from dsv3 import bfloat16, plain
from dsv3.grouped import plain_experts
from dsv3.kernels.operations import combine_loops, wide_product
from dsv3.model import Transformer
from dsv3.plain import FEW_ROWS, in_loops, linear, wide_linear
from dsv3.precision import Precision

pytest.importorskip("numba", reason="Numba is not installed")

from dsv3.kernels import cpu, cpu_linear

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
# Of a sum of 200 products of normal numbers, by what it is summed in.
WITHIN = {F32: 2e-5, F64: 1e-13}


@pytest.fixture
def loops(monkeypatch) -> None:
    """As on a processor whose library is slow at few rows, and without units for bfloat16."""
    monkeypatch.setattr(plain, "LIBRARY_STREAMS", False)
    monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", False)


@pytest.fixture
def three_threads(monkeypatch) -> None:
    monkeypatch.setattr(cpu, "_FOR_A_THREAD", 100)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("lead", [(1,), (2, 1), (3,), (4,), (5,), (2, 4), (0,)])
@pytest.mark.parametrize("of_w", [F32, BF16])
@pytest.mark.parametrize("sums", [F32, F64])
def test_few_rows_in_loops(three_threads, lead, of_w, sums):
    """Rows in fours and what is left of them; 77 outputs over three threads; a view of x and w."""
    x, w = normal(*lead, 250, dtype=BF16)[..., 50:], normal(200, 77, seed=1, dtype=of_w).T
    found = wide_product(x, w, sums)
    assert found.dtype == sums and found.shape == (*lead, 77)
    assert torch.all((found.double() - x.double() @ w.double().T).abs() < WITHIN[sums])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_what_is_not_a_number_stays_so(dtype):
    """A NaN or an infinity reaches the sums that it stands in, and those alone."""
    x, w = normal(6, 200, dtype=dtype), normal(9, 200, seed=1, dtype=dtype)
    x[1, 7], x[4, 3], w[5, 0] = torch.nan, torch.inf, torch.nan
    found, expected = wide_product(x, w, F32), x.double() @ w.double().T
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
@pytest.mark.parametrize("shares", [[0, 1, 3, FEW_ROWS + 1, 0, 2], [FEW_ROWS, 0, 0, 0, 0, 0]])
def test_experts_with_few_rows_in_loops(loops, three_threads, dtype, shares):
    """And those with more of them beside; rows behind the last end are nobody's."""
    ends = torch.tensor(shares).cumsum(0)
    x, stack = normal(int(ends[-1]) + 2, 200, dtype=dtype), normal(6, 33, 200, seed=1, dtype=dtype)
    assert in_loops(x, stack, -(-len(x) // 6), torch.promote_types(dtype, F32))
    of_few = cpu_linear.products(x, stack, ends, FEW_ROWS, torch.promote_types(dtype, F32))
    heavy = torch.tensor(shares) > FEW_ROWS
    left = torch.cat([heavy.repeat_interleave(torch.tensor(shares)), torch.tensor([True] * 2)])
    assert torch.equal((of_few == 0).all(-1), left)
    found = plain_experts(x, stack, ends)
    assert found.dtype == dtype and (found[ends[-1] :] == 0).all()
    start = 0
    for expert, end in enumerate(ends.tolist()):
        exact = x[start:end].double() @ stack[expert].double().T
        step = 2**-8 * exact.abs() if dtype == BF16 else 0.0
        within = WITHIN[F64 if dtype == F64 else F32]
        assert torch.all((found[start:end].double() - exact).abs() <= within + step)
        start = end


def test_many_rows_an_expert_are_grouped(loops, monkeypatch):
    """The share that counts is the average one."""
    taken = []

    def form(name):
        return lambda x, stack, *others: taken.append(name) or x.new_zeros(len(x), stack.shape[1])

    monkeypatch.setattr("dsv3.grouped._plain_in_loops", form("loops"))
    monkeypatch.setattr("dsv3.grouped.grouped", form("grouped"))
    stack, ends = normal(4, 32, 64), torch.tensor([0, 0, 0, 4])
    for rows in (1, 4 * FEW_ROWS, 4 * FEW_ROWS + 1):
        plain_experts(normal(rows, 64), stack, ends)
    assert taken == ["loops", "loops", "grouped"]


def test_experts_of_another_dtype_are_rounded_one_by_one(loops, monkeypatch):
    """Where a model that trains in bfloat16 writes a text: of all experts few are asked."""
    monkeypatch.setattr("dsv3.grouped._plain_in_loops", lambda *inputs: pytest.fail("all at once"))
    x, stack = normal(3, 64, dtype=BF16), normal(4, 32, 64, seed=1)
    found = plain_experts(x, stack, torch.tensor([0, 1, 1, 3]))
    exact = torch.cat([x[:1] @ stack[1].to(BF16).T, x[1:] @ stack[3].to(BF16).T])
    torch.testing.assert_close(found, exact, rtol=2**-7, atol=1e-5)


def test_who_multiplies_by_loops(loops, monkeypatch):
    x, w = normal(FEW_ROWS, 64), normal(32, 64, seed=1)
    assert in_loops(x, w, FEW_ROWS, F32) and in_loops(x, w, FEW_ROWS, F64)
    assert not in_loops(x, w, FEW_ROWS + 1, F64)
    monkeypatch.setattr(plain, "LIBRARY_STREAMS", True)
    assert not in_loops(x, w, 1, F32) and in_loops(x, w, 1, F64)
    monkeypatch.setattr(plain, "LIBRARY_STREAMS", False)
    assert not in_loops(x.to("meta"), w.to("meta"), 1, F32)
    w.requires_grad_()
    assert not in_loops(x, w, 1, F32)
    with torch.no_grad():
        assert in_loops(x, w, 1, F32)
        monkeypatch.setattr("dsv3.fp8.backend._is_installed", lambda name: False)
        assert not in_loops(x, w, 1, F32)


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_linear_takes_the_loop_for_few_rows(loops, monkeypatch, dtype, rows):
    calls = []

    def called(x, w, sums):
        calls.append(sums)
        return wide_product(x, w, sums)

    monkeypatch.setattr(plain, "wide_product", called)
    x, w = normal(rows, 200, dtype=dtype), normal(40, 200, seed=1, dtype=F32)
    exact = x.double() @ w.to(dtype).double().T
    found = linear(x, w)
    assert found.dtype == dtype and calls == [F32] * (rows <= FEW_ROWS)
    step = 2**-8 * exact.abs() if dtype == BF16 else 0.0
    assert torch.all((found.double() - exact).abs() <= WITHIN[F32] + step)
    wide = wide_linear(x, w.to(dtype), F32)
    assert wide.dtype == F32 and calls == [F32, F32] * (rows <= FEW_ROWS)
    assert torch.all((wide.double() - exact).abs() <= WITHIN[F32])


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_float64_is_summed_in_float64(loops, rows):
    """The latent's way up in fp8 on a CPU, or an oracle."""
    x, w = normal(rows, 200, dtype=F64), normal(40, 200, seed=1)
    found = linear(x, w)
    assert found.dtype == F64 and (found - x @ w.double().T).abs().max() < WITHIN[F64]


@pytest.mark.parametrize("rows", [1, 12])
def test_a_fast_library_is_asked(monkeypatch, rows):
    monkeypatch.setattr(plain, "LIBRARY_STREAMS", True)
    x, w = normal(rows, 200), normal(40, 200, seed=1)
    assert torch.equal(linear(x, w), F.linear(x, w))
    assert torch.equal(wide_linear(x, w, F32), F.linear(x, w))


@pytest.mark.parametrize(
    "found, expected",
    [
        ({"architecture": "x86_64", "avx512_f": True}, True),
        ({"architecture": "x86_64", "avx512_f": False}, False),
        ({"architecture": "x86_64"}, False),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_which_library_is_slow_at_few_rows(found, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert plain._library_streams() is expected


# The sum over experts ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n, k, width, kept", [(9, 3, 200, 20), (1, 1, 7, 1), (5, 2, 33, 0)])
def test_the_sum_over_experts_has_the_bits_of_index_add(three_threads, dtype, n, k, width, kept):
    # eq. 12
    y, weights = normal(n * k, width, dtype=dtype), normal(n, k, seed=1, dtype=dtype)
    order = torch.randperm(n * k, generator=torch.Generator().manual_seed(2))
    counted = (y * weights.flatten()[order, None]).index_fill(0, torch.arange(kept, n * k), 0.0)
    expected = torch.zeros(n, width, dtype=dtype).index_add(0, order // k, counted)
    y[kept:] = torch.nan  # rows of experts that others hold
    assert torch.equal(combine_loops(y, weights, order, torch.tensor([kept])), expected)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp8"])
def test_a_layer_in_use_sums_by_the_loop(name, monkeypatch):
    """Which gives the bits of the plain form."""
    source = Transformer(TINY).init_weights(0)
    model = Transformer(TINY, name)
    model.load_state_dict(source.state_dict())
    moe = model.requires_grad_(False).layers[-1].ffn
    u = normal(2, 3, TINY.hidden_size, dtype=moe.precision.dtype)
    found = moe(u)
    with monkeypatch.context() as patches:
        patches.setattr(Precision, "in_loops", lambda self, *inputs: False)
        assert torch.equal(moe(u), found)
    monkeypatch.setattr("dsv3.moe.combine_loops", lambda y, *others: y.new_zeros(6, y.shape[1]))
    assert not torch.equal(moe(u), found)
