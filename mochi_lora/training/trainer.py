"""The step and the loop. Knows no file format, no text encoder, no VAE, no pipeline and no tracker by name.

What happens besides a step (logging, held-out loss, samples, checkpoints) is plugged in as callables by the composition
root, `commands.train`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

from mochi_lora.config.schema import ObjectiveConfig, TrainConfig
from mochi_lora.model.flow import interpolate, temporal_loss, velocity_loss, velocity_target
from mochi_lora.parallel.mesh import ALONE, Ranks, reduce_gradients
from mochi_lora.streams import Purpose, stream
from mochi_lora.training.average import MovingAverage
from mochi_lora.training.batches import Batch
from mochi_lora.training.health import Health
from mochi_lora.training.optimizer import learning_rate, step_if_finite
from mochi_lora.training.stopping import StopFlag


@dataclass(frozen=True)
class Learner:
    """What changes during training, and the settings that say how."""

    accelerator: Accelerator
    model: nn.Module  # VelocityModel
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: MovingAverage | None
    settings: TrainConfig
    objective: ObjectiveConfig
    seed: int
    ranks: Ranks = ALONE


@dataclass(frozen=True)
class StepResult:
    """One optimiser step as seen from the device; reading a value waits for it."""

    loss: torch.Tensor  # mean over all samples of all ranks
    gradient_norm: torch.Tensor  # before clipping
    rate: float
    tokens: int  # visual tokens of this data rank's samples


@dataclass(frozen=True)
class Pace:
    """Means over the steps since the last log line; what else was done in between is not counted."""

    seconds_per_step: float
    tokens_per_second: float  # visual tokens of this data rank's samples


class Event(Protocol):
    """Something due every N steps; called with the number of completed steps on every rank."""

    def __call__(self, done: int) -> None:
        """Do it."""
        ...


@dataclass(frozen=True)
class Events:
    """What the composition root plugs into the loop. None: never."""

    log: Callable[[int, StepResult, Pace], None]  # (completed steps, the last step's result, pace since the last log)
    validate: Event | None
    sample: Event | None
    checkpoint: Event
    progress: Event


def sample_losses(model: nn.Module, batch: Batch, objective: ObjectiveConfig) -> torch.Tensor:
    """Loss of every sample, [B] float32 on the device: velocity error plus the optional temporal term."""
    predicted = model(interpolate(batch.clean, batch.noise, batch.sigma), batch.sigma, batch.text)
    target = velocity_target(batch.clean, batch.noise)
    losses = velocity_loss(predicted, target)
    if objective.temporal_weight:
        losses = losses + objective.temporal_weight * temporal_loss(predicted, target, batch.anchor)
    return losses


def train_step(learner: Learner, health: Health, step: int, batches: Sequence[Batch]) -> StepResult:
    """One optimiser step over this rank's micro-batches. No host-device synchronisation (fused AdamW)."""
    ranks, device = learner.ranks, learner.accelerator.device
    losses = []
    for micro_step, batch in enumerate(batches):
        _seed_dropout(learner.seed, step, ranks.data_rank, micro_step)
        loss = sample_losses(learner.model, batch.to(device), learner.objective)
        (loss.mean() / len(batches)).backward()
        losses.append(loss.detach())
    own = torch.cat(losses)
    parameters = list(learner.parameters.values())
    mean = reduce_gradients(parameters, own.mean(), ranks.layout)
    norm = nn.utils.clip_grad_norm_(parameters, learner.settings.gradient_clip or float("inf"))
    finite = health.note(step, batches, own, mean, norm)
    rate = learning_rate(learner.settings, step)
    step_if_finite(learner.optimizer, finite, rate)
    if learner.average is not None:
        learner.average.update(step, finite)
    learner.optimizer.zero_grad()
    return StepResult(mean, norm, rate, sum(batch.tokens for batch in batches))


def logged_figures(learner: Learner, result: StepResult, pace: Pace) -> dict[str, float]:
    """What is logged of a step; reading it from the device waits, and every rank does."""
    norms = {}
    for part in "ab":
        factors = [tensor.detach() for name, tensor in learner.parameters.items() if f".lora_{part.upper()}." in name]
        norms[f"train/adapter_norm_{part}"] = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(factors))))
    values = {
        "train/loss": float(result.loss),
        "train/learning_rate": result.rate,
        "train/gradient_norm": float(result.gradient_norm),
        **norms,
        "time/seconds_per_step": pace.seconds_per_step,
        "time/tokens_per_second": pace.tokens_per_second * learner.ranks.layout.data,
    }
    if torch.cuda.is_available():
        values["memory/peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
        values["memory/allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return values


def run_loop(
    learner: Learner, health: Health, events: Events, batches: Iterator[tuple[int, list[Batch]]], stop: StopFlag, done: int
) -> int:
    """Go on after `done` completed steps until the batches end or all ranks agree to stop; returns the steps completed."""
    settings = learner.settings
    timed, tokens, since = 0, 0, time.monotonic()
    for step, micro_batches in batches:
        result = train_step(learner, health, step, micro_batches)
        done = step + 1
        timed, tokens = timed + 1, tokens + result.tokens
        last = done == settings.steps
        events.progress(done)
        stopping = stop.agreed() and not last
        saves = last or stopping or done % settings.checkpoint_every == 0
        validates = events.validate is not None and is_due(done, settings.validate_every, last=last)
        samples = events.sample is not None and not stopping and is_due(done, settings.sample_every, last=last)
        pauses = saves or validates or samples or done % settings.log_every == 0
        if pauses or health.crowded:
            health.check()
        if pauses:
            seconds = time.monotonic() - since
            events.log(done, result, Pace(seconds / timed, tokens / seconds))
            if validates and events.validate:
                events.validate(done)
            if saves:
                events.checkpoint(done)
            if samples and events.sample:
                events.sample(done)
            timed, tokens, since = 0, 0, time.monotonic()
        if stopping:
            break
    return done


def is_due(done: int, every: int, *, last: bool) -> bool:
    """Whether something of every N steps, and of the last, is due after `done` steps; N = 0 is never."""
    return every > 0 and (last or done % every == 0)


def _seed_dropout(seed: int, step: int, rank: int, micro_step: int) -> None:
    """Module dropout follows (seed, step, data rank, micro-step), so that a resumed step drops what the lost one dropped.

    The ranks of one context group drop alike: each carries the text stream whole, and their copies must stay one.
    """
    lane = rank * 2**32 + micro_step
    torch.manual_seed(int(stream(seed, Purpose.MODULE, step, lane).integers(2**63)))
