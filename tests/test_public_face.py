"""DESIGN's snippet as it stands, with gradients on, and what a caller may do to a model."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from dsv3 import ModelConfig, Transformer, generate, load_model
from dsv3.attention import KVCache
from dsv3.costs import break_even_queries
from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

pytestmark = pytest.mark.slow

PRECISIONS = ["fp8", "bf16", "fp32"]
SMALL = ModelConfig.mini().but(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    n_routed_experts=8,
    num_experts_per_tok=2,
    first_k_dense_replace=1,
    num_attention_heads=4,
    max_position_embeddings=96,
)


def text(rows: int, length: int, vocab: int = 96) -> torch.Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=PRECISIONS, scope="module")
def model(request, tiny_checkpoint) -> Transformer:
    return load_model(tiny_checkpoint, precision=request.param)


def test_the_snippet(model):
    """One token, several, and more than the break-even of both forms of attention."""
    assert torch.is_grad_enabled()
    long = int(break_even_queries(model.config)) + 5
    for length in (1, 2, 7, long):
        tokens = text(2, length, model.config.vocab_size)
        logits = model(tokens)
        assert logits.shape == (2, length, model.config.vocab_size)
        assert logits.dtype == torch.float32 and not logits.requires_grad
    cache = model.new_cache(batch_size=2, max_seq_len=200)
    parts = [model(part, cache=cache) for part in tokens.split([long - 4, 3, 1], 1)]
    assert (torch.cat(parts, 1).argmax(-1) == logits.argmax(-1)).float().mean() > 0.98
    out = generate(model, [[5], [6, 7, 8]], max_new_tokens=6, temperature=0.0)
    assert [len(ids) <= 6 and all(type(id) is int for id in ids) for ids in out] == [True, True]


def test_loaded_weights_ask_for_no_gradient(model):
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_cache_keeps_no_history(precision):
    """Weights that ask for gradients, as in a model that is trained: every pass has its own graph,
    and the gradients are those of the pass."""
    model = Transformer(SMALL, precision).init_weights(0)
    cache, tokens = model.new_cache(1, 40), text(1, 30)
    sizes = []
    for place in range(30):
        logits = model(tokens[:, place : place + 1], cache=cache, last_only=True)
        sizes.append(nodes(logits))
    assert not cache.data.requires_grad and sizes[-1] == sizes[1]
    logits.sum().backward()
    assert model.layers[0].attn.wkv_a.weight.grad.abs().sum() > 0


def nodes(tensor: torch.Tensor) -> int:
    """Operations that the backward pass from ``tensor`` would visit."""
    seen, queue = set(), [tensor.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None and node not in seen:
            seen.add(node)
            queue += [before for before, _ in node.next_functions]
    return len(seen)


def test_gradients_within_a_pass_are_those_without_a_cache():
    models = [Transformer(SMALL).init_weights(0) for _ in range(2)]
    tokens = text(2, 9)
    for model, cache in zip(models, (None, models[1].new_cache(2, 16))):
        logits = model(tokens, cache=cache, lengths=[9, 5])
        (logits[0].square().mean() + logits[1, :5].square().mean()).backward()
    for one, other in zip(*(model.parameters() for model in models)):
        if one.grad is not None:
            assert torch.allclose(one.grad, other.grad, atol=1e-9)


def test_a_cache_of_keys_and_values_keeps_no_history():
    cache = KVCache(1, 1, 8, 2, 4, dtype=torch.float32)
    for _ in range(3):
        k = torch.randn(1, 2, 2, 4, requires_grad=True)
        keys, values = cache.append(0, k, k)
        (keys.sum() + values.sum()).backward()
        assert torch.equal(k.grad, torch.full_like(k, 2.0)) and not cache.keys.requires_grad
        cache.advance(2)


def test_a_cache_made_in_inference_mode_serves_everybody(model):
    with torch.inference_mode():
        cache = model.new_cache(1, 8)
    model(text(1, 3), cache=cache)
    assert cache.tokens(0) == text(1, 3)[0].tolist()


@pytest.mark.parametrize("length", [1, 5, 100])
def test_fp8_in_a_graph_runs_and_refuses_the_way_back(tiny_checkpoint, length):
    model = load_model(tiny_checkpoint)
    wanted = model(text(1, length))
    model.norm.weight.requires_grad_()
    model.layers[0].attn_norm.weight.requires_grad_()
    logits = model(text(1, length))
    assert torch.equal(logits, wanted)
    with pytest.raises(DSV3Error, match=r"no gradient goes back through stored FP8.*training"):
        logits.sum().backward()


@pytest.fixture
def defaults():
    """Torch's defaults as they were, whatever a test does to them."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defaults_of_torch_change_nothing(tiny_checkpoint, defaults, precision, dtype):
    """The released code sets both, and so do its users; "meta" stands for a GPU."""
    tokens, prompts = text(2, 100), [[5, 6, 7], [8]]
    options = dict(max_new_tokens=6, temperature=1.0, seed=1, n=2)

    def outcome() -> list:
        model = load_model(tiny_checkpoint, precision)
        return [
            model.device.type,
            *(weight.dtype for weight in model.parameters()),
            *model(tokens).flatten().tolist(),
            *(
                generate(model, prompts, **options, speculative=drafts, banned_ids=[3])
                for drafts in (False, True)
            ),
        ]

    plain = outcome()
    torch.set_default_dtype(dtype)
    torch.set_default_device("meta")
    assert outcome() == plain


