"""A tiny checkpoint in the released layout, written with the safetensors library.

Names and shapes are spelled out here once more, by hand, so that a mistake in
``dsv3.checkpoint.layout`` is not repeated in its tests. Scales lie in other shards than their
weights; wkv_a has 192 rows and hidden_size 320 columns, so both edges of the scale grids are
ragged.
"""

import json

import torch
from safetensors.torch import save_file

from dsv3.config import ModelConfig, QuantizationConfig


def tiny_config(**changes) -> ModelConfig:
    fields = dict(
        vocab_size=64,
        hidden_size=320,
        intermediate_size=512,
        moe_intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        kv_lora_rank=64,
        q_lora_rank=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=128,
        v_head_dim=128,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        max_position_embeddings=128,
        quantization_config=QuantizationConfig(),
    )
    return ModelConfig(**{**fields, **changes})


def released_shapes(c: ModelConfig, copies: bool = True) -> dict[str, tuple[str, tuple]]:
    """name -> (F8, BF16 or F32; shape), without scales."""
    d, heads = c.hidden_size, c.num_attention_heads
    q_rows = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    out = {
        "model.embed_tokens.weight": ("BF16", (c.vocab_size, d)),
        "model.norm.weight": ("BF16", (d,)),
    }
    if not c.tie_word_embeddings:
        out["lm_head.weight"] = ("BF16", (c.vocab_size, d))
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        p = f"model.layers.{layer}."
        a = p + "self_attn."
        if c.q_lora_rank is None:
            out[a + "q_proj.weight"] = ("F8", (q_rows, d))
        else:
            out[a + "q_a_proj.weight"] = ("F8", (c.q_lora_rank, d))
            out[a + "q_a_layernorm.weight"] = ("BF16", (c.q_lora_rank,))
            out[a + "q_b_proj.weight"] = ("F8", (q_rows, c.q_lora_rank))
        out[a + "kv_a_proj_with_mqa.weight"] = ("F8", (c.kv_lora_rank + c.qk_rope_head_dim, d))
        out[a + "kv_a_layernorm.weight"] = ("BF16", (c.kv_lora_rank,))
        out[a + "kv_b_proj.weight"] = (
            "F8",
            (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        )
        out[a + "o_proj.weight"] = ("F8", (d, heads * c.v_head_dim))
        out[p + "input_layernorm.weight"] = ("BF16", (d,))
        out[p + "post_attention_layernorm.weight"] = ("BF16", (d,))
        if layer < c.first_k_dense_replace:
            widths = {p + "mlp.": c.intermediate_size}
        else:
            out[p + "mlp.gate.weight"] = ("BF16", (c.n_routed_experts, d))
            if c.gate_bias:
                out[p + "mlp.gate.e_score_correction_bias"] = ("F32", (c.n_routed_experts,))
            widths = {
                p + f"mlp.experts.{e}.": c.moe_intermediate_size for e in range(c.n_routed_experts)
            }
            widths[p + "mlp.shared_experts."] = c.moe_intermediate_size * c.n_shared_experts
        for prefix, width in widths.items():
            out[prefix + "gate_proj.weight"] = ("F8", (width, d))
            out[prefix + "up_proj.weight"] = ("F8", (width, d))
            out[prefix + "down_proj.weight"] = ("F8", (d, width))
        if layer >= c.num_hidden_layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                out[p + name + ".weight"] = ("BF16", (d,))
            out[p + "eh_proj.weight"] = ("BF16", (d, 2 * d))
            if copies:
                out[p + "embed_tokens.weight"] = ("BF16", (c.vocab_size, d))
                out[p + "shared_head.head.weight"] = ("BF16", (c.vocab_size, d))
    return out


def quantize_naive(w: torch.Tensor, power_of_two: bool = False):
    """128x128 blocks, one after the other: E4M3 codes and float32 scales."""
    rows, columns = w.shape
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = w[at].abs().max() / 448
            if power_of_two:
                scale = torch.tensor(2.0) ** torch.frexp(scale).exponent
                if w[at].abs().max() <= 448 * scale / 2:
                    scale = scale / 2
            scales[i, j] = scale
            codes[at] = (w[at] / scale).to(torch.float8_e4m3fn)
    return codes, scales


def random_tensors(
    c: ModelConfig, seed: int = 0, copies: bool = True, scale_dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    out = {}
    for name, (kind, shape) in released_shapes(c, copies).items():
        values = torch.randn(shape, generator=random) * 0.05
        if name.endswith("norm.weight"):
            values = values + 1
        if kind == "F8" and c.quantization_config:
            codes, scales = quantize_naive(values, c.scale_fmt == "ue8m0")
            out[name] = codes
            if scale_dtype == torch.uint8:
                scales = (torch.frexp(scales).exponent + 126).to(torch.uint8)
            out[name + "_scale_inv"] = scales.to(scale_dtype)
        else:
            out[name] = values if kind == "F32" else values.bfloat16()
    if copies:
        for k in range(c.num_nextn_predict_layers):
            p = f"model.layers.{c.num_hidden_layers + k}."
            out[p + "embed_tokens.weight"] = out["model.embed_tokens.weight"].clone()
            head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
            out[p + "shared_head.head.weight"] = out[head].clone()
    return out


def write_checkpoint(folder, config: ModelConfig, tensors=None, shards: int = 3, **options):
    """Write config.json, shards and index; return the tensors."""
    tensors = random_tensors(config, **options) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        names = ["model.safetensors"]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file_name in names:
        save_file(
            {n: t for n, t in tensors.items() if weight_map[n] == file_name},
            folder / file_name,
            metadata={"format": "pt"},
        )
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    return tensors


def read_folder(folder) -> dict[str, torch.Tensor]:
    """All tensors of all safetensors files of a folder, by the library."""
    from safetensors.torch import load_file

    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            assert name not in out
            out[name] = tensor
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; unlike ==, this tells NaNs and signed zeros apart."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    )
