"""Mochi's joint attention over visual and text tokens: one `attend`, and the processor that feeds it.

Shape legend: B = samples, S = tokens (visual first, text last), V = visual tokens, L = padded text tokens, H = heads,
D = head size.

diffusers' own processor (`MochiAttnProcessor2_0`, 0.42.1) calls `nonzero` on the text mask in every block: a device
synchronisation and a graph break 48 times per forward. Here the valid lengths are host integers, known from the collate.
It also ignores `set_attention_backend`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import MochiTransformer3DModel

from mochi_lora.engine import kernels
from mochi_lora.engine.adapted import project
from mochi_lora.engine.fp8 import Coded
from mochi_lora.engine.kernels import Attention
from mochi_lora.engine.rotary import joint_queries_keys
from mochi_lora.errors import UserError
from mochi_lora.parallel.context import ContextRanks

_TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 3e-2}  # of the check; float32 may run as TF32
_CHECKED_TOKENS = 288  # FlashAttention-4 compiles variants of their own below 129


def host_lengths(lengths: Sequence[int]) -> torch.Tensor:
    """Valid lengths as int64 [B] on the host: made outside a compiled function, their values guard nothing in it."""
    return torch.tensor(lengths, dtype=torch.int64, device="cpu")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor | Sequence[int] | None,
    attention: Attention = "auto",
    *,
    before: int = 0,
) -> torch.Tensor:
    """Attention of every valid token to every valid token, without a mask tensor on any kernel.

    q, k, v [B, S, H, D] of one dtype; `before + lengths[b]` of the S tokens are valid, the rest is padding at the end (None:
    all are valid; a tensor is int64 [B] on the host). Padding is neither attended nor attends: its rows of the result
    [B, S, H, D] are zero. Raises RuntimeError where the kernel refuses such tensors, UserError where it is not installed.
    """
    if lengths is None:
        lengths = torch.full((q.shape[0],), q.shape[1] - before, dtype=torch.int64, device="cpu")
    elif not isinstance(lengths, torch.Tensor):
        lengths = host_lengths(lengths)
    return kernels.attention(q, k, v, lengths, before, attention)[0]


class JointAttention:
    """Attention processor of `MochiTransformer3DModel`; the block passes valid text lengths where stock passes a mask."""

    def __init__(self, attention: Attention, context: ContextRanks | None = None) -> None:
        """`context`: the visual stream is this rank's part of the tokens, the text stream whole."""
        self.attention = attention
        self.context = context

    def __call__(
        self,
        attn: Any,  # noqa: ANN401 - diffusers' MochiAttention
        hidden_states: torch.Tensor | Coded,
        encoder_hidden_states: torch.Tensor | Coded,
        attention_mask: torch.Tensor | Sequence[int],
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, V, visual width], [B, L, text width], valid text lengths -> the same two streams after attention.

        Under a context V counts this rank's tokens. The lengths are host integers, or a tensor as `host_lengths` makes it.
        """
        if not isinstance(attention_mask, torch.Tensor):
            attention_mask = host_lengths(attention_mask)
        elif attention_mask.dtype != torch.int64 or attention_mask.dim() != 1:
            message = "this transformer attends by host lengths; call it through mochi_lora.model.transformer.VelocityModel"
            raise TypeError(message)
        visual, text = hidden_states, encoder_hidden_states
        heads = (attn.heads, -1)
        q, k, v = (made.unflatten(2, heads) for made in project((attn.to_q, attn.to_k, attn.to_v), visual))
        text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        q_text, k_text, v_text = (made.unflatten(2, heads) for made in project(text_layers, text))
        q_text, k_text = attn.norm_added_q(q_text), attn.norm_added_k(k_text)
        norms = (attn.norm_q, attn.norm_k)
        if self.context is None:
            q, k = joint_queries_keys(q, k, (q_text, k_text), norms, image_rotary_emb)
        else:  # the text joins when the visual tokens have been exchanged
            q, k = joint_queries_keys(q, k, (q_text[:, :0], k_text[:, :0]), norms, image_rotary_emb)
            q, k, v = self.context.to_heads(torch.stack([q, k, v]))
            q_text, k_text, v_text = (self.context.own_heads(part) for part in (q_text, k_text, v_text))
            q, k = torch.cat([q, q_text], dim=1), torch.cat([k, k_text], dim=1)
        before = v.shape[1]
        v = torch.cat([v, v_text], dim=1)
        joint = attend(q, k, v, attention_mask, self.attention, before=before)
        if self.context is not None:
            joint = self.context.to_tokens(joint, before)
        joint = joint.flatten(2)
        visual, text = joint.split_with_sizes((joint.shape[1] - q_text.shape[1], q_text.shape[1]), dim=1)
        (visual,) = project((attn.to_out[0],), visual)
        if hasattr(attn, "to_add_out"):  # the last block discards its text stream
            (text,) = project((attn.to_add_out,), text)
        return visual, text


def install_attention(transformer: MochiTransformer3DModel, attention: Attention, context: ContextRanks | None = None) -> None:
    """Give every block our processor with the chosen kernel."""
    for block in transformer.transformer_blocks:
        block.attn1.processor = JointAttention(attention, context)


def check_attention(attention: Attention, device: torch.device, dtype: torch.dtype, head_size: int, heads: int = 2) -> None:
    """Run the kernel once on a small input. Raises UserError, which says `auto` is the way out, if it is of no use here."""
    reason = attention_refusal(attention, device, dtype, head_size, heads)
    if reason is not None:
        message = f"engine.attention: {attention} {reason}; set it to auto"
        raise UserError(message)


def attention_refusal(attention: Attention, device: torch.device, dtype: torch.dtype, head_size: int, heads: int) -> str | None:
    """Why the kernel is of no use for such heads, put to the test on a small batch of mixed lengths; None if it is.

    The result and the gradients are held against the formula, not only looked at for being finite: Genmo's code avoids cuDNN
    in training because its backward gave NaN on their version. Raises UserError if flash4 is not installed.
    """
    draw = torch.Generator(device).manual_seed(0)
    shape = (2, _CHECKED_TOKENS, heads, head_size)
    inputs = [torch.randn(shape, generator=draw, device=device, dtype=dtype) for _ in range(4)]
    try:
        tried = _with_gradients(inputs, attention)
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing of the kernel
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # torch goes on with every backend it knows
        return f"does not run on this {device.type} ({reason})"
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tried):
        return f"gives a non-finite gradient on this {device.type}"
    for name, mine, exact in zip(("result", "dq", "dk", "dv"), tried, _with_gradients(inputs, "math"), strict=True):
        off = float(torch.linalg.vector_norm(mine - exact) / torch.linalg.vector_norm(exact))
        if off > _TOLERANCES[dtype]:
            return (
                f"is wrong on this {device.type}: its {name} is {off:.1%} off the formula, of which rounding is at most "
                f"{_TOLERANCES[dtype]:.1%}"
            )
    return None


def _with_gradients(inputs: list[torch.Tensor], attention: Attention) -> tuple[torch.Tensor, ...]:
    """Result and gradients of q, k, v in float32, for inputs (q, k, v, gradient of the result) of two samples."""
    q, k, v = (tensor.detach().requires_grad_() for tensor in inputs[:3])
    result = attend(q, k, v, (_CHECKED_TOKENS, _CHECKED_TOKENS - 31), attention)
    return tuple(tensor.float() for tensor in (result.detach(), *torch.autograd.grad(result, (q, k, v), inputs[3])))
