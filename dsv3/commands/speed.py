"""Prefill and decode speed against transformers' DeepSeek-V3: same weights, same run.

A model of about 100M parameters is filled with random numbers once and given to both. Cells are
measured in turn, A B A B, so that a noisy machine disturbs both alike, and the fastest round
counts, since noise only ever adds time. Prefill: tokens per second over a prompt of so many
tokens, into a new cache. Decode: tokens per second of 16 single-token steps with so many tokens
in the cache. Before anything is timed, the logits of the two are compared in float32.

How many rounds a cell gets follows from the minutes there are: what is left, over the cells to
come. A CPU without bfloat16 units would otherwise spend ten minutes on two cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from dsv3.checkpoint.comparison import load, their_names
from dsv3.checkpoint.layout import layout
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer

CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    moe_intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=8,
    n_routed_experts=32,
    num_experts_per_tok=4,
    kv_lora_rank=256,
    q_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    first_k_dense_replace=1,
    n_group=2,
    topk_group=1,
    routed_scaling_factor=2.5,
    max_position_embeddings=4096,
)
PREFILL, DECODE, STEPS = (512, 2048), (64, 512, 2048), 16
DTYPES = (torch.float32, torch.bfloat16)
MOST_ROUNDS = 20


def make_pair(dtype: torch.dtype, device: torch.device):
    """Ours and transformers' model with the same weights."""
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError:
        raise DSV3Error(
            "transformers is not installed",
            where="bench",
            fix="In the checkout: pip install -c constraints.txt -e '.[book]'",
        ) from None

    fields = CONFIG.to_dict() | {"num_mtp_layers": 0}
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**fields)).eval()
    ours = Transformer(CONFIG, "fp32" if dtype == torch.float32 else "bf16", device=device)
    weights = Transformer(CONFIG).init_weights(0).state_dict()
    ours.load_state_dict(weights)
    released = {spec.hf_name: weights[spec.name] for spec in layout(CONFIG)}
    load(theirs, their_names(CONFIG, released)[0])
    # pyrefly: ignore[bad-argument-type] - it is wrapped for its documentation
    return ours, theirs.to(device, dtype)


def seconds(call) -> float:
    """Wall time of a call, work left on the GPU included."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
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


def interleave(first: Callable, second: Callable, allowed: float) -> tuple[float, float, int]:
    """The fastest round of each of two calls, measured in turn, and how many rounds there were.

    After a first call of each, as many rounds as ``allowed`` seconds hold, from 1 to MOST_ROUNDS.
    """
    spent = seconds(first) + seconds(second)
    times: list[tuple[float, float]] = []
    while not times or (len(times) < MOST_ROUNDS and spent + sum(times[-1]) <= allowed):
        times.append((seconds(first), seconds(second)))
        spent += sum(times[-1])
    return (*(min(column) for column in zip(*times)), len(times))


def cells(ours, theirs, text: torch.Tensor) -> Iterator[tuple]:
    """(what, length, tokens a round, our call, theirs), each made when its turn comes."""
    for n in PREFILL:
        part = text[:, :n]
        yield (
            "prefill",
            n,
            n,
            partial(ours_prefill, ours, part),
            partial(theirs_prefill, theirs, part),
        )
    for n in DECODE:
        part = text[:, :n]
        yield "decode", n, STEPS, ours_decoder(ours, part), theirs_decoder(theirs, part)


@torch.inference_mode()
def measure(
    device: torch.device, minutes: float, say: Callable[[str], None] = lambda text: None
) -> Iterator[dict]:
    """One row a cell: {"dtype", "what", "length", "rounds", "dsv3", "transformers", "ratio"}.

    Cells for which no time is left are left out, and said to be.
    """
    end, left = time.monotonic() + 60 * minutes, len(DTYPES) * (len(PREFILL) + len(DECODE))
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        if time.monotonic() > end:
            break
        say(f"{name}: making both models (100M parameters, the same weights)")
        ours, theirs = make_pair(dtype, device)
        text = torch.randint(
            CONFIG.vocab_size,
            (1, max(PREFILL + DECODE)),
            generator=torch.Generator().manual_seed(0),
        ).to(device)
        if dtype == torch.float32:
            say("comparing what they compute")
            check_equal(ours, theirs, text[:, :256])
        for what, length, tokens, mine, other in cells(ours, theirs, text):
            if time.monotonic() > end:
                break
            a, b, rounds = interleave(mine, other, (end - time.monotonic()) / left)
            left -= 1
            yield {
                "dtype": name,
                "what": what,
                "length": length,
                "rounds": rounds,
                "dsv3": tokens / a,
                "transformers": tokens / b,
                "ratio": b / a,
            }
    if left:
        say(
            f"left out, the {minutes:g} minutes being over: {left} cell{'s' * (left != 1)}. "
            "--minutes M gives more"
        )


def check_equal(ours, theirs, text: torch.Tensor) -> None:
    """Speeds of models that compute different things cannot be compared."""
    wanted = theirs(text).logits
    gap = float((ours(text) - wanted).abs().max() / wanted.abs().max())
    if not gap < 2e-5:
        raise DSV3Error(
            "the two models disagree",
            where="bench",
            found=f"{gap:.1e}",
            expected="logits within 2e-5 of the largest",
        )
