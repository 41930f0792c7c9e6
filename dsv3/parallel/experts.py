"""Expert parallelism: each rank holds some routed experts whole, and tokens travel to them.

Of 256 experts a token uses 8, so it would be a waste to have all of them in one place. With the
experts shared out, two exchanges frame every MoE layer (TR 3.2.2):

* *dispatch*: each token's vector goes to the ranks that hold its experts;
* *combine*: what they made of it comes back, and is added up.

Two networks join the ranks, and the one between nodes is the slow one (``parallel.traffic``). So a
token crosses to a node once, however many of its experts are there: to the rank with the same
number on that node, which passes it on inside the node. The way back is the same in reverse: sums
are taken inside the node first, and one vector per node crosses. A rank applies the token's
weights itself, so that what travels back is a sum already. With node-limited routing at most M
nodes see a token, wherever its 8 experts are. (So it is in training and prefill; in decoding
DeepSeek sends straight to each expert's GPU, TR 3.4.2.)

What travels, at V3's width (d = 7,168): with FP8 products, codes and scales, 7,168 + 4 * 56 =
7,392 bytes a token and destination; back 2 * 7,168 = 14,336 in bf16, as in the paper. A sum that
was rounded on its way depends on how many ranks had a part in it, and so would the text; here sums
travel as they are kept unless ``combine`` says otherwise. Gloo knows no FP8, so vectors travel as
bytes.

All goes through torch.distributed's all-to-all over one process group. Ranks that have nothing for
each other exchange nothing: no groups are made for the two legs, since every new group opens new
connections that would have to prove themselves (``parallel.join``).

*Same tokens or own tokens.* In inference all ranks hold the same tokens: of each pass a rank takes
a share, and the results are gathered, so that all go on with identical numbers. In training each
has tokens of its own (``own_tokens``), and gradients travel the same ways back: the backward pass
of a dispatch is a combine, and the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dsv3.backward import without_backward
from dsv3.errors import DSV3Error
from dsv3.parallel.environment import Place, place
from dsv3.parallel.join import neighbours
from dsv3.parallel.replicas import Plan
from dsv3.parallel.tensor import TensorGroup
from dsv3.parallel.traffic import Topology, Traffic


@dataclass(frozen=True)
class Holding:
    """Which routed experts of one layer each rank holds.

    held: of each rank, its experts, in the order in which they lie in memory. A place there is a
    *slot*; slots are numbered through, ``width`` for each rank.
    """

    held: tuple[tuple[int, ...], ...]

    @staticmethod
    def even(experts: int, ranks: int) -> Holding:
        """An equal run of neighbours on each rank."""
        each = experts // ranks
        return Holding(tuple(tuple(range(r * each, (r + 1) * each)) for r in range(ranks)))

    @staticmethod
    def planned(plan: Plan) -> Holding:
        """By a plan for copies of busy experts; a second copy on one rank would be of no use."""
        return Holding(tuple(tuple(dict.fromkeys(plan.on(gpu))) for gpu in range(plan.gpus)))

    @cached_property
    def width(self) -> int:
        """Slots a rank."""
        return max(map(len, self.held))

    @cached_property
    def places(self) -> list[list[int]]:
        """Of each expert, the slots of its copies."""
        found: dict[int, list[int]] = {}
        for owner, experts in enumerate(self.held):
            for index, expert in enumerate(experts):
                found.setdefault(expert, []).append(owner * self.width + index)
        return [found[expert] for expert in range(len(found))]

    def slots(self, chosen: Int[Tensor, "n k"], rank: int = 0) -> Int[Tensor, "n k"]:
        """The slot for each choice of an expert, made on ``rank``.

        Of several copies of an expert, its choices take one after the other in turn, beginning
        with another one on each rank: on no rank do two copies' shares differ by more than one.
        """
        copies = [len(slots) for slots in self.places]
        most, at = max(copies), dict(device=chosen.device)
        if self.places == [[expert] for expert in range(len(copies))]:
            return chosen
        table = torch.tensor([(slots * most)[:most] for slots in self.places], **at)
        flat = chosen.flatten()
        ordered, order = flat.sort(stable=True)
        nth = torch.arange(len(flat), **at) - torch.searchsorted(ordered, ordered)
        turn = torch.empty_like(flat).scatter(0, order, nth + rank)
        return table[flat, turn % torch.tensor(copies, **at)[flat]].view(chosen.shape)


@dataclass(frozen=True)
class Leg:
    """One exchange of rows, seen from a rank.

    rows: how many I have; row: numbers of those that travel, by destination (one may travel to
    several); sent, received: rows to and from each rank, myself included.
    """

    rows: int
    row: Int[Tensor, " sent"]
    sent: list[int]
    received: list[int]


@dataclass(frozen=True)
class Arrived:
    """Tokens that came to a rank's experts.

    x: their vectors, in parts as they were sent; weights, slots: of all their choices, also those
    of other ranks' slots; legs: how they came.
    """

    x: tuple[Tensor, ...]
    weights: Float[Tensor, "n k"]
    slots: Int[Tensor, "n k"]
    legs: list[Leg]


@runtime_checkable
class Wire(Protocol):
    """How vectors are packed for a journey: of n rows, tensors of n rows, and back."""

    def pack(self, x: Float[Tensor, "n d"]) -> tuple[Shaped[Tensor, "n _"], ...]: ...

    def unpack(self, *parts: Shaped[Tensor, "n _"]) -> Float[Tensor, "n d"]: ...


class ExpertGroup:
    """The ranks among which the routed experts of a model are shared out.

    A model finds it in its group: ``Transformer(config, group=TensorGroup(experts=...))``. All
    else of that model is as the TensorGroup says: whole on each rank, or cut over some of them.

        ranks = TensorGroup.from_environment()                       # all who are there
        experts = ExpertGroup(ranks, per_node=8)                     # they hold the same tokens
        model = load_model(folder, group=TensorGroup(device=ranks.device, experts=experts))

    With ``own_tokens=True`` the model trains. Every rank calls ``model(its tokens)`` and
    ``backward()`` equally often, with as many tokens as it likes. What then stands in ``.grad``: of
    a routed expert the sum over the tokens of *all* ranks' losses (of a copy: those it was given);
    of everything else, over this rank's own, so that those remain to be added over the ranks.

    ranks: all of them; per_node: how many share a machine (default: all); own_tokens: see above;
    plans: copies of experts, one plan for all layers or by number of layer (default and for layers
    without one: equal runs of experts); combine: in which dtype sums travel (default: in which
    they are kept, float32 or wider).
    Traffic of this rank, by kind of link: dispatched and combined (vectors, on both ways of a
    gradient too), metadata (numbers of rows, slots, weights), gathered (results on all ranks).
    """

    def __init__(
        self,
        ranks: TensorGroup,
        *,
        per_node: int | None = None,
        own_tokens: bool = False,
        plans: Plan | Mapping[int, Plan] | None = None,
        combine: torch.dtype | None = None,
    ):
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size
        self.own_tokens, self.plans, self.combines_in = own_tokens, plans, combine
        self.topology = Topology(self.size, per_node or self.size)
        self.dispatched, self.combined, self.metadata, self.gathered = (
            Traffic(self.topology) for _ in range(4)
        )

    @property
    def bytes_sent(self) -> int:
        """All that this rank has sent for its experts."""
        all_ = (self.dispatched, self.combined, self.metadata, self.gathered)
        return sum(sum(traffic.bytes.values()) for traffic in all_)

    def holding(self, experts: int, layer: int | None = None) -> Holding:
        """Who holds which of a layer's experts. Raises DSV3Error for what does not fit."""
        plan = self.plans
        if isinstance(plan, Mapping):
            plan = None if layer is None else plan.get(layer)
        if plan is None:
            self.ranks.split(experts, "n_routed_experts")
            return Holding.even(experts, self.size)
        if plan.gpus != self.size or set(plan.experts) != set(range(experts)):
            raise DSV3Error(
                "a plan for other ranks or experts",
                where="plans" if layer is None else f"plan of layer {layer}",
                found=f"{len(set(plan.experts))} experts on {plan.gpus} GPUs",
                expected=f"{experts} experts on {self.size}",
            )
        return Holding.planned(plan)

    # Who computes what ---------------------------------------------------------------------------

    def share(self, x: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "mine ..."]:
        """Of rows that all ranks hold those that this one sends; the last may have none."""
        if self.own_tokens:
            return x
        each = -(-len(x) // self.size)
        return x[self.rank * each : (self.rank + 1) * each]

    def gather(self, y: Float[Tensor, "mine d"], rows: int) -> Float[Tensor, "rows d"]:
        """All rows on all ranks, from every rank's share."""
        if self.own_tokens or self.size == 1:
            return y
        each = -(-rows // self.size)
        for _ in range(self.size - 1):  # in a ring: every share but the next rank's passes by
            self.gathered.count(
                self.rank, (self.rank + 1) % self.size, each * y.shape[1] * y.itemsize
            )

        def gathered(y):
            padded = F.pad(y, (0, 0, 0, each - len(y)))
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self.ranks.process_group)
            return torch.cat(parts)[:rows]

        return without_backward(
            gathered,
            y,
            what="no gradient goes back through tokens that the ranks have shared out",
            fix="Train with ExpertGroup(..., own_tokens=True)",
        )

    # The two exchanges ---------------------------------------------------------------------------

    def dispatch(
        self,
        x: Sequence[Shaped[Tensor, "n _"]],
        weights: Float[Tensor, "n k"],
        chosen: Int[Tensor, "n k"],
        holding: Holding,
        wire: Wire | None = None,
    ) -> Arrived:
        """Bring my tokens to the ranks that hold their experts: first between nodes, then inside.

        x: what is sent of a token: its vector, or codes and scales; weights and chosen: of its k
        experts. wire: how a vector that has a gradient is packed for each way; the gradient comes
        back as it is.
        """
        slots, legs = holding.slots(chosen, self.rank), []
        t = self.topology
        mine, local = t.node(self.rank), t.local(self.rank)
        for targets, inside in (
            ([t.rank(node, local) for node in range(t.nodes)], False),
            ([t.rank(mine, number) for number in range(t.per_node)], True),
        ):
            if len(targets) == 1:
                continue
            owner = slots // holding.width
            node = owner // t.per_node
            # A choice that is not of this leg goes into a last column, which is cut off.
            place = (owner % t.per_node).where(node == mine, len(targets)) if inside else node
            wanted = torch.zeros(
                (len(slots), len(targets) + 1), dtype=torch.bool, device=slots.device
            ).scatter(1, place, True)[:, :-1]
            leg = self._leg(wanted, targets)
            x = _Exchange.apply(
                self, leg.sent, leg.received, (self.dispatched, self.combined), wire,
                *(part[leg.row] for part in x),
            )  # fmt: skip
            weights, slots = _Exchange.apply(
                self, leg.sent, leg.received, (self.metadata, self.metadata), None,
                weights[leg.row], slots[leg.row],
            )  # fmt: skip
            legs.append(leg)
        return Arrived(tuple(x), weights, slots, legs)

    def combine(self, y: Float[Tensor, "m d"], arrived: Arrived) -> Float[Tensor, "n d"]:
        """The sums over each of my tokens' experts, from what was made of those that arrived."""
        wide = y.dtype
        for leg in reversed(arrived.legs):
            (part,) = _Exchange.apply(
                self, leg.received, leg.sent, (self.combined, self.dispatched), None,
                y.to(self.combines_in or wide),
            )  # fmt: skip
            y = y.new_zeros(leg.rows, y.shape[1]).index_add(0, leg.row, part.to(wide))
        return y

    def _leg(self, wanted: Bool[Tensor, "n targets"], targets: Sequence[int]) -> Leg:
        """Who sends how many rows to whom, once every target has been told."""
        row = wanted.t().nonzero()[:, 1]
        sent = [0] * self.size
        for target, count in zip(targets, wanted.sum(0).tolist(), strict=True):
            sent[target] = count
        one = [int(rank in targets) for rank in range(self.size)]
        told = torch.tensor([[sent[target]] for target in targets], device=wanted.device)
        (heard,) = self.exchange((told,), one, one, self.metadata)
        received = [0] * self.size
        for source, count in zip(targets, heard.flatten().tolist(), strict=True):
            received[source] = count
        return Leg(len(wanted), row, sent, received)

    def exchange(
        self,
        parts: Sequence[Shaped[Tensor, "sent _"]],
        sent: list[int],
        received: list[int],
        traffic: Traffic,
    ) -> list[Shaped[Tensor, "received _"]]:
        """Rows to all ranks and rows from all ranks, in one all-to-all of bytes.

        parts: tensors of as many rows, sorted by destination, that travel side by side; sent,
        received: rows to and from each rank.
        """
        packed = [part.contiguous().view(torch.uint8) for part in parts]
        widths = [part.shape[1] for part in packed]
        out = packed[0].new_empty(sum(received), sum(widths))
        dist.all_to_all_single(
            out, torch.cat(packed, 1), received, sent, group=self.ranks.process_group
        )
        for target, count in enumerate(sent):
            traffic.count(self.rank, target, count * out.shape[1])
        return [
            piece.clone(memory_format=torch.contiguous_format).view(part.dtype)  # aligned anew
            for part, piece in zip(parts, out.split(widths, 1), strict=True)
        ]


def experts_of(group: TensorGroup) -> ExpertGroup | None:
    """Through whom a model of this group has its routed experts shared out; None: nobody does."""
    assert group.experts is None or isinstance(group.experts, ExpertGroup)
    return group.experts


def join_experts(device: str | None = None, *, tensor: int = 1) -> TensorGroup:
    """Join the ranks that a launcher started, with the experts shared out over all of them.

    All else of a model is whole on each rank, or with ``tensor`` cut over so many neighbours. For
    inference: all hold the same tokens. A launcher says which ranks share a machine. Raises
    DSV3Error as ``TensorGroup.from_environment`` does, and for ranks that ``tensor`` does not
    divide.
    """
    ranks = TensorGroup.from_environment(device)
    here = place() or Place(0, 1, 0)
    experts = ExpertGroup(ranks, per_node=here.local_size)
    check_tensor_ranks(ranks.size, tensor)
    if tensor in (1, ranks.size):
        members = ranks.process_group if tensor > 1 else None
    else:
        members = neighbours(here, tensor)
    return TensorGroup(ranks.rank % tensor, tensor, members, ranks.device, experts)


def check_tensor_ranks(experts: int, tensor: int) -> None:
    """Raises DSV3Error where ranks that share experts out cannot be taken ``tensor`` at a time."""
    if experts % tensor:
        fits = [number for number in range(1, experts + 1) if experts % number == 0]
        raise DSV3Error(
            "ranks that share experts out cannot be grouped to cut the rest of the model",
            where="--ep and --tp",
            found=f"{experts} ranks in groups of {tensor}",
            fix=f"With --ep {experts}, choose --tp among {fits}",
        )


class _Exchange(torch.autograd.Function):
    """``ExpertGroup.exchange`` with a way back for gradients: the same rows, the other way.

    traffic: what the forward pass counts in, and the backward pass. wire: packs the one part that
    there then is. Each rank walks back through its exchanges in the reverse order of the forward
    pass, also one that had nothing to send, so that all meet in the same.
    """

    @staticmethod
    def forward(ctx, group, sent, received, traffic, wire, *parts):
        ctx.group, ctx.sent, ctx.received, ctx.traffic = group, sent, received, traffic[1]
        ctx.has_gradient = [part.is_floating_point() for part in parts]
        if wire is None:
            out = group.exchange(parts, sent, received, traffic[0])
        else:
            packed = wire.pack(*parts)
            out = [wire.unpack(*group.exchange(packed, sent, received, traffic[0]))]
        ctx.mark_non_differentiable(*(x for x in out if not x.is_floating_point()))
        return tuple(out)

    @staticmethod
    def backward(ctx, *gradients: Any):
        floats = [g for g, has in zip(gradients, ctx.has_gradient, strict=True) if has]
        back = iter(ctx.group.exchange(floats, ctx.received, ctx.sent, ctx.traffic))
        return *[None] * 5, *(next(back) if has else None for has in ctx.has_gradient)
