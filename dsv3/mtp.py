"""Multi-token prediction (TR 2.2): one more layer that predicts one token further ahead.

    h'^k_i = M_k [RMSNorm(h^{k-1}_i); RMSNorm(Emb(t_{i+k}))]        (21)
    h^k    = TRM_k(h'^k)                                            (22)
    P^k_{i+k+1} = OutHead(h^k_i)                                    (23)

Module k reads the state of position i and the *next* token t_{i+k}, which is known in training
and just chosen in generation, and predicts the one after it, t_{i+k+1}. It is a full layer in
sequence behind the model, with the model's own embedding and head, not a parallel head. In
training it makes every position answer for more of the future; in generation it drafts.

Two traps. The released weights of M_k expect [embedding; hidden], the other way round than
eq. 21 prints. And h^0 is the state *after* the model's final norm, as the field has settled; the
report does not say.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.block import Block
from dsv3.cache import OneLayer, Step
from dsv3.config import ModelConfig
from dsv3.layers import Linear, RMSNorm
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision


class MTPModule(Block):
    """MTP module ``depth`` (0 for k = 1): a block with two norms and M_k before it, one behind."""

    def __init__(
        self, config: ModelConfig, depth: int, precision: Precision, group: TensorGroup, device=None
    ):
        super().__init__(config, config.num_hidden_layers + depth, precision, group, device)
        d = config.hidden_size
        self.enorm = RMSNorm(d, config.rms_norm_eps, device, exact=precision.exact)
        self.hnorm = RMSNorm(d, config.rms_norm_eps, device, exact=precision.exact)
        self.eh_proj = Linear(2 * d, d, precision.plain, device=device)  # M_k
        self.norm = RMSNorm(d, config.rms_norm_eps, device, exact=precision.exact)

    def join(
        self, hidden: Float[Tensor, "b s d"], embedded: Float[Tensor, "b s d"]
    ) -> Float[Tensor, "b s d"]:
        """What the layer reads: hidden h^{k-1}_i and embedded Emb(t_{i+k}) -> h'^k_i."""
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1))  # eq. 21

    def forward(
        self,
        hidden: Float[Tensor, "b s d"],
        embedded: Float[Tensor, "b s d"],
        step: Step,
        kept: OneLayer | None = None,
    ) -> Float[Tensor, "b s d"]:
        """hidden h^{k-1}_i and embedded Emb(t_{i+k}) -> normed h^k_i."""
        joined = self.join(hidden, embedded)
        return self.norm(super().forward(joined, step, kept))  # eq. 22
