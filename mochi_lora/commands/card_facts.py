"""What a model card can know of an adapter: from its header, from the evaluation of this very file, from the run's samples."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mochi_lora.config.schema import Config
from mochi_lora.errors import UserError
from mochi_lora.evaluation.results import Evaluation, file_name
from mochi_lora.files import sha256_of_file
from mochi_lora.inference.shots import adapter_digests
from mochi_lora.inference.video import video_name
from mochi_lora.model.adapter_file import read_provenance
from mochi_lora.report import results_file
from mochi_lora.runs.folder import evaluation_folder, sheet_path

# Of the configuration in an adapter's header, what holds no path and no text of the user's; None is a whole section.
PUBLIC_SETTINGS: dict[str, set[str] | None] = {
    "run": {"seed"},
    "data": {"buckets", "upscale", "validation_fraction"},
    "adapter": {"rank", "alpha", "dropout", "targets", "rslora", "dora"},
    "objective": None,
    "train": None,
    "engine": None,
    "sample": {"frames", "height", "width", "steps", "guidance", "linear_steps", "threshold_noise"},
}
_PUBLIC_HISTORY = ("version", "base_fingerprint", "base_rounded_tensors", "step", "average", "held_out_loss", "data")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Shown:
    """A video to show, where it lies now."""

    prompt: str
    seed: int
    adapter: Path
    base: Path | None


def history_of(adapter: Path) -> dict[str, Any]:
    """The adapter's header. Raises UserError where it is not that of a training here."""
    history = read_provenance(adapter)
    if "config" not in history:
        message = f"{adapter}: its header says nothing of the settings it was trained with"
        raise UserError(f"{message}; a card needs a file that `mochi-lora train` wrote")
    return history


def public(history: dict[str, Any]) -> dict[str, Any]:
    """What a header may tell strangers: `history` without the user's paths and texts."""
    config = {
        section: {key: value for key, value in history["config"].get(section, {}).items() if keys is None or key in keys}
        for section, keys in PUBLIC_SETTINGS.items()
    }
    told = {key: history[key] for key in _PUBLIC_HISTORY if key in history} | {"config": config}
    base = str(history.get("base", ""))
    if _HUB_ID.fullmatch(base) and not Path(base).exists():  # as `model.base.locate` tells a hub id from a folder
        told |= {"base": base, "base_revision": history.get("base_revision")}
    return told


def trigger_of(history: dict[str, Any]) -> str:
    """The words that call the adapter, as far as the settings it was trained with have any."""
    config = history["config"]
    parts = [part.get("trigger") for part in config.get("data", {}).get("mix", [])]
    told = [config.get(section, {}).get("trigger") for section in ("evaluation", "caption")]
    return next((words for words in (*told, *parts) if words), "")


def to_show(config: Config, adapter: Path, history: dict[str, Any]) -> tuple[Evaluation | None, list[Shown]]:
    """The evaluation of this very file, if there is one, and its pairs on trigger prompts; else the run's own samples."""
    folder, digest = evaluation_folder(config), sha256_of_file(adapter)
    for quick in (False, True):
        if not (folder / file_name(results_file.NAME, quick=quick)).is_file():
            continue
        found = results_file.read_results(folder, quick=quick)
        if found.pairs and all(adapter_digests(folder / pair.adapter_video) == [digest] for pair in found.pairs):
            asked = [pair for pair in found.pairs if pair.prompt_set == "trigger"]
            return found, [
                Shown(pair.prompt, pair.seed, folder / pair.adapter_video, folder / pair.base_video) for pair in asked
            ]
    return None, _previewed(config, adapter, history)


def _previewed(config: Config, adapter: Path, history: dict[str, Any]) -> list[Shown]:
    """Sample videos of the adapter's step, beside those of step 0, which are the base's unless training began with one."""
    if not adapter.resolve().is_relative_to(config.run.folder.resolve()):
        return []
    now, before = sheet_path(config, history["step"]).parent, sheet_path(config, 0).parent
    from_nothing = history["config"]["adapter"].get("init_adapter") is None
    found = []
    jobs = [(prompt, seed) for prompt in config.sample.prompts for seed in config.sample.seeds]
    for number, (prompt, seed) in enumerate(jobs):
        name = video_name(number, prompt, seed)
        base = before / name if from_nothing and (before / name).is_file() else None
        if (now / name).is_file():
            found.append(Shown(prompt, seed, now / name, base))
    return found
