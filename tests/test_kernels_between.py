"""Kernels for what stands between the products: attention, norms, the router, sums over experts.

Each against its torch specification, on a GPU or in Triton's interpreter. A model that uses all of
them is in ``test_kernels_model``.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fp8_cases import adversarial_rows, same_bits

from dsv3 import ModelConfig, Transformer
from dsv3.errors import DSV3Error
from dsv3.fp8 import quantize_activation
from dsv3.fp8.latent import LatentFormat

pytest.importorskip("triton", reason="Triton is not installed (there is none for this platform)")

from dsv3.kernels.combine import combine, combine_spec, where_stands
from dsv3.kernels.mla_decode import mla_decode, mla_decode_spec, splits_of
from dsv3.kernels.mla_prefill import mla_prefill, mla_prefill_spec
from dsv3.kernels.norm_quant import norm_quant, norm_quant_spec
from dsv3.kernels.operations import has_room
from dsv3.kernels.router import Choice, router, router_spec
from dsv3.precision import Normed, Precision
from dsv3.viz.widgets.microscope import activations

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def gap(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference, in parts of the largest number."""
    return float((found.cpu() - exact).abs().max() / exact.abs().max())


def reaches(lengths: list[int], queries: int) -> torch.Tensor:
    """Keys that the last ``queries`` tokens of each text see."""
    return (torch.tensor(lengths)[:, None] - queries + 1 + torch.arange(queries)).clamp(min=0)


# Absorbed decode ----------------------------------------------------------------------------


def decode(q, seen, lengths, latent, **options):
    """The kernel's answer and the specification's, in float64."""
    reach = reaches(lengths, q.shape[1])
    scale = q.shape[-1] ** -0.5
    pieces = (x.to(DEVICE) for x in (q, seen, reach))
    found = mla_decode(*pieces, scale, latent, **options).cpu()
    if seen.dtype == torch.uint8:
        seen = LatentFormat(latent, q.shape[-1] - latent).unpack(seen, torch.float64)
    return found, mla_decode_spec(q.double(), seen.double(), reach, scale, latent)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "latent, rope, heads, queries, lengths",
    [
        (128, 32, 16, 1, [258]),  # the shipped model's; the last part has two keys
        (128, 32, 16, 1, [1, 70]),
        (96, 16, 5, 1, [64, 1, 65]),  # fewer heads than a tile has rows, no power of two
        (50, 16, 5, 3, [3, 40, 66]),  # drafts, of which the first sees one key; odd bytes of codes
        (64, 16, 16, 3, [50, 0]),  # rows of two tiles; a text without tokens
        (512, 64, 16, 1, [40]),  # the released sizes
    ],
)
def test_decode(latent, rope, heads, queries, lengths, packed):
    # eq. 10
    shape = (len(lengths), max(lengths), latent + rope)
    q, seen = draw(heads, (len(lengths), queries, heads, latent + rope), shape)
    seen = LatentFormat(latent, rope).pack(seen) if packed else seen.bfloat16()
    found, exact = decode(q, seen, lengths, latent)
    assert gap(found, exact) < 2e-5
    assert not found[torch.tensor(lengths) == 0].any()


def test_decode_keeps_what_bfloat16_would_lose():
    """Queries and weights in two parts; in one, as other kernels have them, it is off by 1e-3."""
    q, seen = draw(1, (1, 1, 16, 80), (1, 64, 80))
    two, exact = decode(q, seen.bfloat16(), [64], 64)
    one, _ = decode(q, seen.bfloat16(), [64], 64, parts=1)
    assert gap(two, exact) < 2e-5 < 3e-4 < gap(one, exact) < 1e-2


def test_decode_reads_a_cache_where_it_lies():
    """A run of a longer store, with NaN where no query looks; large scores do not overflow."""
    q, store = draw(2, (2, 1, 16, 80), (2, 290, 80))
    _, exact = decode(400 * q, store.bfloat16()[:, :270], [260, 33], 64)
    store[:, 260:], store[1, 33:] = torch.nan, torch.nan
    found, _ = decode(400 * q, store.bfloat16()[:, :270], [260, 33], 64)
    assert gap(found, exact) < 1e-4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [3, 16])
