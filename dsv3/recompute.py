"""Recomputation: what is quick to compute again need not be kept for the backward pass (TR 3.2.3).

The backward pass needs what each operation read in the forward pass. Most of that memory holds
results of cheap work: norms, the up-projections from the latents to the keys, values and queries
of all heads, and the product silu(gate) * up. DeepSeek-V3 computes these again when the gradient
comes by, and keeps what is costly.

Each half of a layer is such a region. Of attention, only its result is kept: norm, projections
and rotation come again, the sum over all pairs of tokens does not. Of the feed-forward, only the
outputs of products are kept: norm, the gathering of tokens by expert and SwiGLU come again. The
numbers are the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from dsv3.bfloat16 import widened_product

_aten = torch.ops.aten
# Attention over all pairs of tokens, in the forms that torch chooses from.
ATTENTION = frozenset(
    {
        _aten._scaled_dot_product_flash_attention_for_cpu.default,
        _aten._scaled_dot_product_flash_attention.default,
        _aten._scaled_dot_product_efficient_attention.default,
        _aten._scaled_dot_product_cudnn_attention.default,
    }
)
PRODUCTS = frozenset(
    {_aten.mm.default, _aten.bmm.default, _aten._grouped_mm.default, widened_product._opoverload}
)


def recomputed(kept: frozenset, function: Callable[..., torch.Tensor], *inputs) -> torch.Tensor:
    """function(*inputs), of which only results of the operations ``kept`` wait for backward."""

    def policy(context, operation, *arguments, **options):
        return (
            CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )


def in_backward() -> bool:
    """Whether this is a second computation, called by the backward pass."""
    return torch._C._current_graph_task_id() != -1
