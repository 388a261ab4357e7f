"""`mochi-lora lora inspect`: what an adapter file says of itself, and how strongly it acts on each linear."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from mochi_lora.console import console, print_table
from mochi_lora.interop.adapter_formats import Format, StoredAdapter, read_stored
from mochi_lora.interop.factors import Factors, low_rank_part, norm
from mochi_lora.model.weights import open_weights

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def run(path: Path, *, assume_alpha_is_rank: bool) -> None:
    """Print rank, alpha, targets, norms per layer and the training's settings. Raises UserError for no adapter."""
    stored = read_stored(path, assume_alpha_is_rank=assume_alpha_is_rank)
    factors = low_rank_part(stored.adapter)
    print_table(str(path), ("", ""), _summary(path, stored, factors))
    blocks, rest = _norms(factors)
    title = "norm of delta W at strength 1"
    if stored.adapter.config.get("use_dora"):
        title += " (of B A alone; DoRA's magnitudes act as well)"
    if blocks:
        targets = sorted({target for row in blocks.values() for target in row})
        rows = [
            (number, *(f"{row[name]:.3g}" if name in row else "" for name in targets)) for number, row in sorted(blocks.items())
        ]
        print_table(title, ("block", *targets), rows)
    if rest:
        print_table(
            f"{title}, outside the blocks", ("linear", "norm"), [(name, f"{value:.3g}") for name, value in rest.items()]
        )
    _print_provenance(stored.provenance)


def _summary(path: Path, stored: StoredAdapter, factors: dict[str, Factors]) -> list[tuple[str, object]]:
    config = stored.adapter.config
    ranks = Counter(part.rank for part in factors.values())
    targets = sorted({match[2] if (match := _BLOCK.fullmatch(name)) else name for name in factors})
    parameters = sum(part.a.numel() + part.b.numel() for part in factors.values())
    kinds = [name for name, key in (("DoRA", "use_dora"), ("rsLoRA", "use_rslora")) if config.get(key)]
    total = sum(norm(part) ** 2 for part in factors.values()) ** 0.5
    return [
        ("format", stored.format),
        ("kind", " and ".join(kinds) or "LoRA"),
        ("rank", ", ".join(f"{rank} ({count} linears)" for rank, count in sorted(ranks.items()))),
        ("alpha", _alpha(path, stored.format, config)),
        ("targets", ", ".join(targets)),
        ("linears", len(factors)),
        ("parameters", f"{parameters:,} as separate linears, {path.stat().st_size / 2**20:.1f} MiB on disk"),
        ("norm of delta W", f"{total:.4g} over all linears"),
    ]


def _alpha(path: Path, kind: Format, config: dict[str, Any]) -> str:
    """As the file has it: what is read is folded into B for the two fused layouts."""
    if kind == "diffusers":
        others = sorted(set((config.get("alpha_pattern") or {}).values()))
        return f"{config['lora_alpha']:g}" + (
            f", for some linears {', '.join(f'{value:g}' for value in others)}" if others else ""
        )
    with open_weights(path) as file:
        if kind == "genmo":
            kwargs = json.loads((file.metadata() or {}).get("kwargs", "{}"))
            told = [f"{name} {kwargs[key]:g}" for name, key in _GENMO_ALPHAS.items() if key in kwargs]
        else:
            told = sorted({f"{file.get_tensor(name).item():g}" for name in file.keys() if name.endswith(".alpha")})  # noqa: SIM118
    return ", ".join(told) or "not in the file: scale 1"


_GENMO_ALPHAS = {"qkv": "qkv_proj_lora_alpha", "out": "out_proj_lora_alpha"}


def _norms(factors: dict[str, Factors]) -> tuple[dict[int, dict[str, float]], dict[str, float]]:
    """(block -> target -> norm, linear outside the blocks -> norm)."""
    blocks: dict[int, dict[str, float]] = {}
    rest = {}
    for name, part in factors.items():
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[match[2]] = norm(part)
        else:
            rest[name] = norm(part)
    return blocks, rest


def _print_provenance(provenance: dict[str, Any]) -> None:
    """What this project wrote when it trained, merged or converted; other makers write nothing."""
    settings = provenance.get("config")
    rows = [(key, _plain(value)) for key, value in sorted(provenance.items()) if key != "config"]
    if rows:
        print_table("history", ("", ""), rows)
    if not settings:
        console.print("the file says nothing of the settings it was trained with")
        return
    console.print("trained with:")
    console.print(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), markup=False)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
