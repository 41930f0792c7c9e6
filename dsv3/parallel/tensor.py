"""Tensor parallelism: one layer's weights cut over several ranks.

Two cuts are enough. *Column-parallel*: each rank holds some of a matrix's outputs and computes
them from the whole input; nothing is sent. *Row-parallel*: each rank holds the weights of some
inputs and computes a partial sum of every output; the sums are added over the ranks by one
all-reduce. Put a row-parallel linear behind a column-parallel one, and the pair costs one
all-reduce: heads between wq_b/wkv_b and wo, inner channels between w1/w3 and w2. Routed experts
are not cut; each rank holds some whole.

Partial sums leave a rank in at least float32 and are rounded once after the reduction. Rounding
them to bfloat16 first makes the result depend on the number of ranks, enough to change greedy
tokens.

DeepSeek-V3 was trained without tensor parallelism (TR 3.2); inference uses it for attention
(TR 3.4), and the released demo for everything, as here.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv3.backward import without_backward
from dsv3.errors import DSV3Error

# What a gradient through a collective is told: it would miss what the other ranks did.
_NO_GRADIENT = dict(what="no gradient goes back through a model that is cut over several ranks",
                    fix="Train whole models, one on each rank, and share the batch "
                        "(dsv3.training.train_step)")
# A rank that is alive may compute this long before its peers give up on it.
_PATIENCE = timedelta(minutes=30)


class TensorGroup:
    """The ranks that share one model, and who I am among them.

    A group of size one is the same object with collectives that do nothing.

    rank, size: my number and how many we are; device: where my tensors live; bytes_sent: payload
    this rank has sent since it was made, by the ring algorithms' count: 2 (N-1)/N of the tensor
    for an all-reduce, N-1 times my part for an all-gather.
    """

    def __init__(self, rank: int = 0, size: int = 1, process_group=None,
                 device: torch.device | str = "cpu"):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._process_group = process_group
        self.bytes_sent = 0

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> TensorGroup:
        """A group of one process."""
        return cls(device=device)

    @classmethod
    def from_environment(cls, device: str | None = None) -> TensorGroup:
        """Join the ranks that torchrun started: NCCL with a GPU each, Gloo on CPUs.

        Reads RANK, WORLD_SIZE and LOCAL_RANK. Without them the group has one member.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            kind = f"cuda:{torch.cuda.current_device()}"
        if size == 1:
            return cls.single(kind)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if kind.startswith("cuda") else "gloo",
                                    timeout=_PATIENCE)
        return cls(dist.get_rank(), dist.get_world_size(), dist.group.WORLD, kind)

    def close(self) -> None:
        """Leave the group together; to be called last on every rank, and not after a failure."""
        if self._process_group is not None and dist.is_initialized():
            dist.barrier(group=self._process_group)  # nobody hangs up while another still listens
            dist.destroy_process_group()

    def split(self, count: int, what: str) -> int:
        """``count`` things cut evenly over the ranks: how many are mine.

        Raises DSV3Error, naming ``what``, when they do not divide.
        """
        if count % self.size:
            raise DSV3Error("cannot be cut over the ranks", where=what, found=count,
                            expected=f"a multiple of {self.size}",
                            fix="Use a number of ranks that divides it")
        return count // self.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every rank's x, in place. x is float32 or wider: partial sums are not rounded.

        A gradient through it is refused.
        """
        if self.size == 1:
            return x
        assert x.dtype.itemsize >= 4, "partial sums leave a rank unrounded"
        self.bytes_sent += 2 * (self.size - 1) * x.nbytes // self.size

        def summed(x):
            dist.all_reduce(x, group=self._process_group)
            return x

        return without_backward(summed, x, **_NO_GRADIENT)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's x side by side along the last dimension: (..., n) -> (..., size * n).

        A gradient through it is refused.
        """
        if self.size == 1:
            return x
        self.bytes_sent += (self.size - 1) * x.nbytes

        def gathered(x):
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self._process_group)
            return torch.cat(parts, dim=-1)

        return without_backward(gathered, x, **_NO_GRADIENT)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank ``src``'s x on every rank, in place."""
        if self.size > 1:
            self.bytes_sent += x.nbytes if self.rank == src else 0
            dist.broadcast(x, src, group=self._process_group)
        return x

    def broadcast_object(self, value, src: int = 0):
        """Rank ``src``'s text, numbers or lists of them on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src, group=self._process_group, device=self.device)
        return box[0]
