"""`mochi-lora plan`: what each way of running the engine would take on this GPU, or on named ones, before a weight is read.

With several GPUs, memory and seconds are of each, and money is of all.
"""

import re
import statistics
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mochi_lora.commands.plan_layouts import Launch, print_layouts
from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.requests import PlanRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table
from mochi_lora.data.index import index_path, read_index
from mochi_lora.data.mix import parts_of
from mochi_lora.engine.plan import Plan, resolve_device
from mochi_lora.engine.swap import home_of
from mochi_lora.errors import UserError
from mochi_lora.model import adapter as lora
from mochi_lora.model.base import locate
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer, read_config
from mochi_lora.parallel.mesh import layout_of, least_world
from mochi_lora.planning.cards import Card, card_named, card_nearest, card_of, cards, price_of
from mochi_lora.planning.choice import (
    MODES,
    Choice,
    Forecast,
    candidates,
    choose,
    forecast,
    freed,
    named_precision,
    room_of,
    split_where_nothing_fits,
)
from mochi_lora.planning.pace import decoding_seconds, mean_seconds, seconds_per_guided_step, seconds_per_pass
from mochi_lora.planning.resolve import resolve_plan
from mochi_lora.planning.workload import Films, ModelSize, Workload
from mochi_lora.runs.processes import out_of_memory_named
from mochi_lora.runs.workloads import base_or_published, film_work, training_work
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import Trial, random_steps, run_trial

_HOST_GIB = 64.0  # per GPU of a machine that is only named
_GPUS_PER_HOST = 8  # there
_MEASURED_STEPS, _WARMUP = 5, 2


def run(config: Config, request: PlanRequest) -> None:
    """Print the table and the pick; with `request.measure` also run a few steps. Raises UserError."""
    gpus = request.gpus or least_world(config.engine.parallel)
    launch, known = _asked(config, gpus)
    named = request.gpu is not None or request.memory is not None
    if request.measure and (named or gpus > 1):
        message = "--measure runs on this machine in one process: leave --gpu, --memory, --gpus and engine.parallel out"
        raise UserError(f"{message}, or --measure")
    if not known:
        console.print(f"{config.model.base} is not here yet: Mochi-1's published dimensions are taken", markup=False)
    if not named and resolve_device(config.engine.device) == "cpu":
        _on_this_cpu(launch, request)
        return
    with out_of_memory_named():
        _print_all(launch, request, elsewhere=named or gpus > torch.cuda.device_count())


def _print_all(launch: Launch, request: PlanRequest, *, elsewhere: bool) -> None:
    gpus = launch.work.world
    settled, choice = _settled(launch, request, elsewhere=elsewhere)
    price = _price(choice.card, request, gpus)
    _print_choice(settled, choice, price)
    _print_video(launch, choice, price, elsewhere=elsewhere)
    if gpus > 1:
        print_layouts(settled, choice, price)
    if request.measure:
        with out_of_memory_named(choice.when_full()):
            trial = measured(launch.config, choice.pick.plan, launch.work.bucket)
        _print_trial(trial, choice.pick, launch.work)


def measured(config: Config, plan: Plan, bucket: Bucket) -> Trial:
    """A few steps of a run with this configuration, on random weights of the base's dimensions and random clips."""
    layout_of(config.engine.parallel, 1)  # one process measures
    dimensions = read_config(locate(config.model.base, config.model.revision, "transformer"))
    home = partial(home_of, depth=ModelSize.of(dimensions).layers, plan=plan) if plan.block_swap else None
    device = torch.device(plan.device)
    transformer = random_transformer(dimensions, device=device, precision=plan.precision, home=home)
    parameters = lora.attach(transformer, config.adapter, config.run.seed)
    model = VelocityModel(transformer, plan)
    settings = config.train.model_copy(update={"steps": _WARMUP + _MEASURED_STEPS, "warmup_steps": 0})
    with tempfile.TemporaryDirectory() as folder:
        return run_trial(random_steps(model, parameters, bucket, settings, Path(folder)), model.device, _WARMUP)


