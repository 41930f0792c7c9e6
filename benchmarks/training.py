"""Training speed against transformers' DeepSeek-V3: same sizes, optimizer and batch, one run.

    python benchmarks/training.py [--rounds 6] [--windows 6] [--json]

Both models have the sizes of the small model, without the MTP module, which transformers does not
train. One step: forward, loss, backward, clipped gradient, fused AdamW with float32 master
weights. In bf16 transformers runs under torch's autocast. Steps are taken in turn, A B A B, and
the fastest round of each counts, since noise only ever adds time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time

import torch
import torch.nn.functional as F

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.precision import Precision

LENGTH = 256
CONFIG = ModelConfig.mini().but(num_nextn_predict_layers=0)


def step_of(forward, weights: list, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    """Seconds of one step."""
    begin = time.perf_counter()
    logits = forward(batch[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - begin


def contestants(precision: str):
    """Of ours and theirs: how it goes forward, its weights, its optimizer."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ours = Transformer(CONFIG, Precision.training(precision)).init_weights(0)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG.to_dict() | {"num_mtp_layers": 0}))
    theirs.train()
    with torch.no_grad():
        for name, buffer in theirs.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()

    def forward_theirs(tokens):
        half = (
            torch.autocast("cpu", torch.bfloat16)
            if precision == "bf16"
            else contextlib.nullcontext()
        )
        with half:
            return theirs(tokens, use_cache=False).logits

    for model, forward in ((ours, ours), (theirs, forward_theirs)):
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        yield forward, weights, torch.optim.AdamW(weights, lr=1e-4, fused=True)


def measure(precision: str, windows: int, rounds: int) -> dict[str, float]:
    """Tokens per second of both, and their ratio."""
    pair = list(contestants(precision))
    random = torch.Generator().manual_seed(0)
    best = [float("inf")] * 2
    for number in range(rounds + 2):
        batch = torch.randint(CONFIG.vocab_size, (windows, LENGTH + 1), generator=random)
        for which, contestant in enumerate(pair):
            seconds = step_of(*contestant, batch)
            if number >= 2:  # the first rounds prepare shapes
                best[which] = min(best[which], seconds)
    ours, theirs = (windows * LENGTH / seconds for seconds in best)
    return {"dsv3": round(ours), "transformers": round(theirs), "ratio": round(ours / theirs, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    results = {p: measure(p, args.windows, args.rounds) for p in ("fp32", "bf16")}
    if args.json:
        print(json.dumps(results))
        return
    print(
        f"training, tokens/s, {args.windows} windows of {LENGTH}, {torch.get_num_threads()} threads"
    )
    for precision, r in results.items():
        print(
            f"{precision}  dsv3 {r['dsv3']:6d}   transformers {r['transformers']:6d}   "
            f"ratio {r['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
