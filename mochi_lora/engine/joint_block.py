"""One block of the transformer: diffusers' parts, composed so that each pass over the residual stream is one kernel.

Shape legend: B = samples, V = visual tokens, L = padded text tokens.

Source: diffusers 0.42.1 `transformer_mochi.py`, `MochiTransformerBlock.forward`; bit for bit the same where there are no
kernels.
"""

from typing import Any

import torch
from diffusers.models.transformers.transformer_mochi import MochiTransformerBlock
from torch import nn

from mochi_lora.engine.adapted import takes_codes
from mochi_lora.engine.checkpoints import RotaryTables
from mochi_lora.engine.gating import install_gates, reads_codes
from mochi_lora.engine.residual import added, added_and_normalised, normalised


class JointBlock(nn.Module):
    """diffusers' block under the same names; its linears may be adapted or quantised, its attention is `JointAttention`."""

    def __init__(self, block: Any) -> None:  # noqa: ANN401 - torch does not type a module's parts
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.ff_context = block.ff_context  # None in the last one, so that it is no child there
        self.is_last = block.context_pre_only
        (self.eps,) = {norm.eps for norm in (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm3, block.norm4)}
        self.train(block.training)

    def forward(
        self,
        visual: torch.Tensor,
        text: torch.Tensor,
        conditioning: torch.Tensor,
        lengths: tuple[int, ...] | torch.Tensor,
        rotary: RotaryTables,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """visual [B, V, width], text [B, L, text width], conditioning [B, width] -> the two streams after the block.

        The last block's text comes back as it was: nobody reads it. `lengths` as in `JointAttention`.
        """
        parts: Any = self  # torch types no submodule
        attn, modulate = parts.attn1, parts.norm1
        scale, *gates = modulate.linear(modulate.silu(conditioning)).chunk(4, dim=1)
        coded = takes_codes((attn.to_q, attn.to_k, attn.to_v))
        visual, seen = normalised(visual, 1 + scale.float(), self.eps, coded=coded)
        modulate, text_gates = parts.norm1_context, None
        if self.is_last:
            scale = modulate.linear_1(modulate.silu(conditioning).to(text.dtype))
        else:
            scale, *text_gates = modulate.linear(modulate.silu(conditioning)).chunk(4, dim=1)
        coded = takes_codes((attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        text, told = normalised(text, 1 + scale.float(), self.eps, coded=coded)
        seen, told = attn(hidden_states=seen, encoder_hidden_states=told, attention_mask=lengths, image_rotary_emb=rotary)
        visual = self._fed_forward(visual, seen, gates, parts.ff)
        if text_gates is not None:
            text = self._fed_forward(text, told, text_gates, parts.ff_context)
        return visual, text

    def _fed_forward(
        self, stream: torch.Tensor, attended: torch.Tensor, modulation: list[torch.Tensor], feed_forward: nn.Module
    ) -> torch.Tensor:
        """One stream after attention; `modulation` = gate of what attention adds, scale before, gate after the feed-forward."""
        gate_attended, scale, gate = modulation
        coded = reads_codes(feed_forward)
        stream, normed = added_and_normalised(
            stream, attended, torch.tanh(gate_attended).float(), 1 + scale.float(), self.eps, coded=coded
        )
        return added(stream, feed_forward(normed), torch.tanh(gate).float(), self.eps)


def install_blocks(blocks: nn.ModuleList) -> None:
    """Put a `JointBlock` with `GatedFeedForward` layers in place of each of diffusers' blocks, once."""
    install_gates(blocks)
    for index, block in enumerate(blocks):
        if isinstance(block, MochiTransformerBlock):
            blocks[index] = JointBlock(block)
