"""The plan of one training run: resolved at its first start, kept on resume; what is predicted of it, and told."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.engine.attention import check_attention
from mochi_lora.engine.plan import Plan
from mochi_lora.engine.precision import compute_dtype, require_precision
from mochi_lora.errors import UserError
from mochi_lora.parallel.mesh import Layout
from mochi_lora.planning.cards import card_of
from mochi_lora.planning.choice import Choice, Room, forecast, next_smaller, split_where_nothing_fits
from mochi_lora.planning.pace import mean_seconds
from mochi_lora.planning.resolve import resolve_plan
from mochi_lora.planning.workload import Workload
from mochi_lora.runs.processes import decided, least_room, processes_here
from mochi_lora.runs.workloads import base_of, training_work
from mochi_lora.spec import Bucket
from mochi_lora.training.checkpoint import Checkpoint

_VIDEOS_ONLY = ("cpu_offload", "guidance_passes")  # of a plan: no step is another for it


@dataclass(frozen=True)
class RunPlan:
    """The plan and, on a GPU, what is expected of it: `seconds` is the mean over the run's clips."""

    plan: Plan
    choice: Choice | None
    seconds: float | None

    def told(self) -> str:
        """For the head of a run."""
        if self.choice is None or self.seconds is None:
            return f"plan     {self.plan}"
        pick, pace = self.choice.pick, self.choice.card.told(self.seconds, self.plan)
        return (
            f"plan     {self.plan}\n"
            f"expected {pick.footprint.device:.1f} GiB at most (while {pick.footprint.worst}), "
            f"{self.choice.room.device:.1f} are free; {pace} s per step"
        )

    def when_full(self) -> str | None:
        """What to say when the GPU's memory was too small all the same."""
        return None if self.choice is None else self.choice.when_full()

    def metrics(self) -> dict[str, float]:
        """What is logged beside the measured figures."""
        if self.choice is None or self.seconds is None:
            return {}
        return {
            "memory/predicted_gib": self.choice.pick.footprint.device,
            "time/predicted_seconds_per_step": self.seconds,
        }


def plan_of_run(
    config: Config,
    found: Checkpoint | None,
    folder: Path,
    buckets: Sequence[Bucket],
    processes: Accelerator,
    layout: Layout,
) -> RunPlan:
    """The run's own plan if the engine settings and the device are those it was resolved for; else a new one, said aloud.

    The main process's plan is every process's, made for the fullest GPU of the launch. Raises UserError as `resolve_plan`.
    """
    device = processes.device
    room = least_room(device)
    work = training_work(config, base_of(folder), buckets, processes_here(), layout.world)
    stored = _stored(found)
    _tell_layout(found, layout)
    if stored is not None and decided(
        lambda: _still_asked_for(config, found, device.type, stored, layout) and _runs_here(stored, work, device)
    ):
        run = _expected(config, stored, work, buckets, device, room)
        if run.choice and not run.choice.fits:
            told = f"{run.choice.pick.footprint.device:.1f} GiB are predicted, {run.choice.room.device:.1f} free"
            console.print(f"the plan of the run's first start is kept although memory is short now: {told}", style="yellow")
        return run
    plan = decided(lambda: _resolved(config.engine, work, layout, room))
    now, before = asdict(plan), asdict(stored) if stored else {}
    changed = [f"{key}: {old} -> {now[key]}" for key, old in before.items() if old != now[key] and key not in _VIDEOS_ONLY]
    if changed:
        console.print(f"the engine changed since the checkpoint ({', '.join(changed)}): no longer bit for bit the same run")
    return _expected(config, plan, work, buckets, device, room)


def _resolved(engine: EngineConfig, work: Workload, layout: Layout, room: Room | None) -> Plan:
    return split_where_nothing_fits(engine, layout.world, lambda settings: resolve_plan(settings, work, room)).plan


def _tell_layout(found: Checkpoint | None, layout: Layout) -> None:
    before = None if found is None else found.state["progress"].get("layout")
    if before is not None and before != str(layout):
        told = f"the processes were {before}, now they are {layout}: the same samples in the same steps, not bit for bit"
        console.print(told, markup=False)


def _stored(found: Checkpoint | None) -> Plan | None:
    return None if found is None else Plan(**found.state["progress"]["plan"])


def _still_asked_for(config: Config, found: Checkpoint | None, device: str, stored: Plan, layout: Layout) -> bool:
    assert found is not None
    same = found.state["progress"]["engine"] == config.engine.model_dump(mode="json")
    return same and stored.device == device and layout.world % stored.shard == 0


def _runs_here(stored: Plan, work: Workload, device: torch.device) -> bool:
    """Whether this device has the plan's kernels: a run may come back on another card."""
    try:
        require_precision(stored.precision, device)
        check_attention(stored.attention, device, compute_dtype(stored.precision), work.model.head_size, work.model.heads)
    except UserError as error:
        told = f"the plan of the run's first start does not run here ({error}): another one is made"
        console.print(told, style="yellow", markup=False)
        return False
    return True


def _expected(
    config: Config, plan: Plan, work: Workload, buckets: Sequence[Bucket], device: torch.device, room: Room | None
) -> RunPlan:
    if room is None:
        return RunPlan(plan, None, None)
    card = card_of(device)
    pick = forecast(plan, work, card)
    smaller = next_smaller(config.engine, work, card, room, pick)
    choice = Choice(pick, room, room.holds(pick.footprint, work.processes), smaller, card)
    return RunPlan(plan, choice, mean_seconds(plan, work, buckets, card))
