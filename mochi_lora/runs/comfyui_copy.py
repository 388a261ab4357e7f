"""Each adapter in ComfyUI's layout as well, under the same name in a folder comfyui/ beside it."""

from pathlib import Path
from typing import Any

from mochi_lora.config.schema import Config
from mochi_lora.errors import UserError
from mochi_lora.interop.adapter_formats import write_stored
from mochi_lora.interop.factors import factors_of
from mochi_lora.interop.fusing import fuse
from mochi_lora.model.adapter import Adapter

FOLDER = "comfyui"


def copy_path(adapter: Path) -> Path:
    """Where the copy of an adapter file lies."""
    return adapter.parent / FOLDER / adapter.name


def write_copy(path: Path, adapter: Adapter, provenance: dict[str, Any]) -> None:
    """Write `adapter` to `path` atomically, alpha folded in: ComfyUI reads no header. UserError where it cannot be held."""
    write_stored(path, factors_of(adapter), "comfyui", provenance)


def why_not(adapter: Adapter) -> str:
    """Why ComfyUI's layout cannot hold `adapter`; empty where it can."""
    try:
        fuse(factors_of(adapter), adapter.source)
    except UserError as error:
        return str(error)
    return ""


def refuse_settings(config: Config) -> None:
    """Raises UserError for a copy that the settings rule out, before the base is loaded."""
    if config.train.comfyui_copy and config.adapter.dora:
        message = "train.comfyui_copy: the layout holds products of two factors, and adapter.dora learns magnitudes beside them"
        raise UserError(f"{message}; set one of the two to false")


def refuse_unholdable(adapter: Adapter) -> None:
    """Raises UserError for a copy that the adapted linears rule out, before the first step."""
    if reason := why_not(adapter):
        raise UserError(f"train.comfyui_copy: {reason}\nset it to false, or choose other adapter.targets")
