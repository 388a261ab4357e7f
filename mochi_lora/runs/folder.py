"""What lies where in a run folder, for everybody who looks there."""

import json
from pathlib import Path
from typing import Any

from mochi_lora.config.schema import Config
from mochi_lora.errors import DamagedFileError
from mochi_lora.model.adapter_file import read_provenance
from mochi_lora.training.tracking import HISTORY
from mochi_lora.training.trainer import is_due


def checkpoints(config: Config) -> Path:
    """States to resume from."""
    return config.run.folder / "checkpoints"


def step_adapter(config: Config, done: int) -> Path:
    """The adapter after `done` steps."""
    return config.run.folder / "adapters" / f"step-{done:06d}.safetensors"


def step_adapters(config: Config) -> list[tuple[int, Path]]:
    """(step, file) of every adapter kept along the way, in order."""
    found = (config.run.folder / "adapters").glob("step-*.safetensors")
    return sorted((int(path.stem.removeprefix("step-")), path) for path in found)


def held_out_losses(config: Config) -> dict[int, float]:
    """Held-out loss by step, as far as the run measured it."""
    history = config.run.folder / HISTORY
    lines = history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
    records = [record for line in lines if (record := _record(line)).get("kind") == "heldout"]
    return {record["step"]: record["heldout/loss"] for record in records if record.get("heldout/loss") is not None}


def _record(line: str) -> dict[str, Any]:
    """One line of the history; a last one torn by a kill is nothing."""
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}


def best_adapter(config: Config) -> Path:
    """The adapter of the lowest held-out loss so far."""
    return config.run.folder / "adapters" / "best.safetensors"


def final_adapter(config: Config) -> Path:
    """The adapter that a finished run leaves."""
    return config.run.folder / "adapter.safetensors"


def evaluation_folder(config: Config) -> Path:
    """Videos and reports of `mochi-lora evaluate`, unless told otherwise."""
    return config.run.folder / "evaluation"


def card_folder(config: Config) -> Path:
    """What can be published: the final adapter with its card and videos."""
    return config.run.folder / "publish"


def sheet_path(config: Config, done: int) -> Path:
    """The contact sheet of the videos made after `done` steps: written last, so where it is, they are."""
    return config.run.folder / "samples" / f"step-{done:06d}" / "sheet.png"


def final_is_missing(config: Config, done: int) -> bool:
    """Whether a run of `done` steps is finished but its final adapter is not there, or is that of other steps."""
    path = final_adapter(config)
    if done < config.train.steps:
        return False
    try:
        return not path.exists() or read_provenance(path).get("step") != done
    except DamagedFileError:
        return True


def videos_missing(config: Config, done: int) -> bool:
    """Whether videos are due after `done` steps and were not finished."""
    train = config.train
    due = is_due(done, train.sample_every, last=done == train.steps)
    return due and bool(config.sample.prompts) and not sheet_path(config, done).exists()
