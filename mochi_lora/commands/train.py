"""`mochi-lora train`: the composition root. Decides what is plugged into what; running it again continues the run."""

import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mochi_lora.commands import card, publish
from mochi_lora.config.load import dump_config
from mochi_lora.config.requests import HubTarget
from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import Index, read_index
from mochi_lora.data.mix import parts_of, pools_of
from mochi_lora.data.plan import BatchPlan, Share
from mochi_lora.data.prompts import CachedPrompts
from mochi_lora.data.statistics import data_statistics
from mochi_lora.engine.plan import Plan
from mochi_lora.errors import UserError
from mochi_lora.files import only_one, remove_abandoned, write_text
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import load_adapter
from mochi_lora.model.base import fingerprint, locate
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import LoadedTransformer
from mochi_lora.parallel.mesh import Layout, Ranks, check_layout, layout_of, make_alike, open_ranks
from mochi_lora.runs.called import Called
from mochi_lora.runs.comfyui_copy import refuse_settings
from mochi_lora.runs.events import RunEvents, RunState
from mochi_lora.runs.folder import card_folder, checkpoints, final_adapter, final_is_missing, videos_missing
from mochi_lora.runs.identity import require_same, require_same_encoders, run_identity
from mochi_lora.runs.models import load_planned
from mochi_lora.runs.plan import plan_of_run
from mochi_lora.runs.previews import Previews
from mochi_lora.runs.processes import decided, open_processes, out_of_memory_named
from mochi_lora.runs.resume import resumed
from mochi_lora.runs.workloads import base_of, film_work
from mochi_lora.spec import Bucket
from mochi_lora.training.average import MovingAverage
from mochi_lora.training.batches import Batch, MicroSteps, SampleSource, steps_from
from mochi_lora.training.checkpoint import Checkpoint, remove_torn
from mochi_lora.training.health import Health
from mochi_lora.training.optimizer import build_optimizer
from mochi_lora.training.progress import TrainingLine
from mochi_lora.training.stopping import StopFlag, lost_peer_named
from mochi_lora.training.tracking import Silent, Tracker, open_trackers
from mochi_lora.training.trainer import Learner, run_loop


def run(config: Config, *, fresh: bool, push: HubTarget | None = None, called: Called = Called()) -> None:  # noqa: B008
    """Train, or go on training; a finished run gets its model card, and is published if asked for.

    Raises UserError for whatever a person can mend.
    """
    with open_processes(config.engine.device, config.train.peer_timeout_minutes) as processes:
        if push and processes.is_main_process:
            publish.require_right(push)
        stopped = _train_alone(config, processes, fresh=fresh)
        main = processes.is_main_process
    if stopped:
        sys.exit(128 + stopped)  # what was asked for is not done
    if main:
        _hand_over(config, push)
        called.say_next('sample --prompt "..."')


def _train_alone(config: Config, processes: Accelerator, *, fresh: bool) -> int:
    """Nobody else trains in the run's folder meanwhile. Returns the signal that stopped it, 0 at the end."""
    index = read_index(config.data)
    require_same_encoders(config, index)
    place = Ranks(layout_of(config.engine.parallel, processes.num_processes), processes.process_index)
    share = Share(config.train.batch_size, config.train.gradient_accumulation, place.layout.data, place.data_rank)
    folder = locate(config.model.base, config.model.revision, "transformer")
    identity = run_identity(config, index, fingerprint(folder), share.samples_per_step)
    with ExitStack() as context:
        if processes.is_main_process:
            if fresh:
                _set_aside(config.run.folder)
            context.enter_context(only_one(config.run.folder, "training"))
            remove_torn(checkpoints(config))
            remove_abandoned(config.run.folder)
        context.enter_context(lost_peer_named(config.train.peer_timeout_minutes))
        found = resumed(config, identity, place)
        if found is not None:
            require_same(config.run.folder, found.state["progress"]["identity"], identity)
        if found is not None and decided(lambda: _is_finished(config, found.step)):
            finished = f"{config.run.folder}: finished at step {found.step}; raise train.steps to go on, or use --fresh"
            console.print(finished, markup=False)
        else:
            context.enter_context(out_of_memory_named())
            return _train(config, processes, _Sources.of(config, index), share, folder, identity, found, place.layout)
    return 0


