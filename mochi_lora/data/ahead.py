"""Work begun before its result is asked for, in order and in bounded number: clips are read while the VAE encodes."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_FEWEST, _MOST = 2, 8  # threads: reading shall overlap on one core too; a clip of 163 frames each is 6.5 GB at eight


def threads_to_read(read_ahead: int | None, processes: int = 1) -> int:
    """What `encode.read_ahead` says; for None this process's share of the cores, among `processes` of this machine."""
    if read_ahead is not None:
        return read_ahead
    # What the container or taskset leaves, where the system can tell (Linux).
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or _FEWEST
    return min(_MOST, max(_FEWEST, cores // processes))


def begun_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Generator[Callable[[], Result], None, None]:
    """For each of `items`, in order, a call that waits for `work(item)` and gives its result or raises its error.

    `ahead` threads work on the items that follow; with 0 the work is done in the call. Besides what the caller still
    holds, at most `ahead` + 1 results exist. Closing the iterator drops what has not begun and waits for what has.
    """
    if ahead == 0:
        for item in items:
            yield partial(work, item)
        return
    threads = ThreadPoolExecutor(ahead, thread_name_prefix="reader")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(threads.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result
        while waiting:
            yield waiting.popleft().result
    finally:
        threads.shutdown(wait=True, cancel_futures=True)
