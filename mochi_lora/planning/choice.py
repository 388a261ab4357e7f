"""Which plan: every combination of the parts left on `auto` is predicted, and the fastest that fits is taken.

Deterministic: the same settings, card, workload and room give the same plan.
"""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import TypeVar

import torch

from mochi_lora.config.engine import EngineConfig, Mode, checkpointing_runs, parallel_sizes
from mochi_lora.engine.attention import Attention
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import Precision
from mochi_lora.errors import UserError
from mochi_lora.planning.cards import Card
from mochi_lora.planning.footprint import GIB, Footprint, predict_memory
from mochi_lora.planning.pace import seconds_per_guided_step, seconds_per_pass, seconds_per_step
from mochi_lora.planning.workload import Workload

# What the allocator holds beyond what is allocated, where memory is short (it then gives back what it can).
_SLACK_SHARE, _SLACK_GIB = 0.03, 0.3
_CONTEXT_GIB = 0.6  # of a card that is only named: CUDA's context; here it is part of what is not free
_HOST_SHARE = 0.8  # of the free host memory
_MUCH_SMALLER = 0.92  # of the memory: worth naming when memory was too short
_SAME_MEMORY = 1.02
_WORTH_ROUNDING = 0.95  # of the time: a base rounded to fp8, int8 or nf4 must be faster than the exact one by this much
_WORTH_A_BATCH = 0.97  # of the time: less is noise, and two passes hold half as much
_STEPS_OF_COUNTS = 12
_T = TypeVar("_T")
# From the least memory to the most; a mix has the leaner mode first, because the last blocks' backward comes at the peak.
MODES: tuple[Mode, ...] = ("offload", "full", "attention_saved", "mlp_recomputed", "none")
_FILMED = "sample (frames, height, width)"
_SHAPES = {  # where the shape comes from that a footprint's worst moment is about
    "training": "data.buckets", "validation": "data.buckets", "denoising videos": _FILMED, "decoding videos": _FILMED,
}  # fmt: skip


class NoPlanFitsError(UserError):
    """The settings are right, and memory is too small for every plan that they leave open."""


@dataclass(frozen=True)
class Room:
    """Free memory, GiB."""

    device: float
    host: float

    @property
    def usable(self) -> float:
        """What a prediction may fill of the device."""
        return self.device * (1 - _SLACK_SHARE) - _SLACK_GIB

    def holds(self, footprint: Footprint, processes: int) -> bool:
        """Whether it fits, on the device and on the host that `processes` share."""
        return footprint.device <= self.usable and self.hosts(footprint, processes)

    def hosts(self, footprint: Footprint, processes: int) -> bool:
        """Whether what it takes of the host is there."""
        return footprint.host * processes <= self.host * _HOST_SHARE


@dataclass(frozen=True)
class Forecast:
    """A plan and what is predicted of it: seconds of a step at the largest clip, or of a pass where nothing is trained."""

    plan: Plan
    footprint: Footprint
    seconds: float


@dataclass(frozen=True)
class Choice:
    """The plan taken, what it was measured against, and the next smaller one (None: there is none)."""

    pick: Forecast
    room: Room
    fits: bool
    smaller: Forecast | None
    card: Card

    def when_full(self) -> str:
        """What to say when the GPU's memory was too small all the same."""
        footprint = self.pick.footprint
        words = (
            f"The plan was {self.pick.plan}: predicted were {footprint.device:.1f} GiB while {footprint.worst}, of "
            f"{self.room.device:.1f} free at the start"
        )
        if self.smaller is None:
            return f"{words}; no plan is much smaller, so take fewer frames or a smaller size in {_SHAPES[footprint.worst]}"
        return (
            f"{words}. The next smaller plan is predicted to take {self.smaller.footprint.device:.1f} GiB: set, below engine, "
            f"{self.smaller.plan}"
        )


def forecast(plan: Plan, work: Workload, card: Card) -> Forecast:
    """Everything predicted of one plan."""
    seconds = seconds_per_step(plan, work, card) if work.adapter else seconds_per_pass(plan, work, card)
    return Forecast(plan, predict_memory(plan, work), seconds)


