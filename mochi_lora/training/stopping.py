"""SIGTERM and Ctrl-C: finish the step, agree with the other ranks, save, leave. And what to say when a rank is gone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Self

import torch
import torch.distributed as dist

from mochi_lora.parallel.heartbeat import PeerGoneError, is_peer_error

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ECHO_SECONDS = 2.0  # a launcher passes on what the terminal or the scheduler has sent us already


class StopFlag:
    """Set by a signal, read by all ranks together at step boundaries; a context that catches the signals.

    A second Ctrl-C ends the process at once. A second SIGTERM does nothing: schedulers and launchers both send one.
    """

    def __init__(self, peer_timeout_minutes: float) -> None:
        self.requested = 0  # number of the signal, 0 is none
        self._since = 0.0
        self._before: dict[int, object] = {}
        self._group = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # A gloo group of its own: the question costs about 0.1 ms on the host and never waits for a kernel.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=peer_timeout_minutes))

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; if so, `requested` is the same on every rank afterwards."""
        if self._group is None:
            return self.requested != 0
        answer = torch.tensor([self.requested])
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=self._group)
        asked = int(answer.item())
        if asked:  # else a signal may have come since the question: it is part of the next one
            self.requested = asked
        return asked != 0

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT and time.monotonic() - self._since > _ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.requested:
            self.requested, self._since = number, time.monotonic()
            # Not `print`: the interrupted code may be inside one.
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextmanager
def told_apart() -> Iterator[None]:
    """Start loader processes within: SIGTERM is blocked in all of their threads, so that only `obey_parent_alone` takes it.

    Telemetry libraries start a thread in every forked process, before the loader gets a word in; SIGTERM would choose that
    thread and end the process. What arrives here meanwhile is delivered at the end.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_alone(_worker: int) -> None:
    """For loader processes: Ctrl-C, launchers and schedulers signal the whole group, and a loader that dies takes the run
    with it before it is saved. Only the training process may end one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()
    else:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as `told_apart` left it, nobody could end us


def _leave_when_told(parent: int) -> None:
    """Ignoring SIGTERM altogether would hang the training process's exit, which joins its children after sending it."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def lost_peer_named(minutes: float) -> Iterator[None]:
    """Turn the collectives' errors into PeerGoneError; every other error passes."""
    try:
        yield
    except RuntimeError as error:
        if not is_peer_error(error):
            raise
        message = (
            f"another process of this run is gone, or did not answer within train.peer_timeout_minutes={minutes:g} ({error}); "
            "nothing was saved, the last checkpoint stands: run the same command again"
        )
        raise PeerGoneError(message) from error
