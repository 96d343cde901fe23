"""The ways in which the loss is worked out. `choose` is asked once a call; what it gives is used throughout."""

from __future__ import annotations

from torch import Tensor, compiler

from overtone.kernels.cpu import CpuKernel
from overtone.kernels.kernel import Clip, Fit, Kernel, Target
from overtone.kernels.torch import TorchKernel

__all__ = ["CPU", "TORCH", "Clip", "Fit", "Kernel", "Target", "choose"]

CPU = CpuKernel()
TORCH = TorchKernel()


def choose(logits: Tensor) -> Kernel:
    """The kernel for these logits ``(N, V)``.

    While torch.compile traces, whole nodes for its graph; for plain tensors in the memory of a CPU, C++; for everything
    else (other devices, subclasses, transforms, strides, an installation without C++) PyTorch's operations.
    """
    if compiler.is_compiling():
        from overtone.kernels.graph import GRAPH  # imported while it traces: the operators are registered then

        return GRAPH
    return CPU if CPU.serves(logits) else TORCH