def _hand_over(config: Config, push: HubTarget | None) -> None:
    try:
        card.bring_up_to_date(config)
    except UserError as error:
        if push:
            raise
        console.print(f"no model card was written: {error}", style="yellow", markup=False)  # the adapter itself is safe
    if push:
        publish.run(card_folder(config), push)


def _train(
    config: Config,
    processes: Accelerator,
    sources: "_Sources",
    share: Share,
    folder: Path,
    identity: dict[str, Any],
    found: Checkpoint | None,
    layout: Layout,
) -> int:
    """Returns the signal that stopped it, 0 at the end."""
    fits = partial(check_layout, heads=base_of(folder).size.heads, buckets=_shapes(config, sources))
    fits(layout, step_cache=config.sample.step_cache)
    run_plan = plan_of_run(config, found, folder, sources.buckets, processes, layout)
    plan = run_plan.plan
    layout = replace(layout, shard=plan.shard)  # split, where nothing fits one GPU
    fits(layout, step_cache=config.sample.step_cache)
    ranks = open_ranks(layout, config.train.peer_timeout_minutes)
    with ExitStack() as context:
        context.enter_context(out_of_memory_named(run_plan.when_full()))
        stop = context.enter_context(StopFlag(config.train.peer_timeout_minutes))
        # Before the base is loaded, which takes minutes: what may be refused.
        refuse_settings(config)
        start = _starting_adapter(config) if found is None else None
        previews = _previews(config, processes, sources, stop, ranks)
        tracker = _open_tracker(config, processes, found)
        context.callback(tracker.finish)
        loaded = load_planned(folder, plan, processes.device)
        _warn_rounded(loaded, folder)
        learner, model = _build_learner(config, processes, loaded, plan, start, ranks)
        done = _restore(learner, found)
        data = data_statistics(sources.train.entries, sources.validation.entries)
        state = RunState(identity, run_plan, config, loaded.rounded, _best_of(found), data)
        health = Health(processes.device, config.run.folder, processes.process_index)
        _describe(config, processes, learner, sources, done)
        console.print(run_plan.told(), markup=False)
        line = context.enter_context(TrainingLine(config.train.steps, done)) if processes.is_main_process else None
        events = RunEvents(learner, model, state, tracker, sources.validation, previews, line)
        events.begin(done, resumed=found is not None)
        batches = sources.batches(config, share, done, pin=processes.device.type == "cuda")
        done = run_loop(learner, health, events.plugs(), batches, stop, done)
        events.finish(done)
        processes.wait_for_everyone()
    stopped = 0 if decided(lambda: _is_finished(config, done)) else stop.requested
    _farewell(config, done, stopped)
    return stopped


@dataclass(frozen=True)
class _Sources:
    """What training reads of the data set."""

    prompts: CachedPrompts
    train: SampleSource
    validation: SampleSource

    @classmethod
    def of(cls, config: Config, index: Index) -> "_Sources":
        cache = Cache(config.data.cache)
        stats = LatentStats(index.latents_mean, index.latents_std, index.latents_scale)
        sides = (
            SampleSource(cache, tuple(index.of(split)), stats, config.objective, config.run.seed)
            for split in ("train", "validation")
        )
        return cls(CachedPrompts(cache, index), *sides)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Shape of every clip that is trained on."""
        return tuple(Bucket.parse(entry.bucket) for entry in self.train.entries)

    def batches(self, config: Config, share: Share, start: int, *, pin: bool) -> Iterator[tuple[int, list[Batch]]]:
        buckets = self.buckets
        pools = pools_of(buckets, [entry.part for entry in self.train.entries], parts_of(config.data))
        plan = BatchPlan(buckets, config.run.seed, share.samples_per_step, pools)
        micro_steps = MicroSteps(self.train, plan, share)
        return steps_from(micro_steps, share, start, config.train.steps, workers=config.data.loader_workers, pin=pin)


def _build_learner(
    config: Config,
    processes: Accelerator,
    loaded: LoadedTransformer,
    plan: Plan,
    start: lora.Adapter | None,
    ranks: Ranks,
) -> tuple[Learner, VelocityModel]:
    parameters = lora.attach(loaded.transformer, config.adapter, config.run.seed)
    if start is not None:
        lora.load_into(loaded.transformer, start, lora.TRAINED)
    model = VelocityModel(loaded.transformer, plan, ranks)
    make_alike(list(parameters.values()), ranks.layout)  # now that those of swapped and split blocks are on the device too
    model.train()
    learner = Learner(
        accelerator=processes,
        model=model,
        parameters=parameters,
        optimizer=build_optimizer(config.train, parameters.values()),
        average=MovingAverage(parameters, config.train.ema_decay) if config.train.ema_decay else None,
        settings=config.train,
        objective=config.objective,
        seed=config.run.seed,
        ranks=ranks,
    )
    return learner, model


def _restore(learner: Learner, found: Checkpoint | None) -> int:
    """Put a checkpoint's state back; returns the number of completed steps."""
    if found is None:
        return 0
    saved = found.state["adapter"]
    assert saved.keys() == learner.parameters.keys(), "identity was checked, so the adapter must fit"
    for name, parameter in learner.parameters.items():
        parameter.data.copy_(saved[name])
    if "optimizer" in found.state:  # not at step 0
        # Its moments only: betas and weight decay are this configuration's, which may have changed.
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": found.state["optimizer"]["state"], "param_groups": groups})
    if learner.average is not None:
        learner.average.load(found.state["ema"])
    console.print(f"continuing at step {found.step}")
    return found.step


