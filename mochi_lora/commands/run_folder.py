"""What lies where in a run folder, for everybody who looks there."""

from pathlib import Path

from mochi_lora.config.schema import Config
from mochi_lora.errors import DamagedFileError
from mochi_lora.model.adapter_file import read_provenance
from mochi_lora.training.trainer import is_due


def checkpoints(config: Config) -> Path:
    """States to resume from."""
    return config.run.folder / "checkpoints"


def step_adapter(config: Config, done: int) -> Path:
    """The adapter after `done` steps."""
    return config.run.folder / "adapters" / f"step-{done:06d}.safetensors"


def best_adapter(config: Config) -> Path:
    """The adapter of the lowest held-out loss so far."""
    return config.run.folder / "adapters" / "best.safetensors"


def final_adapter(config: Config) -> Path:
    """The adapter that a finished run leaves."""
    return config.run.folder / "adapter.safetensors"


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
