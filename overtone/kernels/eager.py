"""The kernels that work a loss out at once, and which of them whole logits get."""

from __future__ import annotations

from torch import Tensor

from overtone.kernels.cpu import CpuKernel
from overtone.kernels.kernel import KernelOfParts
from overtone.kernels.torch import TorchKernel

CPU = CpuKernel()
TORCH = TorchKernel()


def choose_eager(logits: Tensor) -> KernelOfParts:
    """C++ for plain tensors ``(N, V)`` in the memory of a CPU, PyTorch's operations for everything else.

    Everything else: other devices, subclasses, transforms, strides, an installation without C++.
    """
    return CPU if CPU.serves(logits) else TORCH
