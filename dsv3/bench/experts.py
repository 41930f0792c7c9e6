"""Rows 6 and 7: many experts at once, and a whole MoE layer for the token that is being written.

The experts of row 6 keep FP8 weights. Beside them: the loop over experts, once with the same
weights, dequantised by the plain formula at each visit, and once with weights kept in bfloat16; and
torch's grouped product in bfloat16. All get the same tokens with the same choices.
"""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from dsv3.bench import plain
from dsv3.bench.chips import chip
from dsv3.bench.row import Row, Trial, Workbench, gap, limit, peer, timed
from dsv3.config import ModelConfig
from dsv3.fp8 import QuantizedTensor
from dsv3.moe import Experts, MoE
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision

# FP8 against its specification: where an intermediate is rounded to bfloat16 or not, a code beside
# it may be the next one, and a code is a step of 6 percent of one number among hundreds.
FP8_GAP = 0.05
# Logits of one layer, by dtype.
MOE_GAP = {"fp32": 2e-5, "bf16": 3e-2, "fp8": 0.15}
M = TypeVar("M", bound=nn.Module)
V3 = ModelConfig.deepseek_v3()  # 256 experts, 11 GB a layer; a rank of eight has 32 of them
LAYER = 1  # the first one with experts
_ORDER = ("w1", "w3", "w2")


