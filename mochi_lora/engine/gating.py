"""SwiGLU, the gate of the feed-forward layers: the projection's two halves, first * silu(second).

Shape legend: M = rows (tokens), N = hidden features, K = input features; the projection makes [M, 2N].

The forward pass is plain torch, which compilers fuse with what follows. Its gradient is one kernel on a GPU: compiled from
the formula, it reads everything once for each half. Where the projection is a bare fp8 linear, the kernel hands on the codes
that its product wants, and the gradient of the wide layer, the largest tensor of a block, is never written in bf16.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import SwiGLU
from torch import nn

from mochi_lora.engine.fp8 import Fp8Linear, empty_codes, input_gradient, product, quantise_rows

try:
    from mochi_lora.engine import fused
except ImportError:
    fused = None  # type: ignore[assignment]


class GatedProjection(nn.Module):
    """diffusers' SwiGLU under the same names; the projection may be adapted or quantised."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        if fused is None or not x.is_cuda:
            return gate(self.proj(x))
        if isinstance(self.proj, Fp8Linear) and self.proj.bias is None:
            rows = x.reshape(-1, x.shape[-1])
            gated = _Fp8Gate.apply(rows, self.proj.weight, self.proj.weight_scale, self.proj.compute_dtype)
            return gated.reshape(*x.shape[:-1], -1)
        return _Gate.apply(self.proj(x))


def install_gates(blocks: Iterable[Any]) -> None:
    """Put `GatedProjection` in SwiGLU's place in the feed-forward layers of diffusers' Mochi blocks, once."""
    for block in blocks:
        for layer in (block.ff, block.ff_context):  # the last block has no layer for its text
            if layer is not None and isinstance(layer.net[0], SwiGLU):
                layer.net[0] = GatedProjection(layer.net[0].proj).train(layer.training)


def gate(hidden: torch.Tensor) -> torch.Tensor:
    """[..., 2N] -> [..., N].

    Source: diffusers 0.42.1 `SwiGLU`; genmoai/mochi @0c86aeb `dit/joint_model/layers.py` has its halves the other way round.
    """
    first, second = hidden.chunk(2, dim=-1)
    return first * F.silu(second)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return gate(hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ANN401, ARG004
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        return gate_gradient(gradients[0], *ctx.saved_tensors)


class _Fp8Gate(torch.autograd.Function):
    """An `Fp8Linear` without bias, and the gate."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        weight: torch.Tensor,
        weight_scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        hidden = product(*quantise_rows(x), weight, weight_scale, dtype)
        ctx.save_for_backward(hidden, weight, weight_scale)
        ctx.dtype = x.dtype
        return gate(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        hidden, weight, weight_scale = ctx.saved_tensors
        codes, scale = gate_gradient_codes(gradients[0], hidden, weight_scale)
        return input_gradient(codes, scale, weight).to(ctx.dtype), None, None, None


@torch.library.custom_op("mochi_lora::gate_gradient", mutates_args=())
def gate_gradient(gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Gradient of `hidden` [..., 2N], from that of the gate's result [..., N]; in float32 and rounded once."""
    result = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    size = gradient.shape[-1]
    fused.gate_gradient[(gradient.numel() // size,)](
        gradient.contiguous(), hidden.contiguous(), result, size, BLOCK=fused.power_of_two(size), num_warps=16
    )
    return result


@gate_gradient.register_fake
def _gate_gradient_fake(_: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op("mochi_lora::gate_gradient_codes", mutates_args=())
def gate_gradient_codes(
    gradient: torch.Tensor, hidden: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate_gradient` of [M, N] and [M, 2N], times `factors` [2N], as `quantise_rows` gives it: [M, 2N] e4m3, [M, 1]."""
    codes, scale = empty_codes(hidden)
    rows, size = gradient.shape
    fused.gate_gradient_codes[(rows,)](
        gradient.contiguous(), hidden.contiguous(), factors, codes, scale, size, BLOCK=fused.power_of_two(size), num_warps=8
    )
    return codes, scale


@gate_gradient_codes.register_fake
def _gate_gradient_codes_fake(_: torch.Tensor, hidden: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_codes(hidden)