def run_hours(launch: Launch, plan: Plan, card: Card) -> float:
    """Of the whole run, predicted, with its held-out losses; its videos are made by its own plan."""
    work, settings, sample = launch.work, launch.config.train, launch.config.sample
    ranks = work.world // work.context  # these share videos and held-out clips out
    seconds = settings.steps * mean_seconds(plan, work, launch.buckets, card)
    if settings.validate_every and launch.held_out:
        looks = [seconds_per_pass(plan, replace(work, bucket=bucket, batch=1), card) for bucket in launch.held_out]
        seconds += _times(settings.steps, settings.validate_every) * settings.validation_bands * sum(looks) / ranks
    if work.films is not None:
        rounds = -(-len(sample.prompts) * len(sample.seeds) // ranks)
        video = _video_seconds(work.films, work, plan, card)
        seconds += _times(settings.steps, settings.sample_every) * rounds * video
    return seconds / 3600


def _times(steps: int, every: int) -> int:
    """Before the first step, every so many, and after the last."""
    return 1 + -(-steps // every)


def _video_seconds(films: Films, work: Workload, plan: Plan, card: Card) -> float:
    one = seconds_per_guided_step if films.guided else seconds_per_pass
    return films.steps * one(plan, replace(work, bucket=films.bucket, batch=1), card) + decoding_seconds(films.bucket, card)


def _asked(config: Config, gpus: int) -> tuple[Launch, bool]:
    """Shapes of the encoded clips; of the configuration where nothing is encoded yet. Raises UserError where a start would."""
    base, known = base_or_published(config)
    if index_path(config.data).is_file():
        index = read_index(config.data)
        buckets, held_out = (tuple(Bucket.parse(entry.bucket) for entry in index.of(side)) for side in ("train", "validation"))
        shapes = {*buckets, *held_out}
    else:
        shapes = {bucket for part in parts_of(config.data) for bucket in part.shapes.buckets}
        buckets, held_out = (max(shapes, key=lambda bucket: bucket.tokens),), None
    here = min(gpus, max(_GPUS_PER_HOST, torch.cuda.device_count()))
    work = training_work(config, base, buckets, here, gpus)
    filmed = {film_work(config).bucket} if work.films else set()
    layout = layout_of(config.engine.parallel, gpus)
    launch = Launch(config, work, buckets, held_out, frozenset(shapes | filmed), layout)
    launch.check(layout)
    return launch, known


def _settled(launch: Launch, request: PlanRequest, *, elsewhere: bool) -> tuple[Launch, Choice]:
    """As a start would settle it: the base is split over all GPUs where nothing fits one of them."""

    def settle(engine: EngineConfig) -> Choice:
        choice = _choice_for(engine, launch.work, request) if elsewhere else resolve_plan(engine, launch.work).choice
        assert choice is not None, "a GPU has a choice"
        return choice

    choice = split_where_nothing_fits(launch.config.engine, launch.layout.world, settle)
    if choice.pick.plan.shard == launch.layout.shard:
        return launch, choice
    launch = launch.shared(replace(launch.layout, shard=choice.pick.plan.shard))
    console.print(f"split    no plan fits one GPU whole, so the base is split over all of them: {launch.layout}", markup=False)
    return launch, choice


def _choice_for(engine: EngineConfig, work: Workload, request: PlanRequest) -> Choice:
    """On GPUs that are not here."""
    gib = _gib(request.memory) if request.memory else None
    if request.gpu:
        card = card_named(request.gpu)
    elif torch.cuda.is_available():
        card = card_of(torch.device("cuda"))
    else:
        assert gib is not None, "one of the two was given"
        card = card_nearest(gib)
        console.print(f"times are those of an {card.name}: --gpu names another", markup=False)
    room = room_of(gib or card.memory_gib, _HOST_GIB * work.processes)
    precision = named_precision(engine, work) or "bf16"
    attention = engine.attention if engine.attention != "auto" else card.fastest_attention(precision)
    return choose(engine, work, card, room, attention)


def _on_this_cpu(asked: Launch, request: PlanRequest) -> None:
    if not request.measure:
        names = ", ".join(card.name for card in cards())
        raise UserError(f"there is no GPU here: name one with --gpu ({names}), or its memory with --memory 24GiB")
    plan = resolve_plan(asked.config.engine, asked.work).plan
    console.print(f"plan     {plan}\nnothing is predicted for a CPU", markup=False)
    _print_trial(measured(asked.config, plan, asked.work.bucket), None, asked.work)


def _print_choice(asked: Launch, choice: Choice, price: float | None) -> None:
    card, pick, work = choice.card, choice.pick, asked.work
    origin = f"measured: {card.source}" if card.source else "an estimate from its datasheet: nobody measured this GPU"
    several = f"{work.world} x " if work.world > 1 else ""
    console.print(
        f"gpu      {several}{card.name}, {choice.room.device:.1f} GiB free ({choice.room.usable:.1f} for a plan), "
        f"host {choice.room.host:.0f} GiB\n"
        f"rates    {origin}\n{_links(asked, card)}"
        f"run      {work.bucket} at most, batch {work.batch} x {work.micro_steps}, {asked.config.train.steps} steps",
        markup=False,
    )
    if asked.config.train.validate_every and asked.held_out is None:
        console.print("hours    without held-out losses: how many clips are held out is known once they are encoded")
    head = ["", "precision", "checkpointing", "swap", "peak GiB", "worst while", "pinned", "host", "s/step", "hours"]
    rows = [_row(item, asked, choice, price) for item in _shown(asked.config, work, choice)]
    each = f" for each GPU of {asked.layout}" if work.world > 1 else ""
    print_table(f"predicted{each}, attention {pick.plan.attention}", [*head, *(["$ run"] if price else [])], rows)
    console.print(f"picked   {_told_pick(choice)}", markup=False)


def _told_pick(choice: Choice) -> str:
    return f"{choice.pick.plan}{'' if choice.fits else ' (set by hand; predicted not to fit)'}"


def _print_video(asked: Launch, choice: Choice, price: float | None, *, elsewhere: bool) -> None:
    """One video as `sample` would make it on the GPU of `choice`, whether or not the run makes any; where it could not, why.

    Its plan is its own: no training step needs room beside it, and nothing is rounded for speed.
    """
    films = film_work(asked.config)
    told = f"video    {films.bucket}, {films.steps} steps"
    try:
        own = _sampling_choice(asked, films, choice, elsewhere=elsewhere)
    except UserError as error:
        console.print(f"{told}: {error}", markup=False)
        return
    seconds = _video_seconds(films, asked.work, own.pick.plan, own.card)
    plan, card = own.pick.plan, own.card
    cost = f", $ {card.told(price * asked.work.context * seconds / 3600, plan, '.3f')}" if price else ""
    told = f"{told}: {card.told(seconds, plan, '.0f')} s{cost}, as sample plans it: {_told_pick(own)}"
    console.print(told, markup=False)


def _sampling_choice(asked: Launch, films: Films, choice: Choice, *, elsewhere: bool) -> Choice:
    """Raises UserError where a start of `sample` would."""
    replace(asked, shapes=frozenset({films.bucket})).check(asked.layout)
    engine = asked.config.engine
    work = replace(asked.work, bucket=films.bucket, batch=1, micro_steps=1, adapter=None, films=films)
    if elsewhere:
        return choose(engine, work, choice.card, choice.room, choice.pick.plan.attention)
    own = resolve_plan(engine, work, choice.room).choice
    assert own is not None, "a GPU has a choice"
    return own


def _links(asked: Launch, card: Card) -> str:
    """What the GPUs reach each other by, a line of its own."""
    work = asked.work
    if work.world == 1:
        return ""
    network = f", {card.network:.0f} to other hosts" if work.world > work.processes else ""
    return (
        f"links    {card.link:.0f} GB/s to GPUs of the same host ({work.processes} each){network}: from datasheets, nobody "
        f"measured them\nshared   {asked.layout}, {asked.samples_per_step} samples per step\n"
    )


def _shown(config: Config, work: Workload, choice: Choice) -> list[Forecast]:
    """The pick, the fastest of each precision, every mode alone, the next smaller: what shows the trade."""
    every = [
        forecast(plan, work, choice.card)
        for plan in candidates(freed(config.engine), work, choice.card, choice.pick.plan.attention)
    ]
    shown = {choice.pick.plan: choice.pick}
    for precision in choice.card.precisions:
        mine = [item for item in every if item.plan.precision == precision]
        fitting = [item for item in mine if choice.room.holds(item.footprint, work.processes)]
        alone = [
            item for item in mine if item.plan.checkpointing in MODES and not item.plan.block_swap and not item.plan.cpu_offload
        ]
        best = [min(fitting, key=lambda item: item.seconds)] if fitting else []
        shown |= {item.plan: item for item in [*best, *sorted(alone, key=lambda item: item.seconds)]}
    least = min(every, key=lambda item: item.footprint.device)
    shown[least.plan] = least
    return list(shown.values())


def _row(item: Forecast, asked: Launch, choice: Choice, price: float | None) -> list[str]:
    plan, footprint, card = item.plan, item.footprint, choice.card
    fits = choice.room.holds(footprint, asked.work.processes)
    mark = "pick" if plan == choice.pick.plan else "" if fits else "too large"
    hours = run_hours(asked, plan, card)
    row = [mark, plan.precision, plan.checkpointing, str(plan.block_swap), f"{footprint.device:.1f}", footprint.worst]
    row += [f"{footprint.pinned:.1f}", f"{footprint.host:.1f}", card.told(item.seconds, plan), card.told(hours, plan, ".1f")]
    return [*row, card.told(hours * price * asked.work.world, plan)] if price else row


def _print_trial(trial: Trial, expected: Forecast | None, work: Workload) -> None:
    """Predicted next to measured, of a training step alone: videos and validation are not run."""
    seconds = statistics.median(trial.seconds)
    rows = [
        (
            "s/step",
            f"{expected.seconds:.3f}" if expected else "-",
            f"{seconds:.3f}",
            _off(expected.seconds if expected else None, seconds),
        )
    ]
    if trial.allocated_gib is not None and expected:
        step = dict(expected.footprint.moments)["training"]
        rows.append(("GiB allocated", f"{step:.1f}", f"{trial.allocated_gib:.1f}", _off(step, trial.allocated_gib)))
        rows.append(("GiB reserved", "-", f"{trial.reserved_gib:.1f}", ""))
    print_table(f"{len(trial.seconds)} steps at {work.bucket}", ("", "predicted", "measured", "off by"), rows)
    console.print(f"first    {trial.first_seconds:.1f} s for the first step")


def _off(predicted: float | None, found: float) -> str:
    return f"{predicted / found - 1:+.1%}" if predicted else ""


def _price(card: Card, request: PlanRequest, gpus: int) -> float | None:
    """Dollars per hour and GPU: given, or from the table, which is told with its date."""
    if request.price is not None:
        return request.price
    if (known := price_of(card)) is None:
        console.print(f"price    none known for {card.name}; --price gives yours", markup=False)
        return None
    of_each = " and GPU" if gpus > 1 else ""
    console.print(f"price    $ {known[0]:.2f} per hour{of_each} ({known[1]}); --price gives yours", markup=False)
    return known[0]


def _gib(text: str) -> float:
    """`24GiB`, `24GB` or `24`. A card's GB are GiB to its maker."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:Gi?B?)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--memory {text}: expected a size above 0 such as 24GiB")
    return float(match[1])
