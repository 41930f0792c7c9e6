"""What the kernels' wrappers share: where they can run, and what they accept."""

from __future__ import annotations

import torch
from triton import knobs

from dsv3.errors import DSV3Error

# Triton decides when a kernel is decorated, so the answer holds for the life of the process.
INTERPRETING: bool = knobs.runtime.interpret


def cdiv(size: int, width: int) -> int:
    """How many pieces of such a width cover the size."""
    return -(-size // width)


def power_of_two(size: int) -> int:
    """The smallest one that is not below a size of 1 or more: so wide are a kernel's rows."""
    return 1 << (size - 1).bit_length()


def is_hopper(device: torch.device) -> bool:
    """Whether kernels that are written for Hopper's memory unit and products can run there."""
    return INTERPRETING or torch.cuda.get_device_capability(device)[0] == 9


def fits_descriptor(*codes: torch.Tensor) -> bool:
    """Whether the memory unit can fetch tiles of these matrices: rows that are contiguous and
    start at multiples of 16 bytes."""
    return all(
        x.numel() > 0
        and x.stride(-1) == 1
        and all(stride % 16 == 0 for stride in x.stride()[:-1])
        and x.storage_offset() * x.itemsize % 16 == 0
        for x in codes
    )


def check_input(x: torch.Tensor, kernel: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a tensor that the kernel would misread or cannot reach."""
    if x.dtype not in dtypes:
        raise DSV3Error(
            "wrong dtype",
            where=kernel,
            found=x.dtype,
            expected=" or ".join(str(dtype) for dtype in dtypes),
        )
    if x.device.type != "cuda" and not INTERPRETING:
        raise DSV3Error(
            "Triton kernels need a GPU",
            where=kernel,
            found=f"a tensor on {x.device}",
            fix="Use backend='torch', or set TRITON_INTERPRET=1 before the start to "
            "run them, slowly, on the CPU.",
        )


def multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time, at least; a few in the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
