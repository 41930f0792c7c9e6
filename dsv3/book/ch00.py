"""Checks of chapter 0's exercises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dsv3.book.exercise import Verdict, judge, judge_statements, judge_value
from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig


def active_share(answer: float | None) -> Verdict:
    """Parameters that work for a token: 10 layers of 100 experts of 2 million, 5 visited."""
    return judge_value(
        "active_share",
        answer,
        150_000_000,
        {
            2_050_000_000: "those are all parameters; a token visits 5 of the 100 experts of a layer",
            100_000_000: "the parameters outside of the experts work too, for every token",
            60_000_000: "a token visits 5 experts in each of the 10 layers, not in one",
            150: "count parameters, not millions of them",
            102_500_000: "5 of 100 are a twentieth of the experts only; what is outside of them always "
            "works",
            0.0731707: "that is the share; the question asks for the number of parameters",
        },
        unit="parameters",
    )


def next_token(answer: Callable) -> Verdict:
    """logits (b, s, V) -> the likeliest next token of each text, (b,)."""

    def right(logits):
        return logits[:, -1].argmax(-1)

    random = torch.Generator().manual_seed(0)
    cases = [
        (torch.randn(3, 5, 11, generator=random),),
        (torch.randn(1, 1, 7, generator=random),),
        (torch.randn(4, 6, 6, generator=random) - 9,),
    ]
    return judge(
        "next_token",
        answer,
        right,
        cases,
        {
            "you take the first position; the last one is about the token that is still to come": lambda logits: (
                logits[:, 0].argmax(-1)
            ),
            "you choose one token for every position; only the last one is new": lambda logits: (
                logits.argmax(-1)
            ),
            "you look for the largest number along the positions (dim=1), not along the vocabulary": lambda logits: (
                logits.argmax(1)[:, -1]
            ),
            "that is the largest logit itself; its place in the row is the token's id": lambda logits: (
                logits[:, -1].max(-1).values
            ),
            "you choose the least likely token (argmin)": lambda logits: logits[:, -1].argmin(-1),
            "you keep a dimension: (b, 1) instead of (b,)": lambda logits: logits[:, -1].argmax(
                -1, keepdim=True
            ),
        },
        praise="this is greedy decoding: temperature 0",
    )


def what_it_is(answer: Mapping[str, bool | None]) -> Verdict:
    """True or false, six sentences about the model."""
    return judge_statements(
        "what_it_is",
        answer,
        {
            "memory": False,
            "cost": False,
            "grows": True,
            "tensor": False,
            "frame": True,
            "both_ways": False,
        },
        {
            "memory": "few experts work for a token, but the next token may choose any other; all of "
            "them stay in memory",
            "cost": "that is 2.788 million GPU hours of the final run at 2 dollars (TR table 1); "
            "research and trials are not included",
            "grows": "attention remembers something of every token it has seen; the weights stay as "
            "they are",
            "tensor": "it was trained with pipeline, expert and data parallelism, without tensor "
            "parallelism (TR 3.2); that appears at inference",
            "frame": "embedding, layers of attention and feed-forward, head: the ideas of the report "
            "stand inside this frame",
            "both_ways": "in a decoder attention is causal: a token sees itself and what stands before "
            "it",
        },
    )


def expert_parameters(answer: float | None) -> Verdict:
    """Share of the small model's main parameters that lie in routed experts."""
    weights = [t for t in layout(ModelConfig.mini()) if not t.scale_of]
    main = [t for t in weights if t.part == "main"]

    def share(tensors, of) -> float:
        return sum(t.numel for t in tensors if t.expert is not None) / sum(t.numel for t in of)

    right = share(main, main)
    return judge_value(
        "expert_parameters",
        answer,
        right,
        {
            share(weights, weights): 'the MTP module is in your sums (t.part is "mtp"), with its '
            "copies of embedding and head; leave it out",
            share(
                weights, main
            ): "your experts include those of the MTP module; leave it out above and below",
            100 * right: "a share lies between 0 and 1; this is in percent",
            1 - right: "that is the share outside of the routed experts",
            len([t for t in main if t.expert is not None])
            / len(main): "you count tensors; count their values (t.numel)",
        },
        tolerance=2e-3,
        praise=f"{right:.1%} in ours; 97.4% at 671B",
    )


def released_name(answer: Callable) -> Verdict:
    """Short name of a weight -> its name in released files."""
    names = {
        t.name: t.hf_name
        for t in layout(ModelConfig.deepseek_v3().but(num_hidden_layers=6), scales=False)
    }
    wanted = [
        "attn.wq_a",
        "attn.wq_b",
        "attn.wkv_a",
        "attn.wkv_b",
        "attn.wo",
        "attn.q_norm",
        "attn.kv_norm",
        "attn_norm",
        "ffn_norm",
        "ffn.experts.7.w1",
        "ffn.experts.200.w2",
        "ffn.experts.0.w3",
    ]
    cases = [(f"layers.5.{name}.weight",) for name in wanted]

    def swapped(name):
        return (
            names[name]
            .replace("down_proj", "*")
            .replace("up_proj", "down_proj")
            .replace("*", "up_proj")
        )

    return judge(
        "released_name",
        answer,
        lambda name: names[name],
        cases,
        {
            "w2 and w3 are exchanged: w2 comes last in the computation and is down_proj": swapped,
            'every released name but the head\'s begins with "model."': lambda name: names[
                name
            ].removeprefix("model."),
            "the norms of a layer stand beside attention and feed-forward, without self_attn or mlp": lambda name: (
                names[name]
                .replace("input_layernorm", "self_attn.input_layernorm")
                .replace("post_attention_layernorm", "mlp.post_attention_layernorm")
            ),
            "self_attn, not attn, in released files": lambda name: names[name].replace(
                "self_attn", "attn"
            ),
            "mlp, not ffn, in released files": lambda name: names[name].replace(".mlp.", ".ffn."),
            "wkv_a is kv_a_proj_with_mqa in released files, not kv_a_proj": lambda name: names[
                name
            ].replace("_with_mqa", ""),
        },
        praise="all 12 names; dsv3/checkpoint/layout.py holds the whole table",
    )
