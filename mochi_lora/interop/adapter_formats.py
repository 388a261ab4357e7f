"""Three layouts of a LoRA file for Mochi, recognised by their tensor names.

diffusers  `transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`, alpha in the header; what we train and store
genmo      `blocks.0.attn.qkv_x.lora_A`, ranks and alphas in the header entry `kwargs`: one pair for qkv, one for out
           (genmoai/mochi @0c86aeb `pipelines.py`, `lora.py`); attention only
comfyui    `diffusion_model.blocks.0.attn.qkv_x.lora_A.weight`, alpha as a tensor `.alpha`, scale 1 without one: ComfyUI's
           "generic lora format" on Genmo's names (`comfy/lora.py`); any linear, each with a rank of its own

What is written has alpha = rank with the scale folded into B: ComfyUI reads no header, so an alpha there would be lost.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file

from mochi_lora import __version__
from mochi_lora.errors import UserError
from mochi_lora.files import write_atomic
from mochi_lora.interop.factors import Factors, adapter_of, factors_of, listed
from mochi_lora.interop.fusing import fuse, split
from mochi_lora.interop.truncation import truncate_all
from mochi_lora.model.adapter import Adapter
from mochi_lora.model.adapter_file import load_adapter, read_provenance, save_adapter
from mochi_lora.model.weights import open_weights

Format = Literal["diffusers", "genmo", "comfyui"]
FORMATS: tuple[Format, ...] = get_args(Format)
_KEYS: dict[Format, re.Pattern[str]] = {
    "diffusers": re.compile(r"transformer\..+\.lora_\w+(\.\w+)?"),
    "genmo": re.compile(r"blocks\.\d+\..+\.lora_[AB]"),
    "comfyui": re.compile(r"diffusion_model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_down\.weight|lora_up\.weight|alpha)"),
}
_HALVES = {"lora_A.weight": "a", "lora_down.weight": "a", "lora_B.weight": "b", "lora_up.weight": "b", "alpha": "alpha"}
_QKV = re.compile(r"blocks\.\d+\.attn\.qkv_[xy]")
_OUT = re.compile(r"blocks\.\d+\.attn\.proj_[xy]")


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as read, the layout it came in, and what its maker's header says of the training."""

    format: Format
    adapter: Adapter
    provenance: dict[str, Any]


def detect(path: Path) -> Format:
    """Which layout `path` has. Raises UserError listing the tensors of an unknown or of more than one layout."""
    if not path.is_file():
        raise UserError(f"{path}: no such adapter file")
    with open_weights(path) as file:
        names = sorted(file.keys())
    found: dict[Format, list[str]] = {}
    unknown = []
    for name in names:
        kind = next((kind for kind, pattern in _KEYS.items() if pattern.fullmatch(name)), None)
        if kind is None:
            unknown.append(name)
        else:
            found.setdefault(kind, []).append(name)
    if unknown or not found:
        message = f"{path}: not a LoRA for Mochi in a layout known here ({', '.join(FORMATS)})"
        raise UserError(f"{message}; {len(unknown)} of {len(names)} tensors are unknown:\n{listed(unknown)}")
    if len(found) > 1:
        parts = [f"{kind} ({len(keys)} tensors):\n{listed(keys)}" for kind, keys in found.items()]
        raise UserError("\n".join([f"{path}: tensors of more than one layout in one file", *parts]))
    return next(iter(found))


def read_stored(path: Path, *, assume_alpha_is_rank: bool = False) -> StoredAdapter:
    """Read an adapter of any of the three layouts, its modules under diffusers' names.

    Raises UserError for an unknown layout, and as `load_adapter` does where the file does not say its alpha.
    """
    kind = detect(path)
    adapter = _read_comfyui(path) if kind == "comfyui" else load_adapter(path, assume_alpha_is_rank=assume_alpha_is_rank)
    if bad := sorted(name for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()):
        raise UserError(f"{path}: {len(bad)} tensors hold NaN or infinity; the training had diverged:\n{listed(bad)}")
    return StoredAdapter(kind, adapter, read_provenance(path))


