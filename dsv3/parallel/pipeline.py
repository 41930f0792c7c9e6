"""A pipeline that runs: stages on several ranks, in the order of torch's schedules (TR 3.2.1).

``dsv3.parallel.schedules`` says in which order ranks should work, ``dsv3.parallel.timeline`` when
they would. Here they do: ``torch.distributed.pipelining`` takes a rank's stages, follows a
schedule, and sends what goes from stage to stage; each piece of work notes when it began and when
it ended, and ``measured`` makes of that the same ``Timeline`` that a simulation gives.

What goes forward is ``carried``, a few tensors of fixed shape, and their gradients come back.
Every rank is given the whole batch: the first stage reads its tokens, the last its targets.

How torch is asked, and why:

* *Shapes are told, not found out.* Left to itself, torch sends them from rank to rank as pickles,
  and runs a forward and a backward before the first step to learn them: routers would count
  tokens that nobody trained on. With ``input_args`` and ``output_args`` on every stage it does
  neither.
* *Gradients are not scaled by torch.* Its default divides them by the number of micro-batches,
  stage by stage; a weight that two stages of one rank share would be divided twice. The loss of a
  micro-batch is divided instead.
* *Work is timed in three methods of PipelineStage* that schedules call, and that have no
  underscore but no documentation either. torch has no hook around a backward pass.
* *Some stages are not split.* torch makes the gradients of weights (W) group by group, and lets go
  of a group's graph when it is done. A weight that is used both before and behind others makes it
  go through theirs again, and it fails ("backward through the graph a second time"). For stages
  in ``unsplit``, I is the whole backward, and W does nothing.
* *A split costs.* torch takes W weight by weight, each with a pass of its own: I and W together
  take 1.4 to 1.5 times as long as B, for the shipped model on a CPU.
* *The first stage's I is empty.* Nobody waits for the gradient of tokens, and so torch leaves its
  whole backward to W. A measured timeline shows it; the result is the same.
* *DualPipe itself is not in torch*, only DualPipeV, which does its work on half the ranks. Its
  overlapped pairs are taken one after the other: on a GPU the messages between stages
  overlap with products anyway. Those between experts would not: for them a forward and a backward
  have to be cut into matching parts, which only the model can do.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from dsv3.errors import DSV3Error
from dsv3.parallel.schedules import Schedule, Work, one_f_one_b
from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.timeline import Durations, Event, Timeline

# Which of torch's schedules runs under which name. Interleaved with one stage a rank is ZB1P.
SCHEDULES: dict[str, Any] = {
    "1F1B": Schedule1F1B,
    "ZB1P": ScheduleInterleavedZeroBubble,
    "ZBV": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}
FOLDED = ("ZBV", "DualPipeV")  # two stages a rank, the way there and back: a V

Piece = tuple[str, int, int, float, float]
"""What was done and when: kind, stage, micro-batch, begin and end in seconds of this machine."""


@dataclass(frozen=True)
class Passed:
    """What a rank has after its part of a batch. outputs: of the last stage, all micro-batches
    below each other, on the rank that has it, else None; pieces: its work, in order."""

    outputs: Tensor | None
    pieces: tuple[Piece, ...]


def stages_in_all(name: str, ranks: int) -> int:
    """Into how many stages a schedule cuts the model. Raises DSV3Error for an unknown name."""
    if name not in SCHEDULES:
        raise DSV3Error(
            "no such schedule", where="name", found=name, expected=" or ".join(SCHEDULES)
        )
    return 2 * ranks if name in FOLDED else ranks


def stages_of(name: str, rank: int, ranks: int) -> tuple[int, ...]:
    """Which stages a rank holds: its own number; in a V also the one opposite, so that the first
    rank has both the first stage and the last."""
    total = stages_in_all(name, ranks)
    return (rank, total - 1 - rank) if name in FOLDED else (rank,)


def rank_of(name: str, stage: int, ranks: int) -> int:
    """Which rank holds a stage."""
    return next(rank for rank in range(ranks) if stage in stages_of(name, rank, ranks))


def pass_through(
    name: str,
    stages: Mapping[int, nn.Module],
    batch: Tensor,
    *,
    carried: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    micro_batches: int,
    group: TensorGroup,
    unsplit: Collection[int] = (),
) -> Passed:
    """Take a batch through the pipeline, forward and backward; gradients are added to ``.grad``.

    stages: this rank's, by number; each is called as ``stage(*carried, batch=rows)``, the first
    without ``carried``, and returns what the next is given; the last one tensor of one row.
    batch: (n, ...), the same on all ranks, n a multiple of micro_batches. carried: examples of
    what goes from stage to stage (on any device, meta too), one micro-batch's. loss: of the last
    stage's output; the mean over micro-batches is minimised. Raises DSV3Error for what the
    schedule cannot do, and a stage's own DSV3Error as it is.
    """
    total = stages_in_all(name, group.size)
    _check(name, group.size, micro_batches, len(batch))
    timed: list[Piece] = []
    held = [
        _TimedStage(
            timed,
            stages[number],
            number,
            total,
            group.device,
            input_args=() if number == 0 else tuple(carried),
            output_args=torch.empty(1) if number == total - 1 else tuple(carried),
            group=group.process_group,
            dw_builder=_nothing_is_left if number in unsplit else None,
        )
        for number in stages_of(name, group.rank, group.size)
    ]
    schedule = SCHEDULES[name](
        held if name != "1F1B" else held[0],
        micro_batches,
        loss_fn=lambda output, _: loss(output) / micro_batches,
        scale_grads=False,
    )
    try:
        with _without_plans_on_the_terminal():
            outputs = schedule.step(batch=batch, target=batch)
    except RuntimeError as error:
        if isinstance(error.__cause__, DSV3Error):
            raise error.__cause__ from None
        raise
    return Passed(None if outputs is None else outputs.detach(), tuple(timed))


@contextmanager
def _without_plans_on_the_terminal() -> Iterator[None]:
    """When a stage fails, torch logs the whole schedule, line by line, before the error."""
    log = logging.getLogger("torch.distributed.pipelining.schedules")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _nothing_is_left() -> Callable[[], None]:
    """The W of a stage whose I was the whole backward (torch's ``dw_builder``)."""
    return lambda: None


class _TimedStage(PipelineStage):
    """torch's stage, which notes its work in a list that the stages of a rank share."""

    def __init__(self, pieces: list[Piece], *arguments, **options):
        super().__init__(*arguments, **options)
        self.pieces = pieces

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments, **options):
        with self._timed("F", fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss=None, full_backward: bool = True, last_backward=False
    ):
        with self._timed("B" if full_backward else "I", bwd_chunk_id):
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward=False):
        with self._timed("W", bwd_chunk_id):
            super().backward_weight_one_chunk(bwd_chunk_id, last_backward)

    @contextmanager
    def _timed(self, kind: str, micro: int) -> Iterator[None]:
        begin = self._now()
        yield
        self.pieces.append((kind, self.stage_index, micro, begin, self._now()))

    def _now(self) -> float:
        """Seconds of a clock that all processes of a machine share. A GPU is waited for first."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measured(name: str, micro_batches: int, pieces: Sequence[Sequence[Piece]]) -> Timeline:
    """The timeline of a batch that has passed, from what each rank noted (``Passed.pieces``).

    Times are in milliseconds since the first piece of work began; the ranks are on one machine.
    The order is the one that was followed; pairs that overlap in the plan come one by one.
    """
    zero = min(piece[3] for mine in pieces for piece in mine)
    events = tuple(
        tuple(
            Event(rank, (Work(kind, stage, micro),), 1e3 * (begin - zero), 1e3 * (end - zero))
            for kind, stage, micro, begin, end in mine
        )
        for rank, mine in enumerate(pieces)
    )
    orders = tuple(tuple(event.step for event in mine) for mine in events)
    return Timeline(Schedule(name, stages_in_all(name, len(pieces)), micro_batches, orders), events)


def durations_of(timeline: Timeline) -> Durations:
    """How long work took in a measured timeline: for a simulation that is laid beside it, in
    which stages are equal. F and B are medians, W its share of the backward passes that were
    split; where none was, half of B."""
    forward: list[float] = []
    backward: dict[tuple[int, int], float] = defaultdict(float)
    weights: dict[tuple[int, int], float] = {}
    for event in (event for mine in timeline.events for event in mine):
        [work], took = event.step, event.end - event.start
        if work.kind == "F":
            forward.append(took)
            continue
        backward[work.stage, work.micro] += took
        if work.kind == "W" and work.stage > 0:  # the first stage's is its whole backward
            weights[work.stage, work.micro] = took
    share = 0.5
    if weights:
        share = sum(weights.values()) / sum(backward[split] for split in weights)
    whole = median(backward.values())
    return Durations(median(forward), whole, share * whole)


def planned(name: str, ranks: int, micro_batches: int) -> Schedule:
    """The order of work that torch will follow, without running it.

    torch plans the orders of all ranks where it makes one rank's schedule, and keeps them in
    ``pipeline_order``. It asks its stages only how many there are and whose they are. 1F1B it
    follows without a plan (the one that it keeps numbers the last rank's forwards from 1, and no
    one reads it), so for that the order is ``one_f_one_b``; the tests hold a run to it.
    """
    total = stages_in_all(name, ranks)
    _check(name, ranks, micro_batches, micro_batches)
    if name == "1F1B":
        return one_f_one_b(ranks, micro_batches)
    stages = [
        SimpleNamespace(
            stage_index=number, num_stages=total, group_size=ranks, group_rank=0, submod=None
        )
        for number in stages_of(name, 0, ranks)
    ]
    made = SCHEDULES[name](stages, micro_batches)
    return Schedule(
        name,
        total,
        micro_batches,
        tuple(
            tuple(
                tuple(
                    Work(part.computation_type.value, part.stage_index, part.microbatch_index)
                    for part in action.sub_actions or (action,)
                )
                for action in made.pipeline_order[rank]
                if action is not None and action.is_compute_op
            )
            for rank in range(ranks)
        ),
    )


def _check(name: str, ranks: int, micro_batches: int, rows: int) -> None:
    least = 2 * ranks if name == "DualPipeV" else ranks
    rounds = max(micro_batches // ranks, 1) if name == "ZB1P" else 1
    if micro_batches < least or micro_batches % rounds:
        raise DSV3Error(
            f"{name} cannot run so many micro-batches",
            where="micro_batches",
            found=micro_batches,
            expected=f"{least} or more for {ranks} ranks"
            if micro_batches < least
            else f"a multiple of {rounds}, the rounds that torch cuts it into",
        )
    if rows % micro_batches:
        raise DSV3Error(
            "a batch that is not cut evenly",
            where="micro_batches",
            found=f"{micro_batches} of {rows} rows",
            expected="a divisor of the number of rows",
        )
