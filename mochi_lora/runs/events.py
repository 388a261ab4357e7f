"""What happens besides steps: logging, held-out loss, sample videos, checkpoints and adapter files."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mochi_lora.config.schema import Config
from mochi_lora.model import adapter as lora
from mochi_lora.model.adapter_file import save_adapter
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.parallel.mesh import share_out
from mochi_lora.runs.comfyui_copy import copy_path, refuse_unholdable, write_copy
from mochi_lora.runs.folder import (
    best_adapter,
    checkpoints,
    final_adapter,
    final_is_missing,
    step_adapter,
    videos_missing,
)
from mochi_lora.runs.identity import BASE
from mochi_lora.runs.plan import RunPlan
from mochi_lora.runs.previews import Previews
from mochi_lora.runs.processes import decided
from mochi_lora.training.batches import SampleSource
from mochi_lora.training.checkpoint import save_checkpoint
from mochi_lora.training.heldout import HeldOutLoss, clip_losses, summarise
from mochi_lora.training.progress import TrainingLine
from mochi_lora.training.tracking import Tracker
from mochi_lora.training.trainer import Events, Learner, Pace, StepResult, logged_figures


@dataclass
class RunState:
    """What a checkpoint remembers besides tensors; `best` changes during the run."""

    identity: dict[str, Any]
    plan: RunPlan
    config: Config
    rounded: tuple[str, ...]
    best: dict[str, Any] | None  # {"step", "loss"} of the lowest held-out loss so far
    data: dict[str, Any]  # `data_statistics`


class RunEvents:
    """The callables of `trainer.Events`, sharing what they need."""

    def __init__(
        self,
        learner: Learner,
        model: VelocityModel,
        state: RunState,
        tracker: Tracker,
        validation: SampleSource,
        previews: Previews | None,
        line: TrainingLine | None,
    ) -> None:
        self._learner = learner
        self._model = model
        self._state = state
        self._tracker = tracker
        self._validation = validation
        self._previews = previews
        self._line = line
        self._main = learner.accelerator.is_main_process

    def plugs(self) -> Events:
        """For the loop."""
        return Events(
            log=self.log,
            validate=self.validate if self._validation.entries else None,
            sample=self.sample if self._previews else None,
            checkpoint=self.checkpoint,
            progress=self._line.advance if self._line else lambda _done: None,
        )

    def begin(self, done: int, *, resumed: bool) -> None:
        """Before the first step of this start: a state to come back to, the untrained loss, and the videos of step `done`
        if there are none (a checkpoint is written before the videos, which take minutes and can fail).
        """
        settings = self._state.config.train
        if settings.comfyui_copy:
            refuse_unholdable(lora.current(self._model.transformer))
        if not resumed:
            self._save_state(0)
        if done == 0 and settings.validate_every and self._validation.entries:
            self.validate(0)
        # By one look: a network disk may show its clients different files, and videos are made together.
        if self._previews and decided(lambda: videos_missing(self._state.config, done)):
            self.sample(done)

    def log(self, done: int, result: StepResult, pace: Pace) -> None:
        """One record of training figures; the host waits for the device here and nowhere else."""
        values = logged_figures(self._learner, result, pace)
        values["time/sampling_seconds"] = self._previews.seconds if self._previews else 0.0
        self._tracker.log(done, values | self._state.plan.metrics())
        if self._line:
            self._line.show(values["train/loss"], pace.seconds_per_step, values["time/tokens_per_second"])

    def validate(self, done: int) -> None:
        """Held-out loss over all ranks; a new lowest one writes adapters/best.safetensors."""
        ranks = self._learner.ranks
        self._model.eval()
        with self._averaged():
            bands = self._state.config.train.validation_bands
            measured = partial(clip_losses, self._model, self._validation, bands=bands)
            table = share_out([partial(measured, item=item) for item in range(len(self._validation.entries))], ranks)
        self._model.train()
        result = summarise(table, self._learner.seed)
        self._tracker.log(done, result.scalars(), kind="heldout")
        best = self._state.best
        if done and math.isfinite(result.loss) and (best is None or result.loss < best["loss"]):
            self._state.best = {"step": done, "loss": result.loss}
            self._write_adapter(best_adapter(self._state.config), done, result)

    def sample(self, done: int) -> None:
        """Sample videos of the adapter as it would be exported."""
        assert self._previews is not None
        with self._averaged():
            videos = self._previews.make(self._model, done)
        if videos:
            self._tracker.log_videos(done, videos)

    def checkpoint(self, done: int) -> None:
        """Adapter file first, then the state: a kill between the two costs nothing."""
        path = step_adapter(self._state.config, done)
        self._write_adapter(path, done, None)
        self._tracker.log_adapter(done, path)
        if done == self._state.config.train.steps:
            self._write_adapter(final_adapter(self._state.config), done, None)
        self._save_state(done)

    def finish(self, done: int) -> None:
        """The final adapter, if it is not there yet: a run stopped early may be declared finished by fewer train.steps."""
        if final_is_missing(self._state.config, done):
            self._write_adapter(final_adapter(self._state.config), done, None)

    def _save_state(self, done: int) -> None:
        processes = self._learner.accelerator
        if self._main:
            save_checkpoint(
                checkpoints(self._state.config), done, self._gather(done), self._state.config.train.keep_checkpoints
            )
        processes.wait_for_everyone()

    def _gather(self, done: int) -> dict[str, Any]:
        """The run's full state by name."""
        learner = self._learner
        content: dict[str, Any] = {"adapter": {name: parameter.detach() for name, parameter in learner.parameters.items()}}
        if learner.average is not None:
            content["ema"] = learner.average.shadow
        if done:
            content["optimizer"] = learner.optimizer.state_dict()
        content["progress"] = {
            "step": done,
            "identity": self._state.identity,
            "plan": asdict(self._state.plan.plan),
            "engine": self._state.config.engine.model_dump(mode="json"),
            "layout": str(learner.ranks.layout),
            "best": self._state.best,
            "run_ids": dict(self._tracker.run_ids),
        }
        return content

    def _write_adapter(self, path: Path, done: int, held_out: HeldOutLoss | None) -> None:
        if not self._main:
            return
        config = self._state.config
        provenance = {
            "base": config.model.base,
            "base_revision": config.model.revision,
            "base_fingerprint": self._state.identity[BASE],
            "base_rounded_tensors": len(self._state.rounded),
            "step": done,
            "average": self._learner.average is not None,
            "held_out_loss": held_out.loss if held_out else None,
            "data": self._state.data,
            "config": config.model_dump(mode="json"),
        }
        with self._averaged():
            adapter = lora.current(self._model.transformer)
            if config.train.comfyui_copy:  # first: where the adapter is, its copy is
                write_copy(copy_path(path), adapter, provenance)
            save_adapter(path, adapter, provenance)

    def _averaged(self) -> AbstractContextManager[None]:
        """The moving average's weights where there is one: what is measured, shown and exported."""
        return self._learner.average.lent() if self._learner.average is not None else nullcontext()
