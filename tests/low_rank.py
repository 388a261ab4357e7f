"""Random adapters for the rooms that rewrite adapters, and how far their deltas are apart, counted the plain way."""

from pathlib import Path

import torch
from golden_files import FOLDER
from inputs import normal
from safetensors.torch import load_file

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.interop.factors import Factors
from mochi_lora.model.adapter import Adapter, attach, current

GENMO = FOLDER / "lora_small.safetensors"
PRESETS = ("visual_attention", "joint_attention", "joint_attention_mlp")


def trained(model, **settings) -> Adapter:
    """An adapter of the tiny model whose every B has been drawn, attached to `model`."""
    attach(model.transformer, AdapterConfig(**{"rank": 4, **settings}), 0)
    for number, (name, parameter) in enumerate(model.transformer.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.05 * normal(*parameter.shape, seed=number))
    return current(model.transformer)


def deltas(adapter: Adapter, scale: float) -> dict[str, torch.Tensor]:
    """Delta W of each linear in float64, from nothing but tensors and a known scale."""
    names = [name.removesuffix(".lora_A.weight") for name in adapter.tensors if name.endswith("lora_A.weight")]
    found = {}
    for name in names:
        a, b = (adapter.tensors[f"{name}.lora_{half}.weight"].double() for half in "AB")
        found[name] = scale * b @ a
    return found


def fused_deltas(
    path: Path, suffix: str = "", prefix: str = "", scales: dict[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """Delta W of each of Genmo's modules in a file that names them so; `scales` by part of the name, 1 where none fits."""
    tensors = load_file(path)
    found = {}
    for key, a in tensors.items():
        if not key.endswith(f".lora_A{suffix}"):
            continue
        module = key.removesuffix(f".lora_A{suffix}")
        scale = next((value for part, value in (scales or {}).items() if part in module), 1.0)
        found[module.removeprefix(prefix)] = scale * tensors[f"{module}.lora_B{suffix}"].double() @ a.double()
    return found


def product(rows: int, columns: int, rank: int, seed: int = 0) -> Factors:
    """A random delta W of known rank."""
    return Factors(normal(rank, columns, seed=seed), normal(rows, rank, seed=seed + 1))
