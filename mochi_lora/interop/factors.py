"""An adapter as pure arithmetic: delta W = B A per linear, every scale folded into B. Norms and differences of such products.

LoRA: Hu et al. 2021 (arXiv:2106.09685); the scale alpha / sqrt(rank) is rsLoRA's (arXiv:2312.03732).
"""

import math
from dataclasses import dataclass

import torch
from peft.utils.other import get_pattern_key

from mochi_lora.errors import UserError
from mochi_lora.model.adapter import Adapter

_NAMED = 20  # how many names a message lists
_ROUNDING = torch.finfo(torch.float32).eps  # of a weight and of its product with a factor, half of it each
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, eq=False)
class Factors:
    """Delta W = b @ a of one linear: a [rank, in], b [out, rank], both float32 on the CPU."""

    a: torch.Tensor
    b: torch.Tensor

    @property
    def rank(self) -> int:
        """Columns of b. The rank of delta W may be lower."""
        return self.a.shape[0]

    def delta(self) -> torch.Tensor:
        """Delta W [out, in] float32, as a matrix: up to 200 MB for one linear of the real model."""
        return self.b @ self.a


def listed(names: list[str]) -> str:
    """The names of a message, one per line, cut after twenty."""
    shown = [f"  {name}" for name in names[:_NAMED]]
    return "\n".join(shown + ([f"  and {len(names) - _NAMED} more"] if len(names) > _NAMED else []))


def factors_of(adapter: Adapter) -> dict[str, Factors]:
    """Diffusers module name -> factors, with alpha/rank (or alpha/sqrt(rank)) folded into B.

    Raises UserError for what is no plain product, DoRA's magnitudes and LoRA biases, naming the tensors.
    """
    if strange := sorted(name for name in adapter.tensors if not name.endswith((_A, _B))):
        kind = "DoRA magnitudes" if any("magnitude" in name for name in strange) else "tensors that are no plain LoRA factor"
        message = f"{adapter.source}: {len(strange)} {kind}, which no product of two factors can hold:\n{listed(strange)}"
        raise UserError(f"{message}\nonly plain LoRA can be converted, merged or resized")
    return low_rank_part(adapter)


def low_rank_part(adapter: Adapter) -> dict[str, Factors]:
    """As `factors_of`, without a look at what else the adapter holds: all there is to measure of a DoRA."""
    modules = sorted(name.removesuffix(_A) for name in adapter.tensors if name.endswith(_A))
    halves = {name.removesuffix(_A).removesuffix(_B) for name in adapter.tensors if name.endswith((_A, _B))}
    if lone := sorted(name for name in halves if f"{name}{_A}" not in adapter.tensors or f"{name}{_B}" not in adapter.tensors):
        raise UserError(f"{adapter.source}: {len(lone)} modules have one factor without the other:\n{listed(lone)}")
    found = {}
    for name in modules:
        a, b = adapter.tensors[f"{name}{_A}"].float(), adapter.tensors[f"{name}{_B}"].float()
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            message = f"{adapter.source}: {name} has factors of shapes {tuple(a.shape)} and {tuple(b.shape)}"
            raise UserError(f"{message}; expected [rank, in] and [out, rank]")
        found[name] = Factors(a, b * scale_of(adapter, name, a.shape[0]))
    return found


def scale_of(adapter: Adapter, module: str, rank: int) -> float:
    """The factor before B A in the forward pass, by PEFT's own rules for patterns."""
    patterns = adapter.config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), adapter.config["lora_alpha"])
    return alpha / (math.sqrt(rank) if adapter.config.get("use_rslora") else rank)


def adapter_of(factors: dict[str, Factors], source: str) -> Adapter:
    """PEFT's view of the same thing: alpha = rank for each module, so that every scale is 1."""
    if not factors:
        raise UserError(f"{source}: nothing is left of it; no linear is changed")
    tensors = {}
    for name, part in sorted(factors.items()):
        tensors[f"{name}{_A}"], tensors[f"{name}{_B}"] = part.a.contiguous(), part.b.contiguous()
    ranks = {name: part.rank for name, part in sorted(factors.items())}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {name: rank for name, rank in ranks.items() if rank != common}
    config = {"r": common, "lora_alpha": common, "target_modules": sorted(ranks)}
    return Adapter(tensors, {**config, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}, source)


def trimmed(part: Factors) -> Factors:
    """Without the rank-one terms that are zero, which is what padding leaves; the rank may become 0."""
    kept = part.b.any(dim=0) & part.a.any(dim=1)
    return part if kept.all() else Factors(part.a[kept], part.b[:, kept])


def norm(part: Factors) -> float:
    """Frobenius norm of delta W, without forming it: ||B A|| = ||R_B R_A^T|| with the QR factors of B and A^T."""
    right = torch.linalg.qr(part.a.double().T, mode="r").R
    left = torch.linalg.qr(part.b.double(), mode="r").R
    return float((left @ right.T).norm())


def rounding(part: Factors) -> float:
    """The most that float32's rounding of the factors can leave of delta W where its terms cancel: ||b_i|| ||a_i|| of each."""
    return _ROUNDING * float((part.b.double().norm(dim=0) * part.a.double().norm(dim=1)).sum())


def is_nothing(part: Factors) -> bool:
    """Whether delta W is zero, or only what rounding left of terms that cancel."""
    return norm(part) <= rounding(part)


def distance(one: Factors | None, other: Factors | None) -> float:
    """Frobenius norm of the difference of two deltas of one shape; None is a linear that is left alone."""
    if one is None or other is None:
        alone = one or other
        return 0.0 if alone is None else norm(alone)
    return norm(Factors(torch.cat([one.a, other.a]), torch.cat([one.b, -other.b], dim=1)))


@dataclass(frozen=True)
class Difference:
    """How far two adapters are apart, relative to the first, layer by layer."""

    by_layer: dict[str, float]
    total: float  # over all layers together: root of the summed squares

    @property
    def worst(self) -> tuple[str, float]:
        """(layer, relative difference)."""
        return max(self.by_layer.items(), key=lambda item: item[1], default=("(none)", 0.0))


def difference(before: dict[str, Factors], after: dict[str, Factors]) -> Difference:
    """||after - before|| / ||before|| of every delta W; a layer that only one of them has counts as zero in the other.

    Of terms that cancel only noise is left, and any noise is as large as that: then `rounding` is what a difference is told by.
    Raises UserError where a layer has another shape in one than in the other.
    """
    by_layer, apart, whole = {}, 0.0, 0.0
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one and other and (one.a.shape[1], one.b.shape[0]) != (other.a.shape[1], other.b.shape[0]):
            raise UserError(f"{name}: {tuple(one.delta().shape)} in one file, {tuple(other.delta().shape)} in the other")
        change, size = distance(one, other), 0.0 if one is None else max(norm(one), rounding(one))
        by_layer[name] = 0.0 if change == 0 else change / size if size else math.inf
        apart, whole = apart + change**2, whole + size**2
    return Difference(by_layer, 0.0 if apart == 0 else math.sqrt(apart / whole) if whole else math.inf)
