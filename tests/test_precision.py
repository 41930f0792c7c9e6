"""In which bits everything is kept and multiplied. Closeness cannot see that, so these tests look.

A mode of torch's dispatcher hears every operation with the dtypes of what goes in and comes out,
and a hook on autograd hears what waits for the backward pass. Expected values are float64 and come
from the definitions of the formats (TR 3.3), not from the package.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fp8_cases import BLOCK, TILE, rounded, to_nearest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_cases import TINY, window

from dsv3 import bfloat16
from dsv3.checkpoint.layout import layout
from dsv3.layers import Head, Linear, RMSNorm, RowParallelLinear
from dsv3.mla import MLA
from dsv3.model import Transformer
from dsv3.moe import Router
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.optimizer import MOMENTS, make_optimizer
from dsv3.training.step import StepValues, train_step

E4M3, BF16, F16, F32, F64 = (
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)
USE = ["fp32", "bf16", "fp8"]
TRAINING = [f"training {name}" for name in USE]
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "linear", "_grouped_mm", "_softmax")


def precision_of(name: str) -> Precision:
    last = name.split()[-1]
    return Precision.training(last) if name != last else Precision.of(name, TINY)


def model_of(name: str, group: TensorGroup | None = None) -> Transformer:
    """Random weights in that precision; of a rank, its slices of them."""
    group = group or TensorGroup.single()
    whole = Transformer(TINY).init_weights(0).state_dict()
    slices = {
        spec.name: spec.slice_for(group.rank, group.size, TINY.n_routed_experts)
        for spec in layout(TINY, scales=False, mtp_copies=False)
    }
    model = Transformer(TINY, precision_of(name), group)
    model.load_state_dict(
        {
            name: whole[name][tuple(slice(r.start, r.stop) for r in part)]
            for name, part in slices.items()
            if part is not None
        }
    )
    return model


class Inside:
    """Which module of a model is at work: the name of the innermost forward pass."""

    def __init__(self, model: torch.nn.Module):
        self.names = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self.names.append(name))
            module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def leave(self) -> None:
        self.names.pop()


class Heard(TorchDispatchMode):
    """Of each kind of module, the dtypes that its products meet; of norms, that all operations do;
    of routers, those of all results."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.inside, self.dtypes = Inside(model), {}
        self.modules = dict(model.named_modules())

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        name = operation._overloadpacket.__name__
        module = self.modules[self.inside.names[-1]]
        product = name in PRODUCTS or "scaled_dot_product" in name or "softmax" in name
        first = result[0] if isinstance(result, tuple) else result  # not the kernels' notes
        heard = first if isinstance(module, Router) and not product else [arguments, first]
        if product or (isinstance(module, (RMSNorm, Router)) and name != "_to_copy"):
            kind = self.inside.names[-1].rpartition(".")[2]
            kind = "norm" if kind.endswith("norm") else kind
            self.dtypes.setdefault(kind, set()).update(
                leaf.dtype
                for leaf in tree_leaves(heard)
                if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
            )
        return result


def e5m6(x: Tensor) -> Tensor:
    """x (tokens, 128 at most) in E5M6, each token with the smallest power of two that keeps its
    largest number at 2^15 (2 - 2^-6) or below."""
    scale = torch.exp2((x.double().abs().amax(-1, keepdim=True) / 65024).log2().ceil())
    return to_nearest(x.double() / scale, 6, -14) * scale


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def unrounded(x: Tensor) -> bool:
    """Whether x holds bits that bfloat16 would drop."""
    return bool((x != x.to(BF16).to(x.dtype)).double().mean() > 0.9)


# What products meet ------------------------------------------------------------------------------

LINEAR = ("wq_a", "wq_b", "wkv_a", "wo", "w1", "w2", "w3", "experts")
# TR 3.3.1: embedding, head, gating, norms and attention keep BF16 or FP32. "ffn": the shared
# expert's part of a sum that goes on; "attn": the core. On a CPU fp8 sums in float64.
MET = {
    "fp32": dict(linear=F32, attn=F32, wkv_b=F32, ffn=F32, gate=F32, head=F32, eh_proj=F32),
    "bf16": dict(linear=BF16, attn=F32, wkv_b=F32, ffn=F32, gate=F32, head=F32, eh_proj=BF16),
    "fp8": dict(linear=F64, attn=F64, wkv_b=F64, ffn=F64, gate=F64, head=F64, eh_proj=BF16),
    # Operands of FP8 products that train are E4M3 values with float32 scales.
    "training bf16": dict(
        linear=BF16, attn=BF16, wkv_b=BF16, ffn=BF16, gate=F32, head=BF16, eh_proj=BF16
    ),
    "training fp8": dict(
        linear=F32, attn=BF16, wkv_b=F32, ffn=F32, gate=F32, head=BF16, eh_proj=BF16
    ),
}
MET["training fp32"] = MET["fp32"]


