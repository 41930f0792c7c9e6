"""Rows 8 and 9: attention for the token that is being written, and for a whole prompt.

Row 8 is one attention layer, projections and all, over a cache of so many tokens, beside that of
transformers, which makes the keys and values of all heads from the whole cache at every step. Both
caches hold the same random latents: what is in them costs no time. Row 9 is the core alone, from
queries, keys and values: keys are 192 wide and values 128, a pair of widths for which torch has
only a slow form on a CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3.bench import peers, plain
from dsv3.bench.chips import chip
from dsv3.bench.models import Models
from dsv3.bench.row import Peer, Row, Trial, Workbench, gap, limit, peer, timed
from dsv3.config import ModelConfig
from dsv3.mla import MLA
from dsv3.precision import Precision

# One layer with heads of the released width, and next to nothing around it.
WIDE = ModelConfig.deepseek_v3().but(
    vocab_size=128,
    hidden_size=2048,
    intermediate_size=128,
    num_hidden_layers=1,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    num_nextn_predict_layers=0,
    rope_scaling=None,
    max_position_embeddings=16384,
    quantization_config=None,
)
GAPS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# Over random latents thousands of values cancel, and what a sum in bfloat16 loses is seen.
THEIR_GAPS = {torch.float32: 2e-5, torch.bfloat16: 0.25}


class Caught(Exception):
    """The arguments of a call, in the place of its answer."""


def arguments(module: nn.Module, run: Callable[[], object]) -> tuple[tuple, dict]:
    """What ``run`` calls a module with; the module itself does not get to work."""

    def catch(_module, args, kwargs):
        raise Caught(args, kwargs)

    handle = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        run()
    except Caught as caught:
        return caught.args
    finally:
        handle.remove()
    raise AssertionError("the module was not called")


def latents(config: ModelConfig, length: int, rows: int, device: torch.device) -> Tensor:
    random = torch.Generator(device=device).manual_seed(length)
    return torch.randn(rows, length, config.latent_dim, generator=random, device=device)


def our_call(models: Models, precision: str, content: Tensor) -> Callable[[], Tensor]:
    """Our layer on one new token of each row, behind a cache of this content."""
    model, attention = models.ours(precision), models.layer(precision, 0).attn
    rows, length, _ = content.shape
    cache = model.new_cache(rows, length + 1)
    cache.data[0, :, :length] = content
    cache.advance([length] * rows)
    token = models.text(1).expand(rows, 1).contiguous()
    args, kwargs = arguments(attention, lambda: model(token, cache=cache))
    return lambda: attention(*args, **kwargs)


def their_call(models: Models, dtype: torch.dtype, content: Tensor) -> Callable[[], Tensor]:
    """transformers' layer on the same."""
    model = models.theirs(dtype)
    cache = peers.transformers().DynamicCache(config=model.config)
    latent, key = content.to(dtype)[:, None].split(
        [models.config.kv_lora_rank, models.config.qk_rope_head_dim], -1
    )
    # Theirs keeps the first numbers of all pairs that are rotated, then the second ones.
    cache.update(latent, torch.cat([key[..., 0::2], key[..., 1::2]], -1), 0)
    token = models.text(1).expand(len(content), 1)
    attention = model.model.layers[0].self_attn
    args, kwargs = arguments(attention, lambda: model(token, past_key_values=cache, use_cache=True))

    def call() -> Tensor:
        answer = attention(*args, **kwargs)[0]
        cache.crop(-1)
        return answer

    return call


def decode(config: ModelConfig, dtype: torch.dtype, length: int, bench: Workbench) -> Trial:
    models = bench.models.of(config)
    content = latents(config, length, 1, bench.device).to(dtype).float()
    ours = our_call(models, "fp32" if dtype == torch.float32 else "bf16", content)
    wanted = by_the_formula(models, content[0])
    theirs = peer(
        f"transformers, {_short(dtype)}",
        lambda: their_call(models, dtype, content),
        50,
        lambda call: gap(call(), wanted, THEIR_GAPS[dtype]),
    )
    return Trial(ours, [theirs], lambda: gap(ours(), wanted, GAPS[dtype]), tokens=1)


