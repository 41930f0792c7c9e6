"""Time from arithmetic and memory, whichever takes longer: the roofline.

A processor that does F FLOPs and moves B bytes a second needs at least max(flops / F, bytes / B)
for its work. Work with fewer than F / B FLOPs a byte waits for memory, work with more waits for
arithmetic; F / B is the ``ridge_point``.
"""

from __future__ import annotations

from dataclasses import dataclass

BF16_BYTES = 2
# Dense BF16 FLOPs and bytes of memory traffic a second of one H800 (NVIDIA's data sheet).
H800_FLOPS, H800_BYTES = 989e12, 3.35e12
# Bytes of its memory: "80 GB" on the label are 81,559 MiB in the driver's report.
H800_MEMORY = 81_559 * 2**20


@dataclass(frozen=True)
class Cost:
    """FLOPs done and bytes moved; costs add up."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    @property
    def intensity(self) -> float:
        """FLOPs for each byte moved."""
        return self.flops / self.bytes

    def seconds(
        self, flops_per_second: float = H800_FLOPS, bytes_per_second: float = H800_BYTES
    ) -> float:
        """The least time, with arithmetic and memory fully overlapped."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


def ridge_point(
    flops_per_second: float = H800_FLOPS, bytes_per_second: float = H800_BYTES
) -> float:
    """FLOPs a byte at which arithmetic and memory take equally long: 295 for an H800 in BF16."""
    return flops_per_second / bytes_per_second


def linear(rows: int, inputs: int, outputs: int, itemsize: float = BF16_BYTES) -> Cost:
    """A product (rows, inputs) x (inputs, outputs): the weight is read once for all rows."""
    moved = rows * inputs + inputs * outputs + rows * outputs
    return Cost(2 * rows * inputs * outputs, moved * itemsize)