def test_decode_gives_the_same_bits_whoever_is_beside(heads, packed, monkeypatch):
    """A text alone; beside a longer one, with keys behind it that are masked; and among drafts.

    The interpreter's products are NumPy's, whose library adds up the last rows of a tile in another
    order on some processors. Here each row is added up in one order, as on a GPU."""

    def in_one_order(a, b, dtype):
        return np.einsum("mk,kn->mn", a.astype(dtype), b.astype(dtype))

    monkeypatch.setattr(np, "matmul", in_one_order)
    q, seen = draw(3, (2, 3, heads, 80), (2, 600, 80))
    seen = LatentFormat(64, 16).pack(seen) if packed else seen.bfloat16()
    alone = decode(q[:1, 1:2], seen[:1, :257], [257], 64)[0]
    beside = decode(q[:, 1:2], seen, [257, 600], 64)[0]
    drafted = decode(q[:1], seen[:1, :512], [258], 64)[0]
    assert same_bits(alone[0], beside[0]) and same_bits(alone[0, 0], drafted[0, 1])
    assert same_bits(alone, decode(q[:1, 1:2], seen[:1, :257], [257], 64)[0])  # every time


def test_a_text_is_cut_at_fixed_places(monkeypatch):
    """At the released lengths some dozen parts, and the last of them ends where the text does."""
    for keys, parts in ((1, 1), (256, 1), (257, 2), (4096, 16), (4097, 17), (12289, 33)):
        assert splits_of(keys) == parts
    assert splits_of(128_000) == 81
    monkeypatch.setattr("dsv3.kernels.mla_decode.PART", 64)
    monkeypatch.setattr("dsv3.kernels.mla_decode.ALIKE", 2)
    q, seen = draw(4, (1, 1, 4, 48), (1, 700, 48))
    for keys, parts in ((130, 3), (385, 5), (700, 6)):  # cut at 64, 128, 256, 384, 640
        assert splits_of(keys) == parts
        assert gap(*decode(q, seen[:, :keys].bfloat16(), [keys], 32)) < 2e-5


# Expanded prefill ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize(
    "d_h, d_r, d_v, heads, queries, lengths",
    [
        (64, 32, 64, 2, 70, [70]),  # the shipped model's; a second tile of queries
        (128, 64, 128, 1, 20, [90, 33]),  # the released sizes, behind other chunks
        (48, 16, 80, 3, 5, [5, 1, 0]),  # values wider than keys, padding, an empty row
        (16, 16, 16, 1, 1, [1]),
    ],
)
def test_prefill(d_h, d_r, d_v, heads, queries, lengths, dtype, bound):
    # eq. 10
    b, t = len(lengths), max(lengths)
    parts = draw(
        d_h,
        (b, queries, heads, d_h),
        (b, queries, heads, d_r),
        (b, t, heads, d_h + d_v),
        (b, t, d_r),
    )
    parts = [part.to(dtype) for part in parts]
    reach, scale = reaches(lengths, queries), (d_h + d_r) ** -0.5
    found = mla_prefill(*(part.to(DEVICE) for part in (*parts, reach)), scale)
    exact = mla_prefill_spec(*(part.double() for part in parts), reach, scale)
    assert gap(found, exact) < bound


