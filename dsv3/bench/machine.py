"""On what, and with which versions, something was measured."""

from __future__ import annotations

import importlib.metadata
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

import dsv3
from dsv3.machine import cores

# Units that change how fast a product is: torch's name of the question, ours of the answer.
_UNITS = {
    "_is_avx2_supported": "avx2",
    "_is_avx512_supported": "avx512",
    "_is_avx512_bf16_supported": "avx512_bf16",
    "_is_amx_tile_supported": "amx",
}
_PACKAGES = ("numba", "triton", "transformers", "sgl-deep-gemm", "sgl-flash-mla")


def described() -> dict[str, object]:
    """The machine and the versions; None for a package that is not installed."""
    asked = {unit: getattr(torch.cpu, name, None) for name, unit in _UNITS.items()}
    told: dict[str, object] = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "units": [unit for unit, ask in asked.items() if ask is not None and ask()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "dsv3": dsv3.__version__,
        "torch": torch.__version__,
        **{name: version(name) for name in _PACKAGES},
    }
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_properties(0)
        told |= {
            "gpu": chip.name,
            "gpu_gb": round(chip.total_memory / 1e9),
            "capability": f"{chip.major}.{chip.minor}",
            "multiprocessors": chip.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return told


def cpu_model() -> str:
    """The processor's name, as the system has it."""
    told = Path("/proc/cpuinfo")
    if told.exists():
        for line in told.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_words(told: dict[str, object]) -> str:
    """Two lines for people."""
    units = ", ".join(told["units"]) or "no wide units"  # type: ignore[arg-type]
    chip = f"{told['gpu']} ({told['gpu_gb']} GB, CUDA {told['cuda']}), " if "gpu" in told else ""
    packages = ", ".join(
        f"{name} {told[name] or 'missing'}" for name in ("torch", "triton", "transformers")
    )
    return (
        f"{chip}{told['cpu']}, {told['cores']} cores, {told['threads']} threads, "
        f"{told['instructions']} ({units})\n"
        f"{told['date']}, dsv3 {told['dsv3']}, Python {told['python']}, {packages}"
    )
