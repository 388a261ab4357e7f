"""An adapter merged into its base: a transformer folder that needs no adapter any more, written tensor by tensor."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from mochi_lora.errors import UserError
from mochi_lora.interop.factors import Factors, listed, norm
from mochi_lora.interop.stored import Stored, Tick, component_folder, nothing, tensors_of_folder, write_tensors
from mochi_lora.model.weights import read_config

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class BaseMerge:
    """Linears changed, and the share of the change that the base's own precision rounded away (0 in float32)."""

    linears: int
    lost: float


def merge_into_base(factors: dict[str, Factors], base: Path, target: Path, *, float32: bool, tick: Tick = nothing) -> BaseMerge:
    """Write `base` (a transformer folder, or a model folder with one) + delta W into the new folder `target`.

    The sum is formed in float32 and stored as the base stores its weight, or in float32 with `float32`, for the changed
    linears only. Raises UserError where the base lacks a linear or has it in another shape.
    """
    if not base.is_dir():
        message = f"{base}: no such folder; expected a transformer folder in diffusers layout, or a model folder with one"
        raise UserError(f"{message}; `mochi-lora convert base` makes one of Genmo's file")
    folder = component_folder(base, "transformer")
    read_config(folder)  # told before the hour of writing
    require_new(target)
    stored = tensors_of_folder(folder)
    missing = [name for name in factors if f"{name}.weight" not in stored]
    odd = [
        name
        for name, part in factors.items()
        if name not in missing and stored[f"{name}.weight"].shape != (part.b.shape[0], part.a.shape[1])
    ]
    if wrong := sorted(missing + odd):
        message = f"{base}: {len(wrong)} of {len(factors)} adapted linears are not there, or of another shape:\n{listed(wrong)}"
        raise UserError(f"{message}\nthe adapter was made for another architecture")
    lost: dict[str, float] = {}
    changed = {f"{name}.weight": part for name, part in factors.items()}
    merged = {
        name: _changed(name, tensor, changed[name], lost, float32=float32) if name in changed else tensor
        for name, tensor in stored.items()
    }
    write_tensors(target / WEIGHTS, merged, tick)
    shutil.copyfile(folder / "config.json", target / "config.json")
    whole = math.sqrt(sum(norm(part) ** 2 for part in factors.values()))
    return BaseMerge(len(factors), math.sqrt(sum(value**2 for value in lost.values())) / whole if whole else 0.0)


def _changed(name: str, tensor: Stored, part: Factors, lost: dict[str, float], *, float32: bool) -> Stored:
    dtype = torch.float32 if float32 else tensor.dtype

    def read() -> torch.Tensor:
        exact = tensor.read().float() + part.delta()
        stored = exact.to(dtype)
        lost[name] = float((stored.float() - exact).norm())
        return stored

    return Stored(tensor.shape, dtype, read)


def require_new(folder: Path) -> None:
    """Raises UserError unless `folder` can be written into without touching what is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not empty; give a new folder, or delete this one")
