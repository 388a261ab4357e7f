"""`mochi-lora plan`: what each way of running the engine would take on this GPU, or on a named one, before a weight is read."""

import re
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mochi_lora.commands.workloads import base_or_published, training_work
from mochi_lora.config.requests import PlanRequest
from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table
from mochi_lora.data.index import index_path, read_index
from mochi_lora.data.mix import parts_of
from mochi_lora.engine.cards import Card, card_named, card_nearest, card_of, cards, price_of
from mochi_lora.engine.choice import MODES, Choice, Forecast, candidates, choose, forecast, freed, room_of
from mochi_lora.engine.mesh import layout_of
from mochi_lora.engine.pace import decoding_seconds, seconds_per_pass, seconds_per_step
from mochi_lora.engine.plan import Plan, resolve_device
from mochi_lora.engine.resolve import resolve_plan
from mochi_lora.engine.swap import home_of
from mochi_lora.engine.workload import Films, ModelSize, Workload
from mochi_lora.errors import UserError
from mochi_lora.model import adapter as lora
from mochi_lora.model.base import locate
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.model.weights import random_transformer, read_config
from mochi_lora.spec import Bucket
from mochi_lora.training.trial import Trial, random_steps, run_trial

_HOST_GIB = 64.0  # of a machine that is only named
_MEASURED_STEPS, _WARMUP = 5, 2


@dataclass(frozen=True)
class _Run:
    """What the configuration asks for, and where its clips' shapes come from."""

    config: Config
    work: Workload
    buckets: tuple[Bucket, ...]


def run(config: Config, request: PlanRequest) -> None:
    """Print the table and the pick; with `request.measure` also run a few steps. Raises UserError."""
    run_asked, known = _asked(config)
    named = request.gpu is not None or request.memory is not None
    if request.measure and named:
        raise UserError("--measure runs on this machine's GPU: leave --gpu and --memory out, or --measure")
    if not known:
        console.print(f"{config.model.base} is not here yet: Mochi-1's published dimensions are taken", markup=False)
    if not named and resolve_device(config.engine.device) == "cpu":
        _on_this_cpu(run_asked, request)
        return
    choice = _choice_for(config, run_asked.work, request) if named else resolve_plan(config.engine, run_asked.work).choice
    assert choice is not None, "a GPU has a choice"
    _print_choice(run_asked, choice, _price(choice.card, request))
    if request.measure:
        _print_trial(measured(config, choice.pick.plan, run_asked.work.bucket), choice.pick, run_asked.work)


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


