"""A quantised matrix to be looked at: its blocks, and what other scales would make of each.

A block is measured against the values that the specimen holds. Those of activations are what was
quantised; those of stored weights are what codes and scales say, since nothing else is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from dsv3.fp8 import QuantizedTensor
from dsv3.fp8.formats import block_scale, round_e4m3


@dataclass(frozen=True, eq=False)
class Specimen:
    """A matrix as it was (rows, cols) in float32, and its codes and scales.

    exact: whether ``values`` are what was quantised; False where they are made of the codes.
    name: of the matrix, with its layer; axes: what a row and a column of it are.
    """

    name: str
    values: Float32[Tensor, "rows cols"]
    quantized: QuantizedTensor
    exact: bool
    axes: tuple[str, str]

    @cached_property
    def largest(self) -> float:
        """max |value| of the whole matrix."""
        return float(self.values.abs().max())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        rows, cols = self.quantized.scale.shape
        return rows, cols

    def spans(self, place: tuple[int, int]) -> tuple[range, range]:
        """The rows and the columns of the matrix that a block holds; the last ones may be few."""
        sizes, blocks = self.values.shape, self.quantized.block
        rows, cols = (
            range(at * block, min((at + 1) * block, size))
            for at, block, size in zip(place, blocks, sizes)
        )
        return rows, cols

    def block(self, place: tuple[int, int]) -> Block:
        rows, cols = self.spans(place)
        inside = slice(rows.start, rows.stop), slice(cols.start, cols.stop)
        values = self.values[inside]
        scale = self.quantized.scale[place]
        power = block_scale(values.abs().max(), "ue8m0")
        whole = block_scale(torch.tensor(self.largest), "float32")
        scales = {"own": scale, "ue8m0": power, "tensor": whole}
        return Block(values, self.quantized.data[inside].float(), scales, self.exact)


@dataclass(frozen=True, eq=False)
class Block:
    """values, codes: (rows, cols) float32, codes as the numbers they stand for; scales: by name."""

    values: Float32[Tensor, "rows cols"]
    codes: Float32[Tensor, "rows cols"]
    scales: dict[str, Float[Tensor, ""]]
    exact: bool

    def rounded(self, name: str) -> Float32[Tensor, "rows cols"]:
        """What becomes of the values under a scale."""
        if name == "own":
            return self.codes * self.scales["own"]
        scale = self.scales[name]
        return round_e4m3((self.values / scale).contiguous()) * scale

    def errors(self, name: str) -> Float32[Tensor, "rows cols"]:
        """|new - old| / |old| of each value; 0 where the old one is 0."""
        old = self.values.abs()
        return torch.where(old > 0, (self.rounded(name) - self.values).abs() / old, 0.0)

    def error(self, name: str) -> float:
        """Relative error of the block: the norm of what is off over the norm of what was."""
        norm = float(self.values.norm())
        return float((self.rounded(name) - self.values).norm()) / norm if norm else 0.0

    def worst(self, name: str) -> tuple[int, int]:
        """Row and column of the value with the largest relative error; of those that are equally
        far off, which is what all that become 0 are, the largest."""
        errors = self.errors(name)
        sizes = torch.where(errors == errors.max(), self.values.abs(), -1.0)
        row, col = divmod(int(sizes.argmax()), self.values.shape[1])
        return row, col

    def lost(self, name: str) -> int:
        """How many values become 0 that were not."""
        return int(((self.rounded(name) == 0) & (self.values != 0)).sum())

    @cached_property
    def exponents(self) -> Int[Tensor, "rows cols"]:
        """Exponent fields of the codes, 0 to 15; -1 for the zeros, subnormals have 0."""
        size = self.codes.abs()
        fields = size.log2().floor().clamp(min=-7).to(torch.int64) + 7
        return torch.where(size == 0, -1, fields)
