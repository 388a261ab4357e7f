"""Queries and keys made ready for attention: normalised, rotated, and joined with the text's, by one kernel on a GPU.

Shape legend: B = samples, V = visual tokens, L = padded text tokens, H = heads, D = head size.

Written out, this is `norm` (diffusers' MochiRMSNorm), `rotate` and `torch.cat`; that is what runs without a GPU. torch.compile
makes kernels of it that move a fifth of what the memory could, for it reads and writes every second number at a time. Here a
pair is read as it lies and taken apart in registers. Everything is computed in float32 and rounded where the formula rounds.
"""

from typing import Any

import torch
from torch import nn

from mochi_lora.engine.hand_written import fused, has_kernels

Pair = tuple[torch.Tensor, torch.Tensor]

_ROWS = 16  # heads of tokens that a program handles; 4 to 32 were tried on an H200
# Eight numbers a thread: with fewer warps Triton moves them between threads through shared memory, in single loads.
_WARPS = 8


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs, in float32: x [B, V, H, D], cos and sin [V, H, D/2]; keeps x's dtype.

    Source: genmoai/mochi @0c86aeb `dit/joint_model/rope_mixed.py`, `temporal_rope.py`.
    """
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    # Rounded before they are interleaved: eager mode moves half as many bytes, and the values are the same.
    turned = ((even * cos - odd * sin).to(x.dtype), (even * sin + odd * cos).to(x.dtype))
    return torch.stack(turned, dim=-1).flatten(-2)


def joint_queries_keys(q: torch.Tensor, k: torch.Tensor, text: Pair, norms: tuple[nn.Module, nn.Module], rotary: Pair) -> Pair:
    """q and k of all tokens [B, V + L, H, D], the visual ones normalised and rotated.

    q, k [B, V, H, D] as projected; text = their text parts [B, L, H, D], normalised; norms = diffusers' MochiRMSNorm of q
    and of k; rotary = cos and sin [V, H, D/2] float32. Where there is no kernel, or D is no power of two, by the formula.
    """
    size = q.shape[3]
    if not has_kernels(q) or size & (size - 1):
        made = (rotate(norm(x), *rotary) for x, norm in zip((q, k), norms, strict=True))
        return tuple(torch.cat([x, x_text], dim=1) for x, x_text in zip(made, text, strict=True))  # type: ignore[return-value]
    norm_q, norm_k = norms
    assert norm_q.eps == norm_k.eps
    return joint_pair(q, k, *text, norm_q.weight, norm_k.weight, *rotary, norm_q.eps)


@torch.library.custom_op("mochi_lora::joint_pair", mutates_args=())
def joint_pair(  # noqa: PLR0913, PLR0917 - an operator takes no dataclass
    q: torch.Tensor,
    k: torch.Tensor,
    q_text: torch.Tensor,
    k_text: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> Pair:
    """The kernel's forward half, shapes as `joint_queries_keys` has them. Weights [D] get no gradient: they are frozen."""
    batch, visual, heads, size = q.shape
    joint = (batch, visual + q_text.shape[1], heads, size)
    q_joint, k_joint = q.new_empty(joint), k.new_empty(joint)
    inputs = [tensor.contiguous() for tensor in (q, k, q_text, k_text, q_weight, k_weight, cos, sin)]
    rows, all_rows = visual * heads, joint[1] * heads
    grid = (fused.cdiv(all_rows, _ROWS), batch)
    fused.join[grid](*inputs, q_joint, k_joint, rows, all_rows, eps, SIZE=size, ROWS=_ROWS, num_warps=_WARPS)
    return q_joint, k_joint


@joint_pair.register_fake
def _joint_pair_fake(q: torch.Tensor, k: torch.Tensor, q_text: torch.Tensor, *_: object) -> Pair:
    joint = (q.shape[0], q.shape[1] + q_text.shape[1], *q.shape[2:])
    return q.new_empty(joint), k.new_empty(joint)


@torch.library.custom_op("mochi_lora::joint_pair_backward", mutates_args=())
def joint_pair_backward(  # noqa: PLR0913, PLR0917 - an operator takes no dataclass
    q_grad: torch.Tensor,
    k_grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> Pair:
    """Gradients of the visual q and k [B, V, H, D], from those of the joint ones [B, V + L, H, D]."""
    batch, visual, heads, size = q.shape
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    inputs = [tensor.contiguous() for tensor in (q_grad, k_grad, q, k, q_weight, k_weight, cos, sin)]
    rows, all_rows = visual * heads, q_grad.shape[1] * heads
    grid = (fused.cdiv(rows, _ROWS), batch)
    fused.part[grid](*inputs, dq, dk, rows, all_rows, eps, SIZE=size, ROWS=_ROWS, num_warps=_WARPS)
    return dq, dk


@joint_pair_backward.register_fake
def _joint_pair_backward_fake(_: torch.Tensor, __: torch.Tensor, q: torch.Tensor, k: torch.Tensor, *___: object) -> Pair:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:  # noqa: ANN401, ARG001 - torch's own signature
    q, k, _, _, q_weight, k_weight, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)


def _differentiate(ctx: Any, q_grad: torch.Tensor, k_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
    q, *others = ctx.saved_tensors
    dq, dk = joint_pair_backward(q_grad, k_grad, q, *others, ctx.eps)
    visual = q.shape[1]
    return dq, dk, q_grad[:, visual:], k_grad[:, visual:], *[None] * 5


joint_pair.register_autograd(_differentiate, setup_context=_keep)
