"""The ways to share several GPUs, side by side: the table of `mochi-lora plan --gpus N` that a person chooses a layout from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from mochi_lora.config.schema import Config
from mochi_lora.console import console, print_table
from mochi_lora.errors import UserError
from mochi_lora.parallel.mesh import Layout, check_layout, layouts_of
from mochi_lora.planning.choice import Choice, Forecast, NoPlanFitsError, choose
from mochi_lora.planning.pace import mean_seconds
from mochi_lora.planning.traffic import step_traffic
from mochi_lora.planning.workload import Workload
from mochi_lora.spec import Bucket


@dataclass(frozen=True)
class Launch:
    """A configuration on so many GPUs: what it asks of each, and where its clips' shapes come from."""

    config: Config
    work: Workload
    buckets: tuple[Bucket, ...]  # of every clip that is trained on
    held_out: tuple[Bucket, ...] | None  # of the others; None: nobody knows before they are encoded
    shapes: frozenset[Bucket]  # of all that goes through the model
    layout: Layout

    def check(self, layout: Layout) -> None:
        """Raises UserError where a start would."""
        self._check(layout, self.shapes)

    def _check(self, layout: Layout, shapes: Iterable[Bucket]) -> None:
        check_layout(layout, self.work.model.heads, shapes, step_cache=self.config.sample.step_cache)

    def refused(self, layout: Layout) -> str | None:
        """Why `layout` would not start, with the setting that its videos' shape comes from; None where it would."""
        try:
            self.check(layout)
        except UserError as error:
            filmed = self.work.films.bucket if self.work.films else None
            if filmed is None or filmed in self.buckets:
                return str(error)
            try:
                self._check(layout, self.shapes - {filmed})
            except UserError as other:
                return str(other)
            told = f"only the videos of sample are {filmed} (frames, height, width)"
            return f"{error}; {told}: as {self.work.bucket}, like the clips, they would divide"
        return None

    def shared(self, layout: Layout) -> "Launch":
        """The same on as many GPUs, shared as `layout`. Raises UserError where that would not start."""
        self.check(layout)
        engine = self.config.engine.model_copy(update={"parallel": str(layout)})
        work = replace(self.work, context=layout.context)
        return replace(self, config=self.config.model_copy(update={"engine": engine}), work=work, layout=layout)

    @property
    def samples_per_step(self) -> int:
        """Of the whole launch."""
        return self.layout.data * self.work.batch * self.work.micro_steps


def print_layouts(launch: Launch, choice: Choice, price: float | None) -> None:
    """One row for each way to share, and below them why others would be refused; `price` is dollars per hour and GPU."""
    rows, refused = [], {}
    for layout in _worth_showing(launch):
        if why := launch.refused(layout):
            refused[layout] = why
            continue
        shared = launch.shared(layout)
        rows.append([_mark(shared, launch), str(layout), *_figures(shared, _pick(shared, launch, choice), choice, price)])
    head = [
        "",
        "engine.parallel",
        "precision",
        "checkpointing",
        "swap",
        "peak GiB",
        "GB/step",
        "s/step",
        "samples/step",
        "samples/h",
    ]
    print_table(f"ways to share {launch.layout.world} GPUs", [*head, *(["$ / 1000"] if price else [])], rows)
    for layout, why in refused.items():
        console.print(f"refused  {layout}: {why}", markup=False)


def _worth_showing(launch: Launch) -> Sequence[Layout]:
    every = layouts_of(launch.layout.world)
    return every if launch.layout in every else [launch.layout, *every]


def _mark(shared: Launch, launch: Launch) -> str:
    return "this" if shared.layout == launch.layout else ""


def _pick(shared: Launch, launch: Launch, choice: Choice) -> Forecast | None:
    """None: nothing fits, or what is set by hand does not go with it."""
    if shared.layout == launch.layout:
        return choice.pick
    try:
        return choose(shared.config.engine, shared.work, choice.card, choice.room, choice.pick.plan.attention).pick
    except NoPlanFitsError:
        return None


def _figures(shared: Launch, pick: Forecast | None, choice: Choice, price: float | None) -> list[str]:
    """Of one GPU, but samples and dollars, which are of all."""
    if pick is None:
        return ["nothing fits", *[""] * (8 if price else 7)]
    plan, card = pick.plan, choice.card
    seconds = mean_seconds(plan, shared.work, shared.buckets, card)
    low, high = card.spread(plan)
    pace = [f"{shared.samples_per_step * 3600 / (factor * seconds):.0f}" for factor in (high, low)]
    row = [plan.precision, plan.checkpointing, str(plan.block_swap), f"{pick.footprint.device:.1f}"]
    row += [f"{step_traffic(plan, shared.work).sum / 1e9:.1f}", card.told(pick.seconds, plan), str(shared.samples_per_step)]
    row += [pace[0] if low == high else " to ".join(pace)]
    if price:
        row.append(card.told(1000 * seconds / shared.samples_per_step / 3600 * price * shared.layout.world, plan))
    return row