def stored_factors(stored: StoredAdapter) -> dict[str, Factors]:
    """Diffusers module -> factors; what a fused layout had to pad or to stack is taken apart again."""
    factors = factors_of(stored.adapter)
    if stored.format == "diffusers":
        return factors
    return split(fuse(factors, stored.adapter.source), stored.adapter.source)


def _read_comfyui(path: Path) -> Adapter:
    modules: dict[str, dict[str, torch.Tensor]] = {}
    with open_weights(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a dict
            match = _KEYS["comfyui"].fullmatch(key)
            assert match, "`detect` has seen every name"
            modules.setdefault(match[1], {})[_HALVES[match[2]]] = file.get_tensor(key).float()
    if lone := sorted(name for name, parts in modules.items() if "a" not in parts or "b" not in parts):
        raise UserError(f"{path}: {len(lone)} modules have one factor without the other:\n{listed(lone)}")
    factors = {}
    for name, parts in modules.items():
        rank = parts["a"].shape[0]
        scale = float(parts["alpha"].flatten()[0]) / rank if "alpha" in parts else 1.0
        if parts["a"].ndim != 2 or parts["b"].shape[1:] != (rank,):
            shapes = f"{tuple(parts['a'].shape)} and {tuple(parts['b'].shape)}"
            raise UserError(f"{path}: {name} has factors of shapes {shapes}; expected [rank, in] and [out, rank]")
        factors[name] = Factors(parts["a"], parts["b"] * scale)
    return adapter_of(split(factors, str(path)), str(path))


def write_stored(
    path: Path, factors: dict[str, Factors], to: Format, provenance: dict[str, Any], *, rank: int | None = None
) -> dict[str, Factors]:
    """Write `factors` (diffusers modules) in layout `to`, at most of `rank` per linear of that layout where one is given.

    Returns what the file now means, in diffusers modules. Raises UserError listing what the layout cannot hold.
    """
    if to == "diffusers":
        written = truncate_all(factors, rank) if rank else factors
        save_adapter(path, adapter_of(written, str(path)), provenance)
        return written
    fused = fuse(factors, str(path))
    if to == "genmo":
        _require_attention(path, fused)
    fused = truncate_all(fused, rank) if rank else fused
    header = {"format": "pt", "mochi_lora": json.dumps({**provenance, "version": __version__}, sort_keys=True)}
    name_of = "{}.lora_{}" if to == "genmo" else "diffusion_model.{}.lora_{}.weight"
    if to == "genmo":
        fused, header["kwargs"] = _one_rank(fused)
    tensors = {}
    for name, part in fused.items():
        tensors[name_of.format(name, "A")], tensors[name_of.format(name, "B")] = part.a.contiguous(), part.b.contiguous()
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    return split(fused, str(path))


def _require_attention(path: Path, fused: dict[str, Factors]) -> None:
    if rest := sorted(module for module in fused if not _QKV.fullmatch(module) and not _OUT.fullmatch(module)):
        message = f"{path}: Genmo's format holds attention only; it cannot hold {len(rest)} of {len(fused)} adapted linears"
        message = f"{message}:\n{listed(rest)}\nconvert to comfyui, which holds them"
        raise UserError(f"{message}, or train with adapter.targets: joint_attention")


def _one_rank(fused: dict[str, Factors]) -> tuple[dict[str, Factors], str]:
    """Zero-padded to one rank for all qkv and one for all output projections, and the header entry that says so."""
    ranks = {kind: max((part.rank for name, part in fused.items() if kind.fullmatch(name)), default=0) for kind in (_QKV, _OUT)}
    padded = {name: _padded(part, ranks[_QKV] if _QKV.fullmatch(name) else ranks[_OUT]) for name, part in fused.items()}
    kwargs: dict[str, float] = {}
    for kind, prefix in ((_QKV, "qkv_proj"), (_OUT, "out_proj")):
        kwargs |= {f"{prefix}_lora_rank": ranks[kind], f"{prefix}_lora_alpha": ranks[kind], f"{prefix}_lora_dropout": 0.0}
    return padded, json.dumps(kwargs)


def _padded(part: Factors, rank: int) -> Factors:
    missing = rank - part.rank
    return Factors(
        torch.cat([part.a, torch.zeros(missing, part.a.shape[1])]),
        torch.cat([part.b, torch.zeros(part.b.shape[0], missing)], dim=1),
    )
