"""Linears adapted by LoRA: one down-projection for all that read the same input, and one kernel for the sum.

Shape legend: K = input features, N = output features, r = rank, X = any leading dimensions.

An adapter's products are bound by memory. q, k and v of a stream read the same input, in the forward pass and for the
gradient of their A, and each adds a tensor as large to the input's gradient; side by side they do each of these once. The
strength goes to the r columns, not to the N, whose gradient would be written once more for it; and the product with B is
added to the base's result as it is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

from mochi_lora.engine.fp8 import Coded, Fp8Linear, through, values_of
from mochi_lora.engine.hand_written import fused, has_kernels

_MOST_RANK = 64  # beyond it the product is no longer bound by memory
_DTYPES = (torch.bfloat16, torch.float16)  # in float32 the product has no tensor cores, and a tile does not fit the registers
_ROWS, _COLUMNS = 64, 128  # of the sum's tiles


@dataclass(frozen=True)
class _Factors:
    """An adapter of one linear: `base(x) + scale * up @ down @ x`."""

    base: nn.Module
    down: torch.Tensor  # A [r, K]
    up: torch.Tensor  # B [N, r]
    scale: float


def takes_codes(layers: Sequence[nn.Module]) -> bool:
    """Whether any of `layers`, adapted or not, multiplies codes of its input."""
    return any(isinstance(layer.get_base_layer() if isinstance(layer, Linear) else layer, Fp8Linear) for layer in layers)


def project(layers: Sequence[nn.Module], rows: torch.Tensor | Coded) -> list[torch.Tensor]:
    """What each of `layers` makes of the same values x [..., K]: [..., N] each.

    PEFT's sum, but for its roundings and the order of the additions in the input's gradient. Layers that hold anything but
    one plain adapter (none, several, DoRA, dropout in training, merged or switched off) are called as they are.
    """
    found = [_plain_factors(layer) for layer in layers]
    downs = [factors.down for factors in found if factors is not None]
    if not downs:
        return [through(layer, rows) for layer in layers]
    x, down = values_of(rows), torch.cat(downs)
    # PEFT takes x to A's float32; autocast would take it back to bf16.
    same = x if torch.is_autocast_enabled(x.device.type) else x.to(down.dtype)
    low = iter(F.linear(same, down).split([len(part) for part in downs], dim=-1))
    pairs = zip(layers, found, strict=True)
    return [through(layer, rows) if factors is None else _adapted(factors, rows, next(low)) for layer, factors in pairs]


def _adapted(factors: _Factors, rows: torch.Tensor | Coded, low: torch.Tensor) -> torch.Tensor:
    """`low` = A x [..., r]."""
    result, low = through(factors.base, rows), low * factors.scale
    if _has_kernel(result, low):
        return _LowRankSum.apply(result, low, factors.up.to(low.dtype))
    return (result + F.linear(low, factors.up)).to(result.dtype)


def _has_kernel(result: torch.Tensor, low: torch.Tensor) -> bool:
    same = result.dtype == low.dtype and low.dtype in _DTYPES
    return has_kernels(result) and same and low.shape[-1] <= _MOST_RANK


class _LowRankSum(torch.autograd.Function):
    """`base` [X, N] + `low` [X, r] `up`.T, all of one dtype."""

    @staticmethod
    def forward(base: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return low_rank_sum(base, low, up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ANN401, ARG004
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        (above,), (low, up) = gradients, ctx.saved_tensors
        of_low = above @ up if ctx.needs_input_grad[1] else None
        of_up = above.flatten(0, -2).t() @ low.flatten(0, -2) if ctx.needs_input_grad[2] else None
        return above if ctx.needs_input_grad[0] else None, of_low, of_up


@torch.library.custom_op("mochi_lora::low_rank_sum", mutates_args=())
def low_rank_sum(base: torch.Tensor, low: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The kernel: base [X, N] + low [X, r] up [N, r].T, summed in float32 and rounded once to their dtype."""
    base, total = base.contiguous(), torch.empty_like(base, memory_format=torch.contiguous_format)
    size, rank = up.shape
    rows = base.numel() // size
    fused.low_rank_sum[(fused.cdiv(size, _COLUMNS), fused.cdiv(rows, _ROWS))](
        base, low.contiguous(), up.contiguous(), total, rows, size, rank,
        RANK=max(16, fused.power_of_two(rank)), ROWS=_ROWS, COLUMNS=_COLUMNS,
    )  # fmt: skip
    return total


@low_rank_sum.register_fake
def _low_rank_sum_fake(base: torch.Tensor, _: torch.Tensor, __: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(base, memory_format=torch.contiguous_format)


def _plain_factors(layer: Any) -> _Factors | None:  # noqa: ANN401 - PEFT's attributes are not typed
    """The layer's only adapter, where PEFT's own forward pass would add nothing but its two products; else None.

    Source: peft 0.21.2 `tuners/lora/layer.py`, `Linear.forward`.
    """
    if not isinstance(layer, Linear) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    (name,) = names
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if down.bias is not None or up.bias is not None or (dropout.training and not isinstance(dropout, nn.Identity)):
        return None
    return _Factors(layer.get_base_layer(), down.weight, up.weight, layer.scaling[name])
