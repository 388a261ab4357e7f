"""Optimiser, learning rate, and the gate that keeps a non-finite step out of both."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mochi_lora.config.schema import TrainConfig
from mochi_lora.errors import UserError


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0: never 0 in the warm-up, never 0 before the end."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    match settings.lr_schedule:
        case "constant":
            return settings.learning_rate
        case "linear":
            return settings.learning_rate * (1 - done)
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(settings: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the adapter's parameters. Raises UserError where bitsandbytes does not load."""
    parameters = list(parameters)
    shared: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **shared)
    try:
        from bitsandbytes import optim  # noqa: PLC0415 - seconds to import, needed by few
    except ImportError as error:
        message = f"train.optimizer: {settings.optimizer} needs bitsandbytes, which does not load here ({error}); use adamw"
        raise UserError(message) from error
    classes = {"adamw8bit": optim.AdamW8bit, "paged_adamw": optim.PagedAdamW, "paged_adamw8bit": optim.PagedAdamW8bit}
    return classes[settings.optimizer](parameters, **shared)


def step_if_finite(optimizer: torch.optim.Optimizer, finite: torch.Tensor, rate: float) -> None:
    """One optimiser step at learning rate `rate`, or none at all when `finite` (bool, on the device) is false.

    torch's fused AdamW takes the decision on the device (`found_inf`, made for GradScaler): nothing waits. bitsandbytes
    has no such input, so there the host reads the flag, one synchronisation a step.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    if isinstance(optimizer, torch.optim.AdamW):
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(finite):
        optimizer.step()
