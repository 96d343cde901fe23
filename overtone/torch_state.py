"""What torch is doing at the moment, which only interfaces of its own tell; each is looked at here and nowhere else."""

from __future__ import annotations

import torch
from torch import Tensor

PRIVATE_NAMES = ("_are_functorch_transforms_active", "_get_dispatch_mode", "_TorchDispatchModeKey")
"""Of `torch._C`."""


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap) calls, whose tensors have no memory."""
    return bool(torch._C._are_functorch_transforms_active())


def is_recorded() -> bool:
    """Whether new tensors have no values, or a graph is recorded, which would not see what C++ does."""
    modes = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in (modes.FAKE, modes.PROXY))


def in_autocast_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would make of the arguments of F.linear."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