def run_hours(asked: Config, work: Workload, buckets: Sequence[Bucket], plan: Plan, card: Card) -> tuple[float, float]:
    """(hours of the whole run, videos included; seconds of one video), predicted."""
    by_shape = {bucket: seconds_per_step(plan, replace(work, bucket=bucket), card) for bucket in set(buckets)}
    steps = asked.train.steps * sum(by_shape[bucket] for bucket in buckets) / len(buckets)
    films = work.films
    if films is None:
        return steps / 3600, 0.0
    video = _video_seconds(films, work, plan, card)
    times = 1 + -(-asked.train.steps // asked.train.sample_every)
    return (steps + times * len(asked.sample.prompts) * len(asked.sample.seeds) * video) / 3600, video


def _video_seconds(films: Films, work: Workload, plan: Plan, card: Card) -> float:
    one = seconds_per_pass(plan, replace(work, bucket=films.bucket, batch=1), card)
    return films.steps * (2 if films.guided else 1) * one + decoding_seconds(films.bucket, card)


def _asked(config: Config) -> tuple[_Run, bool]:
    """Shapes of the encoded clips; of the configuration where nothing is encoded yet."""
    base, known = base_or_published(config)
    if index_path(config.data).is_file():
        buckets = tuple(Bucket.parse(entry.bucket) for entry in read_index(config.data).of("train"))
    else:
        buckets = tuple(sorted({bucket for part in parts_of(config.data) for bucket in part.shapes.buckets}))
        buckets = (max(buckets, key=lambda bucket: bucket.tokens),)
    return _Run(config, training_work(config, base, buckets), buckets), known


def _choice_for(config: Config, work: Workload, request: PlanRequest) -> Choice:
    """On a GPU that is not here."""
    gib = _gib(request.memory) if request.memory else None
    if request.gpu:
        card = card_named(request.gpu)
    elif torch.cuda.is_available():
        card = card_of(torch.device("cuda"))
    else:
        assert gib is not None, "one of the two was given"
        card = card_nearest(gib)
        console.print(f"times are those of an {card.name}: --gpu names another", markup=False)
    room = room_of(gib or card.memory_gib, _HOST_GIB)
    attention = config.engine.attention if config.engine.attention != "auto" else card.fastest_attention()
    return choose(config.engine, work, card, room, attention)


def _on_this_cpu(asked: _Run, request: PlanRequest) -> None:
    if not request.measure:
        names = ", ".join(card.name for card in cards())
        raise UserError(f"there is no GPU here: name one with --gpu ({names}), or its memory with --memory 24GiB")
    plan = resolve_plan(asked.config.engine, asked.work).plan
    console.print(f"plan     {plan}\nnothing is predicted for a CPU", markup=False)
    _print_trial(measured(asked.config, plan, asked.work.bucket), None, asked.work)


def _print_choice(asked: _Run, choice: Choice, price: float | None) -> None:
    card, pick, work = choice.card, choice.pick, asked.work
    origin = f"measured: {card.source}" if card.source else "an estimate from its datasheet: nobody measured this GPU"
    console.print(
        f"gpu      {card.name}, {choice.room.device:.1f} GiB free ({choice.room.usable:.1f} for a plan), "
        f"host {choice.room.host:.0f} GiB\n"
        f"rates    {origin}\n"
        f"run      {work.bucket} at most, batch {work.batch} x {work.micro_steps}, {asked.config.train.steps} steps",
        markup=False,
    )
    head = ["", "precision", "checkpointing", "swap", "peak GiB", "worst while", "pinned", "host", "s/step", "hours"]
    rows = [_row(item, asked, choice, price) for item in _shown(asked.config, work, choice)]
    print_table(f"predicted, attention {pick.plan.attention}", [*head, *(["$ run"] if price else [])], rows)
    _, video = run_hours(asked.config, work, asked.buckets, pick.plan, card)
    if video and work.films:
        cost = f", $ {price * video / 3600:.3f}" if price else ""
        console.print(
            f"video    {work.films.bucket}, {work.films.steps} steps: {_range(video, card, '.0f')} s{cost}", markup=False
        )
    console.print(f"picked   {pick.plan}{'' if choice.fits else ' (set by hand; predicted not to fit)'}", markup=False)


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


def _row(item: Forecast, asked: _Run, choice: Choice, price: float | None) -> list[str]:
    plan, footprint, card = item.plan, item.footprint, choice.card
    fits = choice.room.holds(footprint, asked.work.processes)
    mark = "pick" if plan == choice.pick.plan else "" if fits else "too large"
    hours, _ = run_hours(asked.config, asked.work, asked.buckets, plan, card)
    row = [mark, plan.precision, plan.checkpointing, str(plan.block_swap), f"{footprint.device:.1f}", footprint.worst]
    row += [f"{footprint.pinned:.1f}", f"{footprint.host:.1f}", _range(item.seconds, card), _range(hours, card, ".1f")]
    return [*row, _range(hours * price, card)] if price else row


def _range(value: float, card: Card, form: str = ".2f") -> str:
    low, high = card.spread
    return f"{value:{form}}" if low == high else f"{low * value:{form}} to {high * value:{form}}"


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


def _price(card: Card, request: PlanRequest) -> float | None:
    """Dollars per hour: given, or from the table, which is told with its date."""
    if request.price is not None:
        return request.price
    if (known := price_of(card)) is None:
        return None
    console.print(f"price    $ {known[0]:.2f} per hour ({known[1]}); --price gives yours", markup=False)
    return known[0]


def _gib(text: str) -> float:
    """`24GiB`, `24GB` or `24`. A card's GB are GiB to its maker."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:Gi?B?)?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise UserError(f"--memory {text}: expected a size above 0 such as 24GiB")
    return float(match[1])