# Norm and quantisation ----------------------------------------------------------------------


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
@pytest.mark.parametrize("shape", [(3, 192), (2, 2, 300), (1, 7168), (1, 1)])
def test_norm_quant(shape, scale_format):
    x, weight = draw(shape[-1], shape, shape[-1:])
    x, weight = (5 * x).bfloat16(), weight.abs() + 0.1
    spec = norm_quant_spec(x, weight, 1e-6, scale_format)
    pieces = (x.to(DEVICE), weight.to(DEVICE), 1e-6, scale_format)
    found = norm_quant(*pieces, keeps=True)
    assert all(same_bits(a.cpu(), b) for a, b in zip(found, spec, strict=True))
    codes = quantize_activation(spec[2], scale_format, backend="torch")
    assert same_bits(codes.data, spec[0]) and same_bits(codes.scale, spec[1])
    # torch's own norm, but for a last bit that float32 sums may cost
    norm = F.rms_norm(x.float(), weight.shape, weight, 1e-6).bfloat16()
    assert (norm != spec[2]).sum() <= norm.numel() / 1000
    data, scale, nothing = norm_quant(*pieces)
    assert nothing is None and same_bits(data.cpu(), spec[0]) and same_bits(scale.cpu(), spec[1])
    assert norm_quant(x[:0].to(DEVICE), *pieces[1:])[0].shape == (0, *shape[1:])


@pytest.mark.parametrize("scale_format", ["float32", "ue8m0"])
def test_norm_quant_of_zeros_infinities_and_all_sizes(scale_format):
    x, weight = adversarial_rows(40, 200).bfloat16(), torch.linspace(-3, 3, 200)
    found = norm_quant(x.to(DEVICE), weight.to(DEVICE), 1e-6, scale_format, keeps=True)
    spec = norm_quant_spec(x, weight, 1e-6, scale_format)
    assert torch.equal(found[2].cpu().isnan(), spec[2].isnan()) and spec[2].isnan().any()
    good = ~spec[2].isnan().any(-1)
    for a, b in zip(found, spec, strict=True):
        assert same_bits(a.cpu()[good], b[good])
    assert torch.equal(found[1].cpu().isnan(), spec[1].isnan())


# The router ---------------------------------------------------------------------------------


def routed(u, weight, bias, choice, **options):
    pieces = (None if x is None else x.to(DEVICE) for x in (u, weight, bias))
    weights, chosen = router(*pieces, choice, **options)
    return weights.cpu(), chosen.cpu()


@pytest.mark.parametrize(
    "n, experts, width, biased, choice, split",
    [
        (1, 16, 192, True, Choice(4, 2, 2, "sigmoid", True, 2.5), None),  # the shipped model's
        (17, 256, 100, True, Choice(8, 4, 8, "sigmoid", True, 2.5), False),  # the released sizes
        (3, 60, 330, False, Choice(3, 1, 6, "softmax", False, 16.0), True),  # V2's: no bias
        (3, 10, 64, False, Choice(1, 1, 3, "softmax", False, 1.0), None),  # one group
        (3, 8, 64, True, Choice(8, 3, 3, "sigmoid", True, 1.0), None),  # groups of one
    ],
)
def test_router(n, experts, width, biased, choice, split):
    # eq. 13, 15, 16
    u, weight, bias = draw(n, (n, width), (experts, width), (experts,))
    u, weight = u.bfloat16(), weight * width**-0.5
    bias = 0.3 * bias if biased else None
    weights, chosen = routed(u, weight, bias, choice, split=split)
    expected, experts_of_each = router_spec(u, weight, bias, choice)
    assert torch.equal(chosen, experts_of_each)
    assert torch.allclose(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [320, 512])
def test_a_router_gives_a_token_the_same_bits_among_many(width):
    """Programs that share out the depth and one that takes all of it add up the same parts."""
    u, weight, bias = draw(width, (40, width), (16, width), (16,))
    choice = Choice(4, 2, 2, "sigmoid", True, 2.5)
    given = u.bfloat16(), weight * width**-0.5, 0.1 * bias, choice
    apart, whole = (routed(*given, split=split) for split in (True, False))
    alone = [routed(u[row : row + 1].bfloat16(), *given[1:]) for row in range(3)]
    for number in (0, 1):
        assert same_bits(apart[number], whole[number])
        assert same_bits(torch.cat([each[number] for each in alone]), whole[number][:3])
    # In one go, which another order of the sum is, some weight differs.
    in_one_go = router_spec(*given)[0]
    assert not same_bits(in_one_go, whole[0]) and torch.allclose(in_one_go, whole[0], rtol=1e-5)


