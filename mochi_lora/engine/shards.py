"""A frozen base that is split over several ranks: each holds 1 / S of every block's bytes, and a block is gathered while the
one before it computes.

Why not FSDP2 (`fully_shard`): nothing that is trained is sharded, so there is nothing to reduce or to save in pieces; fp8 and
nf4 payloads with their scales travel as bytes here, whatever their dtypes; and FSDP's hooks would break the graphs of blocks
that are compiled whole. The order of fetching, and what is right when, is `engine.swap`'s; only the source is another.

Every rank of the group must run the same blocks as often as the others: validation and sampling see to it (`Ranks.own`).
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import nn

from mochi_lora.engine.swap import PLACES, BlockSwap, Weight, stays
from mochi_lora.engine.transfer import Copied, bytes_of, laid_out, room_for

_PART_ALIGNMENT = 256  # bytes: collectives are slow on crooked addresses
# Its old name warns since torch 2.13, which brought the new one.
GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


class ShardedBlocks(BlockSwap):
    """All blocks' base weights, of which this rank keeps its part."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, group: dist.ProcessGroup) -> None:
        self._group = group
        self._parts: list[torch.Tensor] = []
        self._slots: list[torch.Tensor] = []
        super().__init__(blocks, len(blocks), device)

    def _take(self, block: nn.Module) -> list[Weight]:
        """Copy this rank's part of a block's bytes to the device and let all go.

        Nothing else is looked at: of tensors that safetensors has mapped from a file, only that part is ever read.
        """
        taken, sources, end = [], [], 0
        for name, tensor in chain(block.named_parameters(), block.named_buffers()):
            if stays(name):
                tensor.data = tensor.data.to(self._device)
                continue
            assert not tensor.requires_grad, f"{name} is trained, but a sharded block's weights only ever come from its ranks"
            shape = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            taken.append(Weight(tensor, shape, (end,)))
            sources.append(tensor.data)
            end += room_for(tensor)
        each = -(-end // (self._group.size() * _PART_ALIGNMENT)) * _PART_ALIGNMENT
        part, first = torch.zeros(each, dtype=torch.uint8, device=self._device), each * self._group.rank()
        for weight, source in zip(taken, sources, strict=True):
            start, memory = weight.key[0], bytes_of(source)
            low, high = max(start, first), min(start + memory.numel(), first + each)
            if low < high:
                part[low - first : high - first].copy_(memory[low - start : high - start])
            weight.tensor.data = torch.empty(0, dtype=source.dtype, device=self._device)
        self._parts.append(part)
        return taken

    def _place(self, number: int) -> None:
        if not self._slots:
            largest = max(part.numel() for part in self._parts) * self._group.size()
            self._slots = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(PLACES)]
        for weight in self._weights[number]:
            weight.tensor.data = laid_out(self._slots[number % PLACES], weight.key[0], weight.host).detach()
        self._placed.add(number)

    def _begin(self, number: int) -> Copied:
        part = self._parts[number]
        whole = self._slots[number % PLACES][: part.numel() * self._group.size()]
        return self._lane.run(lambda: getattr(dist, GATHER)(whole, part, group=self._group))

    def _moved(
        self,
        number: int,
        apply: Callable[..., nn.Module],
        fn: Callable[[torch.Tensor], torch.Tensor],
        recurse: bool = True,  # noqa: FBT001, FBT002 - torch's
    ) -> nn.Module:
        """A sharded block stays where it is: `.to` with its own device does nothing."""
        probe = fn(torch.empty(0, device=self._device))
        assert (probe.device.type, probe.dtype) == (self._device.type, torch.float32), f"block {number} is sharded; it stays"
        return apply(fn, recurse)
