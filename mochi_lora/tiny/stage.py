"""How a stage of pretraining runs: a fixed number of steps, in calls of limited time, each going on where the last stopped."""

import copy
import math
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mochi_lora.console import console
from mochi_lora.errors import DamagedFileError
from mochi_lora.files import write_atomic

_SAVE_EVERY = 250  # steps: half a minute, which is what a kill loses
_AVERAGE_FROM = 200  # steps: before that the average would remember the initial weights


@dataclass(frozen=True)
class Budget:
    """How long a stage is, and how much of it one call may do."""

    steps: int
    minutes: float
    warmup: int
    learning_rate: float  # peak; linear warm-up, cosine down to a hundredth

    def rate(self, step: int) -> float:
        """Learning rate at `step`."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


class Stage:
    """Modules under training with their average and optimiser, kept in one file between calls."""

    def __init__(self, path: Path, modules: dict[str, torch.nn.Module], *, betas: tuple[float, float], decay: float) -> None:
        """Go on with the state in `path`, or begin. Raises DamagedFileError if the file is no state of these modules."""
        self._path, self._decay = path, decay
        self.modules = torch.nn.ModuleDict(modules)
        self.average = copy.deepcopy(self.modules).requires_grad_(requires_grad=False)
        fused = next(self.modules.parameters()).is_cuda
        self._optimizer = torch.optim.AdamW(self.modules.parameters(), lr=0.0, betas=betas, weight_decay=0.0, fused=fused)
        self.step = 0
        if path.exists():
            self._restore(_read(path))

    def run(self, loss_of: Callable[[int], torch.Tensor], budget: Budget) -> bool:
        """Take steps until the stage is over (True) or the call's time (False); `loss_of(step)` builds the graph."""
        start, first = time.monotonic(), self.step
        while self.step < budget.steps and time.monotonic() - start < 60 * budget.minutes:
            self._optimizer.param_groups[0]["lr"] = budget.rate(self.step)
            loss = loss_of(self.step)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0, foreach=True)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._follow()
            self.step += 1
            if self.step % _SAVE_EVERY == 0 or self.step == budget.steps:
                self._save()
                pace = (time.monotonic() - start) / (self.step - first)
                left = (budget.steps - self.step) * pace / 60
                told = f"{self._path.stem} {self.step}/{budget.steps}  loss {float(loss.detach()):.5f}"
                console.print(f"{told}  {pace:.3f} s/step  {left:.1f} min", markup=False)
        self._save()
        return self.step >= budget.steps

    def _follow(self) -> None:
        weight = 1.0 if self.step < _AVERAGE_FROM else 1 - self._decay
        pairs = zip(self.average.parameters(), self.modules.parameters(), strict=True)
        slow, fast = (list(side) for side in zip(*pairs, strict=True))
        torch._foreach_lerp_(slow, [parameter.detach() for parameter in fast], weight)

    def _save(self) -> None:
        content = {
            "step": self.step,
            "modules": self.modules.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        write_atomic(self._path, lambda temporary: torch.save(content, temporary))

    def _restore(self, content: dict[str, Any]) -> None:
        try:
            self.modules.load_state_dict(content["modules"])
            self.average.load_state_dict(content["average"])
            self._optimizer.load_state_dict(content["optimizer"])
            self.step = int(content["step"])
        except (KeyError, RuntimeError, ValueError) as error:  # what torch raises for names and shapes it does not expect
            message = f"{self._path}: the state of other modules than these ({error}); delete it to begin this stage again"
            raise DamagedFileError(message) from error


def _read(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):  # torn, empty, anything: the unpickler of older files would fail in any way at all
        raise DamagedFileError(f"{path}: not the state of a stage; delete it to begin this stage again")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        message = f"{path}: not a readable state of a stage ({error}); delete it to begin this stage again"
        raise DamagedFileError(message) from error
    if not isinstance(content, dict):
        raise DamagedFileError(f"{path}: holds no state of a stage; delete it to begin this stage again")
    return content
