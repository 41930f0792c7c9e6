"""What a latent cache in FP8 costs in loss, on the shipped model and text it was not trained on.

    python benchmarks/latent_cache.py [--texts 16] [--out assets/measurements/latent_cache.json]

The model reads held-out texts (``dsv3.book.held_out``) into a cache in its own dtype, and into
caches that keep less. Each text is read by all of them, so what is reported is the difference of
losses, text by text: its mean, and the standard error of the mean. Beside it, the mean divergence
of the distributions (KL from the plain cache's, in nats a token), and how often the best token is
another one. In fp32 the cache alone rounds, so the whole difference is its doing.

    fp8             what ``new_cache(..., dtype="fp8")`` keeps: latent in E4M3 with scales that are
                    powers of two, rotated key in bfloat16
    float32 scales  the same with scales of any float32
    fp8 throughout  the rotated key in E4M3 as well
    bfloat16        all of it in bfloat16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from dsv3 import load_model
from dsv3.book import held_out
from dsv3.cache import LatentCache, OneLayer
from dsv3.data import DOMAINS
from dsv3.fp8.quantize import ACTIVATION_BLOCK, quantized_values
from dsv3.generation.tokenizer import load_tokenizer

MODEL = Path(__file__).parents[1] / "assets" / "dsv3-mini"


class Rounded(LatentCache):
    """A cache in the model's dtype that keeps what is left of a number in fewer bits."""

    rounded: Callable[[torch.Tensor], torch.Tensor]

    def one(self, layer):
        part, rounded = super().one(layer), self.rounded

        class Part(OneLayer):
            def append(self, new, step):
                return super().append(rounded(new), step)

        return Part(part.store, part.format)


def in_e4m3(x: torch.Tensor, scales: str) -> torch.Tensor:
    flat = quantized_values(x.flatten(0, -2), ACTIVATION_BLOCK, scales)
    return flat.view(x.shape).to(x.dtype)


def forms(model) -> dict[str, Callable[[int, int], LatentCache]]:
    """Name -> maker of such a cache for so many rows and tokens."""
    d_c = model.config.kv_lora_rank

    def kept(latent: Callable, rotated: Callable) -> Callable[[int, int], LatentCache]:
        def make(rows: int, tokens: int) -> LatentCache:
            layers = model.config.num_hidden_layers
            cache = Rounded(model.config, layers, rows, tokens, model.precision.dtype, model.device)
            cache.rounded = lambda new: torch.cat(
                [latent(new[..., :d_c]), rotated(new[..., d_c:])], -1
            )
            return cache

        return make

    def half(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().to(x.dtype)

    return {
        "plain": model.new_cache,
        "fp8": lambda rows, tokens: model.new_cache(rows, tokens, dtype="fp8"),
        "float32 scales": kept(lambda x: in_e4m3(x, "float32"), half),
        "fp8 throughout": kept(lambda x: in_e4m3(x, "ue8m0"), lambda x: in_e4m3(x, "ue8m0")),
        "bfloat16": kept(half, half),
    }


@torch.inference_mode()
def compare(model, texts: list[list[int]]) -> list[dict[str, tuple[float, float, float]]]:
    """Of each text and form: loss, divergence from the plain cache's distributions, and the share
    of places with another best token."""
    found = []
    for text in texts:
        ids, plain, row = torch.tensor([text]), None, {}
        for name, make in forms(model).items():
            logs = model(ids[:, :-1], cache=make(1, len(text))).log_softmax(-1)
            plain = logs if plain is None else plain
            row[name] = (
                float(F.nll_loss(logs[0], ids[0, 1:])),
                float((plain.exp() * (plain - logs)).sum(-1).mean()),
                float((plain.argmax(-1) != logs.argmax(-1)).float().mean()),
            )
        found.append(row)
    return found


def figures(rows: list[dict[str, tuple[float, float, float]]]) -> dict[str, dict[str, float]]:
    """Means over texts, with the standard error of the difference of losses."""
    loss = torch.tensor([row["plain"][0] for row in rows])
    found = {"plain": {"texts": len(rows), "loss": float(loss.mean())}}
    for name in list(rows[0])[1:]:
        figure = torch.tensor([row[name] for row in rows])
        more = figure[:, 0] - loss
        found[name] = {
            "more_loss": float(more.mean()),
            "standard_error": float(more.std() / len(rows) ** 0.5),
            "divergence": float(figure[:, 1].mean()),
            "other_best_token": float(figure[:, 2].mean()),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=16, help="of each domain, at most 16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = load_tokenizer(MODEL)
    texts = json.loads(held_out.PATH.read_text(encoding="utf-8"))["texts"]
    ids = {name: [tokenizer.encode(text) for text in texts[name][: args.texts]] for name in DOMAINS}
    found: dict = {
        "tokens": {name: [len(text) for text in some] for name, some in ids.items()},
        "bytes_a_token_and_layer": {},
        "precisions": {},
    }
    for precision in ("fp32", "fp8"):
        model = load_model(MODEL, precision)
        layers = model.config.num_hidden_layers
        found["bytes_a_token_and_layer"][precision] = {
            name: make(1, 1).data.nbytes // layers for name, make in list(forms(model).items())[:2]
        }
        rows = {domain: compare(model, some) for domain, some in ids.items()}
        rows["all"] = [row for some in rows.values() for row in some]
        by = found["precisions"][precision] = {name: figures(some) for name, some in rows.items()}
        for domain, figure in by.items():
            loss = figure["plain"]["loss"]
            print(f"\n{precision}, {domain}: {len(rows[domain])} texts, loss {loss:.4f}")
            for name, row in list(figure.items())[1:]:
                print(
                    f"  {name:15} loss {row['more_loss']:+.5f} +- {row['standard_error']:.5f}, "
                    f"divergence {row['divergence']:.5f}, "
                    f"another best token {row['other_best_token']:.2%}",
                    flush=True,
                )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rounded = json.loads(
            json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}")
        )
        args.out.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
