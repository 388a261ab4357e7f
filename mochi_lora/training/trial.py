"""A few real training steps on random clips, timed: what `mochi-lora plan --measure` and the benchmark run.

The step, the loader, the optimiser, the health check and the log lines are those of a run; the weights and the data are random.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from mochi_lora.config.schema import ObjectiveConfig, TrainConfig
from mochi_lora.data.cache import Cache
from mochi_lora.data.index import IndexEntry
from mochi_lora.data.plan import BatchPlan, Share
from mochi_lora.data.samples import Posterior, TextEmbedding
from mochi_lora.model.flow import LatentStats
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.spec import Bucket
from mochi_lora.training.batches import MicroSteps, SampleSource, steps_from
from mochi_lora.training.health import Health
from mochi_lora.training.optimizer import build_optimizer
from mochi_lora.training.tracking import Silent, Tracker, Trackers
from mochi_lora.training.trainer import Learner, Pace, StepResult, logged_figures, train_step

TEXT_TOKENS = (120, 96, 143, 120, 80, 120, 171, 110)  # captions differ in length, as real ones do
_LOADERS = 2
GIB = 2**30
Step = Callable[[], tuple[torch.Tensor, int]]  # -> (loss on the device, visual tokens)


@dataclass(frozen=True)
class Trial:
    """What was measured; the first step compiles. GiB are None without a GPU."""

    first_seconds: float
    seconds: tuple[float, ...]  # of each timed step
    losses: tuple[float, ...]  # of every step
    tokens: int
    allocated_gib: float | None
    reserved_gib: float | None


def random_steps(
    model: VelocityModel,
    parameters: dict[str, nn.Parameter],
    bucket: Bucket,
    settings: TrainConfig,
    folder: Path,
    text_tokens: Sequence[int] = TEXT_TOKENS,
) -> Iterator[Step]:
    """`settings.steps` steps over clips of `bucket`, one for each caption of so many tokens, whose cache is written below
    `folder`: each rank's own.
    """
    device, ranks = model.device, model.ranks
    accelerator = Accelerator(mixed_precision="no", cpu=device.type == "cpu")
    model.train()
    learner = Learner(
        accelerator,
        model,
        parameters,
        build_optimizer(settings, parameters.values()),
        None,
        settings,
        ObjectiveConfig(),
        seed=0,
        ranks=ranks,
    )
    health = Health(device, folder, rank=0)
    share = Share(settings.batch_size, settings.gradient_accumulation, ranks.layout.data, ranks.data_rank)
    source = _random_source(bucket, text_tokens, model.transformer.config.text_embed_dim, folder)
    plan = BatchPlan((bucket,) * len(text_tokens), 0, share.samples_per_step)
    micro_steps = MicroSteps(source, plan, share)
    # No record is known of an earlier trial in this folder: the tracker would drop the same steps as replayed.
    tracker = Trackers(folder, [], [], {}) if accelerator.is_main_process else Silent()
    log = _Log(learner, tracker)
    try:
        for number, batches in steps_from(micro_steps, share, 0, settings.steps, workers=_LOADERS, pin=device.type == "cuda"):

            def step(number: int = number, batches: list = batches) -> tuple[torch.Tensor, int]:
                result = train_step(learner, health, number, batches)
                done = number + 1
                log.count(result)
                logs = done % settings.log_every == 0 or done == settings.steps
                if logs or health.crowded:
                    health.check()  # waits for the device, as often as a run does
                if logs:
                    log.write(done, result)
                return result.loss, result.tokens

            yield step
    finally:
        tracker.finish()


class _Log:
    """The log lines of a trial, each with the pace since the one before."""

    def __init__(self, learner: Learner, tracker: Tracker) -> None:
        self._learner, self._tracker = learner, tracker
        self._steps, self._tokens, self._since = 0, 0, time.monotonic()

    def count(self, result: StepResult) -> None:
        self._steps, self._tokens = self._steps + 1, self._tokens + result.tokens

    def write(self, done: int, result: StepResult) -> None:
        seconds = time.monotonic() - self._since
        pace = Pace(seconds / self._steps, self._tokens / seconds)
        self._tracker.log(done, logged_figures(self._learner, result, pace))
        self._steps, self._tokens, self._since = 0, 0, time.monotonic()


def run_trial(steps: Iterator[Step], device: torch.device, warmup: int) -> Trial:
    """Run them; the first `warmup` are not timed, and the device is waited for at the end of each of these.

    A timed step begins when the device has finished the one before. The host runs ahead, as it does in a run.
    """
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    clock = _Clock(device)
    losses, tokens, first = [], 0, 0.0
    for number, step in enumerate(steps):
        loss, tokens = step()
        losses.append(loss)
        if number < warmup:
            float(loss)  # waits
            clock = _Clock(device)
        else:
            clock.mark()
        if number == 0:
            float(loss)
            first = time.perf_counter() - start
    return Trial(
        first_seconds=first,
        seconds=clock.seconds(),
        losses=tuple(float(loss) for loss in losses),
        tokens=tokens,
        allocated_gib=torch.cuda.max_memory_allocated(device) / GIB if cuda else None,
        reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if cuda else None,
    )


class _Clock:
    """Seconds from mark to mark, on a GPU by its own time line; the first mark is the clock's making."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.mark()

    def mark(self) -> None:
        if self._stream:
            self._events.append(self._stream.record_event(torch.cuda.Event(enable_timing=True)))
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> tuple[float, ...]:
        """Waits for the last mark."""
        for event in self._events:
            event.synchronize()
        on_device = tuple(before.elapsed_time(after) / 1000 for before, after in pairwise(self._events))
        return on_device or tuple(after - before for before, after in pairwise(self._times))


def _random_source(bucket: Bucket, text_tokens: Sequence[int], text_width: int, folder: Path) -> SampleSource:
    """A cache of random latents and captions."""
    cache = Cache(folder)
    generator = torch.Generator().manual_seed(0)
    shape = bucket.latent_shape
    entries = []
    for number, tokens in enumerate(text_tokens):
        key = f"{number:032d}"
        cache.write_latents(key, Posterior(torch.randn(shape, generator=generator), torch.full(shape, -6.0)), {})
        cache.write_text(key, TextEmbedding(torch.randn(tokens, text_width, generator=generator)), {})
        entries.append(IndexEntry(f"clip {number}", key, str(bucket), key, key, "", "train"))
    channels = shape[0]
    return SampleSource(cache, tuple(entries), LatentStats((0.0,) * channels, (1.0,) * channels), ObjectiveConfig(), seed=0)