def choose(engine: EngineConfig, work: Workload, card: Card, room: Room, attention: Attention) -> Choice:
    """The plan that `engine.plan` asks for, on a GPU, with `attention` settled.

    A plan set by hand in every part is taken as it is. Raises UserError where settings do not suit the model or the card,
    and NoPlanFitsError.
    """
    check_settings(engine, work)
    card.require(named_precision(engine, work) or "bf16", attention)
    found = [forecast(plan, work, card) for plan in candidates(engine, work, card, attention)]
    by_hand = len({item.plan for item in found}) == 1
    fitting = [item for item in found if room.holds(item.footprint, work.processes)]
    if not fitting and not by_hand:
        raise _nothing_fits(found, work, room)
    open_to_us = fitting or found
    if engine.plan == "smallest":
        least = min(item.footprint.device for item in open_to_us)
        pick = min((item for item in open_to_us if item.footprint.device <= least * _SAME_MEMORY), key=_preference)
    else:
        pick = _exact_if_as_fast(open_to_us, min(open_to_us, key=_preference))
        if engine.guidance_passes == "auto":
            pick = _guided_in_one_pass_if_faster(pick, work, card, room)
    return Choice(pick, room, bool(fitting), next_smaller(engine, work, card, room, pick, found), card)


def split_where_nothing_fits(engine: EngineConfig, world: int, settle: Callable[[EngineConfig], _T]) -> _T:
    """`settle` with these settings; where nothing fits one GPU and the layout is free, with the base split over all of them."""
    try:
        return settle(engine)
    except NoPlanFitsError:
        by_hand = engine.parallel != "auto" or engine.block_swap not in ("auto", 0) or engine.cpu_offload is True
        if by_hand or world == 1:
            raise
        return settle(engine.model_copy(update={"parallel": f"shard:{world}"}))


def candidates(engine: EngineConfig, work: Workload, card: Card, attention: Attention) -> Iterator[Plan]:
    """Every plan that the settings leave open, the exact ones first."""
    compiled = engine.compile == "auto" or engine.compile
    layers = work.model.layers
    swaps = _counts(layers) if engine.block_swap == "auto" else (engine.block_swap,)
    sizes = parallel_sizes(engine.parallel)
    context, shard = sizes.get("context", 1), sizes.get("shard", 1)
    turns = ((False, True) if work.films else (False,)) if engine.cpu_offload == "auto" else (engine.cpu_offload,)
    if shard > 1:  # what is sharded is not swapped, and does not leave the device
        swaps, turns = (0,), (False,)
    passes = "two" if engine.guidance_passes == "auto" else engine.guidance_passes
    for precision, checkpointing, swap, turn in product(_precisions(engine, work, card), _mixes(engine, work), swaps, turns):
        yield Plan("cuda", precision, attention, checkpointing, swap, compiled, context, shard, turn, passes)


def room_here(device: torch.device) -> Room:
    """Free memory of this GPU, within the cap set for the process if there is one, and of this host.

    What torch holds without using it is this process's to use, so it is free; page-locked host memory is given back. A
    compiled or swapped model that nobody has any more lives on until a collection.
    """
    gc.collect()
    if release := getattr(torch.accelerator, "empty_host_cache", None):  # torch 2.11 has no such function
        release()
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    place = torch.cuda.current_device() if device.index is None else device.index  # "cuda" alone is refused
    cap = torch.cuda.get_per_process_memory_fraction(place) * total - used
    return Room(min(free, cap) / GIB, host_memory())


def room_of(gib: float, host: float) -> Room:
    """A GPU with `gib` of memory that runs nothing else, in a host with `host` free."""
    return Room(gib - _CONTEXT_GIB, host)


