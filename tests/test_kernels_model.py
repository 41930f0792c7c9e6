"""Models that compute by kernels, all of them, against the same models in plain torch; how many
kernels a layer takes; and what a compiler is told of each operation."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsv3 import ModelConfig, Transformer, fp8
from dsv3.fp8.latent import LatentFormat

pytest.importorskip("triton", reason="Triton is not installed (there is none for this platform)")

from triton.runtime.interpreter import GridExecutor

from dsv3.kernels.launch import INTERPRETING

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not INTERPRETING, reason="what the interpreter runs is counted"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),
]

# Two layers, dense and experts; all sizes multiples of 16, so that Hopper's kernels take them.
CONFIG = ModelConfig.mini().but(
    num_hidden_layers=2,
    first_k_dense_replace=1,
    vocab_size=64,
    num_nextn_predict_layers=0,
    num_attention_heads=2,
)
TEXT = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
# Kernels of decoding and of prefill on Hopper; fp8_gemm is other chips', column_quant of training,
# weight_dequant of loading.
OF_FP8 = {"act_quant", "norm_quant", "persistent_gemm", "add_parts", "expert_hidden", "expert_out"}
OF_BOTH = {"mla_decode", "mla_combine", "mla_prefill", "router", "router_choose", "combine"}


class Launches(TorchDispatchMode):
    """Counts what would be launched on a GPU: kernels of the house, by name, and torch's operations
    that compute or copy (a view and memory that is asked for launch nothing)."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.torch: Counter[str] = Counter()
        self._inside, run = False, GridExecutor.__call__

        def noted(executor, *arguments, **named):
            self.kernels[executor.fn.__name__.removesuffix("_kernel")] += 1
            self._inside = True  # the interpreter copies
            try:
                return run(executor, *arguments, **named)
            finally:
                self._inside = False

        monkeypatch.setattr(GridExecutor, "__call__", noted)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not self._inside and not self._free(function, (arguments, options), result):
            self.torch[str(function).removeprefix("aten.")] += 1
        return result

    @staticmethod
    def _free(function, given, result) -> bool:
        if "empty" in str(function):
            return True
        stores = {
            t.untyped_storage().data_ptr()
            for t in tree_leaves(given)
            if isinstance(t, torch.Tensor)
        }
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return not function._schema.is_mutable and all(
            t.untyped_storage().data_ptr() in stores for t in made
        )

    @property
    def total(self) -> int:
        return sum(self.kernels.values()) + sum(self.torch.values())


