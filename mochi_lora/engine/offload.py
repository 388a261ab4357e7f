"""What a block keeps for its backward, in host memory: copied out while the next block runs, fetched one block ahead.

Between two blocks the device holds what the last one kept, and nothing of those before. In the backward pass a block's first
look at what it kept starts the fetch for the block before it. In a steady step nothing page-locked is allocated.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mochi_lora.engine.checkpoints import Contexts, is_kept
from mochi_lora.engine.transfer import Copied, CopyLane, HostMemory

LEAST_BYTES = 2**20  # smaller tensors stay: the text stream, seeds


class ActivationOffload:
    """The host memory and the two lanes, shared by all blocks of a model."""

    def __init__(self, device: torch.device) -> None:
        self.out, self.back = CopyLane(device), CopyLane(device)
        self.memory = HostMemory(pinned=device.type == "cuda")
        self._kept = 0
        self._last: _OfBlock | None = None

    @contextmanager
    def keeping(self, stay: Iterable[torch.Tensor]) -> Iterator[Contexts]:
        """While a block runs: what autograd saves goes to the host, but not `stay` (weights, rotary tables) nor small tensors.

        Yields the contexts that an eager checkpoint needs, because what such a one keeps of its inside passes no hook.
        """
        before = self._last if self._last is not None and self._last.alive() else None
        block = _OfBlock(self, before, {tensor.untyped_storage().data_ptr() for tensor in stay})
        with saved_tensors_hooks(block.keep, _get):
            yield block.contexts
        if before is not None:
            before.leave()
        self._last = block

    def room_for(self, tensor: torch.Tensor) -> torch.Tensor:
        """A place in host memory; from the start again once autograd has let go of everything."""
        if self._kept == 0:
            self.memory.reset()
        self._kept += 1
        return self.memory.like(tensor)

    def free(self) -> None:
        """One place less is in use."""
        self._kept -= 1


class _OfBlock:
    """What one block kept in one forward pass."""

    def __init__(self, offload: ActivationOffload, before: "_OfBlock | None", stay: set[int]) -> None:
        self.offload = offload
        self._before = before
        self._stay = stay
        self._tensors: list[weakref.ref[_Kept]] = []  # autograd owns them

    def keep(self, tensor: torch.Tensor) -> "_Kept | torch.Tensor":
        small = tensor.nbytes < LEAST_BYTES
        if small or tensor.untyped_storage().data_ptr() in self._stay or _overlaps(tensor):
            return tensor
        kept = _Kept(self, tensor)
        self._tensors.append(weakref.ref(kept))
        return kept

    def contexts(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        keeping = _Keeping(self)
        return keeping, _Replaying(keeping.results)

    def alive(self) -> list["_Kept"]:
        return [kept for reference in self._tensors if (kept := reference()) is not None]

    def leave(self) -> None:
        for kept in self.alive():
            kept.leave()

    def begin_backward(self) -> None:
        """The block before comes next: fetch for it."""
        before, self._before = self._before, None
        for kept in before.alive() if before is not None else ():
            kept.fetch()


class _Kept:
    """One tensor. It is on the device until `leave`, then on the host alone, and once more on the device between `fetch` and
    `get`. Its memory there is free only when the current stream has waited for the copy: the side streams own nothing.
    """

    def __init__(self, block: _OfBlock, tensor: torch.Tensor) -> None:
        self._block = block
        self._target = tensor.device
        self._host = block.offload.room_for(tensor)
        self._copied: Copied = block.offload.out.copy([(self._host, tensor)])
        self._device: torch.Tensor | None = tensor
        self._fetched = False

    def leave(self) -> None:
        if self._device is not None:
            self._copied.wait()
            self._device = None

    def fetch(self) -> None:
        if self._device is None:
            host = self._host
            self._device = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self._target)
            self._copied = self._block.offload.back.copy([(self._device, host)])
            self._fetched = True

    def get(self) -> torch.Tensor:
        self._block.begin_backward()
        self.fetch()
        tensor = self._device
        assert tensor is not None
        if self._fetched:  # else its copy to the host may be under way still, and autograd lets go of it soon
            self.leave()
        return tensor

    def __del__(self) -> None:
        """Used, or the graph was dropped, perhaps by an exception: nothing stays taken."""
        self.leave()
        self._block.offload.free()


def _get(kept: _Kept | torch.Tensor) -> torch.Tensor:
    return kept.get() if isinstance(kept, _Kept) else kept


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


class _Keeping(TorchDispatchMode):
    """The forward pass of an eager checkpoint: what `checkpoints.is_kept` names is kept."""

    def __init__(self, block: _OfBlock) -> None:
        super().__init__()
        self._block = block
        self.results: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        result = func(*args, **(kwargs or {}))
        if is_kept(func, args):
            # Detached: autograd is about to write the graph, which would hold itself, onto the tensors that are returned.
            self.results.append(tree_map_only(torch.Tensor, lambda tensor: self._block.keep(tensor.detach()), result))
        return result


class _Replaying(TorchDispatchMode):
    """The second forward pass: those results in the same order, without computing them."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self._results = results
        self._next = iter(results)

    def __enter__(self) -> "_Replaying":
        self._next = iter(self._results)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        if is_kept(func, args):
            return tree_map_only(_Kept, _get, next(self._next))
        return func(*args, **(kwargs or {}))