def test_router_takes_the_lower_number_of_equals():
    u = torch.ones(1, 64).bfloat16()
    weight = torch.zeros(16, 64)
    weight[[6, 9, 13]] = 1.0
    for groups, opened, k, expected in (
        (1, 1, 5, [6, 9, 13, 0, 1]),
        (4, 2, 4, [6, 9, 4, 5]),  # group 3 is as strong as 1 and 2
        (4, 1, 2, [6, 4]),
    ):
        choice = Choice(groups, opened, k, "sigmoid", True, 1.0)
        assert routed(u, weight, torch.zeros(16), choice)[1].tolist() == [expected]
        assert router_spec(u, weight, torch.zeros(16), choice)[1].tolist() == [expected]


@pytest.mark.parametrize("bias", [-3.0, -1e30, -torch.inf])
def test_router_with_a_strongly_negative_bias(bias):
    """Closed groups are out by -inf: 0 would win over every biased score."""
    u, weight = draw(5, (4, 64), (16, 64))
    u[1] = torch.nan
    choice = Choice(4, 2, 4, "sigmoid", True, 2.5)
    bias = torch.full((16,), bias)
    weights, chosen = routed(u.bfloat16(), weight, bias, choice)
    expected, experts = router_spec(u.bfloat16(), weight, bias, choice)
    assert torch.equal(chosen, experts)
    assert torch.allclose(weights, expected, rtol=1e-5, equal_nan=True)


