"""The one place where the transformer's blocks are wrapped: checkpointing, compilation, offloading and swapping, from the plan.

From the inside out: checkpointing, compilation around it (the partitioner must see the policy), offloading of what either of
them keeps, and the weights' fetching around everything, so that a second forward pass finds them too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch
from torch import nn

from mochi_lora.engine.checkpoints import Block, RotaryTables, modes_of, run_block
from mochi_lora.engine.compiled import CompiledBlocks
from mochi_lora.engine.offload import ActivationOffload
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.shards import ShardedBlocks
from mochi_lora.engine.swap import BlockSwap
from mochi_lora.parallel.mesh import ALONE, Ranks

_Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]  # `run_block` or its compiled form


@dataclass(frozen=True)
class WrappedBlocks:
    """The transformer's blocks as a plan runs them."""

    calls: tuple[Block, ...]  # in order
    swap: BlockSwap | None = None  # None: all weights are where they are used, all the time

    def fetch(self, index: int) -> None:
        """Put the weights of block `index` in place for who reads them beside its call. Shard ranks all do or none does."""
        if self.swap is not None:
            self.swap.require(index)


def wrap_blocks(blocks: Sequence[nn.Module], plan: Plan, ranks: Ranks = ALONE) -> WrappedBlocks:
    """`blocks` as `plan` says.

    Adapters may be attached before or after. With `block_swap`, or with shard ranks, the base weights of a block that is
    fetched are right only while it runs: who reads them otherwise (DoRA, when it is attached) does so before. With `compile`
    a text stream of one row comes back with two.
    """
    modes = modes_of(plan.checkpointing, len(blocks))
    device = torch.device(plan.device)
    run = CompiledBlocks() if plan.compile else run_block
    offload = ActivationOffload(device) if "offload" in modes else None
    calls = [
        _offloaded(run, block, offload) if mode == "offload" and offload else partial(run, block, mode)
        for block, mode in zip(blocks, modes, strict=True)
    ]
    assert not (plan.block_swap and ranks.shard_group), "what is sharded is not swapped"
    if ranks.shard_group is not None:
        swap: BlockSwap = ShardedBlocks(blocks, device, ranks.shard_group)
    elif plan.block_swap:
        swap = BlockSwap(blocks, plan.block_swap, device)
    else:
        return WrappedBlocks(tuple(calls))
    return WrappedBlocks(tuple(swap.wrap(index, call) for index, call in enumerate(calls)), swap)


def _offloaded(run: _Run, block: nn.Module, offload: ActivationOffload) -> Block:
    """As `attention_saved`, but what is kept lies in host memory."""
    call = partial(run, block, "attention_saved")

    def offloaded(
        visual: torch.Tensor, text: torch.Tensor, conditioning: torch.Tensor, lengths: tuple[int, ...], rotary: RotaryTables
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.is_grad_enabled():
            return call(visual, text, conditioning, lengths, rotary)
        with offload.keeping(chain(block.parameters(), block.buffers(), rotary)) as contexts:
            eager = {"contexts": contexts} if run is run_block else {}
            return call(visual, text, conditioning, lengths, rotary, **eager)

    return offloaded