def by_the_formula(models: Models, content: Tensor) -> Tensor:
    """The same answer from the released code's structure in float32."""
    structure, length = models.released(torch.float32), len(content)
    (store,) = structure.new_cache(length + 1)
    store[:length] = content
    embedded = F.embedding(models.text(1)[0], structure.weights["embed.weight"])
    h = structure.norm(embedded, "layers.0.attn_norm", models.config.rms_norm_eps)
    return structure.attention(h, "layers.0.attn.", store, length, structure.turns(length, 1))[None]


def core_arguments(attention: MLA, run: Callable[[], object]) -> tuple:
    """What ``run`` calls the core of this attention with, whichever form it takes."""

    def catch(*args):
        raise Caught(args)

    attention.core = lambda *_: catch  # pyrefly: ignore[bad-assignment]
    try:
        run()
    except Caught as caught:
        return caught.args[0]
    finally:
        del attention.core
    raise AssertionError("the core was not called")


class Given(nn.Module):
    """Keys and values that are there already, in the place of wkv_b's way up from the latent."""

    def __init__(self, up: nn.Module, k: Tensor, v: Tensor):
        super().__init__()
        self.weight, self.k, self.v = up.weight, k, v

    def forward(self, _: Tensor) -> tuple[Tensor, Tensor]:
        return self.k, self.v


@dataclass(frozen=True, kw_only=True)
class GivenUp(Precision):
    """The same for the form in kernels, which takes them as the product with wkv_b leaves them."""

    kv: Tensor

    def from_latent(self, latent: Tensor, weight: Tensor) -> Tensor:
        return self.kv


def core(
    models: Models, precision: str, q: Tensor, kv: Tensor, k_rope: Tensor, k: Tensor, v: Tensor
) -> Callable[[], Tensor]:
    """The core of our attention over one whole text, in the form that the model takes here.

    q, k, v: (b, heads, s, d) each; kv: (b, s, heads (d_h + d_v)) and k_rope: (b, s, d_h^R), of
    which k and v are made.
    """
    model, attention = models.ours(precision), models.layer(precision, 0).attn
    b, _, s, _ = q.shape
    c, width = models.config, attention.precision.core(q.device)
    _, _, seen, step = core_arguments(attention, lambda: model(models.text(s, b)))
    alone = copy.copy(attention)
    alone._modules = dict(attention._modules)
    alone.wkv_b = Given(attention.wkv_b, k.to(width), v.to(width))
    own = {field.name: getattr(attention.precision, field.name) for field in fields(Precision)}
    alone.precision = GivenUp(**own, kv=kv.to(width))
    q_nope, q_rope = q.transpose(1, 2).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
    seen = torch.cat([seen.new_zeros(b, s, c.kv_lora_rank), k_rope.to(seen.dtype)], -1)
    form = alone.core(q_nope)
    return lambda: form(q_nope, q_rope, seen, step).transpose(1, 2)


def prefill(config: ModelConfig, dtype: torch.dtype, length: int, bench: Workbench) -> Trial:
    heads = config.num_attention_heads
    models = bench.models.of(config)
    random = torch.Generator(device=bench.device).manual_seed(length)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=random, device=bench.device).to(dtype)

    q = drawn(heads, length, config.qk_head_dim)
    kv = drawn(length, heads * (config.qk_nope_head_dim + config.v_head_dim))
    k_rope = drawn(length, config.qk_rope_head_dim)
    k_nope, v = (
        kv.unflatten(-1, (heads, -1))
        .transpose(1, 2)
        .split([config.qk_nope_head_dim, config.v_head_dim], -1)
    )
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1, -1)], -1)
    call = partial(
        F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=config.qk_head_dim**-0.5
    )
    ours = core(models, "fp32" if dtype == torch.float32 else "bf16", q, kv, k_rope, k, v)

    wanted = plain.attend(q, k, v, config.qk_head_dim**-0.5)

    def close(answer: Callable[[], Tensor]):
        return gap(answer(), wanted, GAPS[dtype])

    if bench.device.type == "cpu":
        goal = 3 if dtype == torch.float32 else 12
        against = [peer("SDPA, values 128 wide", lambda: call, goal, close)]
    else:
        against = [_backend(name, which, call, close) for name, which in _BACKENDS.items()]
    return Trial(ours, against, lambda: close(ours), tokens=length)


