"""What training minimises (TR 2.1.2, 2.2): three losses in one sum.

    L = L_main + (lambda / D) sum_k L^k_MTP + L_Bal                               (24-25, 17)

L_main is the cross-entropy of the next token. MTP depth k reads the state of position i and the
tokens up to t_{i+k}, and is asked for t_{i+k+1}: with a target one place earlier it would be asked
for a token it has just been fed; its loss falls to nearly nothing and its drafts are worthless.
L_Bal, the sequence-wise balance loss, has the tiny weight alpha = 1e-4 (``dsv3.training.balance``).

Windows are 1 + D tokens longer than what the model reads, so every position has all its targets
and eq. 24's division by T is an ordinary mean. MTP reads the hidden state after the final norm,
as transformers does; the report does not say which is meant.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.model import Transformer


@runtime_checkable
class HasMTP(Protocol):
    """What predicts further ahead: a model, or the last stage of one."""

    config: ModelConfig

    def mtp_logits(
        self, hidden: Float[Tensor, "b s d"], tokens: Int[Tensor, "b s"], *, depth: int
    ) -> tuple[Float[Tensor, "b s vocab"], Float[Tensor, "b s d"]]: ...


def cross_entropy(
    logits: Float[Tensor, "b s vocab"], targets: Int[Tensor, "b s"]
) -> Float[Tensor, ""]:
    """Mean of -log p(target), in nats a token."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # eq. 24


def mtp_logits(
    model: HasMTP, hidden: Float[Tensor, "b s d"], window: Int[Tensor, "b w"]
) -> list[Float[Tensor, "b s vocab"]]:
    """Logits of every MTP depth (eq. 21-23): depth k at position i is about t_{i+k+1}.

    hidden: states after the final norm; window: s + 1 + D tokens.
    """
    length, result = hidden.shape[1], []
    for depth in range(model.config.num_nextn_predict_layers):
        fed = window[:, depth + 1 : depth + 1 + length]  # t_{i+k}, k = depth + 1
        logits, hidden = model.mtp_logits(hidden, fed, depth=depth)
        result.append(logits)
    return result


def losses(
    model: Transformer, window: Int[Tensor, "b w"]
) -> tuple[Float[Tensor, ""], list[Float[Tensor, ""]]]:
    """Cross-entropy of the next token and of each MTP depth on windows of s + 1 + D tokens."""
    logits, hidden = model(tokens_of(model.config, window), return_hidden=True)
    return losses_of(model, logits, hidden, window)


def losses_of(
    model: HasMTP,
    logits: Float[Tensor, "b s vocab"],
    hidden: Float[Tensor, "b s d"],
    window: Int[Tensor, "b w"],
) -> tuple[Float[Tensor, ""], list[Float[Tensor, ""]]]:
    """The same from what the layers made of the tokens: logits, and states after the norm."""
    length = hidden.shape[1]
    main = cross_entropy(logits, window[:, 1 : 1 + length])
    extra = [
        cross_entropy(ahead, window[:, k + 1 : k + 1 + length])  # t_{i+k+1}
        for k, ahead in enumerate(mtp_logits(model, hidden, window), start=1)
    ]
    return main, extra


def tokens_of(config: ModelConfig, window: Int[Tensor, "b w"]) -> Int[Tensor, "b s"]:
    """What the layers read of a window: all but the last 1 + D tokens, which are only targets."""
    return window[:, : window.shape[1] - 1 - config.num_nextn_predict_layers]


def objective(
    main: Float[Tensor, ""], extra: list[Float[Tensor, ""]], mtp_weight: float
) -> Float[Tensor, ""]:
    """main + (lambda / D) * sum of the MTP losses (eq. 25)."""
    return main + mtp_weight * sum(extra) / len(extra) if extra else main  # eq. 25
