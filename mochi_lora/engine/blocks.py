"""The one place where a transformer block is wrapped: today by gradient checkpointing."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mochi_lora.engine.plan import Plan

# (visual [B, V, width], text [B, L, width], conditioning [B, width], valid text lengths, (cos, sin)) -> (visual, text)
RotaryTables = tuple[torch.Tensor, torch.Tensor]
Block = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...], RotaryTables], tuple[torch.Tensor, torch.Tensor]]


def wrap_blocks(blocks: Sequence[nn.Module], plan: Plan) -> list[Block]:
    """The callables that run `blocks` as `plan` says, in order.

    `full` keeps only a block's inputs and recomputes the rest in the backward pass.
    """
    assert plan.checkpointing in ("none", "full"), plan.checkpointing
    return [block if plan.checkpointing == "none" else _recomputed(block) for block in blocks]


def _recomputed(block: nn.Module) -> Block:
    def recomputed(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            return block(*arguments)
        return checkpoint(block, *arguments, use_reentrant=False)

    return recomputed
