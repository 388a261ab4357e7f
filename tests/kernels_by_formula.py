"""Stand-ins for the kernels of `engine.fused` on a CPU: called with the same arguments, they fill the same tensors by formula.

They prove the wiring around a kernel; the kernel itself is proven on a GPU (`test_gpu_fused.py`).
"""

# ruff: noqa: PLR0913, PLR0917

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mochi_lora.engine import adapted, fp8, quantised, residual
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


def low_rank_sum(base, low, up, total, rows, size, rank, **how):
    assert (base.numel(), low.numel(), up.shape) == (rows * size, rows * rank, (size, rank))
    assert rank <= how["RANK"]
    total.copy_(base.double() + low.double() @ up.double().t())


def byte_product(x, codes, scales, result, size, all_rows, **how):
    assert (x.shape[1], codes.shape) == (size, (all_rows, size)) and size <= how["BLOCK"]  # noqa: PT018
    result.copy_(x.float() @ codes.float().t() * scales)


def row_codes(values, factors, codes, scales, size, **how):
    assert values.shape[1] == size <= how["BLOCK"]
    made, scale = quantise_rows(values * factors if how["FACTORS"] else values)
    codes.copy_(made)
    scales.copy_(scale)


def _through_norm(grad: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, eps: float) -> torch.Tensor:
    """Written out: autograd is not to be had inside an operator."""
    x, grad = x.float(), grad.float() * factor.unsqueeze(1)
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return scale * (grad - x * scale**2 * (grad * x).mean(-1, keepdim=True))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The kernels around a block's linears and on its residual stream, as a GPU would have them."""
    made = SimpleNamespace(
        residual_norm=Kernel(residual_norm),
        residual_norm_gradient=Kernel(residual_norm_gradient),
        low_rank_sum=Kernel(low_rank_sum),
        byte_product=Kernel(byte_product),
        row_codes=Kernel(row_codes),
        power_of_two=lambda size: 1 << (size - 1).bit_length(),
        cdiv=lambda size, length: -(-size // length),
    )
    for room in (residual, adapted, fp8, quantised):
        monkeypatch.setattr(room, "fused", made)
    monkeypatch.setattr(residual, "_has_kernel", lambda _, *given: not any(tensor.requires_grad for tensor in given))
    monkeypatch.setattr(adapted, "_has_kernel", lambda result, low: result.dtype == low.dtype)
    for room in (fp8, quantised):
        monkeypatch.setattr(room, "has_kernels", lambda _: True)
    return made