def host_memory() -> float:
    """GiB that this host, or the container around this process, has left."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    told = Path("/proc/meminfo")
    if told.is_file():  # caches count as free there
        lines = dict(line.split(":", 1) for line in told.read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) / 2**20
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and (most := limit.read_text(encoding="ascii").strip()) != "max":
        free = min(free, (int(most) - int(used.read_text(encoding="ascii"))) / GIB)
    return free


def named_precision(engine: EngineConfig, work: Workload) -> Precision | None:
    """What is set by hand, or what the base is stored in, which cannot be made anything else; None: free."""
    return work.stored if engine.precision == "auto" else engine.precision


def _precisions(engine: EngineConfig, work: Workload, card: Card) -> tuple[Precision, ...]:
    """Videos and held-out losses of `sample` and `evaluate` are made in bf16 unless a precision is asked for by name."""
    if (named := named_precision(engine, work)) is not None:
        return (named,)
    return ("bf16",) if engine.plan == "exact" or work.adapter is None else card.precisions


def _mixes(engine: EngineConfig, work: Workload) -> Sequence[str]:
    if engine.checkpointing != "auto":
        return (engine.checkpointing,)
    if work.adapter is None:
        return ("none",)
    inner = [count for count in _counts(work.model.layers) if 0 < count < work.model.layers]
    return [*MODES, *(f"{lean}:{count},{rich}" for lean, rich in combinations(MODES, 2) for count in inner)]


def _counts(layers: int) -> tuple[int, ...]:
    """0 to all, in about a dozen steps."""
    step = -(-layers // _STEPS_OF_COUNTS)
    return (*range(0, layers, step), layers)


def _exact_if_as_fast(found: Sequence[Forecast], fastest: Forecast) -> Forecast:
    exact = [item for item in found if item.plan.precision in ("bf16", "fp32")]
    best = min(exact, key=_preference, default=fastest)
    return best if best.seconds * _WORTH_ROUNDING <= fastest.seconds else fastest


def _guided_in_one_pass_if_faster(pick: Forecast, work: Workload, card: Card, room: Room) -> Forecast:
    """One pass reads, fetches or decodes the weights once where two do it twice: that shows in small videos, and under swap."""
    films = work.films
    if films is None or not films.guided or work.adapter is not None:  # in training the step decides, not the previews
        return pick
    video = replace(work, bucket=films.bucket)
    both = forecast(replace(pick.plan, guidance_passes="one"), work, card)
    if not room.holds(both.footprint, work.processes):
        return pick
    seconds = (seconds_per_guided_step(item.plan, video, card) for item in (both, pick))
    return both if next(seconds) <= _WORTH_A_BATCH * next(seconds) else pick


def _preference(item: Forecast) -> tuple[float, bool, float]:
    return item.seconds, item.plan.cpu_offload, item.footprint.device


def next_smaller(
    engine: EngineConfig, work: Workload, card: Card, room: Room, pick: Forecast, found: Sequence[Forecast] = ()
) -> Forecast | None:
    """Of those that take clearly less of the device than `pick` and whose host memory is there, the one that `auto` would take,
    with `pick`'s kernel, whatever else was set by hand.

    `found`: forecasts of every plan, where they have been made already.
    """
    free = freed(engine)
    every = (
        found
        if found and free == engine
        else [forecast(plan, work, card) for plan in candidates(free, work, card, pick.plan.attention)]
    )
    most = pick.footprint.device * _MUCH_SMALLER
    less = [item for item in every if item.footprint.device <= most and room.hosts(item.footprint, work.processes)]
    return _exact_if_as_fast(less, min(less, key=_preference)) if less else None


def freed(engine: EngineConfig) -> EngineConfig:
    """The same settings with all that trades memory for time on `auto`; the kernel and compilation stay."""
    return engine.model_copy(
        update={
            "guidance_passes": "auto",
            "precision": "auto",
            "checkpointing": "auto",
            "block_swap": "auto",
            "cpu_offload": "auto",
            "plan": "auto",
        }
    )


def check_settings(engine: EngineConfig, work: Workload) -> None:
    """Raises UserError for counts of blocks that the model does not have."""
    layers = work.model.layers
    if engine.block_swap != "auto" and engine.block_swap > layers:
        message = f"engine.block_swap: got {engine.block_swap}, expected at most the model's {layers} blocks"
        raise UserError(f"{message}; give {layers} or fewer, or auto")
    moved = [name for name in ("block_swap", "cpu_offload") if getattr(engine, name) not in ("auto", 0, False)]
    if moved and parallel_sizes(engine.parallel).get("shard", 1) > 1:
        message = f"engine.{moved[0]}: got {getattr(engine, moved[0])} with engine.parallel {engine.parallel}"
        raise UserError(f"{message}; a sharded base stays on the GPUs: set {moved[0]} to auto, or leave shard out")
    if engine.checkpointing != "auto":
        counts = [count for _, count in checkpointing_runs(engine.checkpointing)]
        named = sum(count or 0 for count in counts)
        if named > layers or (named < layers and None not in counts):
            message = f"engine.checkpointing: {engine.checkpointing} names {named} blocks, the model has {layers}"
            raise UserError(f"{message}; leave out the last count and let its mode take the rest")


def _nothing_fits(found: Sequence[Forecast], work: Workload, room: Room) -> NoPlanFitsError:
    """Names the smallest plan, what it lacks, and what makes the run smaller at the moment that is the worst."""
    least = min(found, key=lambda item: (item.footprint.device, item.footprint.host))
    gib, worst = least.footprint.device, least.footprint.worst
    if gib <= room.usable:
        told = (
            f"{least.footprint.host * work.processes:.1f} GiB of host memory are needed, {room.host * _HOST_SHARE:.1f} of "
            f"{room.host:.1f} free ones may be used"
        )
        change = "free host memory, or set engine.block_swap and engine.cpu_offload by hand"
    else:
        told = f"{gib:.1f} GiB are needed while {worst}, {room.usable:.1f} of {room.device:.1f} free ones may be used"
        change = f"take fewer frames or a smaller size in {_SHAPES[worst]}"
        change += ", or train.sample_every 0" if worst.endswith("videos") and work.adapter else ""
    message = f"no plan fits this GPU: of the smallest ({least.plan}) {told}. {change[0].upper()}{change[1:]}"
    return NoPlanFitsError(f"{message}; set every part of engine by hand to try it all the same")
