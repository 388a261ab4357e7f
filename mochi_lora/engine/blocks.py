"""The one place where a transformer block is wrapped: today by gradient checkpointing."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Checkpointing = Literal["full", "none"]
# (visual [B, V, width], text [B, L, width], conditioning [B, width], valid text lengths, (cos, sin)) -> (visual, text)
RotaryTables = tuple[torch.Tensor, torch.Tensor]
Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], RotaryTables], tuple[torch.Tensor, torch.Tensor]]


def wrap_block(block: nn.Module, checkpointing: Checkpointing) -> Block:
    """The callable that runs `block`. `full` keeps only the block's inputs and recomputes the rest in the backward pass."""
    if checkpointing == "none":
        return block

    def recomputed(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            return block(*arguments)
        return checkpoint(block, *arguments, use_reentrant=False)

    return recomputed
