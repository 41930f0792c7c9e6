"""Pipeline schedules: in which order a rank works through its micro-batches (TR 3.2.1).

A pipeline cuts the model by depth. Stage s can only start on a micro-batch when stage s - 1 has
finished with it, and on the way back when stage s + 1 has; so at the start and at the end ranks
wait. That waiting is the *bubble*. A schedule is nothing but an order of work for each rank, and
the schedules below differ in that order alone:

* 1F1B: as few forward passes as it takes to reach the last stage, then one forward, one backward.
* ZB1P: the backward pass is cut in two. Its first half, the gradient of the input, is what the
  stage before waits for; the second, the gradient of the weights, W, nobody waits for, so it is
  put where the rank would be idle.
* DualPipe: micro-batches enter at both ends of the pipeline. Each rank holds a stage of either
  direction, so twice the parameters, and computes a forward of one together with a backward of
  the other: the pair's messages travel while the other's products are taken (TR 3.2.1, figure 5).
* DualPipeV: DualPipe folded in the middle. Half as many ranks, each with a stage of the way there
  and one of the way back, and one direction is enough.

An order is a list of steps for each rank; a step is one piece of work, or two that overlap. How
long they take and who waits for whom is for ``dsv3.parallel.timeline``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsv3.errors import DSV3Error


@dataclass(frozen=True)
class Work:
    """One piece of work on one micro-batch.

    kind: "F" forward, "B" whole backward, "I" gradient of the input only, "W" gradient of the
    weights that an "I" left over. stage: counted along the way of the micro-batch. direction: 0,
    or 1 for those that enter at the other end.
    """

    kind: str
    stage: int
    micro: int
    direction: int = 0


Step = tuple[Work, ...]
"""One or two pieces of work at a time."""


@dataclass(frozen=True)
class Schedule:
    """An order of work.

    name; stages: of a micro-batch's way; micro_batches: in all; orders: steps of each rank.
    """

    name: str
    stages: int
    micro_batches: int
    orders: tuple[tuple[Step, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.orders)

    @property
    def directions(self) -> int:
        return 1 + max(work.direction for order in self.orders for step in order for work in step)


def one_f_one_b(ranks: int, micro_batches: int) -> Schedule:
    """1F1B. Rank r runs ranks - 1 - r forwards ahead, then one forward and one backward in turn."""
    _check("1F1B", ranks, micro_batches)
    return Schedule(
        "1F1B",
        ranks,
        micro_batches,
        tuple(
            tuple(
                (Work(kind, rank, micro),) for kind, micro in _in_turn(ranks, rank, micro_batches)
            )
            for rank in range(ranks)
        ),
    )


def zb1p(ranks: int, micro_batches: int) -> Schedule:
    """ZB1P, of the zero-bubble family: the order that needs no more memory than 1F1B.

    As 1F1B, but a backward is only the gradient of the input; rank r is r weight gradients behind
    and catches up at the end, where it would wait.
    """
    _check("ZB1P", ranks, micro_batches)
    orders = []
    for rank in range(ranks):
        order, owed = [], []
        for kind, micro in _in_turn(ranks, rank, micro_batches):
            order.append((Work("F" if kind == "F" else "I", rank, micro),))
            if kind == "B":
                owed.append(micro)
                if len(owed) > rank:
                    order.append((Work("W", rank, owed.pop(0)),))
        order += [(Work("W", rank, micro),) for micro in owed]
        orders.append(tuple(order))
    return Schedule("ZB1P", ranks, micro_batches, tuple(orders))


def dualpipe(ranks: int, micro_batches: int) -> Schedule:
    """DualPipe in the order of the published implementation.

    Half of the micro-batches go each way. Raises DSV3Error unless both numbers are even and there
    are at least two micro-batches for each rank.
    """
    _check("DualPipe", ranks, micro_batches, even=True)
    orders = []
    for rank in range(ranks):
        # A rank of the second half does what its mirror image does, with the directions exchanged.
        second_half = rank >= ranks // 2
        place = ranks - 1 - rank if second_half else rank
        stages = (place, ranks - 1 - place)
        orders.append(
            _dual(place, ranks // 2, micro_batches // 2, stages, (second_half, not second_half))
        )
    return Schedule("DualPipe", ranks, micro_batches, tuple(orders))


def dualpipe_v(ranks: int, micro_batches: int) -> Schedule:
    """DualPipeV: rank r has the stages r and 2 * ranks - 1 - r of the one way.

    Raises DSV3Error for fewer than two micro-batches for each rank.
    """
    _check("DualPipeV", ranks, micro_batches)
    return Schedule(
        "DualPipeV",
        2 * ranks,
        micro_batches,
        tuple(
            _dual(rank, ranks, micro_batches, (rank, 2 * ranks - 1 - rank), (0, 0))
            for rank in range(ranks)
        ),
    )


SCHEDULES = {"1F1B": one_f_one_b, "ZB1P": zb1p, "DualPipe": dualpipe, "DualPipeV": dualpipe_v}


def fewest_micro_batches(name: str, ranks: int) -> int:
    """That a schedule can run: enough to fill the pipeline."""
    return max(1, ranks * {"1F1B": 0, "ZB1P": 1, "DualPipe": 2, "DualPipeV": 2}[name])


def _in_turn(ranks: int, rank: int, micro_batches: int) -> Iterator[tuple[str, int]]:
    """1F1B's order on one rank: ("F" or "B", number of the micro-batch)."""
    ahead = min(ranks - 1 - rank, micro_batches)
    yield from (("F", micro) for micro in range(ahead))
    for micro in range(micro_batches - ahead):
        yield "F", micro + ahead
        yield "B", micro
    yield from (("B", micro) for micro in range(micro_batches - ahead, micro_batches))


