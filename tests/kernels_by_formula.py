"""Stand-ins for the kernels of `engine.fused` on a CPU: called with the same arguments, they fill the same tensors by formula.

They prove the wiring around a kernel; the kernel itself is proven on a GPU (`test_gpu_fused.py`).
"""

# ruff: noqa: PLR0913, PLR0917

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mochi_lora.engine import residual
from mochi_lora.engine.fp8 import quantise_rows


class Kernel:
    """`kernel[grid](...)`; notes how it was launched."""

    def __init__(self, formula: Callable[..., None]) -> None:
        self.formula = formula
        self.programs: list[int] = []
        self.coded = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*tensors: Any, **how: Any) -> None:
            self.programs.append(grid[0])
            self.coded += how.get("CODES", False)
            self.formula(*tensors, **how)

        return launch


def residual_norm(x, y, gate, factor, total, normed, codes, scales, rows, size, eps, **how):
    assert x.shape[1:] == (rows, size) and size <= how["BLOCK"]  # noqa: PT018
    value = x
    if how["ADD"]:
        value = total.copy_(x + residual.norm(y, gate, eps))
    if how["NORM"]:
        normed.copy_(residual.norm(value, factor, eps))
    if how["CODES"]:
        made, scale = quantise_rows(normed.flatten(0, 1))
        codes.copy_(made)
        scales.copy_(scale)


def residual_norm_gradient(above, normed_above, total, y, gate, factor, dx, dy, rows, size, eps, **how):
    assert above.shape[1:] == (rows, size) and size <= how["BLOCK"]  # noqa: PT018
    grad = above.float()
    if how["NORM"]:
        grad = grad + _through_norm(normed_above, total, factor, eps)
        dx.copy_(grad)
    if how["ADD"]:
        dy.copy_(_through_norm(grad, y, gate, eps))


def _through_norm(grad: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, eps: float) -> torch.Tensor:
    """Written out: autograd is not to be had inside an operator."""
    x, grad = x.float(), grad.float() * factor.unsqueeze(1)
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scale * (grad - x * scale**2 * (grad * x).mean(-1, keepdim=True))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The residual stream's kernels as a GPU would have them."""
    made = SimpleNamespace(
        residual_norm=Kernel(residual_norm),
        residual_norm_gradient=Kernel(residual_norm_gradient),
        power_of_two=lambda size: 1 << (size - 1).bit_length(),
    )
    monkeypatch.setattr(residual, "fused", made)
    monkeypatch.setattr(residual, "_has_kernel", lambda _, *given: not any(tensor.requires_grad for tensor in given))
    return made
