"""What others made, imported when it is asked for, or missing with a way out.

None of them is needed by the package. transformers runs anywhere; the others are kernels for
Hopper, and come as wheels.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.fp8 import QuantizedTensor


class Missing(Exception):
    """A peer that is not here. Its text says how to get it."""


def transformers() -> Any:
    """The library, for its DeepSeek-V3. Raises Missing."""
    return _installed(
        ("transformers",), "in the checkout: pip install -c constraints.txt -e '.[book]'"
    )


def _installed(names: tuple[str, ...], way: str) -> ModuleType:
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise Missing(f"{names[0]} is not installed; {way}")


def scaled_mm(x: QuantizedTensor, w: QuantizedTensor) -> Callable[[], Tensor]:
    """torch's own block-scaled product, by cuBLAS: x (m, k) times w (n, k) transposed, in bfloat16.

    It wants rows in fours, the scales of x column by column, and those of w likewise, padded.
    Raises Missing where torch or the GPU has none.
    """
    kinds = getattr(F, "ScalingType", None)
    if not hasattr(F, "scaled_mm") or kinds is None:
        raise Missing(f"torch {torch.__version__} has no F.scaled_mm; 2.10 and later have")
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) != (9, 0):
        raise Missing("F.scaled_mm takes these scales on Hopper alone")
    m = len(x)
    codes = F.pad(x.data.view(torch.uint8), (0, 0, 0, -m % 4)).view(x.data.dtype)
    sx = F.pad(x.scale, (0, 0, 0, -m % 4)).t().contiguous().t()
    sw = F.pad(w.scale, (0, -w.scale.shape[1] % 4))

    def product() -> Tensor:
        return F.scaled_mm(
            codes, w.data.t(), sx, kinds.BlockWise1x128, sw.t(), kinds.BlockWise128x128,
            output_dtype=torch.bfloat16,
        )[:m]  # fmt: skip

    return product


def deep_gemm(x: QuantizedTensor, w: QuantizedTensor) -> Callable[[], Tensor]:
    """DeepSeek's kernels for the same product. Raises Missing."""
    library = _installed(
        ("deep_gemm", "sgl_deep_gemm"),
        "for Hopper: pip install sgl-deep-gemm==0.1.2 apache-tvm-ffi==0.1.9",
    )
    out = torch.empty(len(x), len(w), dtype=torch.bfloat16, device=x.device)
    scale = library.get_mn_major_tma_aligned_tensor(x.scale)

    def product() -> Tensor:
        library.fp8_gemm_nt((x.data, scale), (w.data, w.scale), out)
        return out

    return product


def flash_mla(latents: Tensor, queries: Tensor, values: int, scale: float) -> Callable[[], Tensor]:
    """DeepSeek's kernel for absorbed decoding. Raises Missing.

    latents: (b, t, latent) bfloat16, t a multiple of its pages of 64; queries: (b, 1, heads,
    latent); values: how much of a latent is the value.
    """
    library = _installed(
        ("flash_mla", "sgl_flash_mla"), "for Hopper: pip install sgl-flash-mla==1.0.0 --no-deps"
    )
    b, t, width = latents.shape
    pages = latents.reshape(-1, 64, 1, width)
    table = torch.arange(len(pages), dtype=torch.int32, device=latents.device).view(b, -1)
    lengths = torch.full((b,), t, dtype=torch.int32, device=latents.device)
    plan, splits = library.get_mla_metadata(lengths, queries.shape[2], 1)

    def attend() -> Tensor:
        return library.flash_mla_with_kvcache(
            queries, pages, table, lengths, values, plan, splits, softmax_scale=scale
        )[0]

    return attend
