"""Who computes in FP8 on a device: Triton's kernels, Numba's loops, or torch."""

from __future__ import annotations

from functools import cache

import torch

from dsv3.errors import DSV3Error


def pick_backend(device: torch.device, backend: str | None = None) -> str:
    """ "triton" where the GPU multiplies E4M3 itself (compute capability 8.9 and later, NVIDIA),
    "numba" on a CPU, else "torch"; so, too, where one is not installed. A backend asked for by name
    is kept, if there is one of that name.
    """
    if backend is not None:
        if backend not in ("torch", "numba", "triton"):
            raise DSV3Error("unknown FP8 backend", found=backend, expected="torch, numba or triton")
        if backend != "torch" and not _is_installed(backend):
            raise DSV3Error(
                f"{backend.capitalize()} is not installed",
                where=f"backend={backend!r}",
                fix=f"Install it ({_WHERE[backend]}), or use backend='torch'.",
            )
        if backend == "numba" and device.type != "cpu":
            raise DSV3Error(
                "Numba's loops run on a CPU",
                where="backend='numba'",
                found=f"a tensor on {device}",
                fix="Use backend='torch', or leave it out.",
            )
        return backend
    if device.type == "cpu":
        return "numba" if _is_installed("numba") else "torch"
    if device.type != "cuda" or torch.version.hip:
        return "torch"
    has_units = torch.cuda.get_device_capability(device) >= (8, 9)
    return "triton" if has_units and _is_installed("triton") else "torch"


_WHERE = {"triton": "Linux with an NVIDIA GPU", "numba": "pip install numba"}


@cache
def _is_installed(name: str) -> bool:
    # Import statements, for a compiler follows them, and a call of import_module it does not.
    try:
        if name == "triton":
            import triton  # noqa: F401
        else:
            import numba

            return not numba.config.DISABLE_JIT  # pyrefly: ignore[missing-attribute]
    except ImportError:
        return False
    return True
