"""The processes of one command: how many, which one, on which device, and what to say when its memory is full."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration

from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.engine.plan import resolve_device
from mochi_lora.errors import UserError
from mochi_lora.parallel.heartbeat import watch_peers
from mochi_lora.parallel.mesh import ALONE, Ranks, check_layout, gathered, layout_of, open_ranks
from mochi_lora.planning.choice import Room, room_here
from mochi_lora.runs.workloads import base_here, film_work

_WHAT_MAKES_IT_FIT = (
    "What makes it fit, in this order: engine.plan smallest with every other part of engine on auto (slower; in training it "
    "may round the base, which engine.precision bf16 forbids), then fewer frames or a smaller size in data.buckets and sample; "
    "for T5, encode.text_precision int8"
)
T = TypeVar("T")
LONG_WAIT_MINUTES = 7 * 24 * 60  # a rank may be done days before its peers; who is lost is `parallel.heartbeat`'s to tell


@contextmanager
def open_processes(device: str, timeout_minutes: float) -> Iterator[Accelerator]:
    """This process's view of the launch (`accelerate launch`, `torchrun`, or a plain start); within, the processes watch each
    other. Raises PeerGoneError where another one is the reason that this one cannot go on.

    Mixed precision is off here: the plan's precision is autocast in `VelocityModel`, for training and sampling alike.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked != "no":
        console.print(f"accelerate's mixed_precision {asked} has no effect here; engine.precision decides", style="yellow")
    handlers = [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))]
    cpu = resolve_device(device) == "cpu"
    _join_restarted("gloo" if cpu else "nccl", timeout_minutes)
    processes = Accelerator(mixed_precision="no", cpu=cpu, kwargs_handlers=handlers, project_config=ProjectConfiguration())
    with watch_peers(_attempt()) if processes.num_processes > 1 else nullcontext():
        yield processes
        # Not after a failure: a peer that is gone would be waited for. NCCL complains at exit of a group that nobody ended.
        processes.end_training()


def _attempt() -> str:
    """What sets this start of the launch apart from those before, in a store that outlives them; empty for the first."""
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return f"attempt-{attempt}" if attempt and os.environ.get("GROUP_WORLD_SIZE", "1") == "1" else ""


def _join_restarted(backend: str, timeout_minutes: float) -> None:
    """After a restart by torchrun on one machine: join the group under names of this attempt.

    The agent's store outlives its workers, and with it the addresses of the dead ones: torch (2.13) puts no attempt into the
    keys, and gloo then connects to nobody. Agents of several machines count attempts apart; they must not share their store
    (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, as in `launch/slurm.sh`).
    """
    attempt = _attempt()
    if not attempt or dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    named = dist.PrefixStore(attempt, store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=world, timeout=timeout)


@contextmanager
def join_launch(config: Config) -> Iterator[Ranks]:
    """This process's place where videos are made; a plain start is alone. Raises UserError where the layout does not fit."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    layout = layout_of(config.engine.parallel, world)
    if world == 1:
        yield ALONE
        return
    with open_processes(config.engine.device, LONG_WAIT_MINUTES):
        check_layout(layout, base_here(config).size.heads, [film_work(config).bucket], step_cache=config.sample.step_cache)
        yield open_ranks(layout, LONG_WAIT_MINUTES)


def processes_here() -> int:
    """Processes of this launch on this host, as the launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def agreed(item: T) -> T:
    """The main process's `item`, on every process of the launch."""
    told = [item]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(told, src=0)
    return told[0]


def decided(decide: Callable[[], T]) -> T:
    """What the main process comes to, on every process: one that came to something else would leave the others waiting.

    Raises the main process's UserError, everywhere.
    """
    told: tuple[T | None, UserError | None] = None, None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            told = decide(), None
        except UserError as error:
            told = None, error
    item, refusal = agreed(told)
    if refusal is not None:
        raise refusal
    return cast("T", item)


def least_room(device: torch.device) -> Room | None:
    """What is free on the fullest GPU of the launch, and on its fullest host; None on a CPU."""
    if device.type != "cuda":
        return None
    rooms = gathered([room_here(device)])
    return Room(min(room.device for room in rooms), min(room.host for room in rooms))


@contextmanager
def out_of_memory_named(advice: str | None = None) -> Iterator[None]:
    """Turn a full GPU into a `UserError` that says what makes it fit (None: in general); every other error passes."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = f"the GPU's memory is full ({str(error).splitlines()[0]}). {advice or _WHAT_MAKES_IT_FIT}"
        raise UserError(told) from error
