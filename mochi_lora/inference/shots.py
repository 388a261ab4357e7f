"""Many videos in one folder: which there are to make, which are there already, and what lies beside each.

Beside `NAME.mp4` lies `NAME.json` with all that made it. A video counts as made when both are there, belong together, and the
JSON says what would be said now; so a call that was broken off goes on where it was, and a changed setting makes new videos.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mochi_lora.config.requests import AdapterChoice
from mochi_lora.config.schema import SampleConfig
from mochi_lora.files import sha256_of_file, write_json
from mochi_lora.inference.video import write_mp4

# Where things lie, and how their memory is used, change no frame.
_WHEREABOUTS = ("base", "base_revision")
_MEMORY_ONLY = ("checkpointing", "block_swap", "cpu_offload")  # of a plan
_HASHES = ("frames_sha256", "video_sha256")


@dataclass(frozen=True)
class Shot:
    """One video to make; no adapters: the base."""

    video: str  # path relative to the folder, ending in .mp4
    prompt: str
    seed: int
    adapters: tuple[AdapterChoice, ...] = ()


def in_switching_order(shots: Iterable[Shot]) -> list[list[Shot]]:
    """Each video once, grouped by adapter files and within a group by strengths: adapters change as seldom as can be.

    Groups and strengths come in order of their first appearance.
    """
    distinct: dict[str, Shot] = {}
    for shot in shots:
        assert distinct.setdefault(shot.video, shot) == shot, f"two different videos are to be called {shot.video}"
    groups: dict[tuple[Path, ...], dict[tuple[AdapterChoice, ...], list[Shot]]] = {}
    for shot in distinct.values():
        group = groups.setdefault(tuple(choice.path for choice in shot.adapters), {})
        group.setdefault(shot.adapters, []).append(shot)
    return [[shot for same in group.values() for shot in same] for group in groups.values()]


def describe(shot: Shot, origin: dict[str, Any], hashes: dict[Path, str]) -> dict[str, Any]:
    """What the JSON beside the video says; `origin` is what all videos of a call share, `hashes` those of adapter files."""
    used = [{"path": str(item.path), "strength": item.strength, "sha256": hashes[item.path]} for item in shot.adapters]
    return {"prompt": shot.prompt, "seed": shot.seed, "adapters": used, **origin}


def told_settings(sample: SampleConfig) -> dict[str, Any]:
    """The part of `describe`'s `origin` that a person sets for all videos of a call."""
    return sample.model_dump(mode="json", exclude={"prompts", "seeds", "strength", "preset"})


def is_made(path: Path, about: dict[str, Any]) -> bool:
    """Whether `path` is a whole video made as `about` says, wherever base and adapters lay then."""
    try:
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        same = isinstance(told, dict) and _identity(told) == _identity(about)
        return same and told.get("video_sha256") == sha256_of_file(path)
    except (OSError, ValueError, TypeError, AttributeError):  # not there, or not what we write: made anew
        return False


def write_video(path: Path, frames: np.ndarray, about: dict[str, Any]) -> None:
    """The video, then its JSON with the hashes of the exact frames (before x264, which loses some) and of the file."""
    write_mp4(path, frames)
    write_json(path.with_suffix(".json"), about | {"frames_sha256": _digest(frames), "video_sha256": sha256_of_file(path)})


def short_names(paths: Iterable[Path]) -> dict[Path, str]:
    """What to call each of these files: its name, with the folder's where two are called alike."""
    distinct = list(dict.fromkeys(paths))
    same_stem = Counter(path.stem for path in distinct)
    return {path: path.stem if same_stem[path.stem] == 1 else f"{path.absolute().parent.name}/{path.stem}" for path in distinct}


def frames_digest(path: Path) -> str | None:
    """Hash of the exact frames that `path` was made of; None where nothing is known about it."""
    about = path.with_suffix(".json")
    return json.loads(about.read_text(encoding="utf-8")).get("frames_sha256") if about.is_file() else None


def adapter_digests(path: Path) -> list[str]:
    """SHA-256 of every adapter file that `path` was made with; empty for the base, and where nothing is known about it."""
    about = path.with_suffix(".json")
    told = json.loads(about.read_text(encoding="utf-8")).get("adapters", []) if about.is_file() else []
    return [item["sha256"] for item in told]


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(frames.tobytes()).hexdigest()


def _identity(about: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in about.items() if key not in (*_WHEREABOUTS, *_HASHES)}
    adapters = [{key: value for key, value in item.items() if key != "path"} for item in about.get("adapters", [])]
    plan = {key: value for key, value in about.get("plan", {}).items() if key not in _MEMORY_ONLY}
    return kept | {"adapters": adapters, "plan": plan}
