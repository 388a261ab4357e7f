"""An adapter out of a fine-tuned base: for each linear the best product of rank r for tuned - base.

Randomised SVD with subspace iteration (Halko, Martinsson & Tropp 2011, arXiv:0909.4061): an exact one of 480 matrices of
3072 x 16384 takes most of a day on a CPU. What is reported is measured on the difference itself, not estimated.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from mochi_lora.errors import UserError
from mochi_lora.interop.factors import Factors, listed
from mochi_lora.interop.stored import Tick, nothing, transformer_tensors
from mochi_lora.streams import Purpose, stream

_OVERSAMPLING = 16
_ITERATIONS = 4


@dataclass(frozen=True)
class Extraction:
    """The factors, how much of the difference they miss, and what no linear holds."""

    factors: dict[str, Factors]
    by_layer: dict[str, float]  # ||difference - B A|| / ||difference||
    total: float  # the same over all linears
    left_out: tuple[str, ...]  # tensors that differ and are no weight of a linear: norms, biases, positions


def extract(base: Path, tuned: Path, rank: int, *, device: torch.device, tick: Tick = nothing) -> Extraction:
    """LoRA of `rank` for `tuned` - `base`, each a transformer folder, a model folder or Genmo's file; streamed.

    `tick` is called after each tensor. Raises UserError where the two are of different architectures, or equal.
    """
    one, other = transformer_tensors(base), transformer_tensors(tuned)
    odd = sorted(one.keys() ^ other.keys())
    odd += sorted(name for name in one.keys() & other.keys() if one[name].shape != other[name].shape)
    if odd:
        raise UserError(f"{tuned}: not of the same architecture as {base}; {len(odd)} tensors differ in shape:\n{listed(odd)}")
    factors, by_layer, left_out = {}, {}, []
    missed = whole = 0.0
    for name in sorted(one):
        difference = other[name].read().float() - one[name].read().float()
        size = float(difference.norm())
        if size and difference.ndim == 2 and name.endswith(".weight"):
            module = name.removesuffix(".weight")
            factors[module], error = best_factors(difference.to(device), rank)
            by_layer[module] = error / size
            missed, whole = missed + error**2, whole + size**2
        elif size:
            left_out.append(name)
        tick()
    if not factors:
        raise UserError(f"{tuned}: no linear differs from {base}; there is nothing to extract")
    return Extraction(factors, by_layer, math.sqrt(missed / whole), tuple(left_out))


def best_factors(matrix: torch.Tensor, rank: int) -> tuple[Factors, float]:
    """(factors at most of `rank`, ||matrix - B A||) of a float32 matrix [out, in]; the same on every call."""
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    if width == min(matrix.shape):
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    else:
        u, s, vt = _randomised(matrix, width)
    root = s[:rank].sqrt()
    found = Factors(root[:, None] * vt[:rank], u[:, :rank] * root)
    error = float((matrix - found.delta()).norm())
    return Factors(found.a.cpu(), found.b.cpu()), error


def _randomised(matrix: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading `width` singular triples of `matrix`."""
    start = stream(0, Purpose.ADAPTER).standard_normal((matrix.shape[1], width)).astype("float32")
    basis = torch.linalg.qr(matrix @ torch.from_numpy(start).to(matrix.device)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vt = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vt
