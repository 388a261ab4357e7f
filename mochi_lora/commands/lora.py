"""`mochi-lora lora`: arithmetic on adapter files. Merge, change of rank, extraction from a fine-tuned base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mochi_lora.commands.convert import print_error, require_free
from mochi_lora.config.requests import AdapterChoice
from mochi_lora.console import console, progress_bar
from mochi_lora.engine.plan import resolve_device
from mochi_lora.errors import UserError
from mochi_lora.interop.adapter_formats import StoredAdapter, read_stored, stored_factors
from mochi_lora.interop.base_merge import merge_into_base
from mochi_lora.interop.conversion import write_checked
from mochi_lora.interop.extraction import extract
from mochi_lora.interop.factors import Factors
from mochi_lora.interop.merging import merge
from mochi_lora.interop.stored import transformer_tensors

_OF_THE_BASE = ("base", "base_revision", "base_fingerprint")


def run_merge(
    choices: Sequence[AdapterChoice],
    target: Path,
    *,
    rank: int | None,
    base: Path | None,
    float32: bool,
    assume_alpha_is_rank: bool,
) -> None:
    """Write the weighted sum of adapters as one adapter, or the base with that sum inside. Raises UserError."""
    if base is None:
        require_free(target)
    stored = [read_stored(choice.path, assume_alpha_is_rank=assume_alpha_is_rank) for choice in choices]
    _warn_of_other_bases(stored)
    parts = [(stored_factors(one), choice.strength) for one, choice in zip(stored, choices, strict=True)]
    merged = merge(parts)
    if not merged:
        raise UserError("every weight is 0; there is nothing to merge")
    told = " + ".join(f"{choice.strength:g} x {choice.path.name}" for choice in choices)
    if base is not None:
        _into_base(merged, base, target, told, float32=float32)
        return
    history = {"merged_from": [{"file": choice.path.name, "weight": choice.strength} for choice in choices]}
    error = write_checked(target, merged, "diffusers", {**_common(stored), **history}, rank=rank)
    console.print(f"{told}: {target} ({_ranks(merged, rank)})", markup=False)
    print_error(error, exact=rank is None)


def _into_base(merged: dict[str, Factors], base: Path, target: Path, told: str, *, float32: bool) -> None:
    with progress_bar() as bar:
        task = bar.add_task("tensors", total=len(transformer_tensors(base)) if base.is_dir() else None)
        done = merge_into_base(merged, base, target, float32=float32, tick=lambda: bar.advance(task))
    console.print(f"{base} + {told}: {target}, {done.linears} linears changed", markup=False)
    if done.lost:
        line = f"rounding to the precision of the base lost {done.lost:.2%} of the change"
        console.print(f"{line}; --float32 keeps the changed linears exact")


def _warn_of_other_bases(stored: Sequence[StoredAdapter]) -> None:
    bases = {one.provenance["base_fingerprint"] for one in stored if one.provenance.get("base_fingerprint")}
    if len(bases) > 1:
        console.print("note: these adapters were trained on different bases; their sum was never trained on either")


def _common(stored: Sequence[StoredAdapter]) -> dict[str, Any]:
    """The entries about the base that all the adapters agree on."""
    first = stored[0].provenance
    return {
        key: first[key] for key in _OF_THE_BASE if key in first and all(one.provenance.get(key) == first[key] for one in stored)
    }


def _ranks(factors: dict[str, Factors], limit: int | None) -> str:
    ranks = [part.rank for part in factors.values()]
    whole = f"rank {max(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
    if limit is None:
        return whole
    return f"{whole}, reduced to at most {limit}" if max(ranks) > limit else f"{whole}, none above {limit}: nothing to reduce"


def run_resize(source: Path, target: Path, *, rank: int, assume_alpha_is_rank: bool) -> None:
    """Write `source` at most of `rank` per linear of its own layout, and say what that cost. Raises UserError."""
    require_free(target)
    stored = read_stored(source, assume_alpha_is_rank=assume_alpha_is_rank)
    factors = stored_factors(stored)
    history = {"resized_from": {"file": source.name, "rank": max(part.rank for part in factors.values())}}
    error = write_checked(target, factors, stored.format, {**stored.provenance, **history}, rank=rank)
    console.print(f"{source} ({_ranks(factors, rank)}): {target}", markup=False)
    print_error(error, exact=False)


def run_extract(base: Path, tuned: Path, target: Path, *, rank: int) -> None:
    """Write the adapter of `rank` that comes nearest to `tuned` - `base`, and say how near. Raises UserError."""
    require_free(target)
    with progress_bar() as bar:
        task = bar.add_task("tensors", total=len(transformer_tensors(base)))
        device = torch.device(resolve_device("auto"))
        found = extract(base, tuned, rank, device=device, tick=lambda: bar.advance(task))
    history = {"extracted_from": {"base": str(base.name), "tuned": str(tuned.name), "rank": rank}}
    write_checked(target, found.factors, "diffusers", history)
    layer, worst = max(found.by_layer.items(), key=lambda item: item[1])
    console.print(f"{tuned} - {base}: {target}, rank {rank}, {len(found.factors)} linears", markup=False)
    console.print(f"the difference is missed by {found.total:.2%} in all, at most {worst:.2%} ({layer})", markup=False)
    if found.left_out:
        names = ", ".join(found.left_out[:3]) + (", ..." if len(found.left_out) > len(found.left_out[:3]) else "")
        console.print(
            f"left out: {len(found.left_out)} tensors that differ and are no weight of a linear ({names})", markup=False
        )
