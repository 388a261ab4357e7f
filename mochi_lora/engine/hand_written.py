"""The kernels of `engine.fused` where triton is installed, and whether a tensor can have them."""

import torch

try:
    from mochi_lora.engine import fused
except ImportError:  # torch's builds for CPUs and for Windows bring no triton
    fused = None  # type: ignore[assignment]

__all__ = ["fused", "has_kernels"]


def has_kernels(tensor: torch.Tensor) -> bool:
    """Whether the kernels run where `tensor` lies; elsewhere the formulas do."""
    return fused is not None and tensor.is_cuda