def use_kernels(monkeypatch, on: bool) -> None:
    """Everywhere, as on a Hopper GPU; sums in float32, as on every GPU."""
    for place in ("precision", "fp8.product", "fp8.experts", "fp8.quantize"):
        monkeypatch.setattr(
            f"dsv3.{place}.pick_backend", lambda device, backend=None: "triton" if on else "torch"
        )
    monkeypatch.setattr("dsv3.precision.Precision.sums", lambda self, device: torch.float32)


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Texts of a few keys and rows of a few numbers in parts, as long ones are."""
    monkeypatch.setattr("dsv3.kernels.mla_decode.PART", 4)
    monkeypatch.setattr("dsv3.kernels.mla_decode.ALIKE", 1)
    monkeypatch.setattr("dsv3.kernels.router._PART", 64)
    monkeypatch.setattr(
        "dsv3.kernels.persistent_gemm.blocks_in_part", lambda n, k: 1 if n < 200 else 1 + k // 128
    )


def a_model(precision: str) -> Transformer:
    model = Transformer(CONFIG, precision)
    model.load_state_dict(Transformer(CONFIG).init_weights(0, by_width=True).state_dict())
    return model


def read(model: Transformer, cache: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (n, v) of a prompt in two chunks of ragged rows, of single tokens and of drafts, and
    each token's experts (n, k)."""
    kept, logits, experts = model.new_cache(2, 24, dtype=cache), [], []
    ear = model.layers[1].ffn.gate.register_forward_hook(lambda *given: experts.append(given[2][1]))
    for first, last, counts in ((0, 9, [9, 4]), (9, 10, [1, 1]), (10, 13, [3, 3])):
        logits.append(model(TEXT[:, first:last], cache=kept, lengths=counts)[:, : min(counts)])
        experts[-1] = experts[-1][:, : min(counts)]
    ear.remove()
    return torch.cat(logits, 1).flatten(0, 1), torch.cat(experts, 1).flatten(0, 1).sort().values


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize(
    "precision, cache, form",
    [("bf16", None, "absorbed"), ("fp8", None, "expanded"), ("fp8", "fp8", "absorbed")],
)
@torch.inference_mode()
def test_a_model_in_kernels_is_the_model_without(precision, cache, form, monkeypatch, small_parts):
    """What may differ is to which of two neighbours a sum is rounded. In one half of a layer, given
    the same, few sums are so near the middle: they differ by about 2^-17 and bfloat16 is 2^-8
    apart, so one in 2^9 lands on the other side, and 2^-8 sqrt(2^-9) = 1.7e-4 of the norm is off. A
    code of E4M3 that lands on the other side is off by 2^-3: by the sums one in 2^14, by what
    bfloat16 moved one in 2^9 2^5; together 2^-3 sqrt(2^-13) = 1.4e-3, and 2.4e-3 after three such
    products in a row. Both doubled are the bounds of a half.

    From half to half such differences grow, until two computations round independently: in bfloat16
    2^-9 sqrt(2/3) for each rounding, 7e-3 after the twenty of two layers. A code lies between two
    others 2^-3 apart: of numbers that are off by 1.6e-3, one in 80 lands on the other side, by 2^-4
    on average, which is 7e-3, and 2.4e-2 after the twelve products of two layers. Both doubled
    are the bounds of the whole. A wrong scale, mask or expert is an error of the order of 1."""
    monkeypatch.setattr(
        "dsv3.mla.break_even_queries", lambda config: {"absorbed": 100, "expanded": 0}[form]
    )
    model, launches, halves = a_model(precision), Launches(monkeypatch), {}
    logits, experts = {}, {}
    x = model.embed(TEXT[:, :5])
    for on in (False, True):
        use_kernels(monkeypatch, on)
        assert not launches.kernels
        logits[on], experts[on] = read(model, cache)
        for number, layer in enumerate(model.layers):
            kept = model.new_cache(2, 8, dtype=cache)
            step, _ = model._step(TEXT[:, :5], kept, None)
            u = halves.setdefault((number, "u"), x + layer.attend(x, step, kept.one(number)))
            halves[number, "attends", on] = layer.attend(x, step, kept.one(number))
            halves[number, "feeds", on] = layer.feed_forward(u)
    for number, name in ((0, "attends"), (0, "feeds"), (1, "attends"), (1, "feeds")):
        off = apart(halves[number, name, True], halves[number, name, False])
        assert off < {"bf16": 4e-4, "fp8": 5e-3}[precision], (number, name)
    same = (experts[True] == experts[False]).all(-1)  # of near ties another may win
    assert same.float().mean() > 0.8 and logits[False].std() > 0.1
    assert (
        apart(logits[True][same], logits[False][same]) < {"bf16": 1.4e-2, "fp8": 4.8e-2}[precision]
    )
    others = {"absorbed": {"mla_prefill"}, "expanded": {"mla_decode", "mla_combine"}}[form]
    wanted = (OF_BOTH - others) | (OF_FP8 if precision == "fp8" else set())
    assert set(launches.kernels) == wanted


def test_kernels_of_a_decode_layer_are_counted(monkeypatch):
    """In FP8, as eager torch launches them: of the house, and all. ``dsv3.kernels`` says these
    numbers, and that 12 were aimed at."""
    model, launches = a_model("fp8"), Launches(monkeypatch)
    use_kernels(monkeypatch, True)
    counts = []
    with torch.no_grad():  # inference mode hides of what an operation is made
        kept = model.new_cache(2, 24)
        model(TEXT[:, :2], cache=kept)
        step, _ = model._step(TEXT[:, :1], kept, None)
        x = model.embed(TEXT[:, :1])
        for number, layer in enumerate(model.layers):
            launches.kernels.clear(), launches.torch.clear()
            with launches:
                x = layer(x, step, kept.one(number))
            counts.append((sum(launches.kernels.values()), launches.total))
    dense, with_experts = counts
    assert dense <= (13, 42) and with_experts <= (17, 56)


