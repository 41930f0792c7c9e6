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

import json
from typing import Protocol

import torch
import torch.distributed as dist

from dsv3.backward import without_backward
from dsv3.errors import DSV3Error
from dsv3.parallel.environment import Place, check_device, place
from dsv3.parallel.join import join
from dsv3.parallel.rank import is_collective
from dsv3.parallel.shared_memory import SharedMemory
from dsv3.parallel.watch import Watch

# What a gradient through a collective is told: it would miss what the other ranks did.
_NO_GRADIENT = dict(
    what="no gradient goes back through a model that is cut over several ranks",
    fix="Train whole models, one on each rank, and share the batch (dsv3.training.step.train_step)",
)


class SharesExperts(Protocol):
    """Who shares a model's routed experts out: ``parallel.experts.ExpertGroup``. ranks: over whom;
    own_tokens: whether each of them has tokens of its own."""

    ranks: TensorGroup
    own_tokens: bool


class TensorGroup:
    """The ranks that share one model, and who I am among them.

    A group of size one is the same object with collectives that do nothing.

    ``with group:`` frames the work: at its end the ranks leave together; after a failure the others
    are told why this one leaves, and a collective that failed because a rank has gone raises
    RankLost, which names it.

    rank, size: my number and how many we are; process_group: torch's (None: one process); device:
    where my tensors live; bytes_sent: payload this rank has sent since it was made, by the ring
    algorithms' count: 2 (N-1)/N of the tensor for an all-reduce, N-1 times my part for an
    all-gather. experts: the ranks among which routed experts are shared out, when those are other
    ranks than these (``dsv3.parallel.experts``); None: these ranks hold them. watch: the heartbeat
    between machines; None: nobody needs one. shared: the memory of ranks on one machine,
    where they have some.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        process_group=None,
        device: torch.device | str = "cpu",
        experts: SharesExperts | None = None,
        watch: Watch | None = None,
    ):
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.process_group, self.experts, self.watch = process_group, experts, watch
        self.shared: SharedMemory | None = None
        self.bytes_sent = 0

    @property
    def everyone(self) -> TensorGroup:
        """All ranks that the model is on: these, or those that share its experts out."""
        return self if self.experts is None else self.experts.ranks

    @property
    def trains(self) -> bool:
        """Whether a model on these ranks can have gradients: it is whole here, but perhaps for
        experts to which tokens travel from every rank."""
        return self.size == 1 and (self.experts is None or self.experts.own_tokens)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> TensorGroup:
        """A group of one process."""
        return cls(device=device)

    @classmethod
    def from_environment(cls, device: str | None = None) -> TensorGroup:
        """Join the ranks that a launcher started: NCCL with a GPU each, Gloo on CPUs.

        device: "cpu", "cuda" or None, for cuda where there is a GPU. Reads RANK, WORLD_SIZE and
        LOCAL_RANK; without them the group has one member. All ranks call it together. Raises
        DSV3Error for variables that say what cannot be, for a device that is not there, and when
        the ranks cannot meet.
        """
        here = place() or Place(rank=0, size=1, local_rank=0)
        kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if kind == "cuda":
            check_device(kind, here, where="device")
            torch.cuda.set_device(here.local_rank)
            kind = f"cuda:{torch.cuda.current_device()}"
        if here.size == 1:
            return cls.single(kind)
        watch = None
        if not dist.is_initialized():
            watch = join(here, "nccl" if kind.startswith("cuda") else "gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
        group = cls(rank, size, dist.group.WORLD, kind, watch=watch)
        if kind == "cpu" and here.local_size == size:
            group.shared = SharedMemory.among(group)
        return group

    def close(self) -> None:
        """Leave the group together; to be called last on every rank, and not after a failure."""
        if self.process_group is not None and dist.is_initialized():
            dist.barrier(group=self.process_group)  # nobody hangs up while another still listens
            if self.watch:
                self.watch.stop()
            dist.destroy_process_group()

    def __enter__(self) -> TensorGroup:
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        if error is None:
            try:
                self.close()
            except RuntimeError as failure:
                self._explain(failure)
                raise
        else:
            self._explain(error)

    def _explain(self, error: BaseException) -> None:
        """Raise RankLost for a collective that failed with the end of another rank."""
        if self.watch is None:
            return
        if is_collective(error) and (lost := self.watch.blame()):
            raise lost from None
        self.watch.leave(f"{error}" or type(error).__name__)

    def split(self, count: int, what: str) -> int:
        """``count`` things cut evenly over the ranks: how many are mine.

        Raises DSV3Error, naming ``what``, when they do not divide.
        """
        if count % self.size:
            raise DSV3Error(
                "cannot be cut over the ranks",
                where=what,
                found=count,
                expected=f"a multiple of {self.size}",
                fix="Use a number of ranks that divides it",
            )
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
            if self.shared and self.shared.fits(x):
                return self.shared.sum(x)
            dist.all_reduce(x, group=self.process_group)
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
            if self.shared and self.shared.fits(x):
                return torch.cat(self.shared.gather(x), dim=-1)
            parts = [torch.empty_like(x) for _ in range(self.size)]
            dist.all_gather(parts, x.contiguous(), group=self.process_group)
            return torch.cat(parts, dim=-1)

        return without_backward(gathered, x, **_NO_GRADIENT)

    def broadcast(self, x: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank ``src``'s x on every rank, in place."""
        if self.size > 1:
            self.bytes_sent += x.nbytes if self.rank == src else 0
            dist.broadcast(x, group=self.process_group, group_src=src)
        return x

    def broadcast_object(self, value, src: int = 0):
        """Rank ``src``'s text, numbers, or lists or dicts of them on every rank.

        They travel as JSON, never as a pickle: what is received can be wrong, but runs no code. A
        tuple arrives as a list.
        """
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.rank == src else b""
        length = torch.tensor([len(text)], device=self.device)
        dist.broadcast(length, group=self.process_group, group_src=src)
        data = torch.zeros(int(length), dtype=torch.uint8, device="cpu")
        if self.rank == src:
            data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        data = data.to(self.device)
        dist.broadcast(data, group=self.process_group, group_src=src)
        return json.loads(bytes(data.tolist()))
