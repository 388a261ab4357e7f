"""What `mochi-lora doctor` finds of the model's files and of the tracker's login."""

import json
import netrc
import os
from pathlib import Path

from mochi_lora.commands.doctor_machine import Finding
from mochi_lora.config.schema import Config
from mochi_lora.errors import DamagedFileError
from mochi_lora.model.layout import COMPONENTS, FLOAT32_TENSORS, has_weights, missing
from mochi_lora.model.places import cached_commit, in_cache
from mochi_lora.model.weights import exact_tensors, weight_files

# genmo/mochi-1-preview @14be5fc: transformer in bf16 20.1, T5 19.0, VAE 1.8, tokenizer 0.001 GB.
_DOWNLOAD_BYTES = 41e9
_WANDB_HOST = "api.wandb.ai"


def model_folder(config: Config) -> Path | None:
    """Where the base lies on this machine; None for a hub id of which nothing is here."""
    base = config.model.base
    if Path(base).is_dir():
        return Path(base)
    commit = cached_commit(base, config.model.revision)
    return in_cache(base, commit).folder if commit else None


def download_bytes(config: Config) -> float:
    """About what is still to be fetched of the base, taking every model for as large as the published one."""
    folder = model_folder(config)
    if folder is None:
        return _DOWNLOAD_BYTES
    if Path(config.model.base).is_dir():
        return 0.0
    here = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    complete = not any(missing(folder / component, component) for component in COMPONENTS)
    return 0.0 if complete else max(0.0, _DOWNLOAD_BYTES - here)


def check_model(config: Config) -> list[Finding]:
    """Each component of the base: are its files here, and as long as their headers say?"""
    folder = model_folder(config)
    local = Path(config.model.base).is_dir()
    if folder is None:
        return [
            Finding("warn", "model", f"{config.model.base}: nothing on this machine", "mochi-lora download fetches it (41 GB)")
        ]
    return [_component(folder / component, component, local=local) for component in COMPONENTS if component != "scheduler"]


def _component(folder: Path, component: str, *, local: bool) -> Finding:
    again = "copy the folder again" if local else "mochi-lora download"
    try:
        if lacking := missing(folder, component):  # of a hub id it is fetched at its first use
            return Finding("bad" if local else "warn", component, f"{folder}: {', '.join(lacking)} missing", again)
        files = [path for path in sorted(folder.glob("*.safetensors")) if has_weights(component)]
        if short := [path.name for path in files if not _is_whole(path)]:
            return Finding("bad", component, f"{folder}: {', '.join(short)} cut off or damaged", f"delete it, then: {again}")
        if component == "transformer" and _is_rounded(folder):
            found = f"{folder}: bf16, with the tensors rounded that Mochi keeps in float32"
            return Finding("warn", component, found, f"{again} adds {FLOAT32_TENSORS}")
    except DamagedFileError as error:
        return Finding("bad", component, str(error), again)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    return Finding("ok", component, f"{folder}: {size / 1e9:.2f} GB")


def _is_whole(path: Path) -> bool:
    """Whether a safetensors file is as long as its header says: the cheap check that finds a broken copy."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False
    return size == 8 + length + max(ends, default=0)


def _is_rounded(folder: Path) -> bool:
    files = weight_files(folder)
    return ".bf16" in files[0].name and exact_tensors(files) is None


def check_wandb(config: Config) -> Finding:
    """Whether a login for wandb is there, where the configuration wants one."""
    if "wandb" not in config.tracking.trackers:
        return Finding("ok", "wandb", "not among tracking.trackers")
    if config.tracking.wandb_mode == "offline" or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Finding("ok", "wandb", "offline; wandb sync uploads the run later")
    if os.environ.get("WANDB_API_KEY"):
        return Finding("ok", "wandb", "logged in by WANDB_API_KEY")
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        known = path.is_file() and netrc.netrc(str(path)).authenticators(_WANDB_HOST) is not None
    except (netrc.NetrcParseError, OSError) as error:
        return Finding("warn", "wandb", f"{path}: {error}", "mend the file, or set WANDB_API_KEY")
    if known:
        return Finding("ok", "wandb", f"logged in by {path}")
    return Finding("warn", "wandb", "not logged in", "wandb login, or --tracking.wandb_mode offline, or --tracking.trackers []")
