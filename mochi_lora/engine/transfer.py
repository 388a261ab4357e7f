"""Copies between the device and pinned host memory beside the computation.

On a GPU a copy goes through a stream of its own and nobody waits for it but the stream that asks. On the CPU the same calls
copy at once, so that who calls what when is the same everywhere.
"""

from collections.abc import Callable, Sequence

import torch

from mochi_lora.errors import UserError

_ALIGNMENT = 256  # bytes; more than any dtype needs
_ARENA = 2**29


class CopyLane:
    """A stream for copies in one direction, so that both directions of the bus are used."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.no_grad()
    def copy(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> "Copied":
        """Begin to copy the second of each pair into the first, after all work the current stream has been given so far.

        Until somebody has waited for the result, the caller keeps the tensors alive: the allocator knows nothing of this.
        """

        def copy_all() -> None:
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

        return self.run(copy_all)

    def run(self, act: Callable[[], object]) -> "Copied":
        """`act`, whose work is a copy, on this lane, as `copy` does it."""
        if self._stream is None:
            act()
            return Copied(None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            act()
        return Copied(self._stream.record_event())


class Copied:
    """A copy under way."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def wait(self) -> None:
        """Whatever the current stream is given from here on comes after the copy. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


def room_for(tensor: torch.Tensor) -> int:
    """Bytes that a tensor of this dtype, size and strides takes, up to where the next one may begin."""
    return -(-bytes_of(tensor).numel() // _ALIGNMENT) * _ALIGNMENT


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor [bytes], uint8, in its order there: a view that `laid_out` is the inverse of."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,)).view(torch.uint8)


def laid_out(memory: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """A view of uint8 `memory` [N] from byte `start` on with the dtype, size and strides of `like`."""
    room = memory[start : start + room_for(like)].view(like.dtype)
    return room.as_strided(like.shape, like.stride(), room.storage_offset())


class HostMemory:
    """Host memory for copies, page-locked where there is a GPU.

    torch rounds each page-locked allocation up to a power of two, which would waste up to half: tensors are placed into
    arenas of such sizes instead. Placing goes forward only; `reset` makes all of it free.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._arenas: list[torch.Tensor] = []
        self._arena, self._used = 0, 0

    @property
    def bytes(self) -> int:
        """What has been allocated."""
        return sum(arena.numel() for arena in self._arenas)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Room for a tensor of this dtype, size and strides (no two elements at one address); its content is arbitrary."""
        needed = room_for(tensor)
        while self._arena < len(self._arenas) and self._used + needed > self._arenas[self._arena].numel():
            self._arena, self._used = self._arena + 1, 0
        if self._arena == len(self._arenas):
            # At least eight such tensors to an arena: 4 % of it stays empty on average, not half.
            size = max(_ARENA, 1 << (8 * needed - 1).bit_length())
            self._arenas.append(self._room(size))
        start, self._used = self._used, self._used + needed
        return laid_out(self._arenas[self._arena], start, tensor)

    def _room(self, size: int) -> torch.Tensor:
        """Raises UserError where so much cannot be page-locked: CUDA calls that "out of memory", and means the host's."""
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            gib = (self.bytes + size) / 2**30
            message = f"{gib:.1f} GiB of host memory could not be page-locked ({str(error).partition(chr(10))[0]})"
            advice = "lower engine.block_swap or use less checkpointing offload, or raise the container's or ulimit's limit"
            raise UserError(f"{message}; {advice}") from error

    def reset(self) -> None:
        """Forget what was placed; the memory is kept for what comes next."""
        self._arena, self._used = 0, 0