@pytest.mark.parametrize("form", ["expanded", "absorbed"])
@pytest.mark.parametrize("name", USE + TRAINING)
def test_products_meet_the_dtypes_of_the_precision(name, form, monkeypatch, without_numba):
    monkeypatch.setattr(bfloat16, "CPU_HAS_UNITS", True)  # without, bfloat16 numbers are widened
    monkeypatch.setattr(MLA, "prefers_expanded", lambda self, queries: form == "expanded")
    model, tokens = model_of(name), window(2, 6)
    with Heard(model) as heard:
        logits, hidden = model(tokens[:, :-1], return_hidden=True)
        ahead, _ = model.mtp_logits(hidden, tokens[:, 1:])
    met = MET[name]
    if form == "absorbed":
        met = {**met, "wkv_b": None}  # its products stand in the core
    norms = {F32, F64} if name == "fp8" else {F32}  # exact norms sum squares in float64
    expected = {kind: {met["linear"]} for kind in LINEAR} | {"norm": norms}
    expected |= {kind: {met[kind]} for kind in met if kind != "linear" and met[kind]}
    assert heard.dtypes == expected
    assert logits.dtype == ahead.dtype == F32
    dtype = F32 if name.endswith("fp32") else BF16
    assert hidden.dtype == model.embed(tokens).dtype == model.new_cache(1, 4).data.dtype == dtype


@pytest.mark.parametrize("name", USE + TRAINING)
def test_weights_are_kept_in_the_dtypes_of_the_precision(name):
    """TR 3.3.1, 3.3.3; scales are float32, and what training changes is float32 throughout."""
    plain = BF16 if name in ("bf16", "fp8") else F32
    matrix = E4M3 if name == "fp8" else plain
    for key, value in model_of(name).state_dict().items():
        wide = key.endswith(("norm.weight", "gate.weight", "gate.bias", "scale", "wkv_b.weight"))
        if key.startswith(("embed", "head")) or "eh_proj" in key:
            wanted = plain
        else:
            wanted = F32 if wide else matrix
        assert value.dtype == wanted, key


@pytest.mark.parametrize("name", USE)
def test_the_group_follows_a_move(name):
    model = model_of(name)
    for device in ("meta", "cpu"):
        model.to_empty(device=device)
        for module in model.modules():
            if hasattr(module, "group"):
                assert module.group.device.type == device


@pytest.mark.parametrize("name", USE + TRAINING)
def test_the_router_tells_near_ties_apart(name):
    """Gating is never in few bits (TR 3.3.1). Scores and biases differ by 1e-5; where they lie,
    neighbours in bfloat16 are 4e-3 apart, and all experts would be equal."""
    config = TINY.but(n_group=1, topk_group=1)
    router, random = Router(config, precision_of(name)), torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(8, generator=random) for _ in range(2)]) * 1e-5
    base = torch.rand(32, generator=random) / 16
    router.weight.data = base * (1 + 8 * order[0, :, None])
    router.bias.data = 0.5 + order[1]
    u = (0.5 + torch.rand(40, 32, generator=random)).to(router.precision.dtype)
    exact = (u.double() @ router.weight.double().T).sigmoid()
    scores = router.scores(u)
    assert scores.dtype == (F64 if name == "fp8" else F32)
    assert (scores.double() / exact - 1).abs().max() < 1e-6
    weights, chosen, _ = router(u)
    assert weights.dtype == scores.dtype and (weights.sum(-1) - 1).abs().max() < 1e-6
    best = (exact + router.bias.double()).topk(2).indices
    assert torch.equal(chosen.sort().values, best.sort().values)


@pytest.mark.parametrize("name", USE)
def test_logits_are_not_rounded(name):
    """Neighbours in bfloat16 lie 2^-8 apart: the best two tokens of a text would tie."""
    head = Head(32, 320, precision_of(name), TensorGroup.single())
    head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1)).to(head.precision.dtype)
    logits = head(x)
    assert logits.dtype == F32 and unrounded(logits)
    assert error(logits, x.double() @ head.weight.double().T) < 1e-6


# Sums that go on ---------------------------------------------------------------------------------


class Ear(TensorGroup):
    """A rank of two whose all-reduce keeps what it is given and adds nothing."""

    def __init__(self, rank: int):
        super().__init__(rank, 2)
        self.heard = []

    def all_reduce(self, x):
        self.heard.append(x.clone())
        return x

    def all_gather(self, x):
        return torch.cat([x, x], -1)


