"""What a model is worth on text it has never seen, and which experts it sends that text to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.model import Transformer
from dsv3.training.balance import RouterWatch
from dsv3.training.objective import cross_entropy, mtp_logits


@torch.no_grad()
def evaluate(
    model: Transformer,
    windows: Int[Tensor, "n w"],
    token_bytes: Int[Tensor, " vocab"],
    batch_size: int = 8,
    on_windows: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Held-out figures over windows of s + 1 + D tokens.

    loss, mtp_loss: nats a token. bits_per_byte: the loss in bits over the bytes of the predicted
    text, which makes models with different tokenizers comparable; token_bytes (vocab) gives the
    bytes of each token. draft_agreement: share of positions where the first MTP module's best
    token is the main model's own best token one step later, what a greedy draft needs.
    on_windows: called with the number of windows that were just read, for a progress bar.
    """
    depths = model.config.num_nextn_predict_layers
    length = windows.shape[1] - 1 - depths
    nats = ahead = 0.0
    count = text_bytes = agreed = drafted = 0
    for window in windows.split(batch_size):
        logits, hidden = model(window[:, :length], return_hidden=True)
        targets = window[:, 1 : 1 + length]
        nats += float(cross_entropy(logits, targets)) * targets.numel()
        count += targets.numel()
        text_bytes += int(token_bytes[targets].sum())
        if depths:
            draft = mtp_logits(model, hidden, window)[0]
            ahead += float(cross_entropy(draft, window[:, 2 : 2 + length])) * targets.numel()
            agreed += int((draft[:, :-1].argmax(-1) == logits[:, 1:].argmax(-1)).sum())
            drafted += draft[:, :-1].shape[:2].numel()
        on_windows(len(window))
    result = {"loss": nats / count, "bits_per_byte": nats / math.log(2) / text_bytes}
    if depths:
        result |= {"mtp_loss": ahead / count, "draft_agreement": agreed / drafted}
    return result


def evaluate_domains(
    model: Transformer,
    windows: Mapping[str, Int[Tensor, "n w"]],
    token_bytes: Int[Tensor, " vocab"],
    watch: RouterWatch,
    on_windows: Callable[[int], object] = lambda count: None,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[int]]]]:
    """(figures by domain, tokens of each expert by domain and router); see ``evaluate``."""
    figures, loads = {}, {}
    for name, some in windows.items():
        watch.reset()
        some = some.to(token_bytes.device)
        figures[name] = evaluate(model, some, token_bytes, on_windows=on_windows)
        loads[name] = {router: load.int().tolist() for router, load in watch.load.items()}
    return figures, loads
