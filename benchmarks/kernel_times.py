"""What a GPU does while something runs: kernels, the time between them, and where the host waits. Used by the benchmarks."""

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mochi_lora.training.trial import Step

_WARM, _WATCHED = 2, 6
PROFILED_STEPS = _WARM + 1 + _WATCHED + 1  # one is looked at for host waits; after the last one the loaders are shut down
_GAPS = 30


class Kernel(NamedTuple):
    """Nanoseconds since some start; copies between host and device count as kernels."""

    begin: int
    end: int
    name: str


def profiled(steps: Iterator[Step], device: torch.device, folder: Path, name: str) -> dict[str, Any]:
    """Host waits inside a step; of some steps behind each other the seconds with a kernel and the share of time without one.

    The profiler slows the host down: against steps that are timed without it the share is smaller.

    `folder` gets a file with the longest kernels and one with the longest times between kernels.
    """
    for _ in range(_WARM):
        next(steps)()
    torch.cuda.synchronize(device)
    waits = host_waits(next(steps))
    profile, kernels, wall = kernels_of(lambda: [step() for step in islice(steps, _WATCHED)], device)
    folder.mkdir(parents=True, exist_ok=True)
    table = profile.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=90)
    (folder / f"{name}.txt").write_text(table)
    (folder / f"{name}-gaps.txt").write_text(gaps(kernels))
    busy = busy_seconds(kernels)
    idle = {"gpu_idle_share": 1 - busy / wall, "kernel_seconds": busy / _WATCHED}
    return idle | {"host_waits_per_step": len(waits), "host_waits": waits}


def running(work: Callable[[], object], device: torch.device) -> tuple[float, float | None]:
    """Seconds that `work` takes, and on a GPU the share of them in which a kernel ran."""
    if device.type == "cuda":
        _, kernels, wall = kernels_of(work, device)
        return wall, busy_seconds(kernels) / wall
    start = time.perf_counter()
    work()
    return time.perf_counter() - start, None


def kernels_of(work: Callable[[], object], device: torch.device) -> tuple[torch.profiler.profile, list[Kernel], float]:
    """What the GPU did, and the seconds `work` took until all of it was done."""
    # Kernels alone: to record the host's calls as well slows the host down, and the GPU then waits for it.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    found = [event for event in profile.profiler.kineto_results.events() if "cuda" in str(event.device_type()).lower()]
    return profile, [Kernel(event.start_ns(), event.start_ns() + event.duration_ns(), event.name()) for event in found], wall


def busy_seconds(kernels: list[Kernel]) -> float:
    """Length of the union of their times: kernels on several streams overlap."""
    total, reached = 0, -1
    for begin, end, _ in sorted(kernels):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total / 1e9


def gaps(kernels: list[Kernel]) -> str:
    """A line for each pair of neighbours: milliseconds in which nothing ran between them, how often, and their names."""
    between: dict[tuple[str, str], list[int]] = defaultdict(list)
    ordered = sorted(kernels)
    reached = ordered[0].end if ordered else 0
    for before, after in pairwise(ordered):
        reached = max(reached, before.end)
        if after.begin > reached:
            between[before.name[:60], after.name[:60]].append(after.begin - reached)
    longest = sorted(between.items(), key=lambda item: -sum(item[1]))[:_GAPS]
    lines = [f"{sum(map(sum, between.values())) / 1e6:9.3f} ms in all, of {len(ordered)} kernels"]
    lines += [
        f"{sum(found) / 1e6:9.3f} ms in {len(found):6d}, longest {max(found) / 1e6:8.3f}  {before} -> {after}"
        for (before, after), found in longest
    ]
    return "\n".join(lines) + "\n"


def host_waits(step: Step) -> list[str]:
    """Where one step waits for the GPU, as torch's debug mode warns of it; the health check's own wait is not the step's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # "called a synchronizing ..." is a wait; the mode's first warning, that it is a prototype, is not.
    waits = [f"{Path(found.filename).name}:{found.lineno}" for found in caught if "called a synchroniz" in str(found.message)]
    return [wait for wait in waits if not wait.startswith("health.py")]
