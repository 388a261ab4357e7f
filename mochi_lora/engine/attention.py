"""Mochi's joint attention over visual and text tokens: one `attend`, and the processor that feeds it.

Shape legend: B = samples, S = tokens (visual first, text last), V = visual tokens, L = padded text tokens, H = heads,
D = head size.

diffusers' own processor (`MochiAttnProcessor2_0`, 0.42.1) calls `nonzero` on the text mask in every block: a device
synchronisation and a graph break 48 times per forward. Here the valid lengths are host integers, known from the collate.
It also ignores `set_attention_backend`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import MochiTransformer3DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from mochi_lora.errors import UserError

Attention = Literal["auto", "cudnn", "flash", "efficient", "math"]
_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def _kernel(attention: Attention) -> Iterator[None]:
    if attention == "auto":
        yield
        return
    with sdpa_kernel(_KERNELS[attention]):
        yield


def _scaled_dot_product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attention: Attention) -> torch.Tensor:
    with _kernel(attention):
        return F.scaled_dot_product_attention(q, k, v)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...] | None, attention: Attention = "auto"
) -> torch.Tensor:
    """Attention of every valid token to every valid token, without a mask tensor on any kernel.

    q, k, v [B, S, H, D] of one dtype; `lengths[b]` of the S tokens are valid, the rest is padding at the end (None: all
    are valid). Padding is neither attended nor attends: its rows of the result [B, S, H, D] are zero.
    """
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    size = q.shape[2]
    if lengths is None or all(length == size for length in lengths):
        return _scaled_dot_product(q, k, v, attention).transpose(1, 2)
    parts, start = [], 0
    for length, run in groupby(lengths):  # neighbours of one length share a call: sorting a batch by length pays
        stop = start + len(list(run))
        cut = (slice(start, stop), slice(None), slice(length))
        part = _scaled_dot_product(q[cut], k[cut], v[cut], attention)
        parts.append(F.pad(part, (0, 0, 0, size - length)))
        start = stop
    return torch.cat(parts).transpose(1, 2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of interleaved pairs, in float32: x [B, V, H, D], cos and sin [V, H, D/2]; keeps x's dtype.

    Source: genmoai/mochi @0c86aeb `dit/joint_model/rope_mixed.py`, `temporal_rope.py`.
    """
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class JointAttention:
    """Attention processor of `MochiTransformer3DModel`; the block passes valid text lengths where stock passes a mask."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(
        self,
        attn: Any,  # noqa: ANN401 - diffusers' MochiAttention
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: tuple[int, ...],
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, V, visual width], [B, L, text width], valid text lengths -> the same two streams after attention."""
        if isinstance(attention_mask, torch.Tensor):
            message = "this transformer attends by host lengths; call it through mochi_lora.model.transformer.VelocityModel"
            raise TypeError(message)
        visual, text = hidden_states, encoder_hidden_states
        heads = (attn.heads, -1)
        v = torch.cat([attn.to_v(visual).unflatten(2, heads), attn.add_v_proj(text).unflatten(2, heads)], dim=1)
        q = attn.norm_q(attn.to_q(visual).unflatten(2, heads))
        k = attn.norm_k(attn.to_k(visual).unflatten(2, heads))
        q_text = attn.norm_added_q(attn.add_q_proj(text).unflatten(2, heads))
        k_text = attn.norm_added_k(attn.add_k_proj(text).unflatten(2, heads))
        q = torch.cat([rotate(q, *image_rotary_emb), q_text], dim=1)
        k = torch.cat([rotate(k, *image_rotary_emb), k_text], dim=1)
        lengths = tuple(visual.shape[1] + length for length in attention_mask)
        joint = attend(q, k, v, lengths, self.attention).flatten(2)
        visual, text = joint.split_with_sizes((visual.shape[1], text.shape[1]), dim=1)
        visual = attn.to_out[0](visual)
        if hasattr(attn, "to_add_out"):  # the last block discards its text stream
            text = attn.to_add_out(text)
        return visual, text


def install_attention(transformer: MochiTransformer3DModel, attention: Attention) -> None:
    """Give every block our processor with the chosen kernel."""
    for block in transformer.transformer_blocks:
        block.attn1.processor = JointAttention(attention)


def check_attention(attention: Attention, device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Run the kernel once, forward and backward, on a small input. Raises UserError if it refuses or is not finite.

    Genmo's code avoids cuDNN in training because its backward gave NaN on their version.
    """
    shape = (1, 64, 2, head_size)
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        attend(q, k, v, None, attention).float().sum().backward()
    except RuntimeError as error:
        message = f"engine.attention: {attention} does not run on this {device.type} ({error}); set it to auto"
        raise UserError(message) from error
    grads = [tensor.grad for tensor in (q, k, v)]
    if not all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads):
        message = f"engine.attention: {attention} gives a non-finite gradient on this {device.type}; set it to auto"
        raise UserError(message)
