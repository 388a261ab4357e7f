"""The adapter file: sole owner of its names and header. Stock diffusers loads what is written here.

Layout: safetensors, keys `transformer.<module>.lora_A.weight`, header `lora_adapter_metadata` (diffusers' own key: PEFT's
configuration with a `transformer.` prefix, alpha among it) and header `mochi_lora` (base, fingerprint, step, versions, the
resolved configuration). Genmo's format (`blocks.N.attn.qkv_x.lora_A`, header `kwargs`) is read as well.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mochi_lora import __version__
from mochi_lora.errors import DamagedFileError, UserError
from mochi_lora.files import write_atomic
from mochi_lora.model import keymap
from mochi_lora.model.adapter import Adapter

_PREFIX = "transformer."
_OURS = "mochi_lora"


def save_adapter(path: Path, adapter: Adapter, provenance: dict[str, Any]) -> None:
    """Write `adapter` atomically, with all that is needed to know what it is."""
    tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.tensors.items()}
    config = {f"{_PREFIX}{key}": value for key, value in adapter.config.items()}
    header = {
        "format": "pt",
        LORA_ADAPTER_METADATA_KEY: json.dumps(config, sort_keys=True),
        _OURS: json.dumps({"version": __version__, **provenance}, sort_keys=True, ensure_ascii=False),
    }
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def read_provenance(path: Path) -> dict[str, Any]:
    """What this project wrote about the adapter's origin; empty for files of other makers."""
    _, header = _read(path)
    return _entry(path, header, _OURS)


def load_adapter(path: Path, *, assume_alpha_is_rank: bool = False) -> Adapter:
    """Read an adapter in our, diffusers' or Genmo's format.

    Raises UserError when it is no LoRA for Mochi, or carries no alpha and `assume_alpha_is_rank` is off: a guess of
    alpha = rank silently halves or doubles an adapter's strength.
    """
    tensors, header = _read(path)
    if keymap.is_genmo(list(tensors)):
        return _from_genmo(path, tensors, header, assume_alpha_is_rank=assume_alpha_is_rank)
    ours = {key.removeprefix(_PREFIX): tensor.float() for key, tensor in tensors.items() if key.startswith(_PREFIX)}
    strange = [key for key in tensors if not key.startswith(_PREFIX) or ".lora_" not in key]
    if strange or not ours:
        message = f"{path}: not a Mochi LoRA in diffusers' or Genmo's format; unknown tensor {min(strange, default='(none)')}"
        raise UserError(f"{message}; `mochi-lora convert lora IN OUT --to diffusers` makes one from ComfyUI's")
    stored = _entry(path, header, LORA_ADAPTER_METADATA_KEY)
    config = {key.removeprefix(_PREFIX): value for key, value in stored.items() if key.startswith(_PREFIX)}
    if "r" in config and "lora_alpha" in config:  # for what is not there PEFT has defaults, alpha 8 among them
        _require_numbers(path, {"r": config["r"], "lora_alpha": config["lora_alpha"]})
        return Adapter(ours, config, str(path))
    if not assume_alpha_is_rank:
        message = (
            f"{path}: the file does not say its alpha, so its strength is unknown; pass --assume-alpha rank if alpha = rank"
        )
        raise UserError(message)
    ranks = {key.split(".lora_")[0]: factor.shape[0] for key, factor in ours.items() if "lora_A" in key}
    return Adapter(ours, _config_by_rank(ranks), str(path))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if not path.is_file():
        message = f"{path}: no such adapter file"
        raise UserError(message)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        message = f"{path}: not a readable safetensors file ({error}); adapters in pickle formats are not opened"
        raise DamagedFileError(message) from error


def _entry(path: Path, header: dict[str, str], key: str) -> dict[str, Any]:
    """One JSON object of the header; empty where there is none."""
    try:
        content = json.loads(header.get(key, "{}"))
    except json.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        message = f"{path}: header entry `{key}` is not a JSON object; get or write the file again"
        raise DamagedFileError(message)
    return content


def _config_by_rank(ranks: dict[str, int]) -> dict[str, Any]:
    """A LoraConfig with alpha = rank on each module: scale 1, whatever the mixture of ranks."""
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {module: rank for module, rank in ranks.items() if rank != common}
    return {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def _require_numbers(path: Path, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            message = f"{path}: header says {key} = {value!r}, expected a number; get or write the file again"
            raise DamagedFileError(message)


def _from_genmo(path: Path, tensors: dict[str, torch.Tensor], header: dict[str, str], *, assume_alpha_is_rank: bool) -> Adapter:
    """Genmo's file: A is shared by the fused q, k, v; alpha/rank is folded into B, so that every scale is 1.

    Source: genmoai/mochi @0c86aeb `lora_layers.py`, `train.py`; alpha stands in the header entry `kwargs`.
    """
    kwargs = _entry(path, header, "kwargs")
    depth = keymap.depth_of(list(tensors))
    factors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for key, tensor in tensors.items():
        module, _, factor = key.rpartition(".")
        if factor not in ("lora_A", "lora_B") or f"{module}.lora_A" not in tensors or f"{module}.lora_B" not in tensors:
            message = f"{path}: tensor {key} is not part of a Genmo-format LoRA"
            raise UserError(message)
        if factor == "lora_B":
            continue
        factor_a = tensor.float()
        alpha = "qkv_proj_lora_alpha" if ".qkv_" in module else "out_proj_lora_alpha"
        if alpha not in kwargs and not assume_alpha_is_rank:
            message = f"{path}: Genmo-format LoRA whose header entry `kwargs` lacks {alpha}, so its strength is unknown"
            raise UserError(f"{message}; pass --assume-alpha rank if alpha = rank")
        stored = kwargs.get(alpha, factor_a.shape[0])
        _require_numbers(path, {alpha: stored})
        scale = stored / factor_a.shape[0]
        factor_b = tensors[f"{module}.lora_B"].float() * scale
        try:
            parts = keymap.lora_to_diffusers(module, factor_a, factor_b, depth)
        except KeyError as error:
            message = f"{path}: {module} is no module of Mochi's transformer"
            raise UserError(message) from error
        for target, (part_a, part_b) in parts.items():
            factors[f"{target}.lora_A.weight"] = part_a.clone()
            factors[f"{target}.lora_B.weight"] = part_b.contiguous()
            ranks[target] = part_a.shape[0]
    return Adapter(factors, _config_by_rank(ranks), str(path))
