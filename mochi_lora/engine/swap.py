"""Base weights of some blocks in page-locked host memory, fetched into two places on the device while other blocks compute.

The base is frozen, so weights travel one way only. Of the swapped blocks in order, even ones use the first place and odd ones
the second, in the forward and in the backward pass alike, and their parameters are views of that place for good: whoever saved
a weight for the backward (autograd, a compiled graph) finds the right values there again, because a block's own are put back
before its backward begins. LoRA factors stay on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from mochi_lora.engine.checkpoints import Block, RotaryTables
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.transfer import Copied, CopyLane, HostMemory

PLACES = 2
_BLOCKS = "transformer_blocks"


def swapped_blocks(depth: int, count: int) -> tuple[int, ...]:
    """Which of `depth` blocks are swapped: `count` of them, evenly spread."""
    assert 0 <= count <= depth, f"{count} swapped blocks of {depth}"
    return tuple((2 * number + 1) * depth // (2 * count) for number in range(count))


def home_of(name: str, depth: int, plan: Plan) -> torch.device:
    """Where the base tensor of this diffusers name is loaded to: the CPU if it is swapped or sharded, so that it never fills
    the GPU.
    """
    stem, _, rest = name.partition(".")
    if stem == _BLOCKS:
        index = int(rest.partition(".")[0])
        if index in swapped_blocks(depth, depth if plan.shard > 1 else plan.block_swap):
            return torch.device("cpu")
    return torch.device(plan.device)


def stays(name: str) -> bool:
    """Whether a tensor of a swapped block is on the device all the time, as LoRA's are."""
    return ".lora_" in name


@dataclass
class Weight:
    """One base tensor of a swapped block."""

    tensor: torch.Tensor  # the parameter or buffer itself
    host: torch.Tensor  # its copy; where there is none (`engine.shards`), what it looks like, on meta
    key: tuple[Any, ...]  # equal for what may share a place


class BlockSwap:
    """The swapped blocks' weights and where they are. Their host copies are all there is of them: nobody may write to them."""

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
        self._device = device
        self._memory = HostMemory(pinned=device.type == "cuda")
        self._lane = CopyLane(device)
        self._number = {index: number for number, index in enumerate(swapped_blocks(len(blocks), count))}
        self._weights = [self._take(blocks[index]) for index in self._number]
        self._places: tuple[dict[tuple[object, ...], torch.Tensor], ...] = tuple({} for _ in range(PLACES))
        self._holds: list[int | None] = [None] * PLACES
        self._arrived: list[Copied] = [Copied(None)] * PLACES
        self._placed: set[int] = set()
        for index, number in self._number.items():
            self._place(number)
            blocks[index]._apply = partial(self._moved, number, blocks[index]._apply)  # type: ignore[method-assign]
        for number in range(PLACES):
            self._fetch(number)

    def wrap(self, index: int, call: Block) -> Block:
        """`call`, block `index` of the model, with its weights in place when it runs and when its backward runs."""
        if index not in self._number:
            return call
        number = self._number[index]

        def swapped(
            visual: torch.Tensor, text: torch.Tensor, conditioning: torch.Tensor, lengths: tuple[int, ...], rotary: RotaryTables
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self._require(number)
            after = call(visual, text, conditioning, lengths, rotary)
            returns = any(output.requires_grad for output in after)
            if returns:
                for output, given in zip(after, (visual, text), strict=True):
                    if output is not given:
                        _before_backward(output, partial(self._require, number))
                # What made the inputs has its backward after all of this block's: autograd runs later operations first.
                for given in (visual, text):
                    _before_backward(given, partial(self._fetch, number - PLACES))
            ahead = number + PLACES
            if ahead < len(self._weights):
                self._fetch(ahead)
            elif not returns:  # else the backward begins with what is there
                self._fetch(number % PLACES)
            return after

        return swapped

    def require(self, index: int) -> None:
        """Block `index` of the model has its weights when the current stream goes on, until another one is called."""
        if index in self._number:
            self._require(self._number[index])

    def _take(self, block: nn.Module) -> list[Weight]:
        """The base weights of a block, copied to the host; LoRA's, which were made beside them, go to the device."""
        taken = []
        for name, tensor in chain(block.named_parameters(), block.named_buffers()):
            if stays(name):
                tensor.data = tensor.data.to(self._device)
                continue
            assert not tensor.requires_grad, f"{name} is trained, but a swapped block's weights only ever come from the host"
            host = self._memory.like(tensor)
            host.copy_(tensor.data)
            tensor.data = host
            taken.append(Weight(tensor, host, (name.replace("base_layer.", ""), tensor.dtype, tensor.shape, tensor.stride())))
        return taken

    def _place(self, number: int) -> None:
        place = self._places[number % PLACES]
        for weight in self._weights[number]:
            if weight.key not in place:
                host = weight.host
                place[weight.key] = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self._device)
            # An alias: what is copied into the place must not look like a change of the parameter to autograd.
            weight.tensor.data = place[weight.key].detach()
        self._placed.add(number)

    def _require(self, number: int) -> None:
        """The current stream goes on when the block's weights are in place."""
        self._fetch(number)
        if number in self._placed:
            self._arrived[number % PLACES].wait()

    def _fetch(self, number: int) -> None:
        """Begin to fetch a block's weights unless they are there; whoever used the place has been enqueued before."""
        slot = number % PLACES
        if number not in self._placed or self._holds[slot] == number:
            return
        self._holds[slot] = number
        self._arrived[slot] = self._begin(number)

    def _begin(self, number: int) -> Copied:
        place = self._places[number % PLACES]
        return self._lane.copy([(place[weight.key], weight.host) for weight in self._weights[number]])

    def _moved(
        self,
        number: int,
        apply: Callable[..., nn.Module],
        fn: Callable[[torch.Tensor], torch.Tensor],
        recurse: bool = True,  # noqa: FBT001, FBT002
    ) -> nn.Module:
        """`nn.Module._apply` of a swapped block (`.to`, `.cpu`): its weights are never copied, they rest on the host."""
        probe = fn(torch.empty(0))
        assert probe.dtype == torch.float32, "the weights of a swapped block keep their dtypes"
        for weight in self._weights[number]:
            weight.tensor.data = torch.empty(0, dtype=weight.host.dtype)
        for copied in self._arrived:  # whoever gets the places' memory next does not wait for a copy into them
            copied.wait()
        module = apply(fn, recurse)
        if probe.device.type == self._device.type:
            self._place(number)
            return module
        assert probe.device.type == "cpu", f"a swapped block goes between {self._device} and the CPU, not to {probe.device}"
        for weight in self._weights[number]:
            weight.tensor.data = weight.host
        self._placed.discard(number)
        if not self._placed:
            self._places = tuple({} for _ in range(PLACES))
        self._holds[number % PLACES] = None
        return module


def _before_backward(tensor: torch.Tensor, act: Callable[[], None]) -> None:
    """Call `act` just before the backward of what made `tensor`."""
    if tensor.grad_fn is not None:
        tensor.grad_fn.register_prehook(lambda _: act())
