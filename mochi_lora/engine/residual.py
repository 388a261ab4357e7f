"""A block's residual stream: normalised for what reads it, and what comes back added by a gated norm; one kernel on a GPU.

Shape legend: B = samples, S = tokens, W = width, M = B * S.

Written out, `norm` and `gated`, with a rounding to the stream's dtype after each; that is what runs without a GPU, and where
the modulation itself is trained. torch.compile makes kernels of the formula that move a third of what the memory could. Theirs
here read a token once, and write the e4m3 codes that the next product wants beside the values that its adapter wants.

Source: diffusers 0.42.1 `transformer_mochi.py`, `MochiTransformerBlock.forward`; genmoai/mochi @0c86aeb
`dit/joint_model/mod_rmsnorm.py` and `residual_tanh_gated_rmsnorm.py`.
"""

from typing import Any

import torch

from mochi_lora.engine.fp8 import Coded, empty_codes
from mochi_lora.engine.hand_written import fused, has_kernels

Normed = torch.Tensor | Coded
_WARPS = 8
_CODE_WARPS = 16  # with fewer, codes go through shared memory to be stored


def normalised(x: torch.Tensor, factor: torch.Tensor, eps: float, *, coded: bool) -> tuple[torch.Tensor, Normed]:
    """`x` [B, S, W] to go on with, and x / rms(x) * `factor` [B, W] float32, in x's dtype; with codes if they are wanted.

    Go on with the first of the two: its gradient and the norm's then come to x in one kernel.
    """
    if not _has_kernel(x, factor):
        return x, norm(x, factor, eps)
    total, *normed = _ResidualNorm.apply(x, None, None, factor, eps, coded)
    return total, _together(normed)


def added(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` + y / rms(y) * `gate`, [B, S, W] and [B, W] float32; in x's dtype."""
    if not _has_kernel(x, gate):
        return x + norm(y, gate, eps)
    return _ResidualNorm.apply(x, y, gate, None, eps, False)[0]  # noqa: FBT003 - apply takes no names


def added_and_normalised(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, factor: torch.Tensor, eps: float, *, coded: bool
) -> tuple[torch.Tensor, Normed]:
    """`added`, and its sum `normalised`."""
    if not _has_kernel(x, gate, factor):
        total = x + norm(y, gate, eps)
        return total, norm(total, factor, eps)
    total, *normed = _ResidualNorm.apply(x, y, gate, factor, eps, coded)
    return total, _together(normed)


def norm(x: torch.Tensor, factor: torch.Tensor, eps: float) -> torch.Tensor:
    """x / rms(x) * `factor`: [B, S, W] of any dtype, [B, W] float32 -> x's dtype; computed in float32."""
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return (values * factor.unsqueeze(1)).to(x.dtype)


def _has_kernel(x: torch.Tensor, *modulation: torch.Tensor) -> bool:
    return has_kernels(x) and not any(tensor.requires_grad for tensor in modulation)


def _together(normed: list[torch.Tensor]) -> Normed:
    return Coded(*normed) if len(normed) > 1 else normed[0]


class _ResidualNorm(torch.autograd.Function):
    """(x, y or None, gate or None, factor or None) -> the sum; with a factor its norm; if coded, codes and scales of that."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: torch.Tensor,
        y: torch.Tensor | None,
        gate: torch.Tensor | None,
        factor: torch.Tensor | None,
        eps: float,
        coded: bool,  # noqa: FBT001 - apply takes no names
    ) -> tuple[torch.Tensor, ...]:
        made = residual_norm(x, y, gate, factor, eps, coded)
        total, *normed = made if y is not None else (x.view_as(x), *made)
        ctx.save_for_backward(None if factor is None else total, y, gate, factor)
        ctx.eps = eps
        if coded:
            ctx.mark_non_differentiable(*normed[1:])
        return total, *normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        total, y, gate, factor = ctx.saved_tensors
        above, normed_above = gradients[0], gradients[1] if factor is not None else None
        made = residual_norm_gradient(above, normed_above, total, y, gate, factor, ctx.eps)
        dx = above if factor is None else made[0]
        return dx, None if y is None else made[-1], None, None, None, None


@torch.library.custom_op("mochi_lora::residual_norm", mutates_args=())
def residual_norm(
    x: torch.Tensor,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    factor: torch.Tensor | None,
    eps: float,
    coded: bool,  # noqa: FBT001 - an operator's argument
) -> list[torch.Tensor]:
    """The kernel forwards: the sum if there is a y; its norm if there is a factor; codes [M, W] and scales [M, 1] if coded."""
    x, made = x.contiguous(), _room(x, y, factor, coded=coded)
    total = made[0] if y is not None else x
    normed, codes, scale = (*made[y is not None :], x, x, x)[:3]  # x where nothing is written
    samples, tokens, width = x.shape
    fused.residual_norm[(samples * tokens,)](
        x, *_or(x, y, gate, factor), total, normed, codes, scale, tokens, width, eps,
        ADD=y is not None, NORM=factor is not None, CODES=coded, BLOCK=fused.power_of_two(width),
        num_warps=_CODE_WARPS if coded else _WARPS,
    )  # fmt: skip
    return made


residual_norm.register_fake(lambda x, y, _gate, factor, _eps, coded: _room(x, y, factor, coded=coded))


def _room(x: torch.Tensor, y: torch.Tensor | None, factor: torch.Tensor | None, *, coded: bool) -> list[torch.Tensor]:
    values = [x.new_empty(x.shape) for wanted in (y, factor) if wanted is not None]
    return [*values, *(empty_codes(x.flatten(0, 1)) if coded else ())]


@torch.library.custom_op("mochi_lora::residual_norm_gradient", mutates_args=())
def residual_norm_gradient(
    above: torch.Tensor,
    normed_above: torch.Tensor | None,
    total: torch.Tensor | None,
    y: torch.Tensor | None,
    gate: torch.Tensor | None,
    factor: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    """The kernel backwards: the gradient of x if there is a factor (else it is `above`), that of y if there is one."""
    above, made = above.contiguous(), _gradient_room(above, normed_above, y)
    samples, tokens, width = above.shape
    fused.residual_norm_gradient[(samples * tokens,)](
        above, *_or(above, normed_above, total, y, gate, factor), made[0], made[-1], tokens, width, eps,
        ADD=y is not None, NORM=factor is not None, BLOCK=fused.power_of_two(width), num_warps=_WARPS,
    )  # fmt: skip
    return made


residual_norm_gradient.register_fake(lambda above, normed_above, _total, y, *_: _gradient_room(above, normed_above, y))


def _gradient_room(above: torch.Tensor, *wanted: torch.Tensor | None) -> list[torch.Tensor]:
    return [above.new_empty(above.shape) for given in wanted if given is not None]


def _or(instead: torch.Tensor, *tensors: torch.Tensor | None) -> list[torch.Tensor]:
    """Contiguous tensors, `instead` for those that a kernel is not given and does not read."""
    return [instead if tensor is None else tensor.contiguous() for tensor in tensors]