def test_autocast_changes_nothing(model):
    """Its products would be rounded in another way than the model's precision says."""
    tokens = text(1, 5)
    plain, ids = model(tokens), generate(model, [[5, 6]], 6, speculative=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(tokens), plain)
        assert torch.equal(model(tokens, cache=model.new_cache(1, 8)), plain)
        assert generate(model, [[5, 6]], 6, speculative=True) == ids


def test_other_things_than_tokens_and_caches_are_refused(as_in_use, model):
    tokens = text(1, 3)
    for call, message in (
        (lambda: model([[1, 2]]), "wrong token tensor.*found list"),
        (lambda: model(tokens, lengths=3), "wrong row lengths.*found 3"),
        (lambda: model(tokens, cache=True), "not a cache.*found bool"),
        (lambda: model.new_cache(-1, 8), "batch_size: not a usable value.*found -1"),
        (lambda: model.new_cache(1, "8"), "max_seq_len: not a usable value.*found '8'"),
        (lambda: model.new_cache(2, 8).truncate([0]), "lengths.*expected a list of 2"),
        (lambda: model.new_cache(1, 8).truncate(0), "wrong row lengths.*found 0"),
    ):
        with pytest.raises(DSV3Error, match=message):
            call()


# Devices and dtypes ------------------------------------------------------------------------------

CHANGES = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "type": lambda m: m.type(torch.float16),
    "outside": lambda m: torch.nn.Sequential(m).half(),
    "with device": lambda m: m.to("cpu", torch.float16),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_dtype_is_kept_or_refused(tiny_checkpoint, precision, change):
    model = load_model(tiny_checkpoint, precision)
    before = {name: (value.dtype, value.clone()) for name, value in model.named_parameters()}
    fine = (precision, change) in {
        ("bf16", "to(bfloat16)"),
        ("bf16", "bfloat16"),
        ("fp32", "float"),
    }
    if fine:
        CHANGES[change](model)
    else:
        with pytest.raises(DSV3Error, match='precision="fp8", "bf16" or "fp32"'):
            CHANGES[change](model)
    for name, value in model.named_parameters():
        dtype, values = before[name]
        assert value.dtype == dtype
        assert torch.equal(value.view(torch.uint8), values.view(torch.uint8)), name


def test_a_move_takes_group_precision_and_ties_along(tiny_checkpoint):
    """ "meta" stands for a GPU: it sums in float32."""
    model = load_model(tiny_checkpoint)
    assert model.precision.sums(model.device) == torch.float64
    model.to("meta")
    assert model.device.type == model.group.device.type == "meta"
    parts = [part for part in model.modules() if hasattr(part, "precision")]
    assert {part.precision.sums(model.device) for part in parts} == {torch.float32}
    assert model.layers[1].ffn.experts.w13.dtype == torch.float8_e4m3fn
    assert all(part.group is model.group for part in model.modules() if hasattr(part, "group"))
    for call in (lambda: model(text(1, 2)), lambda: model.to("cpu")):
        with pytest.raises(DSV3Error, match=r"load_model\(folder, device=...\)"):
            call()
    model.to_empty(device="cpu")
    assert model.precision.sums(model.device) == torch.float64
    tied = Transformer(SMALL.but(tie_word_embeddings=True)).to("meta")
    assert tied.head.weight is tied.embed.weight


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: Transformer(SMALL, group=TensorGroup.single(), device="meta"),
        lambda folder: load_model(folder, group=TensorGroup.single("meta"), device="cpu"),
    ],
)
def test_two_devices_for_one_model_are_refused(tiny_checkpoint, call):
    with pytest.raises(DSV3Error, match="the model and its group are on two devices"):
        call(tiny_checkpoint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tiny_checkpoint):
    for call in (
        lambda: load_model(tiny_checkpoint, device="cuda"),
        lambda: Transformer(SMALL, device="gpu"),
        lambda: Transformer(SMALL, device="xpu"),
    ):
        with pytest.raises(DSV3Error, match="device: no such device here"):
            call()
    model = Transformer(SMALL).init_weights(0)
    with pytest.raises(DSV3Error, match="cannot be moved.*It stays where it was"):
        model.cuda()
    assert model.device.type == "cpu"


def test_caches_of_another_model_are_refused(tiny_checkpoint):
    model = load_model(tiny_checkpoint, "fp32")
    other = load_model(tiny_checkpoint, "bf16")
    for cache in (other.new_cache(1, 8), model.new_draft_cache(1, 8)):
        with pytest.raises(DSV3Error, match="the cache is another model's"):
            model(text(1, 2), cache=cache)


# Ranks and gradients -----------------------------------------------------------------------------


def gradients_on_a_rank(group: TensorGroup) -> list[str]:
    said = []
    model = Transformer(SMALL, group=group).init_weights(0)
    assert not any(weight.requires_grad for weight in model.parameters())
    model.norm.weight.requires_grad_()
    model.embed.weight.requires_grad_()
    for target in (lambda: model(text(1, 3)).sum(), lambda: model.embed(text(1, 3)).sum()):
        try:
            target().backward()
        except DSV3Error as error:
            said.append(str(error))
    try:
        Transformer(SMALL, Precision.training("fp32"), group)
    except DSV3Error as error:
        said.append(str(error))
    return said


def test_a_model_cut_over_ranks_is_not_trained_in_silence():
    for said in run_ranks(gradients_on_a_rank, 2):
        assert len(said) == 3 and all("cut over several ranks" in line for line in said)