def _best_of(found: Checkpoint | None) -> dict[str, Any] | None:
    return None if found is None else found.state["progress"]["best"]


def _shapes(config: Config, sources: _Sources) -> set[Bucket]:
    """Of everything that goes through the model: clips, held-out clips, the videos in between."""
    filmed = {film_work(config).bucket} if config.train.sample_every and config.sample.prompts else set()
    return {Bucket.parse(entry.bucket) for side in (sources.train, sources.validation) for entry in side.entries} | filmed


def _open_tracker(config: Config, processes: Accelerator, found: Checkpoint | None) -> Tracker:
    if not processes.is_main_process:
        return Silent()
    config.run.folder.mkdir(parents=True, exist_ok=True)
    write_text(config.run.folder / "config.yaml", dump_config(config))
    ids = found.state["progress"]["run_ids"] if found is not None else {}
    return open_trackers(config.tracking, config.run.folder, config.model_dump(mode="json"), ids)


def _is_finished(config: Config, done: int) -> bool:
    """Nothing is left to do: neither steps, nor the final adapter, nor its videos."""
    return done >= config.train.steps and not final_is_missing(config, done) and not videos_missing(config, done)


def _starting_adapter(config: Config) -> lora.Adapter | None:
    if config.adapter.init_adapter is None:
        return None
    start = load_adapter(config.adapter.init_adapter)
    lora.require_same_scale(config.adapter, start)
    return start


def _previews(config: Config, processes: Accelerator, sources: "_Sources", stop: StopFlag, ranks: Ranks) -> Previews | None:
    if not config.train.sample_every or not config.sample.prompts:
        return None
    cancelled = stop.agreed if ranks.layout.together else lambda: stop.requested != 0
    return Previews(config, processes, sources.prompts, cancelled, ranks)


def _set_aside(folder: Path) -> None:
    """--fresh deletes nothing: the old run is renamed."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    shutil.move(folder, aside)
    console.print(f"the old run is now {aside}", markup=False)


def _warn_rounded(loaded: LoadedTransformer, folder: Path) -> None:
    if loaded.rounded:
        console.print(
            f"{folder}: {len(loaded.rounded)} tensors that Mochi keeps in float32 are stored rounded "
            f"({loaded.rounded[0]}, ...); results differ slightly from the float32 checkpoint",
            style="yellow",
            markup=False,
        )


def _describe(config: Config, processes: Accelerator, learner: Learner, sources: _Sources, done: int) -> None:
    count = sum(parameter.numel() for parameter in learner.parameters.values())
    settings = config.train
    layout = learner.ranks.layout
    per_step = settings.batch_size * settings.gradient_accumulation * layout.data
    console.print(
        f"run      {config.run.folder}, step {done} of {settings.steps}\n"
        f"data     {len(sources.train.entries)} clips, {len(sources.validation.entries)} held out, {per_step} per step\n"
        f"adapter  {config.adapter.targets}, rank {config.adapter.rank}, {count:,} parameters\n"
        f"device   {processes.num_processes} x {processes.device.type} ({layout}), started {time.strftime('%H:%M:%S')}",
        markup=False,
    )


def _farewell(config: Config, done: int, stopped: int) -> None:
    if stopped:
        name = signal.Signals(stopped).name
        console.print(f"stopped by {name} after step {done}, which is saved; the same command continues")
        return
    console.print(f"adapter  {final_adapter(config)}", markup=False)
