"""Where a model lives, and what moving it may change.

A model's place is where its weights lie. Two more things depend on it: the group, whose
collectives need their tensors there, and the precision, which sums FP8 products in float64 on a
CPU and in float32 on a GPU. Were each to remember a device of its own, a model that was moved
would sum in one format with weights in another, or send from where nothing lies. So the model,
which knows where its weights are, tells both; this module is how.

``nn.Module`` moves a model by a function that it applies to every tensor, and does the same for
``half()`` and ``to(torch.bfloat16)``. Here, those would turn E4M3 codes into bfloat16 numbers
without their scales, and take from the router and the norms the bits that the precision promises.
A dtype is not changed by moving: it is chosen when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup

Function = Callable[[torch.Tensor], torch.Tensor]


def agree(
    group: TensorGroup | None, device: torch.device | str | None
) -> tuple[TensorGroup, torch.device]:
    """The group and the device of a new model; raises DSV3Error where they are two."""
    wanted = checked_device(device if device is not None else group.device if group else "cpu")
    group = group or TensorGroup.single(wanted)
    if group.device.type != wanted.type or (
        None not in (group.device.index, wanted.index) and group.device != wanted
    ):
        raise DSV3Error(
            "the model and its group are on two devices",
            where="device",
            found=f"{wanted} and the group's {group.device}",
            expected="one device",
            fix="Leave out device, or make the group there",
        )
    return group, wanted


def checked_device(device: torch.device | str) -> torch.device:
    """A device that is there. Raises DSV3Error for any other."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DSV3Error(
            "no such device here",
            where="device",
            found=f"{device}: {_first(error)}",
            fix='Use device="cpu"',
        ) from None


def check_move(model, fn: Function) -> torch.device:
    """Where ``fn`` puts the model's tensors; raises DSV3Error, before one is touched, for what
    is no move."""
    here = model.device
    dtypes = {tensor.dtype for tensor in [*model.parameters(), *model.buffers()]}
    try:
        after = {dtype: fn(torch.empty(0, dtype=dtype, device=here)) for dtype in dtypes}
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        fix = (
            "It has no weights yet: load_model(folder, device=...) gives it some"
            if here.type == "meta"
            else "It stays where it was"
        )
        raise DSV3Error(
            "the model cannot be moved", where=f"device {here}", found=_first(error), fix=fix
        ) from None
    wanted = {tensor.dtype for dtype, tensor in after.items() if tensor.dtype != dtype}
    # A model in bf16 is asked for bfloat16: that it is, with its wider norms and router.
    already = not model.precision.quantized and wanted == {model.precision.weights}
    if wanted and not already:
        raise DSV3Error(
            "a model's dtype is that of its precision and cannot be changed",
            where=f"precision {model.precision.name}",
            found=", ".join(sorted(map(str, wanted))),
            fix='Load it again with precision="fp8", "bf16" or "fp32"',
        )
    target = next(iter(after.values())).device
    if model.group.everyone.size > 1 and target != here:
        raise DSV3Error(
            "a model cut over several ranks stays where its group is",
            where="device",
            found=target,
            expected=here,
            fix="Load it on every rank with a group on that device",
        )
    return target


def keeping_dtypes(fn: Function, target: torch.device) -> Function:
    """``fn`` without what it does to dtypes, once that has been found to be nothing new."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
        return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(target)

    return move


def follow(model, device: torch.device) -> None:
    """Tell the group and every part of a model on ``device`` where it is now."""
    group = model.group
    if group.everyone.size == 1 and group.device != device:
        group = TensorGroup.single(device)
    for module in model.modules():
        if hasattr(module, "group"):
            module.group = group


def _first(error: Exception) -> str:
    """The first line of an error's text."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