def specification(experts: Experts, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """The loop in float32, with what goes into each product quantised."""
    w13 = experts.precision.matrix(experts.w13, experts.w13_scale)
    w2 = experts.precision.matrix(experts.w2, experts.w2_scale)

    def expert(number: int, rows: Tensor) -> Tensor:
        w1, w3 = w13[number].dequantize()
        return plain.swiglu(rows, w1, w3, w2[number].dequantize(), plain.through_fp8)

    return plain.experts_in_a_loop(x.float(), weights, chosen, experts.count, expert)


def in_bfloat16(experts: Experts, config: ModelConfig) -> Experts:
    """The same experts, their weights kept in bfloat16."""
    device = experts.w13.device
    kept = Experts(config, Precision.of("bf16", config), TensorGroup(device=device), device)
    kept.load_state_dict(experts.state_dict())
    return kept.requires_grad_(False)


def grouped(tokens: int, bench: Workbench) -> Trial:
    config = bench.models.config
    moe = bench.models.layer("fp8", LAYER).ffn
    x = _states(tokens, config.hidden_size, bench.device)
    weights, chosen, _ = moe.gate(x)
    kept = in_bfloat16(moe.experts, config)
    stored = {
        name: QuantizedTensor(value, bench.models.weights()[name.replace("weight", "scale")])
        for name, value in bench.models.weights().items()
        if f"layers.{LAYER}.ffn.experts." in name and name.endswith("weight")
    }

    def visit(number: int, rows: Tensor) -> Tensor:
        blocks = (stored[f"layers.{LAYER}.ffn.experts.{number}.{w}.weight"] for w in _ORDER)
        w1, w3, w2 = (plain.dequantize(b.data, b.scale, rows.dtype) for b in blocks)
        return plain.swiglu(rows, w1, w3, w2)

    def visit_kept(number: int, rows: Tensor) -> Tensor:
        w1, w3 = kept.w13[number]
        return plain.swiglu(rows, w1, w3, kept.w2[number])

    def loop(expert) -> Tensor:
        return plain.experts_in_a_loop(x, weights, chosen, config.n_routed_experts, expert)

    ours = partial(moe.experts, x, weights, chosen)
    return Trial(
        ours,
        [
            peer("loop, dequantising", lambda: partial(loop, visit), 2),
            peer("loop, weights kept in bfloat16", lambda: partial(loop, visit_kept), 2),
            peer("grouped_mm in bfloat16", lambda: partial(kept, x, weights, chosen)),
        ],
        lambda: gap(ours(), specification(moe.experts, x, weights, chosen), FP8_GAP),
        tokens=tokens,
    )


def grouped_on_gpu(config: ModelConfig, tokens: int, bench: Workbench) -> Trial:
    group = TensorGroup(device=bench.device)
    experts = filled(Experts(config, Precision.of("fp8", config), group, bench.device))
    x = _states(tokens, config.hidden_size, bench.device)
    scores = torch.rand(tokens, config.n_routed_experts, device=bench.device)
    weights, chosen = scores.topk(config.num_experts_per_tok)
    kept = in_bfloat16(experts, config)
    flops = 6 * config.hidden_size * config.moe_intermediate_size * chosen.numel()
    ours = partial(experts, x, weights, chosen)
    return Trial(
        ours,
        [
            limit("700 TFLOP/s", flops / 700e12, 1.0),
            peer("grouped_mm in bfloat16", lambda: partial(kept, x, weights, chosen), 1.4),
        ],
        lambda: gap(ours(), specification(experts, x, weights, chosen), FP8_GAP),
        tokens=tokens,
    )


def layer(precision: str, bench: Workbench) -> Trial:
    """One token through router, routed and shared experts, beside transformers' layer."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    peer_dtype = torch.float32 if precision == "fp8" else dtype
    moe = bench.models.layer(precision, LAYER).ffn
    u = _states(1, bench.models.config.hidden_size, bench.device).to(dtype)[None]

    def make():
        theirs = bench.models.theirs(peer_dtype).model.layers[LAYER].mlp
        return partial(theirs, u.to(peer_dtype))

    name = f"transformers, {str(peer_dtype).removeprefix('torch.')}"
    structure = bench.models.released(torch.float32)
    wanted = structure.moe(u[0].float(), f"layers.{LAYER}.ffn.")[None]
    most = MOE_GAP["fp32" if peer_dtype == torch.float32 else "bf16"]
    return Trial(
        lambda: moe(u),
        [peer(name, make, 1.5, lambda call: gap(call(), wanted, most))],
        lambda: gap(moe(u), wanted, MOE_GAP[precision]),
        tokens=1,
    )


def layer_on_gpu(config: ModelConfig, tokens: int, bench: Workbench) -> Trial:
    """A whole layer, of whose experts all are read that somebody chose."""
    group = TensorGroup(device=bench.device)
    moe = filled(MoE(config, Precision.of("fp8", config), group, bench.device))
    u = _states(tokens, config.hidden_size, bench.device)[None]
    flat = u[0]
    weights, chosen, _ = moe.gate(flat)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    moved = expert * (1 + 1 / 4096) * (len(chosen.unique()) + config.n_shared_experts)
    best = chip(bench.device)

    def wanted() -> Tensor:
        shared = moe.shared_experts.partial_sum(flat)
        return specification(moe.experts, flat, weights, chosen) + shared

    return Trial(
        lambda: moe(u),
        [limit(f"{best.memory / 1e12:.2f} TB/s", moved / best.memory, 0.5)],
        lambda: gap(moe(u)[0], wanted(), FP8_GAP),
        tokens=tokens,
    )


def filled(module: M) -> M:
    """Random weights of a size at which answers are about as large as questions."""
    random = torch.Generator(device=next(module.parameters()).device).manual_seed(0)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if value.dtype == torch.float8_e4m3fn:
            for part in value.data.view(torch.uint8).unbind():  # codes of 2^-6 to 448
                part.random_(8, 127, generator=random)
                part |= (
                    torch.randint(
                        0, 2, part.shape, generator=random, device=part.device, dtype=torch.uint8
                    )
                    << 7
                )
        elif name.endswith("scale"):
            value.fill_(1e-4)
        elif value.dim() > 1:
            value.data.normal_(0, value.shape[-1] ** -0.5, generator=random)
        else:
            value.data.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.requires_grad_(False)


def _states(tokens: int, width: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, width, generator=random).bfloat16().to(device)


def rows(suite: str) -> list[Row]:
    many, one = "FP8 experts, prefill", "MoE layer, decode"
    found = [
        Row(7, one, f"{precision}, 1 token", timed(partial(layer, precision)))
        for precision in ("fp32", "bf16", "fp8")
    ]
    if suite == "gpu":
        big = Row(
            6,
            many,
            "32 of 7168 x 2048, 4096 tokens",
            timed(partial(grouped_on_gpu, V3.but(n_routed_experts=32), 4096)),
        )
        whole = Row(7, one, "DeepSeek-V3's, 128 tokens", timed(partial(layer_on_gpu, V3, 128)))
        return [big, *found, whole]
    return [
        Row(
            6,
            many,
            f"32 of 512 x 256, top 4, {n} tokens",
            timed(partial(grouped, n)),
            weight=n / 256,
        )
        for n in (256, 1024)
    ] + found
