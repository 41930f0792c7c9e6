"""What the ranks of a training share: the batch always, moments and routed experts if wanted.

With experts shared out (TR 3.2.2; ``dsv3.parallel.experts``) a rank holds an N-th of every layer's
routed experts, and tokens come to them from all ranks. Their gradients are therefore whole where
they are: adding them up over the ranks, as those of all other weights, would be wrong. What leaves
a run, checkpoints and models, is complete: the same tensors as one process would write.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model import Transformer
from dsv3.moe import Experts
from dsv3.parallel.data import Shards
from dsv3.parallel.environment import place
from dsv3.parallel.experts import ExpertGroup
from dsv3.parallel.tensor import TensorGroup


@dataclass(frozen=True)
class Sharing:
    """The ranks that share each batch of a run, and what else they share.

    zero: whether the optimizer's moments are shared out over the ranks (ZeRO-1). experts: through
    which routed experts are shared out; None: every rank has them all.
    """

    group: TensorGroup
    zero: bool = False
    experts: ExpertGroup | None = None

    @classmethod
    def of(cls, group: TensorGroup | None, *, zero: bool, experts: bool) -> Sharing:
        """What was asked for; a group of one shares nothing. A launcher says which ranks share a
        machine."""
        group = group or TensorGroup.single()
        if group.size == 1:
            return cls(group)
        here, nodes = place(), None
        if experts:
            nodes = ExpertGroup(group, own_tokens=True, per_node=here.local_size if here else None)
        return cls(group, zero=zero, experts=nodes)

    def check(self, config: ModelConfig) -> None:
        """Raise DSV3Error for a model whose experts cannot be shared out over these ranks."""
        if self.experts is not None:
            self.experts.holding(config.n_routed_experts)

    @property
    def for_model(self) -> TensorGroup:
        """The group of each rank's model: alone with it, but perhaps for the experts."""
        return TensorGroup(device=self.group.device, experts=self.experts)


def cut(model: nn.Module, group: TensorGroup) -> tuple[Shards, ...]:
    """A model's trained weights, cut over those ranks that learn them together: over the group
    what all of its ranks hold, and over nobody the experts that a rank holds alone."""
    alone = {id(value) for value in held_alone(model).values()}
    trained = [value for value in model.parameters() if value.requires_grad]
    shared = Shards([value for value in trained if id(value) not in alone], group)
    if not alone:
        return (shared,)
    own = [value for value in trained if id(value) in alone]
    return shared, Shards(own, TensorGroup.single(group.device))


def held_alone(model: nn.Module) -> dict[str, nn.Parameter]:
    """By name, the weights of which this rank has its part and no other: of experts that tokens
    come to."""
    return {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, Experts) and module.visited
        for key, value in module.named_parameters(recurse=False)
    }


def all_experts(model: Transformer, mine: Tensor) -> Tensor:
    """Every rank's stack of experts in one; all ranks call it together."""
    ranks = model.group.everyone
    shape = (ranks.size * mine.shape[0], *mine.shape[1:])
    return ranks.all_gather(mine.detach().flatten()).view(shape)


def my_experts(model: Transformer, stack: Tensor) -> Tensor:
    """This rank's part of such a stack."""
    return stack.chunk(model.group.everyone.size)[model.group.everyone.rank]


def whole_model(model: Transformer, *, keep: bool) -> Transformer | None:
    """A model with all experts, on the CPU; the ranks call it together, and who does not keep it
    gets None. A model that is whole is itself."""
    alone = held_alone(model)
    if not alone:
        return model if keep else None
    whole = Transformer(model.config, model.precision) if keep else None
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        value = all_experts(model, value) if name in alone else value
        if whole is not None:
            with torch.no_grad():
                dict([*whole.named_parameters(), *whole.named_buffers()])[name].copy_(value)
    return whole