# What a compiler is told -------------------------------------------------------------------------


def cases() -> dict[str, tuple]:
    """Arguments of each opaque operation."""
    x, weight = torch.randn(2, 3, 48).bfloat16(), torch.rand(48) + 0.5
    q, reach = torch.randn(2, 1, 4, 48), torch.tensor([[5], [2]])
    kv, k_rope = torch.randn(2, 5, 4, 48), torch.randn(2, 5, 16)
    rows, u = fp8.quantize_activation(torch.randn(6, 48)), torch.randn(2, 3, 48).bfloat16()
    w13 = fp8.quantize_weight(torch.randn(3, 2, 32, 48))
    w2, ends = fp8.quantize_weight(torch.randn(3, 48, 32)), torch.tensor([2, 2, 6])
    one = fp8.quantize_weight(torch.randn(32, 48))
    seen = LatentFormat(32, 16).pack(torch.randn(2, 5, 48))
    kept, up = torch.randn(2, 9, 48)[:, :5].bfloat16(), torch.randn(4, 40, 32)
    order, scores = torch.randperm(6), torch.rand(3, 2)
    rule = (torch.randn(8, 48), torch.rand(8), 2, 1, 2, "sigmoid", True, 2.5)
    stacks = w13.data, w13.scale, w2.data, w2.scale
    return {
        "mla_decode": (q, seen, reach, 0.1, 32),
        "mla_loops": (q[..., :24], q[..., 32:], kept, reach, up, 0.1, torch.float64),
        "mla_prefill": (q[..., :32], q[..., 32:], kv, k_rope, reach, 0.1),
        "norm_quant": (x, weight, 1e-6, "ue8m0"),
        "router": (u, *rule),
        "combine": (torch.randn(6, 48), scores, order, ends[-1:]),
        "combine_loops": (torch.randn(6, 48), scores, order, ends[-1:]),
        "rms_norm": (x.transpose(0, 1), weight, 1e-6, True),
        "wide_product": (u, torch.randn(20, 48), torch.float64),
        "plain_experts": (torch.randn(6, 48), torch.randn(3, 32, 48), ends),
        "fp8_experts": (rows.data, rows.scale, w13.data, w13.scale, ends, torch.float64),
        "fused_experts": (rows.data, rows.scale, *stacks, ends, "ue8m0"),
        "quantize_activation": (x, "ue8m0", None),
        "fp8_product": (
            *(rows.data, rows.scale, one.data, one.scale, torch.float64, None, torch.bfloat16),
        ),
    }


def test_every_opaque_operation_is_among_the_cases():
    told = re.findall(
        r"@opaque\(\s*\"(\w+)\(",
        "".join(path.read_text() for path in Path(fp8.__file__).parents[1].rglob("*.py")),
    )
    assert sorted(told) == sorted(cases())


@pytest.mark.parametrize("name", sorted(cases()))
def test_a_compiler_is_told_what_comes_out(name):
    """Shapes, dtypes and strides of the results, that nothing given is changed, and that no result
    is one of the arguments."""
    operation, given = getattr(torch.ops.dsv3, name).default, cases()[name]
    before = [bytes_of(each) for each in given if isinstance(each, torch.Tensor)]
    torch.library.opcheck(operation, given, test_utils="test_faketensor")
    found = tree_leaves(operation(*given))
    tensors = [each for each in given if isinstance(each, torch.Tensor)]
    assert all(torch.equal(bytes_of(each), kept) for each, kept in zip(tensors, before))
    theirs = {each.untyped_storage().data_ptr() for each in tensors}
    assert not any(each.untyped_storage().data_ptr() in theirs for each in found)


def bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8).clone()