@pytest.mark.parametrize("name", USE)
def test_parts_of_sums_leave_a_rank_unrounded(name):
    """Embedding, then attention and feed-forward of a dense layer and of one with experts."""
    group = Ear(1)
    model_of(name, group)(160 + window(2, 6) // 2)  # tokens of this rank's
    embedded, *parts = group.heard
    assert embedded.dtype == F32 and len(parts) == 4
    for part in parts:
        assert part.dtype == (F64 if name == "fp8" else F32) and unrounded(part)


@pytest.mark.parametrize("name", USE)
def test_parts_of_ranks_are_the_whole_product(name):
    """Their sum is the float64 product of what the precision keeps of x and W (TR 3.3.1)."""
    random, precision = torch.Generator().manual_seed(3), precision_of(name)
    x, w = torch.randn(5, 256, generator=random), torch.randn(8, 256, generator=random)
    x, total, exact = x.to(precision.dtype), 0, 0
    for rank, half in enumerate((slice(128), slice(128, 256))):
        group = Ear(rank)
        layer = RowParallelLinear(256, 8, precision, group, what="inputs")
        layer.load_state_dict({"weight": w[:, half]})
        layer(x[:, half])
        total = total + group.heard[0].double()
        mine, theirs = x[:, half], w[:, half].to(precision.weights)
        if name == "fp8":
            mine, theirs = (
                rounded(v, b, TINY.scale_fmt) for v, b in ((mine, TILE), (w[:, half], BLOCK))
            )
        exact = exact + mine.double() @ theirs.double().T
    assert error(total, exact) < 3e-7


def test_experts_of_fp8_round_no_sum_that_goes_on():
    """Within an expert w1 x and w3 x are rounded to bfloat16 as released; w2's product is not."""
    experts = model_of("fp8").layers[1].ffn.experts
    u = torch.randn(8, 32, generator=torch.Generator().manual_seed(4)).to(BF16)
    found = experts(u, torch.ones(8, 1, dtype=F64), torch.arange(8)[:, None])
    assert found.dtype == F64 and unrounded(found)
    whole = Transformer(TINY).init_weights(0).layers[1].ffn.experts
    for e in range(8):
        w1, w3, w2 = (
            rounded(w.detach(), BLOCK, TINY.scale_fmt) for w in (*whole.w13[e], whole.w2[e])
        )
        x = rounded(u[e : e + 1], TILE, TINY.scale_fmt)
        inner = F.silu((x @ w1.T).to(BF16)) * (x @ w3.T).to(BF16)
        assert error(found[e], (rounded(inner, TILE, TINY.scale_fmt) @ w2.T)[0]) < 3e-7


# What training keeps -----------------------------------------------------------------------------


def test_what_waits_for_the_backward_pass_in_fp8(as_in_use, monkeypatch):
    """TR 3.3.3: inputs of linear layers wait in E4M3 with power-of-two scales, the one after
    attention in E5M6; nothing wider of theirs waits."""
    monkeypatch.setattr(MLA, "prefers_expanded", lambda self, queries: True)
    model = model_of("training fp8")
    inside, inputs, saved = Inside(model), {}, {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            module.register_forward_pre_hook(
                lambda _, given, name=name: inputs.update({name: given[0].detach().flatten(0, -2)})
            )

    def pack(tensor):
        saved.setdefault(inside.names[-1], []).append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(window(2, 12))
    linears = [n for n, m in model.named_modules() if isinstance(m, Linear) and n in inputs]
    linears.remove("head")
    assert len(linears) == 4 * 2 + 3 + 2  # of attention twice, dense, w1 and w3 of the shared
    for name in linears:
        x, attention = inputs[name], name.endswith("attn.wo")
        data, scale, *weight = saved[name]
        assert [t.dtype for t in (data, scale, *weight)] == [
            F16 if attention else E4M3,
            F32,
            E4M3,
            F32,
        ], name
        assert data.shape == x.shape and (torch.frexp(scale).mantissa == 0.5).all(), name
        exact = e5m6(x) if attention else rounded(x, TILE, "ue8m0")
        assert torch.equal(data.double() * scale.double(), exact), name
        assert not attention or 1e-3 < error(exact, x.double()) < 5e-3
    for name in ("layers.0.attn.wkv_b", "layers.1.ffn.experts"):
        codes = [t for t in saved[name] if t.dtype == E4M3]
        assert len(codes) >= 2 and F16 not in {t.dtype for t in saved[name]}, name
    assert saved["head"][0].dtype == BF16


@pytest.mark.parametrize("name, moments", [("fp32", "fp32"), ("bf16", "bf16"), ("fp8", "bf16")])
def test_masters_gradients_and_moments(name, moments, as_in_use, monkeypatch):
    """TR 3.3.3: master weights and gradients in float32, AdamW's moments in bfloat16."""
    model = model_of(f"training {name}")
    optimizer, gradients = make_optimizer(model, moments=moments), set()
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda w: gradients.add(w.grad.dtype))
    watch = RouterWatch(model)
    train_step(model, optimizer, window(), StepValues(learning_rate=1e-3), watch)
    watch.close()
    assert gradients == {F32}
    for weight in model.parameters():
        assert weight.dtype == F32
        assert {optimizer.state[weight][m].dtype for m in MOMENTS} == {
            F32 if moments == "fp32" else BF16
        }
    assert unrounded(model.layers[0].attn.wo.weight)
    assert all(router.bias.dtype == F32 for router in watch.routers.values())
