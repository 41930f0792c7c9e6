"""What ranks send, counted by the kind of link it crosses.

Two networks join the GPUs of a cluster. Inside a machine, a *node*, eight H800 talk over NVLink at
about 160 GB/s; between nodes each has InfiniBand at about 50 GB/s, 3.2 times slower (TR 3.2.2).
So a byte has two prices, and a count that leaves out which link it took says little.

``Topology`` says which ranks are on one node, ``Traffic`` keeps the count, and the functions
below say what a collective has to send, in bytes a rank, by the algorithms that reach the least:
rings for sums and gathers, a chain for a broadcast, direct messages for all-to-all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv3.errors import DSV3Error

INSIDE, BETWEEN = "inside", "between"


@dataclass(frozen=True)
class Topology:
    """Which ranks share a node: ranks 0 to per_node - 1 the first, and so on.

    Raises DSV3Error where the nodes would not be equally full.
    """

    ranks: int
    per_node: int

    def __post_init__(self):
        if self.per_node < 1 or self.ranks < 1 or self.ranks % self.per_node:
            raise DSV3Error(
                "nodes that cannot be",
                where="per_node",
                found=f"{self.per_node} of {self.ranks} ranks",
                expected="a divisor of the number of ranks",
            )

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node

    def node(self, rank: int) -> int:
        """The node that a rank is on."""
        return rank // self.per_node

    def local(self, rank: int) -> int:
        """Its number on that node."""
        return rank % self.per_node

    def rank(self, node: int, local: int) -> int:
        """The rank at that place."""
        return node * self.per_node + local

    def link(self, a: int, b: int) -> str | None:
        """The kind of link from a to b: "inside" a node or "between" nodes; None to oneself."""
        if a == b:
            return None
        return INSIDE if self.node(a) == self.node(b) else BETWEEN


@dataclass
class Traffic:
    """Bytes and messages that a rank has sent, by kind of link; what it keeps costs nothing."""

    topology: Topology
    bytes: dict[str, int] = field(default_factory=lambda: {INSIDE: 0, BETWEEN: 0})
    messages: dict[str, int] = field(default_factory=lambda: {INSIDE: 0, BETWEEN: 0})

    def count(self, source: int, target: int, nbytes: int) -> None:
        """Add one message; an empty one is none."""
        link = self.topology.link(source, target)
        if link is not None and nbytes:
            self.bytes[link] += nbytes
            self.messages[link] += 1

    def reset(self) -> None:
        """Begin again at nothing."""
        for counts in (self.bytes, self.messages):
            counts.update({INSIDE: 0, BETWEEN: 0})


def all_reduce_bytes(nbytes: float, ranks: int) -> float:
    """Sum of a tensor of nbytes, whole on every rank: 2 (N-1)/N of it. A reduce-scatter, then an
    all-gather."""
    return 2 * (ranks - 1) / ranks * nbytes


def reduce_scatter_bytes(nbytes: float, ranks: int) -> float:
    """Sum of a tensor of nbytes, an N-th on each rank: (N-1)/N of it."""
    return (ranks - 1) / ranks * nbytes


def all_gather_bytes(nbytes: float, ranks: int) -> float:
    """A tensor of nbytes, of which each rank has an N-th, whole on every rank: (N-1)/N of it."""
    return (ranks - 1) / ranks * nbytes


def broadcast_bytes(nbytes: float, ranks: int) -> float:
    """A tensor of nbytes from one rank to all, along a chain: all of it on each link; the last
    rank sends nothing, so (N-1)/N of it on average."""
    return (ranks - 1) / ranks * nbytes


def all_to_all_bytes(nbytes: float, ranks: int) -> float:
    """An N-th of a tensor of nbytes to every rank, one of them oneself: (N-1)/N of it."""
    return (ranks - 1) / ranks * nbytes
