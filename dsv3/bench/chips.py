"""What a GPU can do at best, by its name: for goals that are shares of a limit."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3.bench.peers import Missing


@dataclass(frozen=True)
class Chip:
    """memory: bytes a second of its HBM; fp8: FLOPs a second in E4M3, dense."""

    name: str
    memory: float
    fp8: float


# By the makers' data sheets.
CHIPS = (
    Chip("H100 PCIe", 2.0e12, 1513e12),
    Chip("H100", 3.35e12, 1979e12),
    Chip("H200", 4.8e12, 1979e12),
    Chip("H20", 4.0e12, 296e12),
    Chip("B200", 8.0e12, 4500e12),
)


def chip(device: torch.device) -> Chip:
    """The chip of a device. Raises Missing for one that is not in the table."""
    name = torch.cuda.get_device_name(device)
    found = next((chip for chip in CHIPS if chip.name in name), None)
    if found is None:
        raise Missing(f"the limits of {name} are not known here; add them to dsv3/bench/chips.py")
    return found
