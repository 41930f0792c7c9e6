"""The latent cache in FP8: 656 bytes a token and layer at the released sizes, not 1,152.

    512 codes in E4M3 | 4 float32 scales, one for 128 codes | 64 bfloat16 of the rotated key

The latent has just left a norm, so its numbers are of one size and E4M3 holds them well. The
rotated key stays in bfloat16: it carries the position, every head reads it, and errors there move
scores directly. (FlashMLA's layout and sizes.)

The scales are powers of two. Code times scale is then a bfloat16 number exactly, so whoever reads
the cache, in whatever dtype, reads the same values: a kernel that multiplies bfloat16 on tensor
cores and a CPU that sums in float64. A float32 scale would be rounded once more in the first.
What is lost is lost when a token is stored, by its own numbers alone. So a text depends neither on
its neighbours in the batch nor on how it was cut into passes; it does depend on the choice of this
cache, which belongs to the model, like its precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dsv3.errors import DSV3Error
from dsv3.fields import BLOCK
from dsv3.fp8.formats import E4M3
from dsv3.fp8.quantize import ACTIVATION_BLOCK, dequantize_rows, quantize_activation, row_chunks


def check_kind(name: str, kind: str) -> None:
    """Raise DSV3Error for what is no kind of cache."""
    if kind not in ("plain", "fp8"):
        raise DSV3Error("unknown kind of cache", where=name, found=kind, expected="plain or fp8")


@dataclass(frozen=True)
class LatentFormat:
    """Where the bytes of a token lie. latent, rope: numbers of each, d_c and d_h^R.

    Codes are padded to a multiple of four bytes, where the scales begin.
    """

    latent: int
    rope: int

    @property
    def tiles(self) -> int:
        """Scales of a token."""
        return -(-self.latent // BLOCK)

    @property
    def scales_at(self) -> int:
        return -(-self.latent // 4) * 4

    @property
    def rope_at(self) -> int:
        return self.scales_at + 4 * self.tiles

    @property
    def bytes(self) -> int:
        """Of a token and layer."""
        return self.rope_at + 2 * self.rope

    def pack(self, new: Float[Tensor, "*lead width"]) -> UInt8[Tensor, "*lead bytes"]:
        """[c^KV; k^R] of each token, in any float dtype, to its bytes."""
        latent, rotated = new.split([self.latent, self.rope], -1)
        codes = quantize_activation(latent.contiguous(), "ue8m0")
        rows = new.new_zeros((*new.shape[:-1], self.bytes), dtype=torch.uint8)
        rows[..., : self.latent] = codes.data.view(torch.uint8)
        rows[..., self.scales_at : self.rope_at] = codes.scale.view(torch.uint8)
        rows[..., self.rope_at :] = rotated.to(torch.bfloat16).contiguous().view(torch.uint8)
        return rows

    def unpack(
        self, rows: UInt8[Tensor, "*lead bytes"], dtype: torch.dtype
    ) -> Float[Tensor, "*lead width"]:
        """The numbers, exactly, in bfloat16 or wider. A NaN or an infinity makes its tile NaN."""
        flat = rows.reshape(-1, self.bytes)
        codes = flat[:, : self.latent].view(E4M3)
        scale = flat[:, self.scales_at : self.rope_at].contiguous().view(torch.float32)
        values = torch.empty(codes.shape, dtype=torch.float32, device=rows.device)
        for some, tiles in row_chunks(codes.shape, 1):
            # A scale may be as large as 2^120, and decoding multiplies it by 256.
            part = dequantize_rows(
                codes[some].contiguous(), scale[tiles] / 256.0, ACTIVATION_BLOCK, out=values[some]
            )
            part.mul_(256.0)
        rotated = flat[:, self.rope_at :].contiguous().view(torch.bfloat16)
        both = torch.cat([values.to(dtype), rotated.to(dtype)], -1)
        return both.view(*rows.shape[:-1], self.latent + self.rope)


@dataclass(frozen=True, eq=False)
class PackedLatents:
    """What a packed cache holds of the keys of a pass, still packed."""

    rows: UInt8[Tensor, "b t bytes"]
    format: LatentFormat

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def to(self, dtype: torch.dtype) -> Float[Tensor, "b t width"]:
        """The numbers."""
        return self.format.unpack(self.rows, dtype)
