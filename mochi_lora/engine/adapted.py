"""Linears that read the same input, adapted by LoRA: one down-projection for all of them.

Shape legend: K = input features, N = output features, r = rank.

Down-projections are bound by reading the input. q, k and v of a stream read the same one, in the forward pass and for the
gradient of their A, and each adds a tensor as large to the input's gradient; side by side they do each of these once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import nn

from mochi_lora.engine.fp8 import Coded, Fp8Linear, through, values_of


@dataclass(frozen=True)
class _Factors:
    """An adapter of one linear: `base(x) + scale * up @ down @ x`."""

    base: nn.Module
    down: torch.Tensor  # A [r, K]
    up: torch.Tensor  # B [N, r]
    scale: float


def takes_codes(layers: Sequence[nn.Module]) -> bool:
    """Whether any of `layers`, adapted or not, multiplies codes of its input."""
    return any(isinstance(layer.get_base_layer() if isinstance(layer, Linear) else layer, Fp8Linear) for layer in layers)


def project(layers: Sequence[nn.Module], rows: torch.Tensor | Coded) -> list[torch.Tensor]:
    """What each of `layers` makes of the same values x [..., K]: [..., N] each.

    PEFT's sum, but for the order of the additions in the input's gradient. Layers that hold anything but one plain adapter
    (none, several, DoRA, dropout in training, merged or switched off) are called as they are.
    """
    found = [_plain_factors(layer) for layer in layers]
    downs = [factors.down for factors in found if factors is not None]
    if len(downs) < 2:
        return [through(layer, rows) for layer in layers]
    x, down = values_of(rows), torch.cat(downs)
    # PEFT takes x to A's float32; autocast would take it back to bf16.
    same = x if torch.is_autocast_enabled(x.device.type) else x.to(down.dtype)
    low = iter(F.linear(same, down).split([len(part) for part in downs], dim=-1))
    pairs = zip(layers, found, strict=True)
    return [through(layer, rows) if factors is None else _adapted(factors, rows, next(low)) for layer, factors in pairs]


def _adapted(factors: _Factors, rows: torch.Tensor | Coded, low: torch.Tensor) -> torch.Tensor:
    """`low` = A x [..., r]."""
    result = through(factors.base, rows)
    return (result + F.linear(low, factors.up) * factors.scale).to(result.dtype)


def _plain_factors(layer: Any) -> _Factors | None:  # noqa: ANN401 - PEFT's attributes are not typed
    """The layer's only adapter, where PEFT's own forward pass would add nothing but its two products; else None.

    Source: peft 0.21.2 `tuners/lora/layer.py`, `Linear.forward`.
    """
    if not isinstance(layer, Linear) or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    (name,) = names
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if down.bias is not None or up.bias is not None or (dropout.training and not isinstance(dropout, nn.Identity)):
        return None
    return _Factors(layer.get_base_layer(), down.weight, up.weight, layer.scaling[name])
