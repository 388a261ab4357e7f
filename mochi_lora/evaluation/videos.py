"""Clips made elsewhere, as cells of an evaluation: which is whose, and whether every one has its counterpart.

Two layouts. `videos.jsonl` with a line per clip: {"video": path, "prompt": ..., "adapter": "base" or "adapter", "seed": 0,
"set": "trigger"}, seed and set optional, paths relative to the file. Or folders `base/` and `adapter/` with files of the same
names, and beside one of the two (or both) NAME.json with "prompt" and perhaps "seed": what `sample` and `evaluate` write.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from mochi_lora.data.media import VIDEO_SUFFIXES
from mochi_lora.data.probe import probe
from mochi_lora.data.trigger import calls
from mochi_lora.errors import UserError
from mochi_lora.evaluation.grid import ADAPTER, Cell
from mochi_lora.evaluation.paired import BASE
from mochi_lora.evaluation.prompts import without_trigger
from mochi_lora.evaluation.results import PromptSet
from mochi_lora.inference.shots import Shot

LIST = "videos.jsonl"
_FORM = '{"video": "base/fox.mp4", "prompt": "...", "adapter": "base", "seed": 0, "set": "trigger"}, seed and set optional'
_SIDES = (BASE, ADAPTER)


@dataclass(frozen=True)
class _Clip:
    video: str
    prompt: str
    seed: int
    side: str
    prompt_set: PromptSet | None
    place: str  # where it is told, for messages


def from_videos(folder: Path, trigger: str) -> tuple[Cell, ...]:
    """Cells of base and adapter for the clips in `folder`, their paths relative to it. Nothing is made; every file is probed.

    A set that is not told follows from the prompt: with the trigger it is `trigger`; without it `plain` if it is what is left
    of a trigger prompt, else `unrelated`. Without a trigger (empty) all are `trigger`. The strength of the adapter is not
    known and told as 1. Raises UserError (ClipError for unreadable videos) naming the file.
    """
    listed = folder / LIST
    clips = _listed(listed) if listed.is_file() else _in_folders(folder)
    _require_pairs(folder, clips)
    for clip in clips:
        if probe(folder / clip.video).is_image:
            raise UserError(f"{folder / clip.video}: is an image; an evaluation measures videos")
    contents = {without_trigger(clip.prompt, trigger) for clip in clips if calls(clip.prompt, trigger)}
    return tuple(
        Cell(
            prompt_set=clip.prompt_set or _set_of(clip.prompt, trigger, contents),
            label=clip.side,
            strength=float(clip.side == ADAPTER),
            content=without_trigger(clip.prompt, trigger),
            shot=Shot(clip.video, clip.prompt, clip.seed),
        )
        for clip in clips
    )


def _set_of(prompt: str, trigger: str, contents: set[str]) -> PromptSet:
    if calls(prompt, trigger):
        return "trigger"
    return "plain" if prompt in contents else "unrelated"


def _listed(path: Path) -> list[_Clip]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it again") from error
    return [_listed_clip(line, path, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _listed_clip(line: str, path: Path, place: str) -> _Clip:
    try:
        told = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); expected {_FORM}") from error
    if not isinstance(told, dict) or not isinstance(told.get("video"), str):
        raise UserError(f"{place}: no video; expected {_FORM}")
    if unknown := sorted(set(told) - {"video", "prompt", "adapter", "seed", "set"}):
        raise UserError(f"{place}: unknown key {', '.join(map(repr, unknown))}; expected {_FORM}")
    if told.get("adapter") not in _SIDES:
        raise UserError(f"{place}: adapter {told.get('adapter')!r}: expected 'base' or 'adapter'; expected {_FORM}")
    prompt_set = told.get("set")
    if prompt_set is not None and prompt_set not in get_args(PromptSet):
        raise UserError(f"{place}: set {prompt_set!r}: expected {', '.join(map(repr, get_args(PromptSet)))}")
    if not (path.parent / told["video"]).is_file():
        raise UserError(f"{place}: there is no file {path.parent / told['video']}; paths are relative to {path.name}")
    prompt, seed = _prompt_and_seed(told, place)
    return _Clip(told["video"], prompt, seed, told["adapter"], cast("PromptSet | None", prompt_set), place)


def _in_folders(folder: Path) -> list[_Clip]:
    sides = {side: _videos(folder / side) for side in _SIDES}
    if not all(sides.values()):
        missing = " and ".join(f"{side}/" for side, videos in sides.items() if not videos)
        message = (
            f"{folder}: no videos in {missing}; expected {LIST}, or folders base/ and adapter/ with videos of the same names"
        )
        raise UserError(message)
    for side, other in (_SIDES, _SIDES[::-1]):
        if alone := sorted(set(sides[side]) - set(sides[other])):
            raise UserError(f"{folder}: {side}/ has {_few(alone)}, {other}/ has not; every clip needs its counterpart")
    clips = []
    for stem in sorted(sides[BASE]):
        told = [
            (path, _prompt_and_seed(_json(path), str(path)))
            for side in _SIDES
            if (path := folder / side / f"{stem}.json").is_file()
        ]
        if not told:
            message = f"{folder / BASE / sides[BASE][stem]}: no {stem}.json beside it; write one with its prompt"
            raise UserError(f'{message}: {{"prompt": "...", "seed": 0}}')
        if told[0][1] != told[-1][1]:
            message = f"{told[0][0]} and {told[1][0]} tell different prompts or seeds: {told[0][1]}, {told[1][1]}"
            raise UserError(f"{message}; base and adapter are compared on the same ones")
        prompt, seed = told[0][1]
        clips += [_Clip(f"{side}/{sides[side][stem]}", prompt, seed, side, None, f"{side}/{stem}") for side in _SIDES]
    return clips


def _videos(folder: Path) -> dict[str, str]:
    """File names of the videos in `folder`, by stem."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise UserError(f"{folder}: {found[path.stem]} and {path.name} have one name; rename one of them")
            found[path.stem] = path.name
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); write it again") from error
    return told if isinstance(told, dict) else {}


def _prompt_and_seed(told: dict[str, Any], place: str) -> tuple[str, int]:
    prompt, seed = told.get("prompt"), told.get("seed", 0)
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{place}: no prompt; expected "prompt": "..."')
    if type(seed) is not int or seed < 0:
        raise UserError(f"{place}: seed {seed!r}: expected a whole number from 0")
    return prompt.strip(), seed


def _require_pairs(folder: Path, clips: Sequence[_Clip]) -> None:
    if not clips:
        raise UserError(f"{folder / LIST}: names no video; expected a line per clip: {_FORM}")
    sides: dict[str, dict[tuple[str, int], _Clip]] = {side: {} for side in _SIDES}
    for clip in clips:
        key = (clip.prompt, clip.seed)
        if first := sides[clip.side].get(key):
            message = (
                f"{first.place} and {clip.place}: two clips of {clip.side} for prompt {clip.prompt!r} and seed {clip.seed}"
            )
            raise UserError(f"{message}; give each its own seed")
        sides[clip.side][key] = clip
    for side, other in (_SIDES, _SIDES[::-1]):
        if alone := [f"{clip.prompt!r} seed {clip.seed}" for key, clip in sides[side].items() if key not in sides[other]]:
            raise UserError(f"{folder}: no clip of {other} for {_few(alone)}; every clip of {side} needs its counterpart")
    for key, clip in sides[BASE].items():
        if (counterpart := sides[ADAPTER][key]).prompt_set != clip.prompt_set:
            raise UserError(
                f"{clip.place} and {counterpart.place} are counterparts but of different sets; say the same in both"
            )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
