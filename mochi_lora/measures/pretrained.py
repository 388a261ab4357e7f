"""Pretrained networks by hub id or local folder: safetensors only, no code from the hub, what is on disk first."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from mochi_lora.errors import UserError
from mochi_lora.model.base import fingerprint

_WANTED = ["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]
_UNWANTED = ["*/*", "*fp16*", "*bf16*"]  # other formats in subfolders, other precisions beside the full one


@dataclass(frozen=True)
class Pretrained:
    """A network's files."""

    folder: Path
    label: str  # id@revision; of a local folder its name and fingerprint
    purpose: str  # what it was asked for: "frame-text alignment", ...


def fetch(name: str, purpose: str, *, instead: str | None = "choose a built-in backbone (builtin:...)") -> Pretrained:
    """Files of `name`: a local folder, or OWNER/NAME or OWNER/NAME@REVISION of the hub, downloaded once.

    The hub is asked only for what is not on disk. Raises UserError naming `name`, `purpose` and what would do `instead`.
    """
    local = Path(name)
    if local.is_dir():
        weight_files(local, name)
        return Pretrained(local, f"{local.resolve().name}@{fingerprint(local)}", purpose)
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or name.startswith((".", "/", "~")):
        expected = f"a local folder, or a hub id (OWNER/NAME, OWNER/NAME@REVISION){f'; or {instead}' if instead else ''}"
        raise UserError(f"{name}: asked for {purpose}, but it is not there; expected {expected}")
    folder = _snapshot(name, repository, revision or None, purpose, instead)
    return Pretrained(folder, f"{repository}@{folder.name[:12]}", purpose)


def _snapshot(name: str, repository: str, revision: str | None, purpose: str, instead: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - a local folder needs no hub client
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    reason = ""
    for on_disk in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    repository,
                    revision=revision,
                    allow_patterns=_WANTED,
                    ignore_patterns=_UNWANTED,
                    local_files_only=on_disk,
                )
            )
            weight_files(folder, name)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, UserError) as error:
            reason = str(error)
            continue
        return folder
    raise UserError(
        f"{name}: needed for {purpose}, not on this machine, and the hub did not give it ({reason}); connect once to "
        f"download it{',' if instead else ' or'} name a local folder that holds it{f', or {instead}' if instead else ''}"
    )


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder. UserError where there are none, or where the index names one that is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / shard for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        found = f"{', '.join(missing)} missing" if missing else "no .safetensors file"
        raise UserError(
            f"{name}: {found} in {folder}; pickles (.bin, .pth) are not opened: convert them, or choose another model"
        )
    return files


def config_of(found: Pretrained) -> dict[str, Any]:
    """`config.json` of a transformers model; UserError where it is missing or is none."""
    path = found.folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {found.label} is needed for {found.purpose}") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{path}: names no model_type; expected a model saved by transformers, for {found.purpose}")
    return content


def kind_of(found: Pretrained, known: Sequence[str]) -> str:
    """The model's type, which must be one of `known`; UserError where it is another. Reads no weight."""
    kind = str(config_of(found)["model_type"])
    if kind not in known:
        message = f"{found.label}: a model of type {kind} cannot be used for {found.purpose}"
        raise UserError(f"{message}; expected one of: {', '.join(known)}")
    return kind


def load_model(load: Callable[..., Any], found: Pretrained, device: str | torch.device, **options: Any) -> Any:  # noqa: ANN401
    """`load` is a transformers class's `from_pretrained`; the model comes frozen, in float32 unless `options` say else.

    transformers draws weights it does not find at random and only warns; numbers from those would look plausible, so a
    missing weight is a UserError here.
    """
    options = {"dtype": torch.float32, **options}
    logging.disable_progress_bar()  # a second bar would tear ours
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a tower alone leaves the other's weights unused, and transformers lists each
    try:
        model, information = load(
            found.folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        message = f"{found.label} ({found.purpose}) needs a package that is not installed: {str(error).strip()}"
        raise UserError(message) from error
    except torch.OutOfMemoryError:  # a RuntimeError too
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{found.label} ({found.purpose}) cannot be loaded: {error}") from error
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted(information["missing_keys"]) + [str(key) for key in information["mismatched_keys"]]
    if lacking:
        shown = ", ".join(lacking[:3])
        message = f"{found.label} ({found.purpose}): {len(lacking)} weights are missing or misshapen, first {shown}"
        raise UserError(f"{message}; the files are of another kind of model, or damaged")
    model = model.eval().requires_grad_(requires_grad=False)
    return model if "device_map" in options else model.to(device)  # quantised weights cannot be moved