def _dual(
    place: int, half: int, each: int, stages: tuple[int, int], directions: tuple[int, int]
) -> tuple[Step, ...]:
    """The eight phases that DualPipe and DualPipeV share, on one rank.

    The rank has two stages, 0 and 1: ``stages`` and ``directions`` say which. place: how far it is
    from where stage 0's micro-batches enter, of ``half`` places; each: micro-batches of a stage.
    """
    done: dict[tuple[str, int], int] = {}
    owed: list[Work] = []
    order: list[Step] = []

    def work(kind: str, side: int) -> Work:
        number = done.get((kind[0].replace("I", "B"), side), 0)
        done[kind[0].replace("I", "B"), side] = number + 1
        made = Work(kind, stages[side], number, int(directions[side]))
        if kind == "I":
            owed.append(Work("W", made.stage, made.micro, made.direction))
        return made

    def run(*parts: tuple[str, int]) -> None:
        order.append(tuple(work(*part) for part in parts))

    def weights() -> None:
        order.append((owed.pop(0),))

    middle = place == half - 1
    for _ in range(2 * (half - 1 - place)):  # 1: stage 0 fills the pipeline
        run(("F", 0))
    for _ in range(place + 1):  # 2: stage 1 has work too
        run(("F", 0))
        run(("F", 1))
    for _ in range(half - 1 - place):  # 3: the first backwards; their weights fill the wait
        run(("I", 1))
        weights()
        run(("F", 1))
    for number in range(each - 2 * half + place + 1):  # 4: forward and backward overlap
        if number == 0 and middle:
            run(("F", 0))
            run(("B", 1))
        else:
            run(("F", 0), ("B", 1))
        run(("F", 1), ("B", 0))
    for _ in range(half - 1 - place):  # 5: stage 0 has no forward left
        run(("B", 1))
        run(("F", 1), ("B", 0))
    split = False
    for number in range(place + 1):  # 6: backwards alone; from the middle on, weights later
        split = split or (number == (place + 1) // 2 and place % 2 == 1)
        run(("I" if split else "B", 1))
        split = split or (number == (place + 1) // 2 and place % 2 == 0)
        run(("I" if split else "B", 0))
    for _ in range(half - 1 - place):  # 7: weights between the last backwards
        weights()
        run(("I", 0))
    while owed:  # 8: the weights that are left
        weights()
    return tuple(order)


def _check(name: str, ranks: int, micro_batches: int, even: bool = False) -> None:
    if ranks < 1 or (even and ranks % 2):
        raise DSV3Error(
            f"{name} cannot run on so many ranks",
            where="ranks",
            found=ranks,
            expected="an even number" if even else "1 or more",
        )
    at_least = fewest_micro_batches(name, ranks)
    if micro_batches < at_least or (even and micro_batches % 2):
        raise DSV3Error(
            f"{name} cannot run so many micro-batches",
            where="micro_batches",
            found=micro_batches,
            expected=f"{'an even number, ' if even else ''}{at_least} or more for {ranks} ranks",
        )