def test_the_specification_is_the_models_router():
    for config in (
        ModelConfig.mini(),
        ModelConfig.mini().but(n_group=1, topk_group=1),
        ModelConfig.mini().but(gate_bias=False, scoring_func="softmax", norm_topk_prob=False),
    ):
        model = Transformer(config).init_weights(0)
        gate = next(layer.ffn.gate for layer in model.layers if hasattr(layer.ffn, "gate"))
        (u,) = draw(6, (1, 30, config.hidden_size))
        weights, chosen, _ = gate(u)
        choice = Choice(
            config.n_group,
            config.topk_group,
            config.num_experts_per_tok,
            config.scoring_func,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        expected, experts = router_spec(u[0], gate.weight, gate.bias, choice)
        assert torch.equal(chosen[0], experts) and torch.allclose(weights[0], expected)


# The sum over experts -----------------------------------------------------------------------


@pytest.mark.parametrize("n, k, width, experts, kept", [(9, 3, 200, 8, 20), (1, 1, 7, 1, 1)])
def test_combine_gives_the_bits_of_index_add(n, k, width, experts, kept):
    # eq. 12
    y, weights, scores = draw(n, (n * k, width), (n, k), (n, experts))
    chosen = scores.topk(k).indices
    order = chosen.flatten().sort(stable=True).indices
    counted = (y * weights.flatten()[order, None]).index_fill(0, torch.arange(kept, n * k), 0.0)
    plain = torch.zeros(n, width).index_add(0, order // k, counted)
    y[kept:] = torch.nan  # rows of experts that others hold
    places = where_stands(order, n * k).view(n, k)
    pieces = [x.to(DEVICE) for x in (y, weights, places, torch.tensor([kept]))]
    found = combine(*pieces).cpu()
    assert torch.equal(found, combine_spec(y, weights, places, kept))
    assert torch.equal(found, plain)


def test_choices_without_a_row_count_for_nothing():
    order = torch.tensor([4, 0, 3])
    assert where_stands(order, 6).tolist() == [1, -1, -1, 2, 0, -1]
    y, weights = draw(7, (3, 10), (2, 3))
    found = combine(
        *(x.to(DEVICE) for x in (y, weights, where_stands(order, 6).view(2, 3))),
        torch.tensor([3], device=DEVICE),
    )
    expected = torch.stack([y[1] * weights[0, 0], y[0] * weights[1, 1] + y[2] * weights[1, 0]])
    assert torch.allclose(found.cpu(), expected)


# Who takes them ------------------------------------------------------------------------------


def use_kernels(monkeypatch, on: bool) -> None:
    """In float32, which is how a GPU sums."""
    monkeypatch.setattr("dsv3.precision.pick_backend", lambda device: "triton" if on else "torch")
    monkeypatch.setattr("dsv3.precision.Precision.sums", lambda self, device: torch.float32)


def test_a_gradient_or_float32_stays_with_torch(monkeypatch):
    use_kernels(monkeypatch, True)
    plain, half = Transformer(ModelConfig.mini()), Transformer(ModelConfig.mini(), "bf16")
    x = torch.ones(1, dtype=torch.bfloat16)
    assert half.precision.in_kernels(x) and not plain.precision.in_kernels(x)
    assert not half.precision.in_kernels(x, half.head.weight)
    with torch.no_grad():
        assert half.precision.in_kernels(x, half.head.weight)


def test_who_listens_is_given_numbers(monkeypatch):
    """In kernels a norm hands on codes as well; a widget's hooks read what was quantised."""
    config = ModelConfig.mini().but(num_hidden_layers=2, first_k_dense_replace=1, vocab_size=64)
    model = Transformer(config, "fp8")
    model.load_state_dict(Transformer(config).init_weights(0, by_width=True).state_dict())
    plain = activations(model, [1, 2, 3])
    use_kernels(monkeypatch, True)
    given = []
    ear = model.layers[0].attn.register_forward_pre_hook(lambda _, x: given.append(x[0]))
    heard = activations(model, [1, 2, 3])
    with torch.inference_mode():
        model(torch.tensor([[1, 2, 3]]))
    ear.remove()
    assert all(isinstance(each, Normed) for each in given) and len(given) == 2
    assert model.precision.operand(given[0]) is given[0].operand  # not quantised again
    assert heard.keys() == plain.keys() and len(heard) > 10
    for name, x in heard.items():
        torch.testing.assert_close(x, plain[name], rtol=0.1, atol=0.1 * float(x.abs().max()))


@pytest.mark.parametrize(
    "capability, there",
    [((8, 9), False), ((9, 0), True), ((10, 0), True), ((10, 3), True), ((12, 0), False)],
)
def test_chips_with_little_shared_memory_compute_in_torch(capability, there, monkeypatch):
    """Ada, and Blackwell on desks: ``test_kernels_compiled`` says what is asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_room(torch.device("cuda")) == there and has_room(torch.device("cpu"))
    use_kernels(monkeypatch, True)
    monkeypatch.setattr("dsv3.precision.has_room", lambda device: there)
    x = torch.ones(1, dtype=torch.bfloat16)
    assert Precision.of("bf16", ModelConfig.mini()).in_kernels(x) == there


def test_wrong_shapes_are_refused():
    half = torch.ones(1, 4, 80, dtype=torch.bfloat16, device=DEVICE)
    one = torch.ones(1, 1, dtype=torch.int64, device=DEVICE)
    q = torch.ones(1, 1, 2, 80, device=DEVICE)
    with pytest.raises(DSV3Error, match="mla_decode: shapes do not fit"):
        mla_decode(q, half[..., 1:], one, 1.0, 64)
    with pytest.raises(DSV3Error, match="mla_decode: wrong dtype"):
        mla_decode(q.bfloat16(), half, one, 1.0, 64)
    with pytest.raises(DSV3Error, match="mla_prefill: shapes do not fit"):
        mla_prefill(q, q, q, half[0].float(), one, 1.0)
    with pytest.raises(DSV3Error, match="norm_quant: shapes do not fit"):
        norm_quant(half, torch.ones(79, device=DEVICE), 1e-6)
    with pytest.raises(DSV3Error, match="router: shapes do not fit"):
        router(half, torch.ones(6, 80, device=DEVICE), None, Choice(4, 1, 1, "softmax", True, 1.0))
    with pytest.raises(DSV3Error, match="combine: shapes do not fit"):
        combine(q[0, 0], q[0, 0], one, one)