_BACKENDS = {
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _backend(name: str, which: SDPBackend, call: Callable, close: Callable) -> Peer:
    def run() -> Tensor:
        with sdpa_kernel(which):
            return call()

    return peer(name, lambda: run, 1.0, close)


def absorbed(config: ModelConfig, rows: int, length: int, bench: Workbench) -> Trial:
    """The absorbed core for one token of each of many texts, at the released sizes."""
    models = bench.models.of(config)
    model = models.ours("bf16")
    content = latents(config, length, rows, bench.device)
    cache = model.new_cache(rows, length + 1)
    cache.data[0, :, : length - 1] = content[:, :-1]
    cache.advance([length - 1] * rows)
    attention = models.layer("bf16", 0).attn
    token = models.text(1).expand(rows, 1).contiguous()
    given = core_arguments(attention, lambda: model(token, cache=cache))
    q_nope, q_rope, seen, _ = given
    ours = partial(attention.core(q_nope), *given)
    w_uk, w_uv = (part.float() for part in attention.wkv_b.per_head())
    q = torch.cat([torch.einsum("bshd,hdc->bshc", q_nope.float(), w_uk), q_rope.float()], -1)

    def wanted() -> Tensor:
        return torch.cat(
            [
                _text(*pair, config.kv_lora_rank, attention.scale)
                for pair in zip(q.split(1), seen.split(1))
            ]
        )

    def kernel() -> Callable[[], Tensor]:
        return peers.flash_mla(
            seen.bfloat16().contiguous(), q.bfloat16(), config.kv_lora_rank, attention.scale
        )

    best = chip(bench.device)
    return Trial(
        ours,
        [
            limit(f"{best.memory / 1e12:.2f} TB/s", seen.nbytes / best.memory, 0.7),
            peer("FlashMLA", kernel, 0.7, lambda call: gap(call(), wanted(), GAPS[torch.bfloat16])),
        ],
        lambda: gap(ours(), torch.einsum("bshc,hdc->bshd", wanted(), w_uv), GAPS[torch.bfloat16]),
        tokens=rows,
    )


def _text(q: Tensor, seen: Tensor, values: int, scale: float) -> Tensor:
    """Latent answers (1, 1, heads, d_c) of one text in float32."""
    keys = seen.float()
    weights = (torch.einsum("bshc,btc->bsht", q, keys) * scale).softmax(-1)
    return torch.einsum("bsht,btc->bshc", weights, keys[..., :values])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows(suite: str) -> list[Row]:
    writing, reading = "MLA, decode", "attention, prefill"
    single, half = torch.float32, torch.bfloat16
    found = [
        Row(
            8,
            writing,
            f"16 heads, {_short(dtype)}, T={length}",
            timed(partial(decode, WIDE, dtype, length)),
        )
        for dtype, length in ((single, 2048), (single, 8192), (half, 2048))
    ]
    if suite == "gpu":
        name = "128 heads, core alone, 128 texts of 4096"
        found.append(
            Row(
                8,
                writing,
                name,
                timed(partial(absorbed, WIDE.but(num_attention_heads=128), 128, 4096)),
            )
        )
    heads, length = (16, 1024) if suite == "cpu" else (128, 4096)
    return found + [
        Row(9, reading, f"{heads} heads of 192 / 128, {_short(dtype)}, S={length}",
            timed(partial(prefill, WIDE.but(num_attention_heads=heads), dtype, length)))
        for dtype in ((single, half) if suite == "cpu" else (half,))
    ]  # fmt: skip
