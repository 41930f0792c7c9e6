"""How the released inference code runs a model whose weights are FP8, where there are no FP8 units.

A plain copy of its structure in our words, as a peer:

* a weight is dequantised by the plain formula each time that it is used, used, and forgotten;
* attention is absorbed, and wkv_b is dequantised anew for each token that is written;
* experts are visited one by one, and each looks for its tokens among all choices;
* the cache has room for everything that can come, and every step reads what is filled.

In float32 its logits are those of our model (a test holds them together to 2e-5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex64, Float, Int
from torch import Tensor

from dsv3.bench import plain
from dsv3.config import ModelConfig
from dsv3.rope import inverse_frequencies, rotate, rotation_scale, rotations, softmax_scale


class Released:
    """One model for one text.

    weights: of a checkpoint, under our names; FP8 ones with their scales. dtype: of all products
    and activations.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.config, self.dtype, self.device = config, dtype, device
        kept = torch.float8_e4m3fn
        self.weights = {
            name: value.to(device)
            if value.dtype == kept or name.endswith((".scale", "norm.weight", "gate.bias"))
            else value.to(device, dtype)
            for name, value in weights.items()
        }

    def new_cache(self, room: int) -> list[Float[Tensor, "room latent"]]:
        """Latent and rotated key of every token, a store a layer."""
        c = self.config
        return [
            torch.zeros(room, c.latent_dim, dtype=self.dtype, device=self.device)
            for _ in range(c.num_hidden_layers)
        ]

    def __call__(
        self, tokens: Int[Tensor, "1 s"], cache: list[Float[Tensor, "room latent"]], start: int
    ) -> Float[Tensor, "1 v"]:
        """Logits after the last of the tokens, which follow the ``start`` that the cache holds."""
        c = self.config
        turns = self.turns(start, tokens.shape[1])
        x = F.embedding(tokens[0], self.weights["embed.weight"])
        for number in range(c.num_hidden_layers):
            layer = f"layers.{number}."
            h = self.norm(x, layer + "attn_norm", c.rms_norm_eps)
            x = x + self.attention(h, layer + "attn.", cache[number], start, turns)
            h = self.norm(x, layer + "ffn_norm", c.rms_norm_eps)
            feed = self.moe if c.is_moe(number) else self.mlp
            x = x + feed(h, layer + "ffn.")
        return self.linear(self.norm(x, "norm", c.rms_norm_eps)[-1:], "head").float()

    def turns(self, start: int, count: int) -> Complex64[Tensor, "s pairs"]:
        """The rotation at each of so many positions."""
        places = torch.arange(start, start + count, device=self.device)
        frequencies = inverse_frequencies(self.config).to(self.device)
        return rotations(places, frequencies, rotation_scale(self.config))

    def matrix(self, name: str) -> Float[Tensor, "out in"]:
        """A weight, dequantised for this one use."""
        weight, scale = self.weights[name + ".weight"], self.weights.get(name + ".scale")
        return weight if scale is None else plain.dequantize(weight, scale, self.dtype)

    def linear(self, x: Float[Tensor, "s in"], name: str) -> Float[Tensor, "s out"]:
        return F.linear(x, self.matrix(name))

    def norm(self, x: Float[Tensor, "s d"], name: str, eps: float = 1e-6) -> Float[Tensor, "s d"]:
        weight = self.weights[name + ".weight"].float()
        return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)

    def attention(
        self,
        h: Float[Tensor, "s d"],
        name: str,
        store: Float[Tensor, "room latent"],
        start: int,
        turns: Complex64[Tensor, "s pairs"],
    ) -> Float[Tensor, "s d"]:
        c, end = self.config, start + len(h)
        if c.q_lora_rank is None:
            q = self.linear(h, name + "wq")
        else:
            q = self.linear(
                self.norm(self.linear(h, name + "wq_a"), name + "q_norm"), name + "wq_b"
            )
        q = q.unflatten(-1, (c.num_attention_heads, -1))
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = self.linear(h, name + "wkv_a").split(
            [c.kv_lora_rank, c.qk_rope_head_dim], -1
        )
        store[start:end, : c.kv_lora_rank] = self.norm(latent, name + "kv_norm")
        store[start:end, c.kv_lora_rank :] = rotate(k_rope, turns)
        up = self.matrix(name + "wkv_b").unflatten(0, (c.num_attention_heads, -1))
        w_uk, w_uv = up[:, : c.qk_nope_head_dim], up[:, c.qk_nope_head_dim :]
        seen = store[:end]
        q_latent = torch.einsum("shd,hdc->shc", q_nope, w_uk)
        scores = torch.einsum("shc,tc->sht", q_latent, seen[:, : c.kv_lora_rank])
        scores = scores + torch.einsum(
            "shr,tr->sht", rotate(q_rope, turns[:, None]), seen[:, c.kv_lora_rank :]
        )
        scores = scores * softmax_scale(c)
        if len(h) > 1:
            later = torch.full((len(h), end), float("-inf"), device=self.device).triu(start + 1)
            scores = scores + later[:, None]
        weights = scores.softmax(-1, dtype=torch.float32).to(h.dtype)
        o = torch.einsum("sht,tc->shc", weights, seen[:, : c.kv_lora_rank])
        return self.linear(torch.einsum("shc,hdc->shd", o, w_uv).flatten(1), name + "wo")

    def mlp(self, x: Float[Tensor, "s d"], name: str) -> Float[Tensor, "s d"]:
        w1, w3, w2 = (self.matrix(name + matrix) for matrix in ("w1", "w3", "w2"))
        return plain.swiglu(x, w1, w3, w2)

    def moe(self, x: Float[Tensor, "s d"], name: str) -> Float[Tensor, "s d"]:
        weights, chosen = self.gate(x, name + "gate.")
        routed = plain.experts_in_a_loop(
            x,
            weights,
            chosen,
            self.config.n_routed_experts,
            lambda number, rows: self.mlp(rows, f"{name}experts.{number}."),
        )
        return routed + self.mlp(x, name + "shared_experts.")

    def gate(
        self, x: Float[Tensor, "s d"], name: str
    ) -> tuple[Float[Tensor, "s k"], Int[Tensor, "s k"]]:
        c = self.config
        scores = F.linear(x, self.weights[name + "weight"]).float().sigmoid()
        biased = scores + self.weights[name + "bias"]
        if c.n_group > 1:
            groups = biased.unflatten(-1, (c.n_group, -1))
            best = groups.topk(2, dim=-1).values.sum(-1).topk(c.topk_group, dim=-1).indices
            closed = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            biased = groups.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        chosen = biased.topk(c.num_experts_per_tok, dim=-1).indices
        weights = scores.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True) * c.routed_scaling_factor, chosen
