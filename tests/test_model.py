"""The parts of the model against plain re-derivations from the paper, and form against form."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dsv3 import ModelConfig, Transformer
from dsv3.cache import LatentCache, Step
from dsv3.config import YarnScaling
from dsv3.errors import DSV3Error
from dsv3.grouped import grouped, one_by_one
from dsv3.moe import MoE, Router
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.rope import inverse_frequencies, rotate, rotations

SMALL = ModelConfig.mini().but(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    kv_lora_rank=32,
    q_lora_rank=24,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    max_position_embeddings=64,
    initializer_range=0.2,
    quantization_config=None,
)
CPU = torch.device("cpu")


def precise(config, name="fp32"):
    return Precision.of(name, config), TensorGroup.single()


def random_router(config, bias_mean=0.0, seed=0):
    torch.manual_seed(seed)
    router = Router(config, precise(config)[0])
    torch.nn.init.normal_(router.weight, std=0.3)
    if router.bias is not None:
        torch.nn.init.normal_(router.bias, bias_mean, 0.3)
    return router


def route_by_hand(config, logits: list[float], bias: list[float]) -> dict[int, float]:
    """Eq. 13-16 and TR 2.1.2 for one token, in Python numbers: expert -> weight. Without a bias
    the released code ranks a group by its best expert alone."""
    if config.scoring_func == "sigmoid":
        score = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        total = sum(math.exp(z) for z in logits)
        score = [math.exp(z) / total for z in logits]
    biased = [s + b for s, b in zip(score, bias)]
    size = len(logits) // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    count = 2 if config.gate_bias else 1
    rank = sorted(groups, key=lambda g: -sum(sorted((biased[i] for i in g), reverse=True)[:count]))
    open_experts = [i for group in rank[: config.topk_group] for i in group]
    chosen = sorted(open_experts, key=lambda i: -biased[i])[: config.num_experts_per_tok]
    whole = sum(score[i] for i in chosen) if config.norm_topk_prob else 1.0
    return {i: config.routed_scaling_factor * score[i] / whole for i in chosen}


@pytest.mark.parametrize("bias_mean", [0.0, -8.0])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(scoring_func="softmax"),
        dict(scoring_func="softmax", norm_topk_prob=False),
        dict(gate_bias=False),
        dict(n_group=1, topk_group=1),
        dict(n_group=6, topk_group=5),
    ],
)
@torch.no_grad()
def test_router_follows_the_equations(changes, bias_mean):
    # eq. 13-16; fact 22, 23
    config = SMALL.but(**changes)
    router = random_router(config, bias_mean)
    u = torch.randn(50, config.hidden_size)
    weights, chosen, _ = router(u)
    logits = (u.double() @ router.weight.double().T).tolist()
    bias = [0.0] * config.n_routed_experts if router.bias is None else router.bias.tolist()
    for token in range(50):
        wanted = route_by_hand(config, logits[token], bias)
        found = dict(zip(chosen[token].tolist(), weights[token].tolist()))
        assert found == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def test_a_token_reaches_at_most_topk_group_groups():
    # fact 24
    config = SMALL.but(n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=8)
    _, chosen, _ = random_router(config, -5.0)(torch.randn(5000, config.hidden_size))
    visited = [len(set(row)) for row in (chosen // 4).tolist()]
    assert max(visited) == 4


@pytest.mark.parametrize("tokens", [1, 2, 40])
@torch.no_grad()
def test_experts_equal_a_loop_over_tokens(tokens):
    """Grouped, one by one, and eq. 12 token by token; some experts get no token."""
    # eq. 12
    torch.manual_seed(1)
    config = SMALL
    moe = MoE(config, *precise(config))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    u = torch.randn(1, tokens, config.hidden_size)
    weights, chosen, _ = moe.gate(u[0])
    matrices = moe.experts.state_dict()
    wanted = torch.zeros(tokens, config.hidden_size, dtype=torch.float64)

    def ffn(x, w1, w2, w3):
        gate = w1.double() @ x.double()
        return w2.double() @ (gate * gate.sigmoid() * (w3.double() @ x.double()))

    shared = moe.shared_experts
    for token in range(tokens):
        x = u[0, token]
        wanted[token] = ffn(x, shared.w1.weight, shared.w2.weight, shared.w3.weight)
        for weight, expert in zip(weights[token], chosen[token].tolist()):
            w1, w2, w3 = (matrices[f"{expert}.{name}.weight"] for name in ("w1", "w2", "w3"))
            wanted[token] += weight.double() * ffn(x, w1, w2, w3)
    torch.testing.assert_close(moe(u)[0].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [3, 40])
def test_grouped_products_equal_one_by_one(rows):
    """With gradients; some experts get no row, and the last rows belong to nobody."""
    torch.manual_seed(1)
    stack = torch.randn(6, 8, 12, requires_grad=True)
    x = torch.randn(rows, 12, requires_grad=True)
    ends = torch.tensor([0, 1, 1, 2, rows - 1, rows - 1])
    results = []
    for form, matrices in ((grouped, stack), (one_by_one, stack.unbind())):
        y = form(x, matrices, ends) if form is grouped else form(F.linear, x, matrices, ends)
        y[: rows - 1].square().sum().backward()
        results.append((y[: rows - 1], x.grad[: rows - 1], stack.grad))
        x.grad = stack.grad = None
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, inputs, outputs", [("fp32", 33, 8), ("bf16", 36, 8), ("bf16", 8, 7)]
)
def test_experts_of_any_size_have_a_product(name, inputs, outputs):
    """A grouped product wants rows of whole 16 bytes; those of other sizes go one by one."""
    torch.manual_seed(1)
    precision = Precision.of(name, SMALL)
    x = torch.randn(10, inputs).to(precision.dtype)
    stack = torch.randn(2, outputs, inputs).to(precision.dtype)
    y = precision.each(x, stack, torch.tensor([4, 10]))
    wanted = torch.cat([x[:4].double() @ stack[0].double().T, x[4:].double() @ stack[1].double().T])
    assert y.dtype == precision.dtype
    torch.testing.assert_close(y.double(), wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("ends", [[64, 70, 229], [0, 230, 230], [1, 1, 200]])
def test_rows_that_are_spread_over_shares_come_back(ends):
    """In bfloat16 on a CPU each expert's rows are rounded up to 64; others of its rows or a
    neighbour's would come out far off. The last rows may belong to nobody."""
    torch.manual_seed(1)
    stack, x = torch.randn(3, 8, 16).bfloat16(), torch.randn(230, 16).bfloat16()
    found = grouped(x, stack, torch.tensor(ends))
    wanted = one_by_one(F.linear, x.double(), stack.double().unbind(), torch.tensor(ends))
    last = ends[-1]
    torch.testing.assert_close(found[:last].double(), wanted[:last], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("queries, past", [(5, 0), (5, 20), (1, 20), (2, 1100)])
@torch.no_grad()
def test_absorbed_equals_expanded(queries, past):
    # eq. 2, 4, 5, 9, 10; fact 11
    # fact 11
    config = SMALL.but(
        rope_scaling=YarnScaling(
            factor=4, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7
        )
    )
    attention = Transformer(config).init_weights(0).layers[0].attn
    seen = torch.randn(2, past + queries, config.latent_dim)
    q_nope = torch.randn(2, queries, config.num_attention_heads, config.qk_nope_head_dim)
    q_rope = torch.randn(2, queries, config.num_attention_heads, config.qk_rope_head_dim)
    step = Step.make(config, [past, past], [queries, queries], queries, CPU)
    expanded = attention.expanded(q_nope, q_rope, seen, step)
    torch.testing.assert_close(
        attention.absorbed(q_nope, q_rope, seen, step), expanded, rtol=1e-5, atol=1e-5
    )


def test_the_cheaper_form_is_chosen():
    """171 queries at the released sizes, by counting multiplications (FACTS of eq. 1-11)."""
    config = ModelConfig.deepseek_v3()
    attention = (
        Transformer(config.but(num_hidden_layers=1, num_nextn_predict_layers=0), device="meta")
        .layers[0]
        .attn
    )

    def multiplications(form: str, queries: int, keys: int) -> int:
        if form == "expanded":
            return keys * 512 * (128 + 128) + queries * keys * (192 + 128)
        return queries * 512 * (128 + 128) + queries * keys * (576 + 512)

    for queries in (1, 170, 171, 4096):
        cheaper = multiplications("expanded", queries, 10**6) < multiplications(
            "absorbed", queries, 10**6
        )
        assert attention.prefers_expanded(queries) == cheaper


def test_cache_of_the_released_model_takes_70272_bytes_a_token():
    # fact 7
    # fact 7
    cache = LatentCache(ModelConfig.deepseek_v3(), 61, 1, 1, torch.bfloat16, "cpu")
    assert cache.data.nbytes == 70272


def test_scores_depend_on_the_distance_alone():
    # eq. 3, 8; fact 13
    # fact 13
    config = ModelConfig.deepseek_v3()
    q, k = torch.randn(2, 64, dtype=torch.float64)
    frequencies = inverse_frequencies(config)
    scores = []
    for shift in (0, 7, 1000):
        turn = rotations(torch.tensor([300 + shift, 100 + shift]), frequencies, 1.0)
        scores.append(float(rotate(q, turn[0]) @ rotate(k, turn[1])))
    assert scores[0] == pytest.approx(scores[1], abs=2e-3) == pytest.approx(scores[2], abs=2e-3)
    assert abs(scores[0] - float(q @ k)) > 1e-2


@pytest.fixture(scope="module")
def fp8_model():
    source = Transformer(
        ModelConfig.mini().but(
            vocab_size=128, num_hidden_layers=2, first_k_dense_replace=1, initializer_range=0.06
        )
    ).init_weights(0)
    model = Transformer(source.config, "fp8")
    model.load_state_dict(source.state_dict())
    return model


@torch.inference_mode()
def test_fp8_logits_do_not_depend_on_how_a_text_is_cut(fp8_model):
    """Whole, in chunks through both forms of attention, step by step, and beside another row."""
    text = torch.randint(128, (2, 180), generator=torch.Generator().manual_seed(0))
    whole = fp8_model(text)
    cache = fp8_model.new_cache(2, 180)
    cuts = [0, 140, 150, *range(151, 181)]
    parts = torch.cat(
        [fp8_model(text[:, a:b], cache=cache) for a, b in itertools.pairwise(cuts)], 1
    )
    assert float((parts - whole).abs().max() / whole.abs().max()) < 1e-6
    alone = fp8_model(text[1:, :60])
    assert float((alone - whole[1:, :60]).abs().max() / whole.abs().max()) < 1e-6


@torch.inference_mode()
def test_fp8_stays_fp8_and_near_fp32():
    config = ModelConfig.mini().but(
        vocab_size=128, num_hidden_layers=2, first_k_dense_replace=4, num_nextn_predict_layers=0
    )
    exact = Transformer(config).init_weights(0)
    model = Transformer(config, "fp8")
    model.load_state_dict(exact.state_dict())
    quantised = sum(p.numel() for p in model.parameters() if p.dtype == torch.float8_e4m3fn)
    linears = sum(
        p.numel()
        for n, p in exact.named_parameters()
        if p.dim() == 2 and not n.startswith(("embed", "head")) and "wkv_b" not in n
    )
    assert quantised == linears
    text = torch.randint(128, (1, 40), generator=torch.Generator().manual_seed(0))
    error = float((model(text) - exact(text)).norm() / exact(text).norm())
    assert 0.01 < error < 0.15, "a product of two quantised operands is off by 3.7 percent"


@torch.inference_mode()
def test_first_weights_are_of_one_size_or_follow_the_width():
    config = ModelConfig.mini().but(num_hidden_layers=3, vocab_size=1024)
    flat = dict(Transformer(config).init_weights(0, 0.3).named_parameters())
    model = Transformer(config).init_weights(0, 0.3, by_width=True)
    d, inner = config.hidden_size, config.moe_intermediate_size
    values = config.num_attention_heads * config.v_head_dim
    for end, reads, adds in (
        ("attn.wq_a", d, 1),
        ("attn.wq_b", config.q_lora_rank, 1),
        ("attn.wkv_b", config.kv_lora_rank, 1),
        ("attn.wo", values, 6),
        ("ffn.experts.w13", d, 1),
        ("ffn.experts.w2", inner, 6),
        ("shared_experts.w2", inner, 6),
        ("eh_proj", 2 * d, 1),
        ("head", d, 1),
    ):
        found = [
            (name, weight)
            for name, weight in model.named_parameters()
            if name.removesuffix(".weight").endswith(end)
        ]
        assert found, end
        for name, weight in found:
            assert float(weight.std()) == pytest.approx((reads * adds) ** -0.5, rel=0.03), name
            assert float(flat[name].std()) == pytest.approx(0.02, rel=0.03), name
    assert not model.layers[2].ffn.gate.bias.any()
    for weights in (flat, dict(model.named_parameters())):
        assert float(weights["embed.weight"].std()) == pytest.approx(0.3, rel=0.03)
        assert torch.equal(weights["layers.0.attn_norm.weight"], torch.ones(d))


@torch.inference_mode()
def test_weights_by_width_give_attention_scores_of_size_one():
    sizes = {}
    for by_width in (False, True):
        model = Transformer(ModelConfig.mini()).init_weights(0, 0.3, by_width=by_width)
        attention = model.layers[1].attn
        h = torch.randn(1, 64, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
        step, _ = model._step(torch.zeros(1, 64, dtype=torch.int64), None, None)
        q_nope, _ = attention.queries(h, step)
        k_nope = attention.wkv_b(attention.latents(h, step))[0][..., : q_nope.shape[-1]]
        scores = torch.einsum("bshd,bhtd->bhst", q_nope, k_nope) * attention.scale
        sizes[by_width] = float(scores.std())
    assert 0.5 < sizes[True] < 2 and sizes[False] < 0.1


def run(model, tokens, **options):
    return lambda: model(torch.as_tensor(tokens), **options)


def test_bad_input_is_named(as_in_use):
    model = Transformer(SMALL).init_weights(0)
    cache = model.new_cache(1, 8)
    cases = {
        r"token id out of range.*96.*0 to 95": run(model, [[3, 96]]),
        r"token id out of range.*-1": run(model, [[-1]]),
        r"wrong token tensor.*\(0,\)|wrong token tensor": run(model, torch.zeros(1, 0).long()),
        r"int64": run(model, torch.zeros(1, 3)),
        r"longer than the context.*65 tokens.*at most 64": run(model, torch.zeros(1, 65).long()),
        r"the cache is full.*0 \+ 9.*at most 8": run(model, torch.zeros(1, 9).long(), cache=cache),
        r"another batch": run(model, torch.zeros(2, 3).long(), cache=cache),
        r"wrong row lengths": run(model, torch.zeros(1, 3).long(), lengths=[4]),
        r"unknown precision": lambda: Transformer(SMALL, "int4"),
        r"no such MTP module": lambda: model.mtp_logits(
            torch.zeros(1, 1, 64), torch.zeros(1, 1).long(), depth=1
        ),
        r"cannot grow": lambda: cache.truncate([3]),
    }
    for pattern, call in cases.items():
        with pytest.raises(DSV3Error, match=pattern) as caught:
            call()
        assert "\n" not in str(caught.value)
