"""Prefill and decode speed against transformers' DeepSeek-V3, same random weights, same run.

    python benchmarks/against_transformers.py [--rounds 5] [--threads 2] [--json]

A model of about 100M parameters is filled with random numbers once and given to both. Cells are
measured in turn, A B A B, so that a noisy machine disturbs both alike; the fastest round counts
(noise only ever adds time). Prefill: tokens per second over a prompt of so many tokens.
Decode: tokens per second of 16 single-token steps with so many tokens in the cache. Before anything is timed,
the two models' logits are compared in float32.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from dsv3.config import ModelConfig
from dsv3.model import Transformer

CONFIG = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, moe_intermediate_size=256,
    num_hidden_layers=8, num_attention_heads=8, n_routed_experts=32, num_experts_per_tok=4,
    kv_lora_rank=256, q_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    first_k_dense_replace=1, n_group=2, topk_group=1, routed_scaling_factor=2.5,
    max_position_embeddings=4096)
PREFILL, DECODE, STEPS = (512, 2048), (64, 512, 2048), 16

# Our names of the weights that transformers keeps unfused, outside the layers and in them.
OUTER = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
         "head.weight": "lm_head.weight"}
INNER = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attn.wq_a": "self_attn.q_a_proj", "attn.q_norm": "self_attn.q_a_layernorm",
         "attn.wq_b": "self_attn.q_b_proj", "attn.wkv_a": "self_attn.kv_a_proj_with_mqa",
         "attn.kv_norm": "self_attn.kv_a_layernorm", "attn.wkv_b": "self_attn.kv_b_proj",
         "attn.wo": "self_attn.o_proj", "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
         "ffn.gate": "mlp.gate", "ffn.shared_experts.w1": "mlp.shared_experts.gate_proj",
         "ffn.shared_experts.w3": "mlp.shared_experts.up_proj",
         "ffn.shared_experts.w2": "mlp.shared_experts.down_proj", "ffn.w1": "mlp.gate_proj",
         "ffn.w3": "mlp.up_proj", "ffn.w2": "mlp.down_proj"}


def make_pair(dtype: torch.dtype):
    """Ours and transformers' model with the same weights."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = CONFIG.to_dict() | {"num_mtp_layers": 0}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**fields)).eval()
    ours = Transformer(CONFIG, "fp32" if dtype == torch.float32 else "bf16")
    source = Transformer(CONFIG).init_weights(0)
    state = theirs.state_dict()
    with torch.no_grad():
        for name in source.weight_names():
            value = source.weight(name)
            ours.load_weight(name, value)
            target, part = their_name(name)
            place = state[target] if part is None else expert_part(state[target], *part)
            place.copy_(value)
    return ours.requires_grad_(False), theirs.to(dtype)


def their_name(name: str):
    """transformers' in-memory name of a weight, and (expert, matrix) where experts are fused."""
    if name in OUTER:
        return OUTER[name], None
    _, layer, rest = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if ".experts." in rest:
        expert, matrix = rest.split(".")[2:4]
        fused = "down_proj" if matrix == "w2" else "gate_up_proj"
        return f"{prefix}mlp.experts.{fused}", (int(expert), matrix)
    if rest in INNER:
        return prefix + INNER[rest], None
    return prefix + INNER[rest.removesuffix(".weight")] + ".weight", None


def expert_part(fused: torch.Tensor, expert: int, matrix: str) -> torch.Tensor:
    """The part of a fused expert weight that holds w1, w2 or w3."""
    if matrix == "w2":
        return fused[expert]
    half = fused.shape[1] // 2
    return fused[expert, :half] if matrix == "w1" else fused[expert, half:]


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def ours_prefill(model, tokens):
    model(tokens, cache=model.new_cache(1, tokens.shape[1]), last_only=True)


def theirs_prefill(model, tokens):
    model(tokens, use_cache=True, logits_to_keep=1)


def ours_decoder(model, tokens):
    cache = model.new_cache(1, tokens.shape[1] + STEPS)
    model(tokens, cache=cache, last_only=True)
    start = list(cache.lengths)

    def run():
        cache.truncate(start)
        for _ in range(STEPS):
            model(tokens[:, -1:], cache=cache, last_only=True)
    return run


def theirs_decoder(model, tokens):
    cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values

    def run():
        for _ in range(STEPS):
            model(tokens[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-STEPS)
    return run


def interleave(first, second, rounds: int) -> tuple[float, float]:
    """The fastest round of each of two calls, measured in turn."""
    first(), second()
    times = [(seconds(first), seconds(second)) for _ in range(rounds)]
    return tuple(min(column) for column in zip(*times))


@torch.inference_mode()
def measure(rounds: int) -> list[dict]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = make_pair(dtype)
        torch.manual_seed(0)
        text = torch.randint(CONFIG.vocab_size, (1, max(PREFILL + DECODE)))
        if dtype == torch.float32:
            a, b = ours(text[:, :256]), theirs(text[:, :256]).logits
            gap = float((a - b).abs().max() / b.abs().max())
            print(f"largest logit difference in fp32: {gap:.1e} of the largest logit", flush=True)
        cells = [("prefill", n, n, lambda n=n: ours_prefill(ours, text[:, :n]),
                  lambda n=n: theirs_prefill(theirs, text[:, :n])) for n in PREFILL]
        cells += [("decode", n, STEPS, ours_decoder(ours, text[:, :n]),
                   theirs_decoder(theirs, text[:, :n])) for n in DECODE]
        for what, length, tokens, mine, other in cells:
            a, b = interleave(mine, other, rounds)
            rows.append({"dtype": str(dtype).removeprefix("torch."), "what": what,
                         "length": length, "dsv3": tokens / a, "transformers": tokens / b,
                         "ratio": b / a})
            print("{dtype:9} {what:8} {length:5}  dsv3 {dsv3:8.1f}  transformers "
                  "{transformers:8.1f} tokens/s  ratio {ratio:.2f}".format(**rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.rounds)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
