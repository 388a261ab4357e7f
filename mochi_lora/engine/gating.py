"""The feed-forward layers of a block: a gated projection (SwiGLU: first half * silu(second half)), and one back to the width.

Shape legend: M = rows (tokens), N = hidden features, K = input features; the projection makes [M, 2N].

The gate's forward pass is plain torch, which compilers fuse with what follows. Its gradient is one kernel on a GPU: compiled
from the formula, it reads everything once for each half. Where both linears are bare fp8 ones, kernels hand on the codes that
the next product wants: what the gate makes, and the gradient of the wide layer, the largest tensor of a block, are never
written in bf16.
"""

from collections.abc import Iterable
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from diffusers.models.activations import SwiGLU
from torch import nn

from mochi_lora.engine.fp8 import Coded, Fp8Linear, coded, empty_codes, input_gradient, product, scaled_codes, values_of
from mochi_lora.engine.hand_written import fused, has_kernels


class GatedProjection(nn.Module):
    """diffusers' SwiGLU under the same names; the projection may be adapted or quantised."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N]."""
        hidden = self.proj(x)
        return _Gate.apply(hidden) if has_kernels(x) else gate(hidden)


class GatedFeedForward(nn.Module):
    """diffusers' FeedForward under the same names: gated projection, dropout, linear; both may be adapted or quantised."""

    def __init__(self, net: nn.ModuleList) -> None:
        super().__init__()
        self.net = net

    def forward(self, rows: torch.Tensor | Coded) -> torch.Tensor:
        """[..., K] -> [..., K]."""
        x = values_of(rows)
        first, last = self.net[0].proj, self.net[2]
        if has_kernels(x) and _is_bare(first) and _is_bare(last):
            _, codes, scale = rows if isinstance(rows, Coded) else coded(x)
            weights = first.weight, first.weight_scale, last.weight, last.weight_scale
            made = _Fp8FeedForward.apply(x.reshape(-1, x.shape[-1]), codes, scale, *weights, last.compute_dtype)
            return made.reshape(x.shape)
        for layer in self.net:
            x = layer(x)
        return x


def reads_codes(layer: nn.Module) -> bool:
    """Whether nothing but the codes of its input is read: both linears are bare fp8 ones."""
    return isinstance(layer, GatedFeedForward) and _is_bare(layer.net[0].proj) and _is_bare(layer.net[2])


def _is_bare(linear: Any) -> TypeGuard[Fp8Linear]:  # noqa: ANN401 - what a module list holds is not typed
    return isinstance(linear, Fp8Linear) and linear.bias is None


def install_gates(blocks: Iterable[Any]) -> None:
    """Put `GatedFeedForward` in place of the feed-forward layers of diffusers' Mochi blocks, once."""
    for block in blocks:
        for name in ("ff", "ff_context"):
            layer = getattr(block, name)  # the last block has no layer for its text
            if layer is not None and isinstance(layer.net[0], SwiGLU):
                assert layer.net[1].p == 0.0, "the fp8 path has no dropout between gate and linear"
                layer.net[0] = GatedProjection(layer.net[0].proj).train(layer.training)
                setattr(block, name, GatedFeedForward(layer.net).train(layer.training))


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


class _Fp8FeedForward(torch.autograd.Function):
    """Two `Fp8Linear`s without bias, the gate between them. Nothing but the wide layer is kept for the way back."""

    @staticmethod
    def forward(  # noqa: PLR0913, PLR0917 - apply takes no dataclass
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        codes: torch.Tensor,
        scale: torch.Tensor,
        first: torch.Tensor,
        first_scale: torch.Tensor,
        last: torch.Tensor,
        last_scale: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        hidden = product(codes, scale, first, first_scale, dtype)
        ctx.save_for_backward(hidden, first, first_scale, last, last_scale)
        ctx.dtype = x.dtype
        codes, scale = gate_codes(hidden)
        return product(codes, scale, last, last_scale, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:  # noqa: ANN401
        hidden, first, first_scale, last, last_scale = ctx.saved_tensors
        above = input_gradient(*scaled_codes(gradients[0], last_scale), last)
        codes, scale = gate_gradient_codes(above, hidden, first_scale)
        return input_gradient(codes, scale, first).to(ctx.dtype), *[None] * 7


@torch.library.custom_op("mochi_lora::gate_codes", mutates_args=())
def gate_codes(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`gate` of [M, 2N], in float32 and not rounded, as `quantise_rows` gives it: [M, N] e4m3, [M, 1]."""
    rows, size = hidden.shape[0], hidden.shape[1] // 2
    codes, scale = empty_codes(hidden, size)
    fused.gate_codes[(rows,)](hidden.contiguous(), codes, scale, size, BLOCK=fused.power_of_two(size), num_warps=8)
    return codes, scale


@gate_codes.register_fake
def _gate_codes_fake(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_codes(hidden, hidden.shape[1] // 2)


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
    """`gate_gradient` of [M, N] and [M, 2N] times `factors` [2N], in float32 and not rounded, as `quantise_rows` gives it.

    [M, 2N] e4m3, [M, 1].
    """
    codes, scale = empty_codes(hidden)
    rows, size = gradient.shape
    fused.gate_gradient_codes[(rows,)](
        gradient.contiguous(), hidden.contiguous(), factors, codes, scale, size, BLOCK=fused.power_of_two(size), num_warps=16
    )
    return codes, scale


@gate_gradient_codes.register_fake
def _gate_gradient_codes_fake(_: torch.Tensor, hidden: torch.Tensor, __: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return empty_codes(hidden)
