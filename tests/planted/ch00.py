"""Wrong answers to chapter 0's exercises, as readers give them."""

from dsv3 import ModelConfig
from dsv3.checkpoint.layout import layout

RIGHT = {
    "memory": False,
    "cost": False,
    "grows": True,
    "tensor": False,
    "frame": True,
    "both_ways": False,
}


def first_position(logits):
    return logits[:, 0, :].argmax(dim=1)


def everywhere(logits):
    return logits.argmax(dim=2)


def along_positions(logits):
    return logits.max(dim=1).indices[:, -1]


def share(parts):
    tensors = [t for t in layout(ModelConfig.mini()) if t.scale_of is None and t.part in parts]
    inside = sum(t.numel for t in tensors if t.expert is not None)
    return inside / sum(t.numel for t in tensors)


WORDS = {
    "attn": "self_attn",
    "ffn": "mlp",
    "wq_a": "q_a_proj",
    "wq_b": "q_b_proj",
    "wkv_a": "kv_a_proj_with_mqa",
    "wkv_b": "kv_b_proj",
    "wo": "o_proj",
    "q_norm": "q_a_layernorm",
    "kv_norm": "kv_a_layernorm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}


def translate(name, words):
    return ".".join(words.get(word, word) for word in name.split("."))


def in_order(name):
    return "model." + translate(name, WORDS | {"w2": "up_proj", "w3": "down_proj"})


def without_model(name):
    return translate(name, WORDS)


def keeps_ffn(name):
    return "model." + translate(name, {k: v for k, v in WORDS.items() if k != "ffn"})


PLANTED = {
    "active_share": [
        (100_000_000, "outside of the experts work too"),
        (2.05e9, "those are all parameters"),
        (0.05 * 2.05e9, "a twentieth of the experts only"),
    ],
    "next_token": [
        (first_position, "the first position"),
        (everywhere, "for every position"),
        (along_positions, "dim=1"),
    ],
    "what_it_is": [
        (RIGHT | {"memory": True}, "all of them stay in memory"),
        (RIGHT | {"cost": True}, "final run"),
        (RIGHT | {"both_ways": True}, "causal"),
    ],
    "expert_parameters": [
        (share({"main", "mtp"}), "the MTP module is in your sums"),
        (1 - share({"main"}), "outside of the routed experts"),
        (100 * share({"main"}), "in percent"),
    ],
    "released_name": [
        (in_order, "w2 and w3 are exchanged"),
        (without_model, 'begins with "model."'),
        (keeps_ffn, "mlp, not ffn"),
    ],
}
