"""Adapter files with random factors, strong enough to be seen."""

from pathlib import Path

import torch

from mochi_lora.config.schema import AdapterConfig
from mochi_lora.model.adapter import attach, current
from mochi_lora.model.adapter_file import save_adapter
from mochi_lora.model.weights import load_transformer


def write_adapter(path: Path, tiny: Path, seed: int, **settings) -> Path:
    """Write an adapter for the model in `tiny`, another for each seed."""
    transformer = load_transformer(tiny / "transformer", device=torch.device("cpu"), precision="fp32").transformer
    draw = torch.Generator().manual_seed(seed)
    for key, parameter in attach(transformer, AdapterConfig(**{"rank": 4, "alpha": 8, **settings}), seed).items():
        if ".lora_B." in key:
            parameter.data.normal_(0, 0.5, generator=draw)
    save_adapter(path, current(transformer), {"step": 3})
    return path
