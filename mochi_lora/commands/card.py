"""`mochi-lora card`, and the last thing training does: a folder that can be published as it is.

- README.md: the model card (`report.card`)
- pytorch_lora_weights.safetensors: the adapter, under the name diffusers looks for, no path in its header
- comfyui/NAME.safetensors: the same in ComfyUI's layout, where that can hold it
- videos/: what the card shows
"""

import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mochi_lora import __version__
from mochi_lora.commands.card_facts import Shown, history_of, public, to_show, trigger_of
from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import remove_abandoned, write_atomic
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter
from mochi_lora.report.card import NAME as README
from mochi_lora.report.card import Card, Film, is_as_written, licence_of, write_card
from mochi_lora.runs import comfyui_copy
from mochi_lora.runs.folder import card_folder, final_adapter

WEIGHTS = "pytorch_lora_weights.safetensors"
_VIDEOS = "videos"
_OURS = re.compile(rf"{README}|{WEIGHTS}|{comfyui_copy.FOLDER}/[\w.-]+\.safetensors|{_VIDEOS}/[\w.-]+\.mp4")
_IGNORED = re.compile(r"\.gitattributes|\.git/.*|\.cache/.*|(.*/)?\.DS_Store")  # others' traces: left alone, never published
_MOST_FILMS = 6


def run(config: Config, *, adapter: Path | None = None, output: Path | None = None, licence: str = "unknown") -> Path:
    """Write the folder; returns it. Raises UserError for an adapter of another maker, and for a card changed by hand."""
    source, folder = adapter or final_adapter(config), output or card_folder(config)
    history = history_of(source)
    before = public_files(folder)
    _refuse_changed(folder / README)
    remove_abandoned(folder)
    told = public(history)
    name = source.stem if adapter else config.run.folder.resolve().name
    evaluation, shown = to_show(config, source, history)
    films = tuple(_film(folder, number, one) for number, one in enumerate(shown[:_MOST_FILMS], 1))
    (folder / README).unlink(missing_ok=True)  # it comes last: where there is a card, all it speaks of is there
    comfyui = _write_adapter(folder, name, source, told)
    card = Card(
        name=name,
        licence=licence,
        base=told.get("base"),
        base_fingerprint=history["base_fingerprint"],
        step=history["step"],
        trigger=trigger_of(history),
        settings=told["config"],
        data=history.get("data"),
        films=films,
        weights=WEIGHTS,
        comfyui=comfyui,
        evaluation=evaluation,
        versions=f"mochi-lora {__version__}, diffusers {version('diffusers')}, peft {version('peft')}",
    )
    path = write_card(folder, card)
    kept = {README, WEIGHTS, comfyui, *(video for film in films for video in (film.adapter, film.base))}
    for stale in set(before) - kept:
        (folder / stale).unlink()
    console.print(f"card     {path}", markup=False)
    return folder


def bring_up_to_date(config: Config) -> None:
    """The card of the run's final adapter, unless the one that is there is of the same step. Raises UserError as `run`."""
    if not _is_there(card_folder(config), read_provenance(final_adapter(config))["step"]):
        run(config)


def retell(config: Config, adapter: Path) -> None:
    """The run's card once more, now that there is an evaluation to tell of; the licence it names is kept.

    Only where there is a card and `adapter`, the run's final one, is what it is about. Raises UserError as `run`.
    """
    path, final = card_folder(config) / README, final_adapter(config)
    if not path.is_file() or adapter.resolve() != final.resolve() or not final.is_file():
        return
    if read_provenance(card_folder(config) / WEIGHTS) != public(history_of(final)):
        return
    _refuse_changed(path)
    run(config, licence=licence_of(path.read_text(encoding="utf-8")))


def public_files(folder: Path) -> list[str]:
    """The files of a card's folder, relative to it and sorted. Raises UserError for one that does not belong there."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; name a folder for the card")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if _IGNORED.fullmatch(name) or ".tmp-" in name or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or not _OURS.fullmatch(name):
            raise UserError(f"{folder}: {name} is not of a model card's folder, which is published whole; move it away")
        found.append(name)
    return found


def _is_there(folder: Path, step: int) -> bool:
    try:
        return (folder / README).is_file() and read_provenance(folder / WEIGHTS).get("step") == step
    except DamagedFileError:
        return False


def _refuse_changed(path: Path) -> None:
    if path.is_file() and not is_as_written(path.read_text(encoding="utf-8")):
        message = f"{path}: was changed by hand, and would be replaced"
        raise UserError(f"{message}; delete or move it to have it written anew, or give --output DIR")


def _write_adapter(folder: Path, name: str, source: Path, told: dict[str, Any]) -> str | None:
    """Both layouts; returns where ComfyUI's lies, relative to `folder`, None where it cannot hold the adapter."""
    adapter = load_adapter(source)
    comfyui = None
    if not comfyui_copy.why_not(adapter):
        comfyui = f"{comfyui_copy.FOLDER}/{re.sub('[^A-Za-z0-9_.-]+', '-', name)}.safetensors"
        comfyui_copy.write_copy(folder / comfyui, adapter, told)
    save_adapter(folder / WEIGHTS, adapter, told)
    return comfyui


def _film(folder: Path, number: int, shown: Shown) -> Film:
    """The videos, copied under names that tell nothing."""
    adapter, base = (f"{_VIDEOS}/{side}-{number}.mp4" for side in ("adapter", "base"))
    _copy(shown.adapter, folder / adapter)
    if shown.base:
        _copy(shown.base, folder / base)
    return Film(shown.prompt, shown.seed, adapter, base if shown.base else None)


def _copy(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source}: this video, which the card is to show, is gone; run the evaluation again to make it")
    write_atomic(target, lambda temporary: _copy_bytes(source, temporary))


def _copy_bytes(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
